"""Every endpoint over HTTP, as the SDKs of other servers call it."""

import asyncio
import json

import pytest

from memory_store import Unavailable

pytestmark = pytest.mark.anyio

SAY = {"input": "hello", "max_output_tokens": 6, "temperature": 0}
CHAT = {"max_tokens": 6, "temperature": 0}


@pytest.fixture
async def http(endless):
    async with endless.client() as client:
        yield client


def events(answer):
    """Return the events of a stream of the Responses API."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in answer.text.strip().split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def chunks(answer):
    """Return the chunks of a streamed chat completion, and what came last."""
    lines = [line.removeprefix("data: ") for line in answer.text.strip().split("\n\n")]
    return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1]


def error(answer, status, code):
    """Check the one shape of errors."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "code", "message", "param", "retry_after_s"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    return body["error"]


def user(text):
    return {"role": "user", "content": text}


# --- responses ----------------------------------------------------------------------------------


async def test_a_fresh_window_begins_a_new_conversation_in_the_same_session(http):
    async def said(text, **memory):
        body = {**SAY, "input": text, "conversation": "s", "memory": memory}
        answer = (await http.post("/v1/responses", json=body)).json()
        return answer["output"][0]["content"][0]["text"], answer["usage"]["input_tokens"]

    first = await said("hello", mode="off")
    await said("my name is ada")
    looked = await said("hello", mode="read_only", window="fresh")
    assert looked == first  # nothing was learned yet, and nothing is left in the window
    assert (await said("hello", mode="read_only")) != first
    await said("hello", window="fresh")
    session = (await http.get("/v1/sessions/s")).json()
    assert session["version"] == 2
    assert len((await http.get("/v1/conversations/s/items")).json()["data"]) == 4


async def test_instructions_hold_in_a_fresh_window_when_they_are_sent_again(http):
    async def read(**fields):
        body = {**SAY, "conversation": "s", "instructions": "be brief and kind", **fields}
        return (await http.post("/v1/responses", json=body)).json()["usage"]["input_tokens"]

    first = await read()
    assert await read() < first  # known already
    assert await read(memory={"window": "fresh"}) == first


async def test_a_response_is_whole_and_says_what_became_of_the_memory(http):
    answer = await http.post("/v1/responses", json={**SAY, "conversation": "s"})

    body = answer.json()
    assert answer.status_code == 200
    assert (body["object"], body["status"], body["model"]) == ("response", "incomplete", "random")
    assert body["output"][0]["content"][0]["type"] == "output_text"
    assert body["conversation"] == {"id": "s"}
    assert body["usage"]["output_tokens"] == 6
    assert body["memory"]["outcome"] == "committed"
    assert body["memory"]["durability"] == "memory"
    assert body["memory"]["committed_version"] == 1


async def test_a_stream_says_the_same_as_a_whole_response(http):
    whole = (await http.post("/v1/responses", json={**SAY, "conversation": "a"})).json()
    answer = await http.post("/v1/responses", json={**SAY, "conversation": "b", "stream": True})

    told = events(answer)
    deltas = [e["delta"] for e in told if e["type"] == "response.output_text.delta"]
    text = whole["output"][0]["content"][0]["text"]
    assert told[0]["type"] == "response.created"
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == "".join(deltas) == text
    assert [e["sequence_number"] for e in told] == list(range(len(told)))
    assert answer.headers["cache-control"] == "no-store"


async def test_a_stream_that_fails_says_so_in_its_last_event(http):
    said = {**SAY, "conversation": "s", "memory": {"if_version": 7}, "stream": True}

    answer = await http.post("/v1/responses", json=said)

    assert answer.status_code == 200
    told = events(answer)
    assert [e["type"] for e in told][-1] == "response.failed"
    assert told[-1]["response"]["error"]["code"] == "precondition_failed"
    assert told[-1]["response"]["memory"]["outcome"] == "rolled_back"


async def test_the_session_may_stand_in_a_header(http):
    await http.post("/v1/responses", json=SAY, headers={"x-session-id": "s"})
    await http.post("/v1/responses", json=SAY, headers={"session-id": "s"})

    assert (await http.get("/v1/sessions/s")).json()["turns"] == 2


async def test_body_and_header_must_name_the_same_session(http):
    said = {**SAY, "conversation": {"id": "a"}}

    assert (
        error(
            await http.post("/v1/responses", json=said, headers={"x-session-id": "b"}),
            400,
            "session_mismatch",
        )["param"]
        == "conversation"
    )
    assert (
        await http.post("/v1/responses", json=said, headers={"x-session-id": "a"})
    ).status_code == 200


