"""A turn that is asked for twice under its id is learned once, and answered twice."""

import asyncio
import json

import pytest

from hope_runtime.tokenizer import Role
from memory_store import Conflict, Full, LocalStore, SessionKey
from server.security import LOCAL
from server.turn import Began, Ended, Kept, Words
from server.wire import Mode, Outcome

KEY = SessionKey(LOCAL, "s")
LINE = "ws://127.0.0.1:8000/v1/responses"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
SAY = {"input": "hello", "conversation": "s", "max_output_tokens": 6, "turn_id": "t-1"}
CHAT = {
    "messages": [{"role": "user", "content": "hello"}],
    "conversation": "s",
    "max_tokens": 6,
    "turn_id": "t-1",
}


def said(happenings):
    return "".join(each.text for each in happenings if isinstance(each, Words))


def one(kind, happenings):
    [found] = [each for each in happenings if isinstance(each, kind)]
    return found


def told(ended):
    """Return what a terminal event says of a turn, whether it is the first time or not."""
    memory = ended.memory.model_copy(update={"replayed": False})
    return ended.status, ended.reason, ended.read, ended.skipped, ended.said, memory


async def turns_of(house):
    return (await house.head()).meta["book"]["turns"]


async def until_said(turn, words=3):
    while words:
        words -= isinstance(await anext(turn), Words)


# --- inside -------------------------------------------------------------------------------------


async def completed(build, house):
    return await house.turn("hello", most=400, turn_id="t-1")


async def incomplete(build, house):
    return await house.turn("hello", most=6, turn_id="t-1")


async def cancelled(build, house):
    turn = house.start("hello", most=4000, turn_id="t-1")
    heard = []
    while sum(isinstance(each, Words) for each in heard) < 3:
        heard.append(await anext(turn))
    turn.cancel(keep=True)
    return heard + [each async for each in turn]


@pytest.mark.anyio
@pytest.mark.parametrize("had", [completed, incomplete, cancelled])
async def test_a_turn_that_is_asked_for_again_is_answered_as_the_first_time(build, fragile, had):
    async with build(fragile, stops=had is completed) as house:
        first = await had(build, house)
        await house.idle()
        before = await house.head()

        again = await house.turn("hello", most=400, turn_id="t-1")

        assert said(again) == said(first)
        ended = one(Ended, again)
        assert told(ended) == told(one(Ended, first))
        assert ended.memory.replayed
        assert ended.memory.outcome is Outcome.COMMITTED
        assert one(Began, again).base_version == one(Ended, first).memory.base_version
        assert not [each for each in again if isinstance(each, Kept)]
        assert await house.head() == before
        assert house.sample("hope_duplicate_turns_total") == 1


@pytest.mark.anyio
async def test_another_turn_under_the_same_id_is_refused(endless):
    await endless.ended("hello", turn_id="t-1")
    before = await endless.head()

    for change in ({"text": "goodbye"}, {"text": "hello", "instructions": "Be kind."}):
        refused = await endless.ended(**change, turn_id="t-1")

        assert (refused.error.status, refused.error.code) == (409, "turn_id_reused")
        assert refused.error.param == "turn_id"
    assert await endless.head() == before
    assert endless.sample("hope_duplicate_turns_total") == 0


@pytest.mark.anyio
async def test_the_same_id_in_another_session_is_another_turn(endless):
    for session in ("a", "b"):
        assert not (await endless.ended("hello", session, turn_id="t")).memory.replayed


@pytest.mark.anyio
async def test_a_retry_may_come_after_other_turns_and_changes_nothing_for_the_next(build):
    async with build(stops=False) as house, build(stops=False) as twin:
        for text in ("my name is Ada", "it rains"):
            await house.turn(text, turn_id=text)
            await twin.turn(text)

        again = await house.ended("my name is Ada", turn_id="my name is Ada")

        assert again.memory.committed_version < (await house.head()).version
        assert await house.reply("who am I?") == await twin.reply("who am I?")


@pytest.mark.anyio
async def test_turns_that_failed_or_were_rolled_back_can_be_tried_again(build, fragile):
    async with build(fragile, stops=False) as house:
        fragile.failures.append(Full("no room"))
        assert (await house.ended("hello", turn_id="t-1")).error.code == "store_full"
        turn = house.start("hello", most=4000, turn_id="t-1")
        await until_said(turn)
        turn.cancel(keep=False)
        async for _ in turn:
            pass
        await house.ended("hello", turn_id="t-1", mode=Mode.READ_ONLY)

        ended = await house.ended("hello", turn_id="t-1")

        assert ended.memory.outcome is Outcome.COMMITTED
        assert not ended.memory.replayed
        assert await turns_of(house) == 1


