"""A store that dies, is full, is slow, or takes no more connections, and the turns meanwhile."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest

from memory_store import NotFound, RedisStore, SessionKey, StoreError, Unavailable
from tests.faults.oracle import Fate, Line, Turn, Witness, connected
from tests.faults.talk import (
    BEFORE,
    COMMIT,
    LONG,
    Gate,
    InBackground,
    Stream,
    Talker,
    metric,
    wait_until,
)
from tests.tools.engines import HOST, Engine
from tests.tools.proxy import Proxy

TEXT, AFTER = "it rains in the hills", "tell me more"


@pytest.fixture
def engine(tmp_path, request):
    """A store of the test's own."""
    with Engine(tmp_path / "engine", settings=getattr(request, "param", None)) as engine:
        yield engine


@pytest.fixture
def ada(name, twins, engine):
    return Talker(name, twins, engine.url)


def ready(server):
    return Line(server.url).get("/health/ready")[0] == 200


def regressions(server):
    return metric(server.url, "hope_store_version_regressions_total")


# --- it dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine", [{"appendfsync": "everysec"}, {"appendfsync": "always"}], indirect=True, ids=str
)
def test_what_was_acknowledged_survives_kill_9_of_the_store_under_load(
    servers, twins, engine, name
):
    one = servers("one", engine.url)
    talkers = [Witness(f"{name}-{number}", twins, engine.url) for number in range(3)]

    def talk(talker):
        for number in range(6):
            if talker.say(one.url, f"{AFTER} ({number})", 8).fate is not Fate.COMMITTED:
                return

    with ThreadPoolExecutor(len(talkers)) as threads:
        talking = [threads.submit(talk, talker) for talker in talkers]
        wait_until(lambda: all(len(talker.history) >= 2 for talker in talkers), 20)
        engine.kill()
        assert not ready(one)
        engine.start()
        wait_until(lambda: ready(one))
        for each in talking:
            each.result(30)

    two = servers("two", engine.url)
    for talker in talkers:
        talker.examine(one.url)
        assert talker.say(two.url, BEFORE).fate is Fate.COMMITTED
        talker.examine(two.url)
    assert regressions(one) == 0


def test_a_server_goes_on_at_once_when_its_store_is_back(servers, twins, engine):
    one = servers("one", engine.url)
    talkers = [Witness(f"back-{number}", twins, engine.url) for number in range(6)]

    def say(talker, text):
        return Line(one.url).say(talker.name, Turn(text, 4))

    with ThreadPoolExecutor(len(talkers)) as threads:
        # many connections, all of which the store's death will break
        assert {a.fate for a in threads.map(say, talkers, [BEFORE] * 6)} == {Fate.COMMITTED}
        for talker in talkers:
            Line(one.url).settled(talker.name)
        engine.restart()
        answers = list(threads.map(say, talkers, [TEXT] * 6))
    assert [answer.fate for answer in answers] == [Fate.COMMITTED] * 6


NOTHING_KEPT = {"appendonly": "no"}


@pytest.mark.parametrize("engine", [NOTHING_KEPT], indirect=True, ids=["appendonly-no"])
@pytest.mark.parametrize("kept", [True, False], ids=["older-version-left", "nothing-left"])
def test_what_a_store_without_persistence_has_lost_is_offered_again_and_counted(
    servers, engine, ada, kept
):
    one = servers("one", engine.url)
    assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
    Line(one.url).settled(ada.name)
    if kept:
        engine.ask("SAVE")
    assert ada.say(one.url, TEXT).fate is Fate.COMMITTED
    acknowledged = Line(one.url).settled(ada.name)["version"]
    engine.restart()

    told = ada.say(one.url, AFTER)
    assert told.fate is Fate.COMMITTED
    assert told.memory["recovered"]
    assert told.memory["base_version"] > acknowledged
    assert regressions(one) == 1
    ada.examine(servers("two", engine.url).url)


@pytest.mark.parametrize("engine", [NOTHING_KEPT], indirect=True, ids=["appendonly-no"])
def test_a_turn_during_which_the_store_forgets_its_session_is_rolled_back_and_can_be_had_again(
    servers, engine, ada, endless
):
    one = servers("one", engine.url)
    assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
    Line(one.url).settled(ada.name)
    stream = ada.begin(one.url, endless)
    stream.hear(3)
    engine.restart()

    told = stream.end()
    assert (told.fate, told.code) == (Fate.REFUSED, "session_moved")
    again = ada.again(one.url, stream.turn)
    assert again.fate is Fate.COMMITTED
    assert again.memory["recovered"]
    assert regressions(one) == 1
    ada.examine(one.url)


