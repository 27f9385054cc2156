"""A session goes out as a file and comes in again as it was; what is no session comes in never."""

import hashlib
import json

import pytest
from safetensors.torch import load

from hope_runtime.tokenizer import Role
from hope_runtime.weights.random import tiny_config, tiny_mixed, tiny_native
from memory_store import LocalStore
from server.wire import METADATA_KEYS

pytestmark = pytest.mark.anyio

LEARN = "it rains in the hills today and all week"
S, T = "/v1/sessions/s", "/v1/sessions/t"


def refused(answer, status, code):
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert body["code"] == code
    return body["message"]


async def exported(http, session="s", **query):
    answer = await http.get(f"/v1/sessions/{session}/export", params=query)
    assert answer.status_code == 200, answer.text
    return answer.content


async def imported(http, data, session="t", **query):
    return await http.put(f"/v1/sessions/{session}/import", content=data, params=query)


def changed(data, change):
    """Return a file whose manifest was changed, with good checksums."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(manifest)
    text = json.dumps(manifest)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    header["__metadata__"] |= {"manifest": text, "sha256": checksum}
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def file(build, anyio_backend):
    """A session of two turns, as a file."""
    async with build(stops=False) as house, house.client() as http:
        await house.turn("my name is Ada", metadata=(("name", "Ada"),))
        await house.turn(LEARN, most=20, rates=((Role.ASSISTANT, 1.0),))
        await house.idle()
        return await exported(http)


async def test_an_exported_session_is_a_safetensors_file_with_its_version(endless):
    await endless.turn(LEARN)
    await endless.idle()
    version = (await endless.head()).version
    async with endless.client() as http:
        answer = await http.get(f"{S}/export")

    assert answer.headers["content-length"] == str(len(answer.content))
    assert f"s.{version}.safetensors" in answer.headers["content-disposition"]
    assert answer.headers["etag"] == f'"{version}"'
    tensors = load(answer.content)
    assert any(name.startswith("level/fast::") for name in tensors)


@pytest.mark.parametrize("shape", [tiny_config, tiny_native, tiny_mixed])
async def test_a_session_that_is_exported_and_imported_is_the_same_on_another_server(
    builder, shape
):
    build = builder(shape())
    async with (
        build(stops=False) as house,
        build(stops=False) as other,
        house.client() as http,
        other.client() as elsewhere,
    ):
        for text in ("my name is Ada", LEARN):
            await house.turn(text, turn_id=text)
        await house.idle()
        data = await exported(http)

        answer = await imported(elsewhere, data, user="ada")

        made = answer.json()
        assert (answer.status_code, made["id"], made["version"]) == (201, "t", 1)
        assert (made["user"], made["turns"]) == ("ada", 2)
        was = (await http.get(S)).json()
        for name in ("tokens", "surprise", "levels", "bytes", "metadata"):
            assert made[name] == was[name]
        assert await other.probe("t") == await house.probe()
        items = [
            await h.get(f"/v1/conversations/{s}/items") for h, s in ((http, "s"), (elsewhere, "t"))
        ]
        texts = [[i["content"][0]["text"] for i in each.json()["data"]] for each in items]
        assert texts[0] == texts[1]
        for text in ("who am I?", "and then?"):
            assert await other.reply(text, "t") == await house.reply(text)
        assert (await other.ended(LEARN, "t", turn_id=LEARN)).memory.replayed


async def test_a_session_that_owes_a_consolidation_takes_the_debt_along(build, fragile):
    learn = ((Role.ASSISTANT, 1.0),)
    async with build(fragile, stops=False) as house, house.client() as http:
        fragile.failures.extend([None, RuntimeError("no consolidation")])
        await house.turn("hello", most=20, rates=learn)
        assert (await house.head()).meta["state"]["due"]

        assert (await imported(http, await exported(http))).status_code == 201

        assert await house.reply("who am I?", "t") == await house.reply("who am I?")


async def test_an_older_version_can_be_exported(endless):
    await endless.turn("my name is Ada", rates=((Role.USER, 0.0),))
    known = await endless.probe()
    await endless.turn(LEARN)
    async with endless.client() as http:
        await imported(http, await exported(http, version=1))

        assert await endless.probe("t") == known
        assert (await http.get(T)).json()["turns"] == 1


async def test_a_file_comes_in_only_where_nothing_is(endless, file):
    async with endless.client() as http:
        await endless.turn("hello", "t")
        await endless.turn("hello", "gone")
        await http.delete("/v1/sessions/gone")
        before = await endless.head("t")

        assert "exists already" in refused(await imported(http, file), 409, "session_exists")
        refused(await imported(http, file, "gone"), 410, "session_deleted")
        refused(await imported(http, file, "a b"), 400, "invalid_request")
        assert await endless.head("t") == before


async def test_a_session_of_another_model_does_not_come_in(builder, file):
    async with builder(tiny_config(width=16))() as house, house.client() as http:
        message = refused(await imported(http, file), 409, "state_incompatible")

        assert "serve the model that made it" in message
        refused(await http.get(T), 404, "conversation_not_found")


async def test_a_file_that_is_too_large_is_refused(build, file):
    async with build(max_import_mib=1) as house, house.client() as http:
        message = refused(await imported(http, file + bytes(1 << 20)), 413, "message_too_large")
        assert "HOPE_MAX_IMPORT_MIB" in message

        async def chunks():
            for _ in range(40):
                yield b"\0\0\0\1\0\0\0\0" + bytes(1 << 15)

        answer = await imported(http, chunks())
        assert answer.status_code in (400, 413)
        assert (await http.get("/v1/sessions")).json()["data"] == []


async def test_a_larger_file_than_a_usual_body_comes_in(build, file):
    async with build(max_body_bytes=2048) as house, house.client() as http:
        assert len(file) > 2048
        assert (await imported(http, file)).status_code == 201


def without(name):
    return lambda manifest: manifest["meta"].pop(name)


def state(**changes):
    return lambda manifest: manifest["meta"]["state"].update(changes)


def book(**changes):
    return lambda manifest: manifest["meta"]["book"].update(changes)


def level(**changes):
    return lambda manifest: manifest["meta"]["state"]["levels"]["fast"].update(changes)


def turn(**changes):
    return lambda manifest: manifest["turns"][0][1].update(changes)


def result(**changes):
    return lambda manifest: manifest["turns"][0][1]["result"].update(changes)


def named(turn_id):
    def change(manifest):
        manifest["turns"][0][0] = turn_id

    return change


GARBAGE = {
    "no state": without("state"),
    "no book": without("book"),
    "another format": state(format=99),
    "no position": lambda m: m["meta"]["state"].pop("position"),
    "a word for a position": state(position="far"),
    "an endless position": state(position=1 << 60),
    "a negative position": state(position=-1),
    "an infinite position": state(position=1e300),
    "no pieces": state(pieces=[]),
    "unknown pieces": state(pieces=[7]),
    "a token that is none": state(carry=[[1 << 40, 0.0]]),
    "a negative token": state(carry=[[-1, 0.0]]),
    "a carry of words": state(carry="hello"),
    "an unknown level due": state(due=[["none", 0, 8]]),
    "a chunk of the future due": state(due=[["fast", 1 << 30, 1 << 31]]),
    "a chunk the wrong way round due": state(due=[["fast", 8, 0]]),
    "an unknown level": lambda m: m["meta"]["state"]["levels"].update(none={"updates": 1}),
    "levels of a word": state(levels="fast"),
    "a word for updates": level(updates="many"),
    "a word for a loss": level(loss="much"),
    "an unknown fact of a level": level(secret=1),
    "a list for a movement": level(movement=[]),
    "a level's own levels": state(own=[{"name": "fast"}]),
    "marks of a word": state(marks=["x"]),
    "an unknown fact of the book": book(secret=1),
    "a word for turns": book(turns="many"),
    "half a turn": book(turns=1.5),
    "a negative number of turns": book(turns=-1),
    "true items": book(items=True),
    "a list for a surprise": book(surprise=[]),
    "an empty word for a surprise": book(surprise=""),
    "a number for a digest": book(chain=7),
    "a number for the first digest": book(first=7),
    "no digest": book(chain=None),
    "metadata of a word": book(metadata="Ada"),
    "metadata of numbers": book(metadata={"age": 36}),
    "too many metadata": book(metadata={str(n): "x" for n in range(METADATA_KEYS + 1)}),
    "metadata that cannot be told": book(metadata={"name": "\ud800"}),
    "a word for a time": book(learned_at={"fast": "now"}),
    "times of a list": book(learned_at=[1]),
    "a turn of no items": turn(items=None),
    "a turn of a number": turn(items=[7]),
    "a turn of somebody else": turn(items=[["king", "hello"]]),
    "a turn of markup": turn(items=[["markup", "hello"]]),
    "a turn of a number said": turn(items=[["user", 7]]),
    "a turn that cannot be told": turn(items=[["user", "\udc00"]]),
    "a turn without a reason": turn(reason=None),
    "a result of a word": turn(result="done"),
    "a result of no text": lambda m: m["turns"][0][1]["result"].pop("text"),
    "a result that cannot be told": result(text="\ud800"),
    "a result that failed": result(status="failed"),
    "a result of words for numbers": result(read="many"),
    "a result without memory": result(memory={}),
    "a result of another outcome": result(memory={"outcome": "great"}),
    "a name that cannot be told": named("\ud800"),
    "a name without end": named("x" * 100_000),
    "no name": named(""),
}


@pytest.fixture(scope="module")
async def http(build, anyio_backend):
    """A server that nothing gets into."""
    async with build(stops=False) as house, house.client() as client:
        yield client


@pytest.mark.parametrize("change", GARBAGE.values(), ids=GARBAGE.keys())
async def test_facts_that_cannot_be_are_refused_and_nothing_is_made_of_them(http, file, change):
    message = refused(await imported(http, changed(file, change)), 400, "invalid_archive")

    assert len(message) < 600
    refused(await http.get(T), 404, "conversation_not_found")
    assert (await http.get("/v1/sessions")).json()["data"] == []


async def test_the_file_that_the_others_are_made_of_is_sound(endless, file):
    async with endless.client() as http:
        assert (await imported(http, changed(file, lambda manifest: None))).status_code == 201


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\xff" * 64,
        (1 << 62).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
    ],
    ids=["nothing", "short", "ones", "a huge header", "an empty header", "null"],
)
async def test_what_is_no_file_of_ours_is_refused(http, data):
    refused(await imported(http, data), 400, "invalid_archive")
    refused(await http.get(T), 404, "conversation_not_found")


async def test_a_file_that_is_cut_short_or_bent_is_refused(http, file):
    bent = bytearray(file)
    bent[-3] ^= 1
    for data in (file[:-1], file[: len(file) // 2], file[:100], file + b"x", bytes(bent)):
        refused(await imported(http, data), 400, "invalid_archive")
    refused(await http.get(T), 404, "conversation_not_found")


async def test_a_frozen_session_comes_in_thawed(endless):
    await endless.turn("hello")
    async with endless.client() as http:
        await http.post(f"{S}/freeze")

        made = (await imported(http, await exported(http))).json()

    assert not made["frozen"]


async def test_a_client_that_leaves_during_an_import_leaves_nothing(build):
    store = LocalStore()
    async with build(store) as house:
        scope = {
            "type": "http",
            "method": "PUT",
            "path": f"{T}/import",
            "raw_path": f"{T}/import".encode(),
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")],
        }
        messages = [
            {"type": "http.request", "body": b"\x40", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive():
            return messages.pop(0)

        async def send(message):
            pass

        await house.app(scope, receive, send)

    assert store._sessions == {}
