"""The supervisor of the embedded server, with real processes and real kills."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memory_store import CannotStart, Change, EmbeddedValkey, RedisStore, SessionKey

KEY = SessionKey("acme", "user-7")

# A process that starts the server, commits, says so, and then waits to be killed.
OWNER = """
import asyncio, sys, time
import memory_store.embedded
from memory_store import Change, EmbeddedValkey, RedisStore, SessionKey

async def commit(url):
    store = await RedisStore.open(url)
    change = Change("f", {}, put={"a": b"remembered"})
    await store.commit(SessionKey("acme", "user-7"), change, expected=0, commit_id="c1")
    await store.close()

if sys.argv[2] == "untied":
    memory_store.embedded._tie = lambda: []  # as on a system without PDEATHSIG
server = EmbeddedValkey(sys.argv[1])
server.start()
asyncio.run(commit(server.url))
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
def test_the_server_ends_with_the_process_that_started_it(owner):
    process, server = owner()

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
    await store.commit(KEY, change, expected=0, commit_id="c1")
    await store.close()
    os.kill(first.pid, signal.SIGKILL)
    first.stop()

    with EmbeddedValkey(tmp_path) as second:
        assert await remembered(second.url) == {"a": b"remembered"}


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
