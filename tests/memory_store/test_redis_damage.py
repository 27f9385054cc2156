"""Damage at rest: found, named, and stood in for by an older version that is whole."""

import os

import pytest

from memory_store import Change, Conflict, Corrupt, RedisStore, SessionKey, TurnRecord
from memory_store.seal import Sealed
from tests.memory_store.conftest import KEYRING
from tests.tools.leases import put as write

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"
HEAD = "hope:{acme:user-7}:h"


@pytest.fixture(params=[None, KEYRING], ids=["plain", "sealed"])
async def store(request, url, raw):
    store = await RedisStore.open(url, keyring=request.param, kept_versions=3)
    yield store
    await store.close()


async def commit(store, key, version, put=None, keep=(), base=None):
    turns = (TurnRecord(f"t{version}", {"text": f"said {version}"}),)
    parts = {"put": put or {}, "keep": frozenset(keep), "turns": turns, "base": base}
    change = Change(FINGERPRINT, {"at": version}, **parts)
    return await write(store, key, change, expected=version - 1, commit_id=f"c{version}")


async def load(store, key, version=None):
    return await store.load(key, fingerprint=FINGERPRINT, version=version)


async def blobs_of(raw, version):
    """The names of the blobs whose last version this is."""
    named = await raw.hgetall("hope:{acme:user-7}:r")
    last = b"%d " % version
    return [f"hope:{{acme:user-7}}:b:{n.decode()}" for n, v in named.items() if v.startswith(last)]


async def flip(raw, name, field=None):
    """Flip one bit in the middle."""
    value = await (raw.get(name) if field is None else raw.hget(name, field))
    damaged = bytearray(value)
    damaged[len(damaged) // 2] ^= 1
    if field is None:
        await raw.set(name, bytes(damaged))
    else:
        await raw.hset(name, field, bytes(damaged))


async def flip_blob(raw, version):
    [name] = await blobs_of(raw, version)
    await flip(raw, name, 0)


async def flip_manifest(raw, version):
    current = int(await raw.hget(HEAD, "ver"))
    if version == current:
        await flip(raw, HEAD, "man")
    else:
        await flip(raw, f"hope:{{acme:user-7}}:m:{version}")


async def shorten(raw, version):
    [name] = await blobs_of(raw, version)
    await raw.hset(name, 0, b"short")


async def lose_field(raw, version):
    [name] = await blobs_of(raw, version)
    await raw.hdel(name, 1)


async def lose_blob(raw, version):
    [name] = await blobs_of(raw, version)
    await raw.delete(name)


async def lose_manifest(raw, version):
    await raw.hdel(HEAD, "man")


DAMAGES = {
    flip_blob: "'fast'|seal is broken",
    flip_manifest: "manifest",
    shorten: "bytes stored, not 1100000|not sealed",
    lose_field: "'fast': field 1 of 2 is missing",
    lose_blob: "'fast': field 0 of 2 is missing",
    lose_manifest: "manifest",
}


async def three(store, key):
    """Make versions 1 to 3, of blobs that have two fields each."""
    blobs = {version: {"fast": os.urandom(1_100_000)} for version in (1, 2, 3)}
    for version, put in blobs.items():
        await commit(store, key, version, put=put)
    return blobs


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_the_version_before_stands_in_and_says_so(store, raw, key, caplog, damage):
    blobs = await three(store, key)
    await damage(raw, 3)

    found = await load(store, key)

    assert found.blobs == blobs[2]
    assert (found.head.version, found.latest) == (2, 3)
    assert [*found.damaged] == [3]
    assert any(part in found.damaged[3] for part in DAMAGES[damage].split("|"))
    assert "version 2 stands in: version 3: " in caplog.text
    with pytest.raises(Corrupt):
        await load(store, key, 3)


async def test_damaged_kept_versions_are_passed_over_too(store, raw, key):
    blobs = await three(store, key)
    await flip_blob(raw, 3)
    await flip_manifest(raw, 2)

    found = await load(store, key)

    assert found.blobs == blobs[1]
    assert [*found.damaged] == [3, 2]
    assert [head.version for head in await store.versions(key)] == [3, 1]


async def test_a_lost_kept_version_is_passed_over(store, raw, key):
    blobs = await three(store, key)
    await flip_blob(raw, 3)
    await raw.delete("hope:{acme:user-7}:m:2")

    found = await load(store, key)

    assert found.blobs == blobs[1]
    assert found.damaged[2] == "it is not there"


async def test_when_no_version_is_whole_each_is_named(store, raw, key):
    await three(store, key)
    await flip_blob(raw, 3)
    await flip_manifest(raw, 2)
    await lose_blob(raw, 1)

    with pytest.raises(Corrupt, match=r"version 3: .*; version 2: .*; version 1: "):
        await load(store, key)


async def test_a_commit_on_what_stood_in_repairs_the_session(store, raw, key):
    blobs = await three(store, key)
    await flip_manifest(raw, 3)
    for question in (store.head(key), store.turns(key)):
        with pytest.raises(Corrupt, match="manifest"):
            await question
    with pytest.raises(Corrupt, match="manifest"):
        await commit(store, key, 4, keep={"fast"})
    standing = await load(store, key)

    await commit(store, key, 4, keep={"fast"}, base=standing.head.version)

    found = await load(store, key)
    assert (found.blobs, found.damaged, found.latest) == (blobs[2], {}, 4)
    assert (await store.head(key)).version == 4
    assert [turn.turn_id for turn in await store.turns(key)] == ["t1", "t2", "t4"]
    assert [head.version for head in await store.versions(key)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ver", "7", "of version 3, the head of 7"),
        ("ver", "x", "head"),
        ("ver", None, "head: its version is missing"),
        ("cids", "[1", "head"),
        ("old", "x", "head"),
    ],
)
async def test_a_damaged_head_is_named_and_never_taken_for_a_new_session(
    store, raw, key, field, value, message
):
    await three(store, key)
    lease = await store.acquire(key, "tester", seconds=30)
    await (raw.hdel(HEAD, field) if value is None else raw.hset(HEAD, field, value))

    with pytest.raises(Corrupt, match=message):
        await store.head(key)
    for expected in (0, 3, 7):
        with pytest.raises((Corrupt, Conflict)):
            await store.commit(lease, Change(FINGERPRINT, {}), expected=expected, commit_id="new")
    assert await raw.ttl(HEAD) == -1