# --- it is full ---------------------------------------------------------------------------------


def used(engine):
    """Return the bytes that count against `maxmemory`, without buffers that come and go."""

    def now():
        time.sleep(0.1)
        memory = engine.ask("INFO", "memory")
        return int(memory["used_memory"]) - int(memory["mem_not_counted_for_evict"])

    return min(now() for _ in range(30))  # idle connections give theirs back within 2 s


def staged(engine):
    client = connected(engine.url)
    return [key for key in client.scan_iter("hope:*:b:*", count=1000) if client.ttl(key) >= 0]


# bytes that are left: none, so that not even a lease is given; some, so that staging fails
@pytest.mark.parametrize("left", [0, 40_000], ids=["nothing-left", "a-little-left"])
def test_a_full_store_refuses_turns_and_keeps_what_it_has(servers, engine, ada, left):
    one = servers("one", engine.url)
    other = Talker(f"{ada.name}-other", ada._twins, engine.url)
    for talker in (ada, other):
        assert talker.say(one.url, BEFORE).fate is Fate.COMMITTED
        Line(one.url).settled(talker.name)
    before, known = Line(one.url).session(ada.name), set(staged(engine))
    engine.set("maxmemory", used(engine) + left)

    # enough of it for levels to be consolidated, and so to be stored
    refused = Line(one.url).say(ada.name, Turn(TEXT * 30))
    assert (refused.fate, refused.code) == (Fate.REFUSED, "store_full")
    assert Line(one.url).session(ada.name) == before
    assert set(staged(engine)) <= known
    looked = Line(one.url).say(ada.name, Turn(TEXT), mode="read_only")
    assert looked.fate is Fate.READ_ONLY
    assert looked.reply
    assert _deleted(one, other.name)

    engine.set("maxmemory", 0)
    assert ada.say(one.url, TEXT).fate is Fate.COMMITTED
    ada.examine(one.url)


def test_a_store_that_is_full_by_the_time_of_the_commit_lets_go_of_what_was_staged(
    servers, engine, ada
):
    with Gate(HOST, engine.port) as gate:
        one = servers("one", gate.url, store_timeout=5)
        assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
        before = Line(one.url).settled(ada.name)
        known = set(staged(engine))
        gate.close_for(COMMIT)
        stream = ada.begin(one.url, TEXT, 8)
        gate.wait()
        assert set(staged(engine)) > known
        engine.set("maxmemory", 1)
        gate.let_through()

        told = stream.end()
        assert (told.fate, told.code) == (Fate.REFUSED, "store_full")
        assert Line(one.url).session(ada.name) == before
        assert set(staged(engine)) <= known
        engine.set("maxmemory", 0)
        assert ada.again(one.url, stream.turn, 8).fate is Fate.COMMITTED
        ada.examine(one.url)


def _deleted(server, session):
    import http.client

    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        line.request("DELETE", f"/v1/sessions/{session}")
        return line.getresponse().status == 200
    finally:
        line.close()


# --- it is slow ---------------------------------------------------------------------------------

GAP_S = 0.5  # between two pieces of text, on a machine that has other things to do


@contextmanager
def listeners(server, words):
    """Have long replies streamed meanwhile, to who has no session and to who only looks."""
    streams = [
        Stream(server.url, None, Turn(words, LONG), mode="off"),
        Stream(server.url, "nobodys", Turn(words, LONG), mode="read_only"),
    ]
    listening = True

    def listen(stream):
        while listening:
            stream.hear(stream.said + 1)
        stream.hang_up()

    for stream in streams:
        stream.hear(5)
    threads = [InBackground(listen, stream) for stream in streams]
    yield streams
    listening = False
    for thread in threads:
        thread.result()


def gaps(stream, since):
    """Return the longest silence of a stream since a moment, and how much was said."""
    times = [since, *(at for at in stream.times if at > since), time.monotonic()]
    return max(b - a for a, b in pairwise(times)), len(times)


