"""The client's side of the wire as a transcript: what arrives, and what it means."""

from __future__ import annotations

import json

import pytest

from clients import core
from clients.errors import ConnectionLost, ProtocolViolation, Refused
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
        "memory": {"mode": "read_write", "if_version": 3, "on_cancel": "keep"},
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