@pytest.mark.anyio
async def test_a_retry_on_a_server_that_was_started_again_is_not_learned(build):
    store = LocalStore()
    async with build(store, stops=False) as house:
        first = await house.turn("hello", turn_id="t-1")
    async with build(store, stops=False) as house:
        again = await house.turn("hello", turn_id="t-1")

        assert said(again) == said(first)
        assert one(Ended, again).memory.replayed
        assert await turns_of(house) == 1


@pytest.mark.anyio
async def test_a_retry_of_a_turn_that_was_rolled_back_since_is_not_learned(endless):
    quiet = {"rates": ((Role.USER, 0.0),)}
    await endless.turn("hello", **quiet)
    await endless.turn("my name is Ada", turn_id="t-1", **quiet)
    async with endless.client() as http:
        await http.post("/v1/sessions/s/rollback", json={"version": 1})

    again = await endless.ended("my name is Ada", turn_id="t-1", **quiet)

    assert again.memory.replayed
    assert again.memory.committed_version == 2
    assert await turns_of(endless) == 1


@pytest.mark.anyio
async def test_five_retries_at_once_on_two_servers_are_one_turn(build):
    store = LocalStore()
    async with (
        build(store, server_id="a", stops=False) as left,
        build(store, server_id="b", stops=False) as right,
    ):
        houses = (left, right, left, right, left)
        replies = await asyncio.gather(
            *(house.turn("hello", most=24, turn_id="t-1") for house in houses)
        )

        assert len({said(reply) for reply in replies}) == 1
        ends = [one(Ended, reply) for reply in replies]
        assert [ended.memory.outcome for ended in ends] == [Outcome.COMMITTED] * 5
        assert sorted(ended.memory.replayed for ended in ends) == [False] + [True] * 4
        assert len({ended.memory.committed_version for ended in ends}) == 1
        assert await turns_of(left) == 1
        assert len(await store.turns(KEY)) == 1


@pytest.mark.anyio
async def test_a_retry_after_the_store_fell_silent_tells_what_became_of_the_turn(build, fragile):
    async with build(fragile, stops=False) as house:
        await house.turn("hello", rates=((Role.USER, 0.0),))
        fragile.mute = True
        first = await house.turn("my name is Ada", turn_id="t-1")
        assert one(Ended, first).memory.outcome is Outcome.UNKNOWN
        fragile.mute = False

        again = await house.turn("my name is Ada", turn_id="t-1")

        ended = one(Ended, again)
        assert ended.memory.replayed
        assert (ended.memory.base_version, ended.memory.committed_version) == (1, 2)
        assert said(again) == said(first)
        assert await turns_of(house) == 2
        assert ended.memory.recovered is None
        assert house.sample("hope_store_version_regressions_total") == 0


@pytest.mark.anyio
async def test_a_retry_after_a_commit_that_never_came_through_is_learned(build, fragile):
    async with build(fragile, stops=False) as house:
        fragile.failures.append(Conflict("s", expected=0, found=1))
        await house.turn("hello", turn_id="t-1")

        assert not (await house.ended("hello", turn_id="t-1")).memory.replayed
        assert await turns_of(house) == 1


# --- on the wire --------------------------------------------------------------------------------


def last(answer):
    """Return the response of a stream's terminal event."""
    data = answer.text.strip().split("\n\n")[-1].split("\n")[1]
    return json.loads(data.removeprefix("data: "))["response"]


def same(first, again):
    """Check that two responses say the same of one turn, the second that it was had before."""
    assert [part["content"] for part in again["output"]] == [
        part["content"] for part in first["output"]
    ]
    for name in ("status", "usage", "incomplete_details", "error"):
        assert again[name] == first[name]
    assert first["memory"] == {**again["memory"], "replayed": False}
    assert again["memory"]["replayed"]


@pytest.mark.anyio
@pytest.mark.parametrize("stops", [True, False], ids=["completed", "incomplete"])
async def test_over_http_and_as_a_stream_a_retry_says_the_same(build, stops):
    async with build(stops=stops) as house, house.client() as http:
        most = {"max_output_tokens": 400 if stops else 6}
        first = (await http.post("/v1/responses", json={**SAY, **most})).json()
        assert first["status"] == ("completed" if stops else "incomplete")

        same(first, (await http.post("/v1/responses", json={**SAY, **most})).json())
        stream = await http.post("/v1/responses", json={**SAY, **most, "stream": True})
        same(first, last(stream))
        deltas = [
            json.loads(line[6:])["delta"]
            for line in stream.text.splitlines()
            if line.startswith("data: ") and '"response.output_text.delta"' in line
        ]
        assert "".join(deltas) == first["output"][0]["content"][0]["text"]
        assert (await http.get("/v1/sessions/s")).json()["turns"] == 1
        other = await http.post("/v1/responses", json={**SAY, "input": "goodbye"})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "turn_id_reused")


