"""The primary API: many sessions on one socket, and nothing left behind when it closes."""

import asyncio
import json
import time

import pytest
from starlette.websockets import WebSocketDisconnect

from server import socket
from server.connection import MAX_STREAMS

LINE = "ws://127.0.0.1:8000/v1/responses"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
LONG = 4000  # tokens; longer than any test listens


def create(session="s", text="hello", most=6, **fields):
    return {
        "type": "response.create",
        "input": text,
        "conversation": session,
        "max_output_tokens": most,
        "temperature": 0,
        **fields,
    }


def until(line, *kinds):
    """Listen until an event of one of these kinds; return all that was heard."""
    heard = [line.receive_json()]
    while heard[-1]["type"] not in kinds:
        heard.append(line.receive_json())
    return heard


def until_ended(line):
    return until(line, *TERMINAL)


def wait(true, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.fixture
def room(door):
    """A server whose replies do not end by themselves, and one socket to it."""
    with door(stops=False) as (client, house), client.websocket_connect(LINE) as line:
        yield client, house, line


def test_a_turn_over_the_socket_is_told_and_kept(room):
    client, _, line = room
    line.send_json(create())

    heard = until_ended(line)

    assert [e["type"] for e in heard[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [e["sequence_number"] for e in heard] == list(range(len(heard)))
    assert heard[-1]["response"]["memory"]["outcome"] == "committed"
    assert client.get("/v1/sessions/s").json()["turns"] == 1


def test_turn_after_turn_goes_over_one_socket(room):
    _, _, line = room
    versions = []
    for _ in range(3):
        line.send_json(create())
        versions.append(until_ended(line)[-1]["response"]["memory"]["committed_version"])

    assert versions == sorted(set(versions))


def test_several_sessions_talk_at_once_on_one_socket(room):
    client, _, line = room
    names = ["a", "b", "c"]
    for name in names:
        line.send_json(create(name, most=12, stream_id=name))

    heard, open_streams = [], set(names)
    while open_streams:
        heard.append(line.receive_json())
        if heard[-1]["type"] in TERMINAL:
            open_streams.discard(heard[-1]["stream_id"])

    for name in names:
        mine = [e for e in heard if e["stream_id"] == name]
        assert [e["sequence_number"] for e in mine] == list(range(len(mine)))
        assert mine[-1]["response"]["conversation"] == {"id": name}
    streams = [e["stream_id"] for e in heard if e["type"] == "response.output_text.delta"]
    assert streams != sorted(streams), "the three took turns one after the other"
    assert len(client.get("/v1/sessions").json()["data"]) == 3


def test_a_stream_takes_one_turn_at_a_time(room):
    _, _, line = room
    line.send_json(create("a", most=LONG, stream_id="left"))
    line.send_json(create("b", stream_id="left", event_id="e2"))

    error = until(line, "error")[-1]

    assert (error["error"]["code"], error["event_id"]) == ("session_busy", "e2")
    line.send_json({"type": "response.cancel"})
    until_ended(line)
    line.send_json(create("b", stream_id="left"))
    assert until_ended(line)[-1]["type"] == "response.incomplete"


def test_a_reply_that_is_stopped_is_kept_as_far_as_it_came(room):
    client, house, line = room
    line.send_json(create(most=LONG))
    until(line, "response.output_text.delta")
    line.send_json({"type": "response.cancel"})

    last = until_ended(line)[-1]["response"]

    assert last["incomplete_details"] == {"reason": "cancelled"}
    assert last["memory"]["outcome"] == "committed"
    assert 0 < last["usage"]["output_tokens"] < LONG
    items = client.get("/v1/conversations/s/items").json()["data"]
    assert items[-1]["content"][0]["text"] == last["output"][0]["content"][0]["text"]
    wait(lambda: house.quiet)


def test_a_reply_may_be_rolled_back_when_it_is_stopped(room):
    client, _, line = room
    line.send_json(create(most=LONG, memory={"on_cancel": "rollback"}))
    until(line, "response.output_text.delta")
    line.send_json({"type": "response.cancel"})

    last = until_ended(line)[-1]["response"]

    assert last["memory"]["outcome"] == "rolled_back"
    assert client.get("/v1/sessions/s").status_code == 404


def test_one_of_two_replies_is_stopped_and_the_other_goes_on(room):
    _, _, line = room
    line.send_json(create("a", most=LONG, stream_id="a"))
    line.send_json(create("b", most=40, stream_id="b"))
    until(line, "response.output_text.delta")
    line.send_json({"type": "response.cancel", "stream_id": "a"})

    ends = [until_ended(line)[-1], until_ended(line)[-1]]

    reasons = {e["stream_id"]: e["response"]["incomplete_details"]["reason"] for e in ends}
    assert reasons == {"a": "cancelled", "b": "max_output_tokens"}


def test_a_cancel_after_the_end_is_told_and_harmless(room):
    _, _, line = room
    line.send_json(create())
    response_id = until_ended(line)[-1]["response"]["id"]
    line.send_json({"type": "response.cancel", "response_id": response_id})

    assert until(line, "error")[-1]["error"]["code"] == "invalid_request"
    line.send_json(create())
    assert until_ended(line)[-1]["response"]["memory"]["outcome"] == "committed"


@pytest.mark.parametrize("words", [0, 1, 5])
def test_a_socket_that_closes_mid_reply_rolls_back_and_stops_the_model(door, words):
    with door(stops=False) as (client, house):
        with client.websocket_connect(LINE) as line:
            line.send_json(create("kept"))
            until_ended(line)
            line.send_json(create("kept", most=LONG, stream_id="1"))
            line.send_json(create("fresh", most=LONG, stream_id="2"))
            for _ in range(words):
                until(line, "response.output_text.delta")
        wait(lambda: house.quiet)

        assert client.get("/v1/sessions/kept").json()["turns"] == 1
        assert client.get("/v1/sessions/fresh").status_code == 404
        assert house.sample("hope_websocket_connections") == 0
        assert house.sample("hope_requests_in_progress") == 0
        assert house.sample("hope_websocket_close_total", code="1000") == 1


def test_a_socket_that_closes_leaves_other_sockets_alone(room):
    client, house, line = room
    line.send_json(create("mine", most=60))
    with client.websocket_connect(LINE) as other:
        other.send_json(create("theirs", most=LONG))
        until(other, "response.output_text.delta")

    assert until_ended(line)[-1]["response"]["memory"]["outcome"] == "committed"
    wait(lambda: house.quiet)


def test_illegal_messages_are_answered_and_the_socket_stays_open(room):
    _, _, line = room
    for send, code in (
        (lambda: line.send_text("{"), "invalid_json"),
        (lambda: line.send_bytes(b"\x00\x01"), "invalid_json"),
        (lambda: line.send_json({"type": "session.update"}), "unknown_event_type"),
        (lambda: line.send_json({"type": "response.create"}), "invalid_request"),
        (lambda: line.send_json(create(text=" ")), "invalid_request"),
        (lambda: line.send_json(create(model="gpt-9")), "model_not_found"),
        (lambda: line.send_json(create(session="a b")), "invalid_request"),
        (lambda: line.send_json(create(most=1 << 20)), "invalid_request"),
    ):
        send()
        error = line.receive_json()
        assert (error["type"], error["error"]["code"]) == ("error", code)

    line.send_json(create())
    assert until_ended(line)[-1]["response"]["memory"]["outcome"] == "committed"


def test_a_refused_turn_frees_its_stream(room):
    _, _, line = room
    line.send_json(create(text=" ", stream_id="left"))
    assert line.receive_json()["stream_id"] == "left"

    line.send_json(create(stream_id="left"))

    assert until_ended(line)[-1]["type"] == "response.incomplete"


def test_a_socket_carries_only_so_many_replies(room):
    _, house, line = room
    for number in range(MAX_STREAMS + 1):
        line.send_json(create(f"s{number}", most=LONG, stream_id=str(number)))

    assert until(line, "error")[-1]["error"]["code"] == "rate_limit_exceeded"
    line.close()
    wait(lambda: house.quiet)


def test_the_session_may_stand_in_a_header_of_the_handshake(door):
    with door() as (client, _):
        headers = {"x-session-id": "s"}
        with client.websocket_connect(LINE, headers=headers) as line:
            line.send_json({"type": "response.create", "input": "hello", "max_output_tokens": 3})
            assert until_ended(line)[-1]["response"]["conversation"] == {"id": "s"}
            line.send_json(create("other"))
            assert line.receive_json()["error"]["code"] == "session_mismatch"


def test_news_of_the_memory_comes_after_the_end_to_those_who_asked(room):
    _, _, line = room
    rates = {"user": 0, "assistant": 1}
    line.send_json(create(most=20, include=["hope:memory"], memory={"rates": rates}))

    last = until_ended(line)[-1]["response"]["memory"]
    news = until(line, "hope:memory.committed")

    assert last["due_levels"] == ["fast", "slow"]
    assert {e["type"] for e in news[:-1]} == {"hope:consolidation.completed"}
    assert news[-1]["version"] == last["committed_version"] + 1


def test_a_failing_commit_is_the_last_thing_heard_of_a_turn(door, fragile):
    with door(fragile) as (client, house), client.websocket_connect(LINE) as line:
        fragile.failures.append(RuntimeError("a bug"))
        line.send_json(create())
        last = until_ended(line)[-1]

        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "internal_error"
        line.send_json(create())
        assert until_ended(line)[-1]["response"]["memory"]["base_version"] == 0
        wait(lambda: house.quiet)


def test_a_server_that_stops_takes_no_turns_from_open_sockets(door):
    with door() as (client, house), client.websocket_connect(LINE) as line:
        client.portal.call(house.turns.drain, 0)
        line.send_json(create())

        error = line.receive_json()

    assert (error["status"], error["error"]["code"], error["retry_after_s"]) == (503, "draining", 1)


def test_a_server_that_stops_tells_whoever_it_cuts_off(room):
    client, house, line = room
    line.send_json(create(most=LONG))
    until(line, "response.output_text.delta")

    client.portal.call(house.turns.drain, 0.05)

    last = until_ended(line)[-1]
    assert last["response"]["error"]["code"] == "draining"
    assert client.get("/v1/sessions/s").status_code == 404


# --- a socket that cannot be written to ---------------------------------------------------------


class Wire:
    """A socket over bare ASGI, whose other end stops taking what is sent after a while."""

    def __init__(self, *messages, accepts=1000, then=None):
        self._incoming = [{"type": "websocket.connect"}, *messages]
        self._accepts = accepts
        self._then = then
        self.sent = []
        self.scope = {
            "type": "websocket",
            "path": "/v1/responses",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")],
            "subprotocols": [],
        }

    async def receive(self):
        if self._incoming:
            return self._incoming.pop(0)
        return await self.forever()

    async def send(self, message):
        if len(self.sent) >= self._accepts:
            await self._then()
        self.sent.append(message)

    async def forever(self):
        """Block, as a full buffer does."""
        await asyncio.Event().wait()


ASKED = {"type": "websocket.receive", "text": json.dumps(create(most=LONG))}


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_same_breath_leaves_no_turn(endless):
    wire = Wire(ASKED, ASKED, {"type": "websocket.disconnect", "code": 1001})

    await asyncio.wait_for(endless.app(wire.scope, wire.receive, wire.send), 5)

    await endless.idle()
    assert endless.sample("hope_websocket_close_total", code="1001") == 1
    assert (await endless.store.sessions("local")).heads == ()


@pytest.mark.anyio
async def test_a_client_that_reads_too_slowly_is_cut_off_and_its_turn_rolled_back(
    endless, monkeypatch
):
    monkeypatch.setattr(socket, "PATIENCE", 0.05)
    monkeypatch.setattr(socket, "FAREWELL", 0.05)
    wire = Wire(ASKED, accepts=6)
    wire._then = wire.forever

    await asyncio.wait_for(endless.app(wire.scope, wire.receive, wire.send), 5)

    await endless.idle()
    assert endless.sample("hope_websocket_close_total", code="1013") == 1
    assert (await endless.store.sessions("local")).heads == ()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [OSError("broken pipe"), RuntimeError("Unexpected ASGI message")], ids=["os", "asgi"]
)
async def test_a_connection_that_breaks_mid_reply_ends_its_turn_quietly(endless, error):
    async def broken():
        raise error

    wire = Wire(ASKED, accepts=6, then=broken)

    await asyncio.wait_for(endless.app(wire.scope, wire.receive, wire.send), 5)

    await endless.idle()
    assert endless.sample("hope_websocket_close_total", code="1006") == 1
    assert (await endless.store.sessions("local")).heads == ()


def test_a_socket_to_nowhere_is_closed(door):
    with (
        door() as (client, _),
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect(LINE.replace("responses", "nowhere")),
    ):
        pass