async def test_messages_of_every_role_are_taken(http):
    said = {
        **SAY,
        "conversation": "s",
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "Be kind."},
            {"role": "document", "content": "It rains in the hills."},
            {"role": "user", "content": [{"type": "input_text", "text": "what is the weather?"}]},
        ],
    }

    assert (await http.post("/v1/responses", json=said)).status_code == 200
    items = (await http.get("/v1/conversations/s/items")).json()["data"]
    assert [item["role"] for item in items] == [
        "system",
        "system",
        "document",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"previous_response_id": "resp_1"}, 404, "previous_response_not_found", None),
        ({"input": ""}, 400, "invalid_request", "input"),
        ({"input": "  \n"}, 400, "invalid_request", "input"),
        ({"input": []}, 400, "invalid_request", "input"),
        ({"input": [user("hello"), user(" ")]}, 400, "invalid_request", "input"),
        ({"input": [user("hello \ud800")]}, 400, "invalid_request", None),
        ({"metadata": {"name": "\udc00"}}, 400, "invalid_request", None),
        ({"input": [{"role": "king", "content": "hello"}]}, 400, "invalid_request", None),
        ({"input": None}, 400, "invalid_request", None),
        ({"max_output_tokens": 0}, 400, "invalid_request", "max_output_tokens"),
        ({"max_output_tokens": 1 << 20}, 400, "invalid_request", "max_output_tokens"),
        ({"temperature": 3}, 400, "invalid_request", "temperature"),
        ({"conversation": "a b"}, 400, "invalid_request", "conversation"),
        ({"conversation": "../s"}, 400, "invalid_request", "conversation"),
        ({"conversation": {}}, 400, "invalid_request", None),
        ({"memory": {"mode": "maybe"}}, 400, "invalid_request", "memory.mode"),
        (
            {"memory": {"mode": "off", "if_version": 1}},
            400,
            "invalid_request",
            "memory.if_version",
        ),
        (
            {"conversation": None, "memory": {"if_version": 1}},
            400,
            "invalid_request",
            "memory.if_version",
        ),
        ({"memory": {"rates": {"king": 1}}}, 400, "invalid_request", None),
        ({"memory": {"rates": {"user": 11}}}, 400, "invalid_request", None),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused(http, change, status, code, param):
    body = json.dumps({**SAY, "conversation": "s", **change})
    answer = await http.post(
        "/v1/responses", content=body, headers={"content-type": "application/json"}
    )

    found = error(answer, status, code)
    assert param is None or found["param"] == param
    assert (await http.get("/v1/sessions")).json()["data"] == []


async def test_a_body_of_another_type_is_told_what_to_send(http):
    answer = await http.post("/v1/responses", data={"input": "hello"})
    nothing = await http.post("/v1/responses")

    assert "Content-Type: application/json" in error(answer, 400, "invalid_json")["message"]
    assert error(nothing, 400, "invalid_request")["message"].startswith("the body: ")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/conversations"])
@pytest.mark.parametrize("body", ["{", " ", "[]", '"text"', "\x00"])
async def test_a_body_that_is_no_object_is_refused(http, path, body):
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_request")


async def test_a_body_that_is_too_large_is_refused(build):
    async with build(max_body_bytes=2048) as house, house.client() as http:
        answer = await http.post("/v1/responses", json={**SAY, "input": "x" * 4096})

        assert "2048" in error(answer, 413, "message_too_large")["message"]
        assert (await http.post("/v1/responses", json=SAY)).status_code == 200


async def test_a_body_of_unknown_length_that_grows_too_large_is_refused(build):
    async def body():
        for _ in range(100):
            yield b" " * 100

    async with build(max_body_bytes=2048) as house, house.client() as http:
        answer = await http.post(
            "/v1/responses", content=body(), headers={"content-type": "application/json"}
        )

    assert "2048" in error(answer, 413, "message_too_large")["message"]


async def test_an_input_of_too_many_tokens_is_refused(build):
    async with build(max_input_tokens=40) as house, house.client() as http:
        answer = await http.post("/v1/responses", json={**SAY, "input": "x" * 60})

    assert error(answer, 413, "message_too_large")["param"] == "input"


async def test_an_unknown_place_and_a_wrong_method_are_told_in_the_same_shape(http):
    error(await http.get("/v1/none"), 404, "not_found")
    error(await http.get("/v1/responses"), 405, "method_not_allowed")
    error(await http.get("/page/none.js"), 404, "not_found")
    error(await http.get("/page/..%2fapp.py"), 404, "not_found")