def test_a_slow_store_is_not_felt_in_the_streams_of_others(
    servers, engine, ada, endless_without_memory
):
    with Proxy(HOST, engine.port) as proxy:
        one = servers("one", proxy.url, store_timeout=5, lease_seconds=30)
        assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
        Line(one.url).settled(ada.name)
        with listeners(one, endless_without_memory) as streams:
            began = time.monotonic()
            proxy.delay(0.2)
            assert ada.say(one.url, TEXT).fate is Fate.COMMITTED
            assert time.monotonic() - began > 1.5
            found = [gaps(stream, began) for stream in streams]
        proxy.heal()
        assert max(gap for gap, _ in found) < GAP_S
        assert min(said for _, said in found) > 100
        ada.examine(one.url)


def test_a_store_that_hangs_during_a_commit_is_not_felt_by_others_and_has_it_once(
    servers, engine, ada, endless_without_memory
):
    with Gate(HOST, engine.port) as gate:
        one = servers("one", gate.url, lease_seconds=5)
        assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
        Line(one.url).settled(ada.name)
        with listeners(one, endless_without_memory) as streams:
            gate.close_for(COMMIT)
            stream = ada.begin(one.url, TEXT, 8)
            gate.wait()
            engine.pause()
            gate.let_through()
            began = time.monotonic()
            told = ada.note(stream.turn, stream.end())  # all of its tries are timed out
            waited = time.monotonic() - began
            found = [gaps(stream, began) for stream in streams]
            engine.resume()
        assert told.fate is Fate.UNKNOWN
        assert told.code == "store_unavailable"
        assert waited > 1
        assert max(gap for gap, _ in found) < GAP_S
        wait_until(lambda: ready(one))
        ada.examine(one.url)  # the commits that were late came all, and count once


# --- it takes no more connections ---------------------------------------------------------------

LEASE_S = 1.0


def test_without_connections_turns_are_refused_and_the_lease_of_a_long_one_is_kept(
    servers, twins, engine, ada, endless
):
    raw = connected(engine.url)
    raw.ping()  # a connection that is there already
    one = servers("one", engine.url, lease_seconds=LEASE_S)
    assert ada.say(one.url, BEFORE).fate is Fate.COMMITTED
    Line(one.url).settled(ada.name)
    crowd = [Witness(f"crowd-{number}", twins, engine.url) for number in range(8)]
    stream = ada.begin(one.url, endless)
    wait_until(lambda: metric(one.url, "hope_lease_events_total", event="renewed") > 0)
    raw.config_set("maxclients", len(raw.client_list()))

    turns = {talker.name: Turn(BEFORE) for talker in crowd}

    def hammer(talker):
        until, codes = time.monotonic() + 1.5 * LEASE_S, set()
        while time.monotonic() < until:
            codes.add(Line(one.url, 20).say(talker.name, turns[talker.name]).code)
        return codes

    def insist(talker):
        return Line(one.url).insist(talker.name, turns[talker.name])

    with ThreadPoolExecutor(len(crowd)) as threads:
        codes = set().union(*threads.map(hammer, crowd))
        assert codes <= {"", "store_unavailable", "session_busy", "session_moved"}
        assert "store_unavailable" in codes
        raw.config_set("maxclients", 1000)
        stream.hear(stream.said + 20)  # with its lease lost it would have ended by now
        stream.hang_up()
        wait_until(lambda: ready(one))
        for talker, answer in zip(crowd, threads.map(insist, crowd), strict=True):
            assert answer.fate is Fate.COMMITTED
            talker.history.append((turns[talker.name], answer.reply))
    ada.examine(one.url)
    for talker in crowd:
        talker.examine(one.url)


@pytest.mark.anyio
async def test_the_connections_that_live_serve_on_while_no_new_one_can_be_had(engine):
    raw = connected(engine.url)
    raw.ping()
    opened = await RedisStore.open(engine.url)
    key = SessionKey("local", "unknown")

    async def look():
        try:
            await opened.head(key)
        except StoreError as error:
            return type(error)

    assert await look() is NotFound
    raw.config_set("maxclients", len(raw.client_list()))
    crowd = await asyncio.gather(*(look() for _ in range(8)))
    assert set(crowd) == {NotFound, Unavailable}
    alone = [await look() for _ in range(4)]
    raw.config_set("maxclients", 1000)
    await opened.close()
    assert alone == [NotFound] * 4
