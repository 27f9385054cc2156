"""The tools themselves, with the client that the store uses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.tools.engines import KINDS, Cluster, Engine, Sentinels, free_port, wait_until
from tests.tools.proxy import Proxy

OWNER = """
import sys, time
from tests.tools.engines import Engine

with Engine(sys.argv[1]) as engine:
    print(engine.pid, flush=True)
    time.sleep(600)
"""


def client(url, **options):
    return redis.Redis.from_url(url, socket_timeout=0.3, retry=Retry(NoBackoff(), 0), **options)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def engine(kind, tmp_path_factory):
    with Engine(tmp_path_factory.mktemp("engine"), kind) as engine:
        yield engine


@pytest.fixture
def direct(engine):
    """A client without a proxy between, of an empty server."""
    with client(engine.url) as direct:
        direct.flushall()
        yield direct


@pytest.fixture
def proxy(engine):
    with Proxy.of(engine.url) as proxy:
        yield proxy


@pytest.fixture
def line(proxy):
    """A client behind the proxy that has connected already."""
    with client(proxy.url, single_connection_client=True) as line:
        line.ping()
        yield line


def test_a_killed_engine_comes_back_on_its_port_with_its_data(engine, direct):
    engine.set("appendfsync", "always")  # else a sync that is under way holds the next write back
    direct.set("a", "kept")
    first = engine.pid
    engine.kill()
    assert not engine.alive
    with pytest.raises(redis.ConnectionError):
        direct.get("a")

    engine.restart()

    assert engine.pid != first
    assert direct.get("a") == b"kept"


def test_a_paused_engine_does_not_answer_until_it_is_resumed(engine, direct):
    engine.pause()
    with pytest.raises(redis.TimeoutError):
        direct.ping()

    engine.resume()

    assert direct.ping()


def test_settings_are_given_or_changed(kind, tmp_path):
    with Engine(tmp_path, kind, {"maxmemory": "64mb", "save": "3600 1"}) as engine:
        assert engine.ask("CONFIG", "GET", "maxmemory")[1] == str(64 << 20)
        assert engine.ask("CONFIG", "GET", "appendonly")[1] == "yes"

        engine.set("appendfsync", "always")

        assert engine.ask("CONFIG", "GET", "appendfsync")[1] == "always"


def test_an_engine_that_cannot_start_says_why(kind, tmp_path):
    with pytest.raises(AssertionError, match=r"died; the end of (?s:.)*nonsense"):
        Engine(tmp_path, kind, {"nonsense": "yes"}).start()


def test_waiting_in_vain_shows_the_log(engine):
    with pytest.raises(pytest.fail.Exception, match=r"no luck within(?s:.)*Ready to accept"):
        wait_until(lambda: False, "no luck", [engine], seconds=0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
def test_an_engine_ends_with_the_process_that_started_it(tmp_path):
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        engine = Path("/proc") / owner.stdout.readline().strip() / "status"
        os.kill(owner.pid, signal.SIGKILL)

    def ended():
        return not engine.exists() or "State:\tZ" in engine.read_text()

    wait_until(ended, "it lives on", seconds=3)


def test_a_cluster_serves_and_mourns_a_master(kind, tmp_path):
    with Cluster(tmp_path, kind, {"appendfsync": "always"}) as cluster:
        port = int(cluster.url.rpartition(":")[2])
        with redis.RedisCluster(host="127.0.0.1", port=port) as all_of_it:
            for number in range(30):
                all_of_it.set(f"key-{number}", number)
        assert [one.ask("DBSIZE") > 0 for one in cluster.masters] == [True] * 3
        home = cluster.master_of("key-7")
        assert home.ask("GET", "key-7") == "7"

        home.restart()
        cluster.wait()

        assert home.ask("GET", "key-7") == "7"


@pytest.mark.long
def test_sentinels_replace_a_killed_master_and_take_it_back(kind, tmp_path):
    with Sentinels(tmp_path, kind, sentinels={"valkey": 3, "redis": 1}[kind]) as watched:
        watched.master.ask("SET", "a", "kept")
        wait_until(lambda: watched.replica.ask("GET", "a") == "kept", "the replica lags behind")

        killed = watched.kill_master()
        promoted = watched.wait_for_failover()
        assert promoted is watched.master is not killed
        assert promoted.ask("GET", "a") == "kept"

        killed.restart()
        watched.wait()
        assert watched.replica is killed
        promoted.pause()
        assert watched.wait_for_failover() is killed


def test_a_proxy_passes_everything_and_counts_it(proxy, line, direct):
    value = os.urandom(3_000_000)
    line.connection.socket_timeout = 5
    line.set("a", value)

    assert line.get("a") == value
    assert direct.get("a") == value
    assert (proxy.connections, proxy.open) == (1, 1)
    assert all(3_000_000 < passed < 3_001_000 for passed in proxy.bytes.values())


def test_a_client_that_leaves_leaves_no_connection_behind(engine, proxy, direct):
    with client(proxy.url) as passing:
        passing.set("a", 1)

    wait_until(lambda: proxy.open == 0, "it stays", seconds=2)
    wait_until(lambda: len(direct.client_list()) == 1, "the server keeps it", seconds=2)


def test_a_cut_line_breaks_and_is_refused_until_it_is_healed(proxy, line):
    proxy.cut()
    assert proxy.open == 0
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            line.ping()

    proxy.heal()

    assert line.ping()
    assert proxy.connections == 2


def test_a_hung_line_is_silent_for_old_and_new_connections(proxy, line, direct):
    proxy.hang()
    with pytest.raises(redis.TimeoutError):
        line.set("a", 1)
    with client(proxy.url) as new, pytest.raises(redis.TimeoutError):
        new.ping()
    assert direct.get("a") is None

    proxy.heal()

    wait_until(lambda: direct.get("a") == b"1", "what was held back does not flow", seconds=2)


def test_one_way_to_the_server_executes_and_never_answers(proxy, line, direct):
    proxy.one_way("to_server")
    with pytest.raises(redis.TimeoutError):
        line.set("a", 1)

    wait_until(lambda: direct.get("a") == b"1", "it did not arrive", seconds=2)


def test_one_way_to_the_client_still_delivers(proxy, direct):
    with client(proxy.url) as listener, listener.pubsub() as news:
        news.subscribe("all")
        assert news.get_message(timeout=1)["type"] == "subscribe"

        proxy.one_way("to_client")
        direct.publish("all", "hello")

        assert news.get_message(timeout=1)["data"] == b"hello"
        with pytest.raises(redis.TimeoutError):
            listener.set("a", 1)
        assert direct.get("a") is None


def test_a_delay_is_felt_there_and_back(proxy, line):
    proxy.delay(0.05)
    began = time.monotonic()
    line.ping()
    assert 0.1 <= time.monotonic() - began < 0.25

    proxy.heal()

    began = time.monotonic()
    line.ping()
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("nbytes", [0, 3])
def test_a_reply_is_lost_though_the_request_was_done(proxy, line, direct, nbytes):
    proxy.cut_reply_after(b"INCR", nbytes, times=2)
    for done in (b"1", b"2"):
        line.ping()  # connects again
        before = proxy.bytes["to_client"]
        with pytest.raises(redis.ConnectionError):
            line.incr("counter")
        assert direct.get("counter") == done
        assert proxy.bytes["to_client"] - before == nbytes

    assert line.incr("counter") == 3


def test_a_whole_pipeline_is_done_though_its_reply_is_lost(proxy, line, direct):
    proxy.cut_reply_after(b"EXEC")
    pipe = line.pipeline()
    for number in range(4):
        pipe.set(f"key-{number}", os.urandom(500_000))

    with pytest.raises(redis.ConnectionError):
        pipe.execute()

    assert direct.dbsize() == 4


def test_a_proxy_before_a_dead_server_closes_its_connections(engine, proxy, line):
    engine.kill()
    try:
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                line.ping()
    finally:
        engine.restart()

    assert line.ping()


def test_a_proxy_stands_before_a_unix_socket(kind, tmp_path):
    path = tmp_path / "s"
    with (
        Engine(tmp_path, kind, {"unixsocket": path}),
        Proxy.of(f"unix://{path}") as proxy,
        client(proxy.url) as line,
    ):
        line.set("a", 1)

        assert line.get("a") == b"1"


@pytest.mark.anyio
async def test_a_proxy_serves_an_asynchronous_test(proxy, direct):
    async with redis.asyncio.Redis.from_url(
        proxy.url, socket_timeout=0.3, retry=redis.asyncio.retry.Retry(NoBackoff(), 0)
    ) as line:
        await line.set("a", 1)
        proxy.hang()
        with pytest.raises(redis.TimeoutError):
            await line.get("a")

        proxy.heal()

        assert await line.get("a") == b"1"


def test_free_ports_are_never_given_twice():
    ports = [free_port() for _ in range(50)]

    assert len(set(ports)) == 50