async def test_a_busy_session_says_when_to_come_again(build, fragile):
    async with build(fragile, turns_waiting=0) as house, house.client() as http:
        fragile.going_on.clear()
        first = house.start("hello")
        await asyncio.sleep(0)
        answer = await http.post("/v1/responses", json={**SAY, "conversation": "s"})
        fragile.going_on.set()
        async for _ in first:
            pass

    error(answer, 409, "session_busy")
    assert answer.headers["retry-after"] == "1"


async def test_a_bug_is_told_without_its_details(build, fragile):
    async with build(fragile) as house, house.client() as http:
        fragile.failures.append(RuntimeError("the password is hunter2"))
        answer = await http.post("/v1/responses", json={**SAY, "conversation": "s"})

    assert "hunter2" not in answer.text
    error(answer, 500, "internal_error")


# --- a client that leaves -----------------------------------------------------------------------


class Leaver:
    """A client over bare ASGI that leaves once it has heard enough."""

    def __init__(self, path, body, patience):
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._body = json.dumps(body).encode()
        self._patience = patience
        self._read = False
        self._gone = asyncio.Event()
        self.heard = []

    async def receive(self):
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self._gone.is_set():
            return  # as uvicorn does
        self.heard.append(message)
        if self._patience and len(self.heard) >= self._patience:
            self._gone.set()

    async def call(self, house, seconds=None):
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self._gone.set)
        await asyncio.wait_for(house.app(self.scope, self.receive, self.send), 10)


@pytest.mark.parametrize("patience", [1, 2, 8])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_a_client_that_leaves_its_stream_leaves_no_turn(endless, path, patience):
    body = {"input": "hello", "messages": [user("hello")], "conversation": "s", "stream": True}

    await Leaver(path, {**body, "max_tokens": 4000, "max_output_tokens": 4000}, patience).call(
        endless
    )

    await endless.idle()
    assert (await endless.store.sessions("local")).heads == ()
    endpoint = path.removeprefix("/v1/").replace("/", "_")
    assert (
        endless.sample(
            "hope_requests_total",
            endpoint=endpoint,
            transport="sse",
            outcome="failed",
            code="disconnected",
        )
        == 1
    )


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_a_client_that_leaves_before_its_answer_leaves_no_turn(endless, path):
    """The words come so fast that nobody would look up between two of them."""
    body = {"input": "hello", "messages": [user("hello")], "conversation": "s"}
    leaver = Leaver(path, {**body, "max_tokens": 4000, "max_output_tokens": 4000}, None)

    await leaver.call(endless, seconds=0.1)

    await endless.idle()
    assert (await endless.store.sessions("local")).heads == ()


# --- chat completions ---------------------------------------------------------------------------


async def test_a_chat_completion_has_the_usual_shape(http):
    answer = await http.post("/v1/chat/completions", json={**CHAT, "messages": [user("hello")]})

    body = answer.json()
    assert (body["object"], body["model"]) == ("chat.completion", "random")
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["completion_tokens"] == 6
    assert body["memory"]["outcome"] == "off"
    assert (await http.get("/v1/sessions")).json()["data"] == []


async def test_a_streamed_completion_adds_up_to_the_whole_one(http):
    said = {**CHAT, "messages": [user("hello")]}
    whole = (await http.post("/v1/chat/completions", json=said)).json()
    answer = await http.post("/v1/chat/completions", json={**said, "stream": True})

    parts, last = chunks(answer)
    assert last == "[DONE]"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert len({p["id"] for p in parts}) == 1
    assert "usage" not in parts[-1]


async def test_usage_comes_last_where_it_was_asked_for(http):
    said = {**CHAT, "messages": [user("hello")], "stream": True}

    answer = await http.post(
        "/v1/chat/completions", json={**said, "stream_options": {"include_usage": True}}
    )

    parts, _ = chunks(answer)
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 6


async def test_a_stream_of_chunks_that_fails_says_so_instead_of_done(http):
    said = {**CHAT, "messages": [user("hello")], "conversation": "s", "stream": True}

    answer = await http.post("/v1/chat/completions", json={**said, "memory": {"if_version": 7}})

    parts, last = chunks(answer)
    assert last != "[DONE]"
    assert parts[-1]["error"]["code"] == "precondition_failed"


async def test_a_resent_history_is_read_once(http):
    history, path = [], "/v1/chat/completions"
    read = []
    for text in ("hello", "how are you?", "and now?"):
        history.append(user(text))
        body = (
            await http.post(path, json={**CHAT, "messages": history, "conversation": "s"})
        ).json()
        history.append(body["choices"][0]["message"])
        read.append(body["usage"])

    items = (await http.get("/v1/conversations/s/items")).json()["data"]
    assert [item["content"][0]["text"] for item in items] == [m["content"] for m in history]
    assert read[2]["prompt_tokens"] > read[1]["prompt_tokens"]


