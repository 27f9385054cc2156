"""The client's side of the wire as a transcript: what arrives, and what it means."""

from __future__ import annotations

import json

import pytest

from clients import core
from clients.errors import ConnectionLost, ProtocolViolation, Refused, Unreachable
from server import wire


def turn(turn_id: str = "t1", **options) -> core.Turn:
    return core.Turn(core.request("nora", "hello", turn_id, [], **options), turn_id)


def asked(*turns: core.Turn) -> core.Connection:
    connection = core.Connection()
    for one in turns:
        connection.ask(one)
    return connection


def event(kind: str, number: int, *, stream: str = "t1", **fields) -> str:
    return json.dumps({"type": kind, "sequence_number": number, "stream_id": stream, **fields})


def response(status: str = "in_progress", text: str = "", **fields) -> dict:
    part = {"type": "output_text", "text": text}
    item = {"type": "message", "id": "m1", "status": "completed", "content": [part]}
    return {
        "id": "r1",
        "created_at": 1.0,
        "status": status,
        "model": "tiny",
        "output": [item] if text else [],
        **fields,
    }


ITEM = {"type": "message", "id": "m1", "status": "in_progress", "content": []}
PART = {"type": "output_text", "text": ""}


def transcript(stream: str = "t1") -> list[str]:
    """Return the events of a whole reply, in the order of the protocol."""
    steps = [
        ("response.created", {"response": response()}),
        ("response.in_progress", {"response": response()}),
        ("response.output_item.added", {"item": ITEM}),
        ("response.content_part.added", {"item_id": "m1", "part": PART}),
        ("response.output_text.delta", {"item_id": "m1", "delta": "good "}),
        ("response.output_text.delta", {"item_id": "m1", "delta": "day"}),
        ("response.output_text.done", {"item_id": "m1", "text": "good day"}),
        ("response.content_part.done", {"item_id": "m1", "part": PART}),
        ("response.output_item.done", {"item": ITEM}),
        ("response.completed", {"response": response("completed", "good day")}),
    ]
    return [event(kind, n, stream=stream, **fields) for n, (kind, fields) in enumerate(steps)]


def hear(connection: core.Connection, messages: list[str]) -> list[core.Heard]:
    return [heard for message in messages for heard in connection.receive(message)]


def test_a_request_names_its_turn_once_for_event_stream_and_repetition():
    message = json.loads(core.Connection().ask(turn("t9", temperature=0.5, if_version=3)))

    assert message == {
        "type": "response.create",
        "conversation": "nora",
        "input": "hello",
        "temperature": 0.5,
        "stream": False,
        "memory": {"mode": "read_write", "if_version": 3, "on_cancel": "keep", "window": "kept"},
        "event_id": "t9",
        "stream_id": "t9",
        "turn_id": "t9",
    }


def test_a_request_out_of_range_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="temperature"):
        turn(temperature=9.0)


def test_a_reply_is_told_as_facts():
    one = turn()
    heard = hear(asked(one), transcript())

    assert [fact for _, fact in heard[:3]] == [
        core.Started("r1"),
        core.Text("good "),
        core.Text("day"),
    ]
    assert isinstance(heard[3].fact, core.Finished)
    assert {turn_id for turn_id, _ in heard} == {"t1"}
    assert (one.ended, one.text) == (True, "good day")


def test_turns_on_one_socket_do_not_mix():
    one, two = turn("t1"), turn("t2")
    both = asked(one, two)

    for first, second in zip(transcript("t1"), transcript("t2"), strict=True):
        hear(both, [first, second])

    assert (one.text, two.text) == ("good day", "good day")
    assert one.ended
    assert two.ended


@pytest.mark.parametrize("skipped", [0, 1, 2, 3, 6, 7])
def test_a_skipped_event_is_a_violation(skipped):
    messages = transcript()
    del messages[skipped]
    one = turn()

    hear(asked(one), messages)

    assert isinstance(one.error, ProtocolViolation)


def test_an_event_out_of_order_leaves_the_turn_as_it_was():
    one = turn()
    one.receive(wire.ResponseEvent.model_validate_json(transcript()[0]))

    with pytest.raises(ProtocolViolation, match="out of order: the turn is created"):
        one.receive(wire.TextDelta(sequence_number=1, item_id="m1", delta="early"))

    assert (one.phase, one.text) == (core.Phase.CREATED, "")


def test_sequence_numbers_may_jump_but_not_stand():
    messages = transcript()
    connection = asked(one := turn())
    hear(connection, messages[:4])

    hear(connection, [event("response.output_text.delta", 40, item_id="m1", delta="a")])
    heard = hear(connection, [event("response.output_text.delta", 40, item_id="m1", delta="b")])

    assert one.text == "a"
    assert isinstance(heard[0].fact, core.Failed)


