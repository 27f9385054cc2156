"""Two servers and one session: whoever was overtaken has done nothing, and is told so."""

import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.faults.oracle import TERMINAL, Answer, Fate, Line, Turn, Witness, connected
from tests.faults.talk import (
    BEFORE,
    COMMIT,
    LONG,
    STAGE,
    Gate,
    InBackground,
    Talker,
    judged,
    metric,
    replayed,
    wait_until,
)
from tests.tools.engines import HOST

TEXT, OTHER, AFTER = "it rains in the hills", "remember the blue door", "tell me more"
LEASE_S = 1.0


@pytest.fixture
def gate(store):
    with Gate(HOST, store.port) as gate:
        yield gate


@pytest.fixture
def gates(store):
    with Gate(HOST, store.port) as one, Gate(HOST, store.port) as two:
        yield one, two


@pytest.fixture
def ada(name, twins, store):
    return Talker(name, twins, store.url)


def begun(server, ada):
    """Have the first turn of a session there."""
    assert ada.say(server.url, BEFORE).fate is Fate.COMMITTED
    Line(server.url).settled(ada.name)


def lapsed(store, session):
    """Tell whether nobody holds the session's lease."""
    return store.ask("EXISTS", f"hope:{{local:{session}}}:l") == 0


# --- an owner that sleeps -----------------------------------------------------------------------


def test_an_owner_that_slept_through_its_lease_is_overtaken_and_told_so(servers, ada, endless):
    one, two = servers("one"), servers("two")
    begun(one, ada)
    stream = ada.begin(one.url, endless)
    stream.hear(3)
    one.pause()

    assert ada.say(two.url, OTHER).fate is Fate.COMMITTED
    one.resume()
    told = stream.end()
    assert (told.fate, told.code) == (Fate.REFUSED, "session_moved")
    assert ada.say(one.url, AFTER).fate is Fate.COMMITTED
    ada.examine(two.url)


def test_a_turn_that_its_owner_slept_through_is_had_once_elsewhere(servers, ada, endless):
    one, two = servers("one"), servers("two")
    begun(one, ada)
    stream = ada.begin(one.url, endless)
    stream.hear(3)
    one.pause()

    assert ada.again(two.url, stream.turn).fate is Fate.COMMITTED
    one.resume()
    assert stream.end().fate is Fate.REFUSED
    replayed(one.url, ada)
    ada.examine(one.url)


def test_an_owner_that_slept_and_was_not_overtaken_ends_its_turn(servers, store, ada, endless):
    one, two = servers("one"), servers("two")
    begun(one, ada)
    stream = ada.begin(one.url, endless, 40)
    stream.hear(3)
    one.pause()
    wait_until(lambda: lapsed(store, ada.name))
    one.resume()

    told = ada.note(stream.turn, stream.end())
    assert told.fate in (Fate.COMMITTED, Fate.REFUSED)  # it may think that it was overtaken
    assert ada.say(two.url, AFTER).fate is Fate.COMMITTED
    ada.examine(one.url)


def test_a_commit_that_comes_after_the_session_was_taken_over_is_fenced(servers, store, gate, ada):
    one, two = servers("one", gate.url), servers("two")
    begun(one, ada)
    gate.close_for(COMMIT)
    stream = ada.begin(one.url, TEXT, 8)
    gate.wait()
    one.pause()  # with its commit on the way

    assert ada.say(two.url, OTHER).fate is Fate.COMMITTED
    before = Line(two.url).settled(ada.name)
    gate.let_through()
    time.sleep(0.2)  # it arrives
    assert Line(two.url).session(ada.name) == before
    one.resume()
    told = stream.end()
    assert (told.fate, told.code) == (Fate.REFUSED, "session_moved")
    assert metric(one.url, "hope_store_ops_total", op="commit", outcome="fenced") == 1
    ada.examine(one.url)


def test_a_commit_that_comes_before_that_of_who_took_over_is_fenced_too(servers, store, gates, ada):
    first, second = gates
    one, two = servers("one", first.url), servers("two", second.url, store_timeout=5)
    begun(one, ada)
    first.close_for(COMMIT)
    second.close_for(COMMIT)
    stream = ada.begin(one.url, TEXT, 8)
    first.wait()
    one.pause()
    with_two = InBackground(ada.say, two.url, OTHER)
    second.wait()  # it has the session, and has not committed yet

    one.resume()
    first.let_through()
    told = stream.end()
    assert (told.fate, told.code) == (Fate.REFUSED, "session_moved")
    second.let_through()
    assert with_two.result().fate is Fate.COMMITTED
    ada.examine(one.url)


