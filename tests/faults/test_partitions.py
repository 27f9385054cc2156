"""A server that loses its store acknowledges nothing, and nothing is learned twice."""

import pytest

from tests.faults.oracle import Fate, Line, Turn
from tests.faults.talk import BEFORE, COMMIT, Gate, Talker, metric, replayed, wait_until
from tests.tools.engines import HOST
from tests.tools.proxy import TO_CLIENT, TO_SERVER, Proxy

TEXT, AFTER = "it rains in the hills", "tell me more"
REFUSALS = ("session_moved", "store_unavailable")

PARTITIONS = {
    "cut": Proxy.cut,
    "half-open": Proxy.hang,
    "requests-lost": lambda proxy: proxy.one_way(TO_CLIENT),
    "replies-lost": lambda proxy: proxy.one_way(TO_SERVER),
}


@pytest.fixture(params=PARTITIONS.values(), ids=PARTITIONS.keys())
def part(request):
    """One way of parting a server from its store."""
    return request.param


@pytest.fixture
def proxy(store):
    with Proxy(HOST, store.port) as proxy:
        yield proxy


@pytest.fixture
def gate(store):
    with Gate(HOST, store.port) as gate:
        yield gate


@pytest.fixture
def ada(name, twins, store):
    return Talker(name, twins, store.url)


def test_a_turn_that_begins_behind_a_partition_is_refused_and_another_server_has_it(
    servers, proxy, part, ada
):
    one, two = servers("one", proxy.url, store_timeout=0.25), servers("two")
    ada.say(one.url, BEFORE)
    Line(one.url).settled(ada.name)
    part(proxy)

    refused = Line(one.url).say(ada.name, turn := Turn(TEXT))
    assert (refused.fate, refused.code) == (Fate.REFUSED, "store_unavailable")
    assert Line(one.url).get("/health/ready")[0] == 503

    assert ada.again(two.url, turn).fate is Fate.COMMITTED
    assert ada.say(two.url, AFTER).fate is Fate.COMMITTED
    proxy.heal()
    wait_until(lambda: Line(one.url).get("/health/ready")[0] == 200)
    replayed(one.url, ada)
    ada.examine(one.url)


def test_a_turn_behind_a_partition_that_outlasts_its_lease_moves(
    servers, proxy, part, ada, endless
):
    one, two = servers("one", proxy.url, store_timeout=0.25), servers("two")
    ada.say(one.url, BEFORE)
    Line(one.url).settled(ada.name)
    stream = ada.begin(one.url, endless)
    stream.hear(3)
    part(proxy)

    assert ada.again(two.url, stream.turn).fate is Fate.COMMITTED
    told = stream.end()
    assert told.fate is Fate.REFUSED
    assert told.code in REFUSALS
    proxy.heal()
    replayed(one.url, ada)
    assert ada.say(one.url, AFTER).fate is Fate.COMMITTED
    ada.examine(two.url)


def test_a_turn_outlives_a_partition_that_is_shorter_than_its_lease(
    servers, proxy, part, ada, endless
):
    one = servers("one", proxy.url, lease_seconds=3)
    ada.say(one.url, BEFORE)
    Line(one.url).settled(ada.name)
    stream = ada.begin(one.url, endless, 200)
    stream.hear(3)
    part(proxy)
    stream.hear(stream.said + 30)
    proxy.heal()

    assert ada.note(stream.turn, stream.end()).fate is Fate.COMMITTED
    assert metric(one.url, "hope_lease_events_total", event="lost") == 0
    ada.examine(one.url)


def test_a_commit_that_a_partition_swallows_is_in_doubt_and_had_once(servers, gate, ada):
    one, two = servers("one", gate.url, store_timeout=0.25), servers("two")
    ada.say(one.url, BEFORE)
    Line(one.url).settled(ada.name)
    gate.close_for(COMMIT)
    stream = ada.begin(one.url, TEXT, 8)
    gate.wait()
    gate.cut()  # all three tries: the first with its commit under way, the others at the door

    told = stream.end()
    assert told.fate is Fate.UNKNOWN
    assert told.code == "store_unavailable"
    gate.let_through()
    gate.heal()
    assert ada.again(two.url, stream.turn, 8).fate is Fate.COMMITTED
    replayed(one.url, ada)
    ada.examine(one.url)