def test_a_replayed_reply_is_said_from_its_terminal_event():
    connection = asked(one := turn())

    heard = hear(
        connection,
        [
            event("response.created", 0, response=response()),
            event("response.completed", 1, response=response("completed", "as before")),
        ],
    )

    assert [type(fact) for _, fact in heard] == [core.Started, core.Text, core.Finished]
    assert one.text == "as before"


def test_a_cancelled_reply_finishes_and_says_why():
    connection = asked(one := turn())
    ending = response(
        "incomplete",
        "good ",
        incomplete_details={"reason": "cancelled"},
        memory={
            "conversation": "nora",
            "base_version": 6,
            "committed_version": 7,
            "outcome": "committed",
            "durability": "always",
            "updates": 0,
            "consolidated_levels": [],
            "due_levels": [],
            "surprise": None,
        },
    )

    cancel = json.loads(connection.cancel(one))
    hear(connection, [*transcript()[:5], event("response.incomplete", 5, response=ending)])
    record = core.Record(one)

    assert cancel == {"type": "response.cancel", "event_id": "t1.cancel", "stream_id": "t1"}
    assert (record.status, record.cut_short_by, record.version) == ("incomplete", "cancelled", 7)


def test_a_failed_reply_carries_the_servers_words():
    connection = asked(one := turn())
    error = {"type": "server_error", "code": "memory_corrupt", "message": "Sorry."}

    hear(connection, transcript()[:5])
    hear(connection, [event("response.failed", 9, response=response("failed", error=error))])

    assert isinstance(one.error, Refused)
    assert (one.error.code, str(one.error)) == ("memory_corrupt", "Sorry.")
    assert core.Record(one).status == "failed"


def refusal(**fields) -> str:
    detail = {"type": "conflict", "code": "session_busy", "message": "Busy."}
    return json.dumps({"type": "error", "status": 409, "error": detail, **fields})


@pytest.mark.parametrize(
    "address", [{"stream_id": "t1", "event_id": "t1"}, {"stream_id": "t1"}, {"event_id": "t1"}]
)
def test_an_error_ends_the_turn_it_names(address):
    connection = asked(one := turn(), other := turn("t2"))

    connection.receive(refusal(**address, retry_after_s=2.0))

    assert isinstance(one.error, Refused)
    assert (one.error.status, one.error.retry_after_s) == (409, 2.0)
    assert not other.ended


def test_a_cancel_that_came_too_late_harms_nobody():
    connection = asked(one := turn())

    assert connection.receive(refusal(stream_id="t1", event_id="t1.cancel")) == []
    assert connection.receive(refusal(stream_id="gone", event_id="gone.cancel")) == []
    assert not one.ended


def test_an_error_about_the_socket_explains_why_the_line_was_lost():
    connection = asked(one := turn())

    connection.receive(refusal())
    connection.lose("closed with code 1013")

    assert "Busy." in str(one.error)


def test_a_lost_line_ends_every_open_turn():
    connection = asked(one := turn("t1"), two := turn("t2", mode=wire.Mode.OFF), done := turn("t3"))
    hear(connection, transcript("t3"))

    heard = connection.lose("gone")

    assert [turn_id for turn_id, _ in heard] == ["t1", "t2"]
    assert isinstance(one.error, ConnectionLost)
    assert isinstance(two.error, ConnectionLost)
    assert (one.error.may_be_committed, two.error.may_be_committed) == (True, False)
    assert done.error is None
    assert connection.lose("again") == []


# --- sent again -------------------------------------------------------------------------------


def lost(turn_id: str = "t1") -> ConnectionLost:
    return ConnectionLost("Lost.", turn_id=turn_id, may_be_committed=True)


def refused(code: str, **fields) -> Refused:
    return Refused(wire.ErrorDetail(type="x", code=code, message="No."), **fields)


def broken_off(shown: int) -> tuple[core.Connection, core.Turn]:
    """Return a turn that said "good day", lost its line, and is asked for again."""
    connection = asked(one := turn())
    hear(connection, transcript()[:6])
    connection.lose("gone")
    assert one.error is not None
    one.again(one.error, shown)
    again = core.Connection()
    assert again.ask(one) == one.request.model_dump_json(exclude_none=True)
    return again, one


@pytest.mark.parametrize("shown", [0, 2, 5, 8])
def test_a_turn_sent_again_says_what_was_not_shown(shown):
    connection, one = broken_off(shown)

    heard = hear(connection, transcript())

    said = "".join(fact.piece for _, fact in heard if isinstance(fact, core.Text))
    assert said == "good day"[shown:]
    assert isinstance(heard[-1].fact, core.Finished)
    assert (one.text, one.tries, one.diverged) == ("good day", 2, False)