def test_an_owner_that_slept_before_its_commit_and_wakes_first_has_it(servers, store, gate, ada):
    one, two = servers("one", gate.url, store_timeout=5), servers("two")
    begun(one, ada)
    gate.close_for(COMMIT)
    stream = ada.begin(one.url, TEXT, 8)
    gate.wait()
    one.pause()
    wait_until(lambda: lapsed(store, ada.name))
    one.resume()
    gate.let_through()

    assert ada.note(stream.turn, stream.end()).fate is Fate.COMMITTED
    assert ada.say(two.url, OTHER).fate is Fate.COMMITTED
    ada.examine(one.url)


# --- the same turn, many times ------------------------------------------------------------------


def over_http(url, session, turn):
    return Line(url).say(session, turn)


def asking(session, turn):
    return {
        "type": "response.create",
        "input": turn.text,
        "conversation": session,
        "turn_id": turn.id,
        "max_output_tokens": turn.most,
        "temperature": 0,
        "memory": {"rates": {"user": 1, "assistant": 1}},
    }


def over_a_socket(url, session, turn):
    with connect(f"ws{url[4:]}/v1/responses") as line:
        line.send(json.dumps(asking(session, turn)))
        while True:
            event = json.loads(line.recv(30))
            if event["type"] == "error":
                return Answer(Fate.REFUSED, code=event["error"]["code"])
            if event["type"] in TERMINAL:
                return judged(event["response"])


def test_a_turn_that_is_sent_five_times_at_once_over_two_servers_is_learned_once(
    servers, store, twins
):
    one, two = servers("one"), servers("two")
    ways = [(over_http, one), (over_a_socket, one), (over_http, two), (over_a_socket, two)]
    ways.append((over_http, one))
    with ThreadPoolExecutor(5) as threads:
        for number in range(4):
            ada = Witness(f"five-times-{number}", twins, store.url)
            if number % 2:
                ada.say(one.url, BEFORE)
            turn, together = Turn(TEXT, 12), threading.Barrier(5)

            def send(way, server, turn=turn, together=together, name=ada.name):
                together.wait(10)
                return way(server.url, name, turn)

            answers = list(threads.map(send, *zip(*ways, strict=True)))

            had = [answer for answer in answers if answer.fate is Fate.COMMITTED]
            refused = [answer for answer in answers if answer.fate is not Fate.COMMITTED]
            assert {answer.code for answer in refused} <= {"session_busy"}, answers
            had += [Line(two.url).insist(ada.name, turn) for _ in refused]
            assert len({(a.reply, a.memory["committed_version"]) for a in had}) == 1
            assert [a.memory["replayed"] for a in had].count(False) == 1
            ada.history.append((turn, had[0].reply))
            assert Line(one.url).settled(ada.name)["turns"] == len(ada.history)
            ada.examine(random.Random(number).choice((one, two)).url)


# --- deleting -----------------------------------------------------------------------------------


def delete(server, session):
    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        line.request("DELETE", f"/v1/sessions/{session}")
        answer = line.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        line.close()


def keys_of(store, session):
    client = connected(store.url)
    return [key.decode() for key in client.scan_iter(f"hope:{{local:{session}}}:*", count=1000)]


def gone(store, session):
    """Check that nothing is left of a session but its tombstone, and that it is not listed."""
    assert keys_of(store, session) == [f"hope:{{local:{session}}}:h"]
    assert store.ask("HKEYS", f"hope:{{local:{session}}}:h") in (["tomb"], ["ver", "tomb"])
    assert store.ask("ZSCORE", "hope:t:local:sessions", session) is None


@pytest.mark.parametrize("word", [COMMIT, STAGE], ids=["commit", "stage"])
def test_a_session_that_is_deleted_elsewhere_during_a_commit_stays_deleted(
    servers, store, gate, ada, word
):
    one, two = servers("one", gate.url, store_timeout=5), servers("two")
    begun(one, ada)
    gate.close_for(word)
    stream = ada.begin(one.url, TEXT, 8)
    gate.wait()
    status, receipt = delete(two, ada.name)
    assert (status, receipt["deleted"]) == (200, True)
    gate.let_through()

    told = stream.end()
    assert (told.fate, told.code) == (Fate.REFUSED, "session_deleted")
    wait_until(lambda: metric(one.url, "hope_leases_held") == 0)
    gone(store, ada.name)
    for server in (one, two):
        assert Line(server.url).say(ada.name, stream.turn).code == "session_deleted"
        assert Line(server.url).get(f"/v1/sessions/{ada.name}")[0] == 410


