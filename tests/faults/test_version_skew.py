"""Sessions that another build, another model or another precision has written."""

import hashlib
import json

import pytest
import torch

from memory_store.codec import FORMAT
from tests.faults.houses import EXACT, builder, memory, redis, say
from tests.faults.oracle import Fate, Line, Turn, Witness, connected
from tests.faults.talk import BEFORE

TEXT, AFTER = "it rains in the hills", "tell me more"


@pytest.fixture
def ada(name, twins, store):
    return Witness(name, twins, store.url)


def begun(server, ada):
    """Have a session with two turns behind it, resident nowhere."""
    for text in (BEFORE, TEXT):
        assert ada.say(server.url, text).fate is Fate.COMMITTED
        Line(server.url).settled(ada.name)
    server.terminate()
    server.wait()


def rewrite(store, session, change):
    """Let every manifest of a session be what another build would have written."""
    client, prefix = connected(store.url), f"hope:{{local:{session}}}:"

    def changed(data):
        body = json.dumps(change(json.loads(data.partition(b"\n")[2])), separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest().encode() + b"\n" + body.encode()

    client.hset(f"{prefix}h", "man", changed(client.hget(f"{prefix}h", "man")))
    for key in client.scan_iter(f"{prefix}m:*"):
        client.set(key, changed(client.get(key)))


def everything(store, session):
    client = connected(store.url)
    return {key: client.dump(key) for key in client.scan_iter(f"hope:{{local:{session}}}:[!l]*")}


def as_format_1(manifest):
    """Before format 2 nothing could be rolled back, and no session had an owner."""
    assert manifest.pop("owner") is None
    assert manifest.pop("undone") == []
    del manifest["chain"]
    return manifest | {"format": 1}


def test_a_session_of_an_older_format_is_read_and_goes_on(servers, store, ada):
    begun(servers("old"), ada)
    rewrite(store, ada.name, as_format_1)
    new = servers("new")

    assert ada.say(new.url, AFTER).fate is Fate.COMMITTED
    Line(new.url).settled(ada.name)
    raw = connected(store.url).hget(f"hope:{{local:{ada.name}}}:h", "man")
    assert json.loads(raw.partition(b"\n")[2])["format"] == FORMAT
    ada.examine(new.url)


SKEWED = {
    "newer-format": lambda manifest: manifest | {"format": FORMAT + 1, "more": True},
    "another-model": lambda manifest: manifest | {"fingerprint": "other@0123456789abcdef/01234567"},
}


@pytest.mark.parametrize("skew", SKEWED.values(), ids=SKEWED.keys())
def test_what_cannot_be_read_here_is_refused_and_left_as_it_is(servers, store, ada, skew):
    begun(servers("other"), ada)
    rewrite(store, ada.name, skew)
    before = everything(store, ada.name)
    one = servers("one")

    for mode in ("read_write", "read_only"):
        told = Line(one.url).say(ada.name, Turn(AFTER), mode=mode)
        assert (told.fate, told.code) == (Fate.REFUSED, "state_incompatible")
    assert Line(one.url).get(f"/v1/sessions/{ada.name}/export")[0] == 409
    after = everything(store, ada.name)
    assert after.keys() == before.keys()
    assert connected(store.url).hget(f"hope:{{local:{ada.name}}}:h", "ver") is not None
    assert Line(servers("two").url).say(ada.name, Turn(AFTER)).code == "state_incompatible"


@pytest.mark.anyio
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
async def test_a_session_goes_on_in_another_precision_and_comes_back(store, name, first):
    other = torch.bfloat16 if first is torch.float32 else torch.float32
    versions = []
    for text, dtype in ((BEFORE, first), (TEXT, other), (AFTER, first)):
        async with redis(store.url) as opened, builder(dtype)(opened, **EXACT) as house:
            ended = await say(house, name, text)
            assert ended.memory.outcome == "committed", ended
            assert ended.memory.recovered is None
            versions += [ended.memory.base_version, ended.memory.committed_version]
            tensors, _ = await memory(house, name)
            assert tensors
            assert (await house.head(name)).meta["book"]["turns"] == len(versions) // 2
    assert versions == sorted(versions)