def test_a_turn_sent_again_is_behind_until_it_has_caught_up():
    connection, one = broken_off(5)

    hear(connection, transcript()[:4])
    assert one.behind

    hear(connection, transcript()[4:5])
    assert not one.behind


def test_another_reply_than_what_was_shown_ends_the_turn_with_what_went_wrong_before():
    connection, one = broken_off(5)
    messages = [*transcript()[:4], event("response.output_text.delta", 4, item_id="m", delta="go!")]

    heard = hear(connection, messages)

    assert heard[-1].fact == core.Failed(one.failures[0])
    assert one.diverged
    assert one.text == "good "
    assert hear(connection, transcript()[5:]) == []


def test_a_reply_shorter_than_what_was_shown_is_another():
    connection, one = broken_off(8)
    ending = event("response.completed", 6, response=response("completed", "good "))

    heard = hear(connection, [*transcript()[:5], ending])

    assert isinstance(heard[-1].fact, core.Failed)
    assert one.diverged


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (lost(), True),
        (refused("draining"), True),
        (refused("session_busy"), True),
        (refused("store_full"), False),
        (refused("version_conflict"), False),
        (ProtocolViolation("?"), False),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
def test_only_a_passing_trouble_is_worth_another_try(error, passing):
    pause = core.Patience().wait(turn(), error, waited=0, chance=0)

    assert (pause is not None) == passing


def test_pauses_double_and_are_spread():
    one, patience = turn(), core.Patience(tries=4)
    pauses = []
    for chance in (0.0, 1.0, 0.0):
        pauses.append(patience.wait(one, lost(), waited=0, chance=chance))
        one.again(lost(), 0)

    assert pauses == [0.5, 1.5, 2.0]
    assert patience.wait(one, lost(), waited=0, chance=0) is None


@pytest.mark.parametrize(("waited", "pause"), [(0, 5.0), (9, 5.0), (11, None)])
def test_a_pause_is_as_long_as_the_server_asks_while_there_is_patience(waited, pause):
    busy = refused("session_busy", retry_after_s=5.0)

    assert core.Patience().wait(turn(), busy, waited=waited, chance=0) == pause


def test_an_address_where_nobody_answers_is_tried_again_only_after_it_had_answered():
    one, patience = turn(), core.Patience()

    assert patience.wait(one, Unreachable("Nobody."), waited=0, chance=0) is None
    one.again(lost(), 0)
    assert patience.wait(one, Unreachable("Nobody."), waited=0, chance=0) is not None


def test_what_may_be_committed_is_told_before_what_is_merely_in_the_way():
    one, first = turn(), lost()
    one.again(first, 0)

    assert one.verdict(Unreachable("Nobody.")) is first
    assert one.verdict(refused("session_busy")) is first
    assert one.verdict(refused("session_deleted")).code == "session_deleted"


def test_a_failure_of_unknown_outcome_may_be_committed():
    connection = asked(one := turn())
    error = {"type": "server_error", "code": "store_unavailable", "message": "Silent."}
    memory = wire.MemoryResult(
        conversation="nora",
        base_version=6,
        committed_version=None,
        outcome=wire.Outcome.UNKNOWN,
        durability="always",
        updates=0,
        consolidated_levels=[],
        due_levels=[],
        surprise=None,
    ).model_dump()

    hear(connection, transcript()[:2])
    ending = response("failed", error=error, memory=memory)
    hear(connection, [event("response.failed", 2, response=ending)])

    assert one.error.may_be_committed
    assert core.passes(one.error)


def test_news_of_the_memory_are_heard_after_the_turn_has_ended():
    connection = asked(turn())
    hear(connection, transcript())
    news = wire.MemoryCommitted(conversation="nora", version=8, stream_id="t1")

    assert connection.receive(news.model_dump_json()) == [core.Heard("t1", core.MemoryEvent(news))]


def test_what_a_client_does_not_know_it_ignores():
    connection = asked(turn())

    assert connection.receive('{"type": "hope:server.draining", "deadline_s": 30}') == []
    assert (
        connection.receive(event("response.created", 0, stream="other", response=response())) == []
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", "not JSON"),
        ("[1]", "not an event"),
        ('{"type": "response.created"}', "malformed response.created"),
    ],
)
def test_what_is_no_event_at_all_is_a_violation(message, words):
    with pytest.raises(ProtocolViolation, match=words):
        core.Connection().receive(message)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="must look like"):
        core.socket_url(url)


def test_an_http_refusal_is_read_whoever_wrote_it():
    ours = Refused.from_http(409, json.dumps({"error": json.loads(refusal())["error"]}), "3")
    proxys = Refused.from_http(401, b"")

    assert (ours.code, ours.message, ours.retry_after_s) == ("session_busy", "Busy.", 3.0)
    assert (proxys.code, proxys.status) == ("http_401", 401)
    assert "API key" in str(proxys)