def test_a_deletion_that_races_a_turn_is_the_last_word(servers, store, twins):
    one, two = servers("one"), servers("two")
    chance = random.Random(15)
    outcomes = set()
    for number in range(6):
        name = f"races-{number}"
        begun(one, Talker(name, twins, store.url))
        turn = InBackground(Line(one.url).say, name, Turn(TEXT, 8))
        time.sleep(chance.uniform(0.0, 0.08))
        assert delete(two, name)[0] == 200

        outcomes.add(turn.result().code)
        wait_until(lambda: metric(one.url, "hope_leases_held") == 0)
        wait_until(lambda name=name: keys_of(store, name) == [f"hope:{{local:{name}}}:h"], 2)
        # the turn may have put it into the index just after the deletion: reading takes it out
        code, listing = Line(two.url).get("/v1/sessions")
        assert code == 200
        assert name.encode() not in listing
        gone(store, name)
        assert Line(one.url).say(name, Turn(AFTER)).code == "session_deleted"
    assert outcomes <= {"", "session_deleted", "session_moved"}


# --- being told to stop -------------------------------------------------------------------------


class Socket:
    """One turn over a socket, and what the socket says until it is closed."""

    def __init__(self, line, turn):
        self.line, self.turn = line, turn

    @classmethod
    @contextmanager
    def begin(cls, server, session, text, most):
        with connect(f"ws{server.url[4:]}/v1/responses") as line:
            turn = Turn(text, most)
            line.send(json.dumps(asking(session, turn)))
            yield cls(line, turn)

    def hear(self, pieces):
        while pieces:
            pieces -= json.loads(self.line.recv(20))["type"] == "response.output_text.delta"

    def end(self):
        """Return what was told of the turn, and the code that the socket was closed with."""
        answer = None
        with suppress(ConnectionClosed):
            while True:
                event = json.loads(self.line.recv(20))
                if event["type"] in TERMINAL:
                    answer = judged(event["response"])
        return answer, self.line.close_code


HOURS = {"lease_seconds": 300}  # who is not let go of is not had in this test


def test_a_turn_that_ends_in_time_is_kept_when_its_server_stops(servers, ada, endless):
    one, two = servers("one", shutdown_timeout=20, **HOURS), servers("two", **HOURS)
    begun(one, ada)
    with Socket.begin(one, ada.name, endless, 60) as turn:
        turn.hear(3)
        one.terminate()

        told, code = turn.end()
    assert ada.note(turn.turn, told).fate is Fate.COMMITTED
    assert code == 1012
    assert one.wait(10) == 0
    began = time.monotonic()
    assert ada.say(two.url, AFTER).fate is Fate.COMMITTED
    assert time.monotonic() - began < 2
    ada.examine(two.url)


def test_a_turn_that_does_not_end_in_time_is_rolled_back_and_another_server_has_it(
    servers, ada, endless
):
    one, two = servers("one", shutdown_timeout=0.2, **HOURS), servers("two", **HOURS)
    begun(one, ada)
    with Socket.begin(one, ada.name, endless, LONG) as turn:
        turn.hear(3)
        one.terminate()
        began = time.monotonic()

        told, code = turn.end()
    assert (told.fate, told.code, code) == (Fate.REFUSED, "draining", 1012)
    assert one.wait(10) == 0
    assert time.monotonic() - began < 4
    assert ada.again(two.url, turn.turn).fate is Fate.COMMITTED
    assert time.monotonic() - began < 6
    ada.examine(two.url)


@pytest.mark.parametrize("answered", [True, False], ids=["answered-late", "never-answered"])
def test_a_server_that_stops_during_a_commit_leaves_the_session_whole(servers, gate, ada, answered):
    one = servers("one", gate.url, shutdown_timeout=0.2, **HOURS)
    two = servers("two", lease_seconds=2)
    begun(one, ada)
    gate.close_for(COMMIT)
    with Socket.begin(one, ada.name, TEXT, 8) as turn:
        gate.wait()
        one.terminate()
        began = time.monotonic()
        time.sleep(0.4)  # its patience is over
        if answered:
            gate.let_through()

        told, code = turn.end()
    assert told.fate in (Fate.COMMITTED, Fate.UNKNOWN)
    assert code == 1012
    assert one.wait(10) == 0
    assert time.monotonic() - began < 6
    gate.let_through()
    ada.note(turn.turn, told)
    if ada.doubtful:
        ada.doubtful = None
        assert ada.again(two.url, turn.turn, 8).fate is Fate.COMMITTED
    ada.examine(two.url)