async def test_a_resent_history_says_what_new_messages_alone_would_have(http):
    path = "/v1/chat/completions"
    first = {**CHAT, "messages": [user("hello")]}
    reply = (await http.post(path, json={**first, "conversation": "a"})).json()
    await http.post(path, json={**first, "conversation": "b"})

    whole = [user("hello"), reply["choices"][0]["message"], user("and now?")]
    resent = await http.post(path, json={**CHAT, "messages": whole, "conversation": "a"})
    alone = await http.post(path, json={**CHAT, "messages": whole[-1:], "conversation": "b"})

    texts = [a.json()["choices"][0]["message"]["content"] for a in (resent, alone)]
    assert texts[0] == texts[1]
    usages = [a.json()["usage"]["prompt_tokens"] for a in (resent, alone)]
    assert usages[0] > usages[1]


async def test_a_history_that_was_edited_is_refused(http):
    path = "/v1/chat/completions"
    await http.post(path, json={**CHAT, "messages": [user("hello")], "conversation": "s"})
    edited = [user("hello"), {"role": "assistant", "content": "never said"}, user("and now?")]

    answer = await http.post(path, json={**CHAT, "messages": edited, "conversation": "s"})

    assert error(answer, 409, "history_diverged")["param"] == "messages"
    assert (await http.get("/v1/sessions/s")).json()["turns"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [user("")]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user"}]},
        {"messages": "hello"},
        {"n": 2},
        {"max_tokens": 0},
        {"max_completion_tokens": 1 << 20},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
async def test_a_chat_that_cannot_be_served_is_refused(http, change):
    answer = await http.post(
        "/v1/chat/completions", json={**CHAT, "messages": [user("hello")], **change}
    )

    error(answer, 400, "invalid_request")


# --- conversations and sessions -----------------------------------------------------------------


async def test_a_conversation_is_created_empty_talked_to_and_deleted(http):
    made = (await http.post("/v1/conversations", json={"metadata": {"name": "Ada"}})).json()
    assert (made["object"], made["metadata"]) == ("conversation", {"name": "Ada"})
    path = f"/v1/conversations/{made['id']}"
    assert (await http.get(path)).json() == made
    assert (await http.get(f"{path}/items")).json()["data"] == []

    said = {**SAY, "conversation": made["id"]}
    assert (await http.post("/v1/responses", json=said)).json()["memory"]["base_version"] == 1
    items = (await http.get(f"{path}/items")).json()
    assert [item["role"] for item in items["data"]] == ["user", "assistant"]
    assert items["data"][1]["status"] == "incomplete"
    assert (items["first_id"], items["last_id"]) == (items["data"][0]["id"], items["data"][1]["id"])

    gone = (await http.delete(path)).json()
    assert (gone["object"], gone["deleted"]) == ("conversation.deleted", True)
    assert gone["keys"] > 0
    error(await http.get(path), 410, "session_deleted")
    error(await http.get(f"{path}/items"), 410, "session_deleted")
    error(await http.post("/v1/responses", json=said), 410, "session_deleted")
    error(await http.delete(path), 410, "session_deleted")


async def test_a_conversation_needs_no_body(http):
    assert (await http.post("/v1/conversations")).json()["metadata"] == {}


async def test_items_for_a_new_conversation_are_refused_and_not_forgotten(http):
    answer = await http.post("/v1/conversations", json={"items": [user("hello")]})

    assert error(answer, 400, "invalid_request")["param"] == "items"
    assert (await http.post("/v1/conversations", json={"items": []})).status_code == 200


async def test_two_conversations_are_two(http):
    made = [(await http.post("/v1/conversations", json={})).json()["id"] for _ in range(2)]

    assert made[0] != made[1]


@pytest.mark.parametrize("path", ["/v1/sessions/s", "/v1/conversations/s"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_unknown_session_is_not_found(http, method, path):
    found = error(await http.request(method, path), 404, "conversation_not_found")

    assert found["type"] == "not_found_error"
    assert "'s'" in found["message"]


async def test_items_of_an_unknown_session_are_not_found(http):
    error(await http.get("/v1/conversations/s/items"), 404, "conversation_not_found")


async def test_a_session_tells_its_size_and_how_each_level_stands(http):
    said = {**SAY, "conversation": "s", "input": "it rains in the hills today"}
    memory = (await http.post("/v1/responses", json=said)).json()["memory"]

    body = (await http.get("/v1/sessions/s")).json()

    assert (body["id"], body["version"], body["turns"]) == ("s", memory["committed_version"], 1)
    assert body["tokens"] > 30
    assert body["bytes"] > 1000
    assert body["surprise"] == pytest.approx(memory["surprise"])
    assert (body["learning"], body["durability"]) == (True, "memory")
    fast, slow = body["levels"]
    assert (fast["name"], fast["chunk"], fast["blocks"]) == ("fast", 8, [3])
    assert fast["updates"] > slow["updates"] > 0
    assert fast["last_position"] % 8 == slow["last_position"] % 16 == 0
    assert fast["movement"] > 0
    assert fast["last_at"] == pytest.approx(body["updated_at"], abs=5)
    assert fast["last_outcome"] in ("applied", "clipped")


async def test_an_empty_session_has_levels_that_never_learned(http):
    made = (await http.post("/v1/conversations")).json()

    body = (await http.get(f"/v1/sessions/{made['id']}")).json()

    assert (body["version"], body["turns"], body["tokens"]) == (1, 0, 0)
    assert {level["updates"] for level in body["levels"]} == {0}
    assert {level["last_at"] for level in body["levels"]} == {None}


async def test_sessions_are_listed_by_pages_the_latest_first(http):
    for number in range(5):
        await http.post("/v1/responses", json={**SAY, "conversation": f"s{number}"})

    pages, cursor = [], None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await http.get("/v1/sessions", params=query)).json()
        pages.append([session["id"] for session in page["data"]])
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break

    assert pages == [["s4", "s3"], ["s2", "s1"], ["s0"]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "query.limit"),
        ({"limit": 201}, "query.limit"),
        ({"limit": "x"}, "query.limit"),
        ({"cursor": "nonsense"}, "cursor"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(http, query, param):
    answer = await http.get("/v1/sessions", params=query)

    assert error(answer, 400, "invalid_request")["param"] == param


async def test_a_deleted_session_leaves_the_list(http):
    for name in ("a", "b"):
        await http.post("/v1/responses", json={**SAY, "conversation": name})

    assert (await http.delete("/v1/sessions/a")).json()["id"] == "a"

    assert [s["id"] for s in (await http.get("/v1/sessions")).json()["data"]] == ["b"]


async def test_a_session_id_that_cannot_be_one_is_refused(http):
    error(await http.get("/v1/sessions/a%20b"), 400, "invalid_request")


# --- models and operations ----------------------------------------------------------------------


async def test_the_model_is_listed_with_its_shape(http):
    body = (await http.get("/v1/models")).json()

    [card] = body["data"]
    assert (body["object"], card["id"], card["object"]) == ("list", "random", "model")
    assert card["levels"][0]["name"] == "fast"
    assert (await http.get("/v1/models/random")).json() == card


@pytest.mark.parametrize("name", ["none", "org/none"])
async def test_an_unknown_model_is_not_found(http, name):
    found = error(await http.get(f"/v1/models/{name}"), 404, "model_not_found")

    assert found["param"] == "model"
    assert "use 'random'" in found["message"]


@pytest.mark.parametrize("name", ["random", "default", ""])
async def test_the_model_may_be_named_or_left_open(http, name):
    assert (await http.post("/v1/responses", json={**SAY, "model": name})).status_code == 200


async def test_a_healthy_server_is_ready_and_says_what_it_promises(http):
    assert (await http.get("/health/live")).json()["status"] == "ok"
    ready = (await http.get("/health/ready")).json()
    assert (ready["status"], ready["durability"]) == ("ok", "memory")


async def test_a_server_whose_store_is_gone_is_alive_but_not_ready(build, fragile):
    async with build(fragile) as house, house.client() as http:
        fragile.down = Unavailable("10.0.0.5:6379", "connection refused")
        ready = await http.get("/health/ready")

        assert ready.status_code == 503
        assert ready.json()["status"] == "store_unavailable"
        assert (await http.get("/health/live")).status_code == 200
        answer = await http.get("/v1/sessions")
        error(answer, 503, "store_unavailable")
        assert answer.headers["retry-after"] == "2"
        fragile.down = None
        assert (await http.get("/health/ready")).status_code == 200


async def test_a_server_that_stops_says_so_and_takes_no_turns(build):
    async with build() as house, house.client() as http:
        await house.turns.drain(0)

        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        for path, body in (
            ("/v1/responses", SAY),
            ("/v1/responses", {**SAY, "stream": True}),
            ("/v1/chat/completions", {**CHAT, "messages": [user("hello")]}),
        ):
            error(await http.post(path, json=body), 503, "draining")
        assert house.sample("hope_draining") == 1
