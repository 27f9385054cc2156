"""The supervisor of the embedded server, with real processes and real kills."""

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from memory_store import CannotStart, Change, EmbeddedValkey, RedisStore, SessionKey, embedded
from tests.tools.leases import put

KEY = SessionKey("acme", "user-7")

# A process that starts the server, commits, says so, and then waits to be killed.
OWNER = """
import asyncio, os, sys, time
import memory_store.embedded
from memory_store import Change, EmbeddedValkey, RedisStore, SessionKey
from tests.tools.leases import put

async def commit(url):
    store = await RedisStore.open(url)
    change = Change("f", {}, put={"a": b"remembered"})
    await put(store, SessionKey("acme", "user-7"), change, expected=0, commit_id="c1")
    await store.close()

if sys.argv[2] == "untied":
    memory_store.embedded._tie = lambda: []  # as on a system without PDEATHSIG
server = EmbeddedValkey(sys.argv[1])
server.start()
asyncio.run(commit(server.url))
if sys.argv[2] == "killed":
    os.kill(server.pid, 9)
    while not (server.restarts and server.pid):
        time.sleep(0.01)
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Return what starts an owner of `tmp_path`: it gives the process and its server's pid."""
    started = []

    def start(kind="tied"):
        command = [sys.executable, "-c", OWNER, str(tmp_path), kind]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    with EmbeddedValkey(tmp_path):
        pass  # ends what was left behind, and removes its socket


def kill(process):
    process.kill()
    process.wait()


def alive(pid):
    """Whether a process runs (one that waits to be reaped does not)."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def soon(condition, seconds=10):
    """Wait for what must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_server(server):
    os.kill(server.pid, signal.SIGKILL)