# --- the reply to a commit is lost --------------------------------------------------------------

REPLY = b"*2\r\n$2\r\nOK\r\n:1000\r\n"  # the longest that there can be here


def dups(server):
    return metric(server.url, "hope_store_ops_total", op="commit", outcome="dup")


def test_a_commit_whose_reply_is_lost_after_any_byte_is_acknowledged_once(servers, proxy, ada):
    server = servers("one", proxy.url, store_timeout=2)
    lost = 0
    for nbytes in range(len(REPLY) + 1):
        before, known = ada.version, dups(server)
        proxy.cut_reply_after(COMMIT, nbytes)
        stream = ada.begin(server.url, f"{AFTER} ({nbytes})", 4)

        told = ada.note(stream.turn, stream.end())
        assert told.fate is Fate.COMMITTED
        assert server.turn_over(nbytes + 1)
        found = dups(server) - known
        assert found in (0, 1)
        assert found or nbytes >= len(REPLY) - len("000")  # only a reply that came whole is none
        lost += int(found)
        assert told.memory["committed_version"] == told.memory["base_version"] + 1
        # nobody knows of versions that were not told: at most its consolidation's lies between
        assert told.memory["base_version"] - before in (0, 1)
    assert lost >= len("*2\r\n$2\r\nOK\r\n:1\r\n")
    ada.examine(server.url)


def test_a_commit_of_which_no_try_is_answered_is_in_doubt_and_had_once(servers, proxy, ada):
    server = servers("one", proxy.url)
    ada.say(server.url, BEFORE)
    Line(server.url).settled(ada.name)
    proxy.cut_reply_after(COMMIT, 3, times=3)
    stream = ada.begin(server.url, TEXT, 8)

    told = ada.note(stream.turn, stream.end())
    assert told.fate is Fate.UNKNOWN
    assert told.code == "store_unavailable"
    ada.examine(server.url)  # which sends it again, and hears what it was told in vain


def test_a_turn_whose_lines_are_all_cut_once_its_commit_is_done_is_had_once(
    servers, gate, ada, store
):
    server = servers("one", gate.url, store_timeout=2)
    assert ada.say(server.url, BEFORE).fate is Fate.COMMITTED
    before = Line(server.url).settled(ada.name)["version"]
    gate.close_for(COMMIT)
    stream = ada.begin(server.url, TEXT, 16)
    gate.wait()
    cut_once_done(gate, store, ada.name, before + 1)

    told = ada.note(stream.turn, stream.end())
    assert told.fate in (Fate.COMMITTED, Fate.UNKNOWN)  # it is there, so "refused" is a lie
    ada.examine(server.url)


def test_a_consolidation_whose_reply_is_lost_is_applied_once(servers, gate, ada, store):
    server = servers("one", gate.url, store_timeout=2)
    gate.close_for(COMMIT)
    stream = ada.begin(server.url, TEXT, 16)
    gate.wait()
    gate.let_one_through()
    told = ada.note(stream.turn, stream.end())
    assert told.memory["due_levels"]
    gate.wait()
    after = told.memory["committed_version"] + 1
    cut_once_done(gate, store, ada.name, after)

    wait_until(lambda: dups(server) == 1)
    assert Line(server.url).settled(ada.name)["version"] == after
    ada.examine(server.url)


def cut_once_done(gate, store, session, version):
    """Let the commit that waits be done, but nothing of it be heard; then cut every line."""
    gate.one_way(TO_SERVER)
    gate.let_through()
    wait_until(lambda: store.ask("HGET", f"hope:{{local:{session}}}:h", "ver") == str(version))
    gate.cut()
    gate.heal()