@pytest.mark.anyio
async def test_over_chat_completions_a_retry_says_the_same(endless):
    async with endless.client() as http:
        first = (await http.post("/v1/chat/completions", json=CHAT)).json()
        again = (await http.post("/v1/chat/completions", json=CHAT)).json()
        asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        stream = await http.post("/v1/chat/completions", json=asked)

        assert again["choices"] == first["choices"]
        assert again["usage"] == first["usage"]
        assert again["memory"]["replayed"]
        parts = [json.loads(line[6:]) for line in stream.text.split("\n\n")[:-2]]
        text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts[:-1])
        assert text == first["choices"][0]["message"]["content"]
        assert parts[-1]["usage"] == first["usage"]
        assert (await http.get("/v1/sessions/s")).json()["turns"] == 1


def heard(line):
    """Return the response of the next terminal event."""
    while (event := line.receive_json())["type"] not in TERMINAL:
        pass
    return event["response"]


def test_over_a_socket_the_event_id_names_the_turn(door):
    asked = {
        "type": "response.create",
        "event_id": "e-1",
        "input": "hello",
        "conversation": "s",
        "max_output_tokens": 6,
    }
    with door(stops=False) as (client, _):
        with client.websocket_connect(LINE) as line:
            line.send_json(asked)
            first = heard(line)
        with client.websocket_connect(LINE) as line:  # the first one broke
            line.send_json(asked)
            same(first, heard(line))
            line.send_json({**asked, "turn_id": "t-2"})
            assert not heard(line)["memory"]["replayed"]
            line.send_json({**asked, "input": "goodbye"})
            assert heard(line)["error"]["code"] == "turn_id_reused"
        same(first, client.post("/v1/responses", json={**SAY, "turn_id": "e-1"}).json())
        assert client.get("/v1/sessions/s").json()["turns"] == 2


def test_a_reply_that_was_stopped_and_kept_is_replayed_as_far_as_it_came(door):
    asked = {
        "type": "response.create",
        "event_id": "e-1",
        "input": "hello",
        "conversation": "s",
        "max_output_tokens": 4000,
    }
    with door(stops=False) as (client, _), client.websocket_connect(LINE) as line:
        line.send_json(asked)
        while line.receive_json()["type"] != "response.output_text.delta":
            pass
        line.send_json({"type": "response.cancel"})
        first = heard(line)
        assert first["incomplete_details"] == {"reason": "cancelled"}

        line.send_json(asked)
        same(first, heard(line))


@pytest.mark.anyio
@pytest.mark.parametrize("turn_id", ["", "x" * 257, 7])
async def test_a_turn_id_that_cannot_be_one_is_refused(endless, turn_id):
    async with endless.client() as http:
        answer = await http.post("/v1/responses", json={**SAY, "turn_id": turn_id})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "turn_id"


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_durable_turn_says_that_it_is_on_disk_and_so_does_its_retry(build, lasting):
    async with build(lasting, stops=False) as house, house.client() as http:
        body = {**SAY, "memory": {"wait": "durable"}}
        first = (await http.post("/v1/responses", json=body)).json()
        again = (await http.post("/v1/responses", json=body)).json()
        usual = (await http.post("/v1/responses", json={**SAY, "turn_id": "t-2"})).json()
        asked_later = {**SAY, "turn_id": "t-2", "memory": {"wait": "durable"}}
        later = (await http.post("/v1/responses", json=asked_later)).json()
        looked = {**SAY, "turn_id": "t-3", "memory": {"wait": "durable", "mode": "read_only"}}
        read_only = (await http.post("/v1/responses", json=looked)).json()

        assert first["memory"]["durable"] is True
        same(first, again)
        assert usual["memory"]["durable"] is None
        assert later["memory"]["replayed"]
        assert later["memory"]["durable"] is True
        assert read_only["memory"]["durable"] is None
        assert await turns_of(house) == 2


@pytest.mark.anyio
async def test_a_server_may_wait_for_the_disk_by_default(build, lasting):
    async with build(lasting, stops=False, wait="durable") as house, house.client() as http:
        first = (await http.post("/v1/responses", json=SAY)).json()
        body = {**SAY, "turn_id": "t-2", "memory": {"wait": "committed"}}
        second = (await http.post("/v1/responses", json=body)).json()

    assert first["memory"]["durable"] is True
    assert second["memory"]["durable"] is None


@pytest.mark.anyio
async def test_a_store_that_cannot_say_what_is_on_disk_refuses_durable_turns_by_name(endless):
    async with endless.client() as http:
        answer = await http.post("/v1/responses", json={**SAY, "memory": {"wait": "durable"}})

        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "durability_unavailable")
        assert error["param"] == "memory.wait"
        assert "durability memory" in error["message"]
        assert (await http.get("/v1/sessions")).json()["data"] == []