def answers(server):
    with redis.Redis.from_url(server.url, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return client.ping()
        except redis.RedisError:
            return False


def free(path):
    """Whether nobody holds a lock."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def pauses(caplog):
    """The pauses that the warnings tell, one for each death."""
    return [record.args[1] for record in caplog.records if record.name == "memory_store.embedded"]


async def remembered(url):
    store = await RedisStore.open(url)
    snapshot = await store.load(KEY, fingerprint="f")
    await store.close()
    return snapshot.blobs


@pytest.mark.anyio
async def test_data_survive_the_kill_of_the_process_that_ran_the_server(tmp_path, owner):
    process, _ = owner()
    kill(process)
    began = time.monotonic()

    with EmbeddedValkey(tmp_path) as server:
        took = time.monotonic() - began
        assert await remembered(server.url) == {"a": b"remembered"}

    assert took < 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
@pytest.mark.parametrize("kind", ["tied", "killed"])
def test_the_server_ends_with_the_process_that_started_it_even_if_it_is_a_later_one(owner, kind):
    process, server = owner(kind)

    kill(process)

    deadline = time.monotonic() + 3
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(server)


@pytest.mark.anyio
async def test_a_server_left_behind_is_ended_before_the_next_one_starts(tmp_path, owner):
    process, orphan = owner("untied")
    kill(process)
    assert alive(orphan)

    with EmbeddedValkey(tmp_path) as server:
        assert not alive(orphan)
        assert await remembered(server.url) == {"a": b"remembered"}


def test_a_server_that_is_still_ending_is_waited_for(tmp_path, owner):
    process, ending = owner()
    os.kill(ending, signal.SIGSTOP)
    kill(process)
    threading.Timer(0.5, os.kill, (ending, signal.SIGCONT)).start()
    began = time.monotonic()

    with EmbeddedValkey(tmp_path):
        assert time.monotonic() - began > 0.4
        assert not alive(ending)


def test_a_second_owner_is_refused_with_the_first_ones_pid(tmp_path, owner):
    process, server = owner()

    with pytest.raises(CannotStart, match=f"process {process.pid};.*--data-dir.*--redis-url"):
        EmbeddedValkey(tmp_path).start()

    assert alive(server)


@pytest.mark.anyio
async def test_data_survive_the_kill_of_the_server(tmp_path):
    first = EmbeddedValkey(tmp_path)
    first.start()
    store = await RedisStore.open(first.url)
    change = Change("f", {}, put={"a": b"remembered"})
    await put(store, KEY, change, expected=0, commit_id="c1")
    await store.close()
    os.kill(first.pid, signal.SIGKILL)
    first.stop()

    with EmbeddedValkey(tmp_path) as second:
        assert await remembered(second.url) == {"a": b"remembered"}


@pytest.mark.anyio
async def test_a_killed_server_comes_back_by_itself_on_its_socket(tmp_path, caplog):
    with EmbeddedValkey(tmp_path) as server:
        store = await RedisStore.open(server.url)
        change = Change("f", {}, put={"a": b"remembered"})
        await put(store, KEY, change, expected=0, commit_id="c1")
        url, first = server.url, server.pid

        kill_server(server)
        soon(lambda: server.restarts == 1 and answers(server))

        assert server.running
        assert server.url == url
        assert server.pid != first
        assert (await store.load(KEY, fingerprint="f")).blobs == {"a": b"remembered"}
        await store.close()
    (warning,) = caplog.messages
    assert "exit status -9" in warning
    assert str(tmp_path / "valkey.log") in warning


def test_a_server_that_is_killed_repeatedly_comes_back_each_time_a_little_later(tmp_path, caplog):
    with EmbeddedValkey(tmp_path) as server:
        pids = set()
        for number in range(4):
            with redis.Redis.from_url(server.url) as client:
                assert client.incr("kills") == number + 1
            pids.add(server.pid)
            kill_server(server)
            soon(lambda number=number: server.restarts == number + 1 and answers(server))

    assert len(pids) == 4
    assert pauses(caplog) == [0.1, 0.2, 0.4, 0.8]
    assert server.restarts == 4


def test_after_a_long_life_the_pause_is_short_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(embedded, "_SETTLED_S", 0.0)

    with EmbeddedValkey(tmp_path) as server:
        for number in range(3):
            kill_server(server)
            soon(lambda number=number: server.restarts == number + 1 and answers(server))

    assert pauses(caplog) == [0.1, 0.1, 0.1]


def test_stopping_during_the_pause_is_prompt_and_final(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_FIRST_PAUSE_S", 60.0)
    server = EmbeddedValkey(tmp_path)
    server.start()
    kill_server(server)
    soon(lambda: not server.running)
    assert server.pid is None

    began = time.monotonic()
    server.stop()

    assert time.monotonic() - began < 1
    assert server.restarts == 0
    assert free(tmp_path / "server.lock")
    assert free(tmp_path / "owner.lock")


@pytest.mark.parametrize("moment", [0.0, 0.08, 0.1, 0.12, 0.15, 0.2])
def test_stopping_at_any_moment_of_a_new_start_leaves_no_server(tmp_path, moment):
    server = EmbeddedValkey(tmp_path)
    server.start()
    kill_server(server)
    time.sleep(moment)

    server.stop()

    assert not server.running
    assert free(tmp_path / "server.lock")


def test_a_server_that_cannot_come_back_is_tried_with_pauses_until_it_can(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(embedded, "_LONGEST_PAUSE_S", 0.4)
    binary, data = tmp_path / "server", tmp_path / "data"
    shutil.copy(embedded.find_binary(), binary)
    with EmbeddedValkey(data, binary=binary) as server:
        gone = binary.rename(tmp_path / "gone")
        kill_server(server)
        soon(lambda: len(caplog.records) >= 4)
        assert pauses(caplog)[:4] == [0.1, 0.2, 0.4, 0.4]

        gone.rename(binary)
        soon(lambda: answers(server))


def test_a_directory_that_is_lost_does_not_keep_the_server_from_being_stopped(tmp_path, caplog):
    data, lost = tmp_path / "data", tmp_path / "lost"
    server = EmbeddedValkey(data)
    server.start()
    data.rename(lost)
    kill_server(server)
    soon(lambda: len(caplog.records) >= 3)
    assert pauses(caplog)[:3] == [0.1, 0.2, 0.4]

    began = time.monotonic()
    server.stop()

    assert time.monotonic() - began < 1
    assert not data.exists()
    assert free(lost / "owner.lock")


def test_no_second_server_starts_while_something_of_the_first_still_writes(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(embedded, "_FIRST_PAUSE_S", 0.5)
    with EmbeddedValkey(tmp_path) as server:
        with (tmp_path / "server.lock").open() as held:
            kill_server(server)
            soon(lambda: not server.running)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a child that writes on does
            soon(lambda: len(caplog.records) >= 2)
            assert server.restarts == 0
            assert "still uses" in caplog.messages[1]

        soon(lambda: answers(server))


@pytest.mark.anyio
async def test_the_server_outlives_the_thread_that_asked_for_it(tmp_path):
    server = EmbeddedValkey(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    await asyncio.sleep(0.2)

    store = await RedisStore.open(server.url)

    assert server.running
    await store.close()
    server.stop()


def test_a_stopped_server_leaves_no_socket_and_frees_the_directory(tmp_path):
    server = EmbeddedValkey(tmp_path / "new" / "data")
    server.start()
    socket = Path(server.url.removeprefix("unix://"))
    assert socket.is_socket()
    assert socket.parent.stat().st_mode & 0o777 == 0o700

    server.stop()
    server.stop()

    assert not socket.parent.exists()
    assert server.pid is None
    with server:
        assert server.running


def test_the_socket_path_stays_short_where_the_temporary_directory_is_long(tmp_path, monkeypatch):
    long = tmp_path / ("d" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    with EmbeddedValkey(tmp_path / "data") as server:
        assert len(server.url.removeprefix("unix://")) <= 103

    assert list(long.iterdir()) == []


def test_the_server_has_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        assert os.getsid(server.pid) == server.pid


def test_a_server_that_dies_at_its_start_is_reported_with_its_log(tmp_path):
    data = tmp_path / "appendonlydir"
    data.mkdir()
    (data / "appendonly.aof.manifest").write_text("nonsense\n")

    with pytest.raises(CannotStart, match=r"died at its start; the end of .*(?s:.)*manifest"):
        EmbeddedValkey(tmp_path).start()


def test_a_binary_that_cannot_run_is_reported(tmp_path):
    with pytest.raises(CannotStart, match="no-such-server"):
        EmbeddedValkey(tmp_path, binary=Path("/no-such-server")).start()


def test_a_directory_that_cannot_be_used_is_reported(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(CannotStart, match="file"):
        EmbeddedValkey(tmp_path / "file").start()
