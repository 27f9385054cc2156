"""A model that remembers instead of attending, served end to end."""

import pytest

from hope_runtime.weights.random import tiny_mixed, tiny_native
from memory_store import LocalStore
from server.service import Card
from server.turns import Mode, Words

LINE = "ws://127.0.0.1:8000/v1/responses"
TEXTS = ["my name is Ada and I like trains", "hm", "who am I, and what do I like?", "goodbye"]


@pytest.fixture(scope="module", params=[tiny_native, tiny_mixed])
def build(request, builder):
    return builder(request.param())


def said(happenings):
    return "".join(each.text for each in happenings if isinstance(each, Words))


async def ask(house, text, session="s", **fields):
    async with house.client() as http:
        body = {"input": text, "conversation": session, "max_output_tokens": 12, "temperature": 0}
        answer = await http.post("/v1/responses", json=body | fields)
    assert answer.status_code == 200, answer.text
    [message] = answer.json()["output"]
    return message["content"][0]["text"]


@pytest.mark.anyio
async def test_a_chat_that_restarts_at_every_turn_goes_on_as_one_that_never_does(build):
    store, restarted = LocalStore(), []
    async with build(stops=False) as house:
        twin = [await ask(house, text) for text in TEXTS]
        strangers = [await ask(house, text, "t") for text in ["good morning", *TEXTS[1:]]]
    for text in TEXTS:
        async with build(store, stops=False) as house:
            restarted.append(await ask(house, text))

    assert restarted == twin
    assert len(set(twin)) == len(twin)
    assert strangers[1] != twin[1]  # they were told something else before


@pytest.mark.anyio
async def test_what_remembers_in_its_blocks_has_no_window_to_begin_anew(build):
    async with build(stops=False) as house, house.client() as http:
        body = {"input": "hi", "conversation": "s", "memory": {"window": "fresh"}}
        answer = await http.post("/v1/responses", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "memory.window"


def test_over_a_socket_too_a_session_outlives_its_server(door):
    def told(line, text):
        line.send_json(
            {
                "type": "response.create",
                "input": text,
                "conversation": "s",
                "max_output_tokens": 12,
                "temperature": 0,
            }
        )
        heard = [line.receive_json()]
        while heard[-1]["type"] not in ("response.completed", "response.incomplete"):
            assert heard[-1]["type"] != "response.failed", heard[-1]
            heard.append(line.receive_json())
        return "".join(e["delta"] for e in heard if e["type"] == "response.output_text.delta")

    with door(stops=False) as (client, _), client.websocket_connect(LINE) as line:
        twin = [told(line, text) for text in TEXTS]
    store, restarted = LocalStore(), []
    for text in TEXTS:
        with (
            door(store, stops=False) as (client, _),
            client.websocket_connect(LINE) as line,
        ):
            restarted.append(told(line, text))

    assert restarted == twin


@pytest.mark.anyio
async def test_read_only_hears_the_memory_and_off_is_a_memory_that_begins_empty(endless):
    await endless.turn(TEXTS[0])
    before = await endless.head()

    heard = await endless.turn("who am I?", most=16, mode=Mode.READ_ONLY)
    off = await endless.turn("who am I?", most=16, mode=Mode.OFF)

    assert (await endless.head()).version == before.version
    assert said(off) == said(await endless.turn("who am I?", None, most=16)) != said(heard)
    # nothing of either is left: the turn that is kept begins where they began
    assert said(await endless.turn("who am I?", most=16))[:2] == said(heard)[:2]


@pytest.mark.anyio
async def test_turns_that_keep_nothing_leave_the_next_as_if_they_had_not_been(build):
    answers = []
    for modes in ([], [Mode.READ_ONLY, Mode.OFF]):
        async with build(stops=False) as house:
            await house.turn(TEXTS[0])
            for mode in modes:
                await house.turn("a long story about the sea", most=16, mode=mode)
            answers.append(said(await house.turn("who am I?", most=16)))

    assert answers[0] == answers[1]


@pytest.mark.anyio
async def test_the_model_s_card_tells_what_it_has(endless, build):
    async with endless.client() as http:
        [card] = (await http.get("/v1/models")).json()["data"]

    attends = bool(build.config.attention_blocks)
    assert (card["window"], card["sinks"]) == ((32, 2) if attends else (None, None))
    memory = card["memory"]
    assert (memory["heads"], memory["head_width"], memory["rule"]["chunk"]) == (2, 16, 4)
    assert memory["blocks"] == list(build.config.memory_blocks)


def test_what_is_printed_of_a_model_names_what_it_has():
    def mixers(config):
        return Card("m", "f", config, "cpu", "float32", 1).mixers

    memory = "memory of 2 heads of 16 x 16 in 2 blocks, chunk 4"
    assert mixers(tiny_native()) == memory
    assert mixers(tiny_mixed()) == f"window 32 tokens, 2 sinks; {memory}"


@pytest.mark.anyio
async def test_the_size_of_a_session_is_told_by_part(endless, build):
    await endless.turn(TEXTS[0])
    name = "hope_session_state_bytes"
    context = "window" if build.config.attention_blocks else "context"
    sizes = {
        part: endless.sample(f"{name}_sum", level=part) for part in (context, "memory", "fast")
    }

    assert all(sizes.values())
    assert endless.sample(f"{name}_count", level="memory") == endless.sample(
        f"{name}_count", level=context
    )
    # per commit: live and anchor of both blocks, their rings, and one or two marks of as much
    each = sizes["memory"] / endless.sample(f"{name}_count", level="memory")
    held = 2 * 4 * (2 * 2 * 16 * 16 + 3 * 2 * 2 * 16)
    assert held <= each <= 3 * held