@pytest.mark.parametrize(("field", "value"), [("ver", "x"), ("ver", None), ("old", "x")])
async def test_a_session_with_a_damaged_head_can_be_deleted(store, raw, key, field, value):
    await three(store, key)
    await (raw.hdel(HEAD, field) if value is None else raw.hset(HEAD, field, value))
    for reference in await raw.hkeys("hope:{acme:user-7}:r"):
        await raw.hset("hope:{acme:user-7}:r", reference, "damaged")

    receipt = await store.delete(key)

    assert receipt.left == 0
    assert [name async for name in raw.scan_iter("*")] == [HEAD.encode()]


async def test_a_damaged_reference_costs_no_commit_and_no_blob(store, raw, key):
    blobs = await three(store, key)
    for reference in await raw.hkeys("hope:{acme:user-7}:r"):
        await raw.hset("hope:{acme:user-7}:r", reference, "damaged")

    await commit(store, key, 4, keep={"fast"})

    assert (await load(store, key)).blobs == blobs[3]
    assert (await load(store, key, 1)).blobs == blobs[1]


async def test_a_damaged_session_does_not_hide_the_others(store, raw, key):
    await commit(store, SessionKey("acme", "well"), 1)
    await commit(store, key, 1, put={"a": b"1"})
    await flip(raw, HEAD, "man")

    listed = await store.sessions("acme")
    receipt = await store.delete(key)

    assert [head.key.session for head in listed.heads] == ["well"]
    assert receipt.left == 0


@pytest.mark.parametrize("place", range(0, 40, 3))
async def test_a_flipped_bit_in_a_turn_is_named(store, raw, key, place):
    await commit(store, key, 1)
    items = "hope:{acme:user-7}:i"
    record = bytearray(await raw.hget(items, "t:t1"))
    record[place % len(record)] ^= 1
    await raw.hset(items, "t:t1", bytes(record))

    # A flipped bit in the name of a key looks like a key that is not there.
    with pytest.raises((Corrupt, Sealed)):
        await store.turn(key, "t1")
    with pytest.raises((Corrupt, Sealed)):
        await store.turns(key)


async def test_a_key_that_is_not_there_is_no_damage(url, raw, key):
    newer = KEYRING.with_new_key("acme")
    outdated, current = [await RedisStore.open(url, keyring=ring) for ring in (KEYRING, newer)]
    await commit(outdated, key, 1, put={"a": b"1"})
    await commit(current, key, 2, put={"a": b"2"})

    with pytest.raises(Sealed):  # version 1 could be read, and is not what was learned last
        await load(outdated, key)

    assert (await load(current, key)).blobs == {"a": b"2"}
    await outdated.close()
    await current.close()


async def test_a_lost_turn_is_named(store, raw, key):
    await three(store, key)
    await raw.hdel("hope:{acme:user-7}:i", "t:t2")

    with pytest.raises(Corrupt, match="turn 't2': its record is missing"):
        await store.turns(key)


async def test_a_turn_put_in_anothers_place_is_named(store, raw, key):
    await three(store, key)
    items = "hope:{acme:user-7}:i"
    await raw.hset(items, "t:t2", await raw.hget(items, "t:t1"))

    with pytest.raises(Corrupt, match="t2"):
        await store.turn(key, "t2")
