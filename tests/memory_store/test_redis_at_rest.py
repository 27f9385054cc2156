"""What lies in a real server: time limits, damage, a full server, races, cancelled callers."""

import asyncio
import hashlib
import json
import os

import pytest

from memory_store import (
    Change,
    Deleted,
    Fenced,
    Full,
    RedisStore,
    SessionKey,
    TurnRecord,
)
from memory_store.codec import encode_json
from tests.tools.leases import put as write

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"


async def commit(store, key, version, put=None, keep=(), meta=None, turn=None):
    turns = (turn,) if turn else ()
    change = Change(FINGERPRINT, meta or {}, put=put or {}, keep=frozenset(keep), turns=turns)
    return await write(store, key, change, expected=version - 1, commit_id=f"c{version}")


async def load(store, key):
    return await store.load(key, fingerprint=FINGERPRINT)


async def limits(raw, pattern="*:b:*"):
    """The time limits of the keys of a pattern; -1 is for ever."""
    return {name: await raw.ttl(name) async for name in raw.scan_iter(pattern)}


async def the_blob(raw):
    [name] = await limits(raw)
    return name


async def test_blobs_of_kept_versions_stay_and_dropped_ones_expire(url, raw, key):
    store = await RedisStore.open(url, kept_versions=2)
    await commit(store, key, 1, put={"fast": b"1", "slow": b"s", "only 1": b"x"})
    stays = {}
    for version in range(2, 8):
        before = set(await limits(raw))
        await commit(store, key, version, put={"fast": bytes([version])}, keep={"slow"})
        [new] = set(await limits(raw)) - before
        stays[version] = new

    found = await limits(raw)

    await store.close()
    live = {name for name, limit in found.items() if limit == -1}
    dropped = {name for name, limit in found.items() if 0 <= limit <= 60}
    assert live | dropped == set(found)
    assert {stays[5], stays[6], stays[7]} < live
    assert len(live) == 4  # and the slow level, put by version 1
    assert {stays[2], stays[3], stays[4]} < dropped
    assert len(dropped) == 5
    assert sorted(await limits(raw, "*:m:*")) == [
        b"hope:{acme:user-7}:m:5",
        b"hope:{acme:user-7}:m:6",
    ]


async def test_keeping_fewer_versions_drops_the_others_at_the_next_commit(url, raw, key):
    generous, thrifty = await RedisStore.open(url), await RedisStore.open(url, kept_versions=0)
    for version in range(1, 5):
        await commit(generous, key, version, put={"a": bytes([version])})

    await commit(thrifty, key, 5, put={"a": b"5"})

    assert list((await limits(raw)).values()).count(-1) == 1
    assert await limits(raw, "*:m:*") == {}
    assert (await load(thrifty, key)).blobs == {"a": b"5"}
    await generous.close()
    await thrifty.close()


async def test_a_kept_blob_is_not_written_again(redis_store, raw, key):
    await commit(redis_store, key, 1, put={"slow": os.urandom(2_000_000)})
    before = await limits(raw)

    done = await commit(redis_store, key, 2, keep={"slow"})

    assert done.written == 0
    assert await limits(raw) == before


async def test_fields_are_at_most_one_mebibyte(redis_store, raw, key):
    await commit(redis_store, key, 1, put={"big": os.urandom(3_500_000)})

    name = await the_blob(raw)

    assert [await raw.hstrlen(name, i) for i in range(4)] == [1 << 20] * 3 + [354_272]
    assert await raw.hlen(name) == 4


async def test_regular_bytes_are_stored_in_fewer(redis_store, key):
    done = await commit(redis_store, key, 1, put={"zeros": bytes(1_000_000)})

    blob = (await redis_store.head(key)).blobs["zeros"]

    assert blob.length == 1_000_000
    assert blob.stored == done.written < 1000


async def test_all_keys_of_a_session_share_its_hash_tag(redis_store, raw, key):
    for version in (1, 2):
        turn = TurnRecord(f"t{version}", {})
        await commit(redis_store, key, version, put={"a": b"1"}, turn=turn)

    names = await limits(raw, "*")

    assert names.pop(b"hope:t:acme:sessions") == -1
    assert 0 < names.pop(b"hope:{acme:user-7}:l") <= 30
    assert set(names.values()) == {-1}
    assert all(name.startswith(b"hope:{acme:user-7}:") for name in names)


async def test_the_transcript_keeps_the_last_thousand_turns(redis_store, raw, key):
    await commit(redis_store, key, 1, turn=TurnRecord("first", {}))
    items = "hope:{acme:user-7}:i"
    await raw.hset(items, "n", 999)
    await raw.hset(items, "n:999", "almost last")
    await raw.hset(items, "t:almost last", "{}")

    await commit(redis_store, key, 2, turn=TurnRecord("number 1000", {}))
    full = await raw.hgetall(items)
    await commit(redis_store, key, 3, turn=TurnRecord("number 1001", {}))

    assert b"t:first" in full
    assert {b"t:first", b"n:1"}.isdisjoint(await raw.hgetall(items))
    turns = await redis_store.turns(key, limit=1000)
    assert [turn.turn_id for turn in turns] == ["almost last", "number 1000", "number 1001"]


async def test_the_index_is_repaired_by_reading_it(redis_store, raw, key):
    await commit(redis_store, key, 1)
    await raw.zadd("hope:t:acme:sessions", {"never-was": 1.0, "user-8": 2.0, "to-come": 9e9})

    listed = await redis_store.sessions("acme")

    assert [head.key for head in listed.heads] == [key]
    assert set(await raw.zrange("hope:t:acme:sessions", 0, -1)) == {b"user-7", b"to-come"}


async def test_a_session_is_listed_before_it_exists(redis_store, raw, key):
    refused = Change(FINGERPRINT, {}, put={"a": os.urandom(3_000_000)})
    await redis_store.acquire(key, "tester", seconds=30)
    used = (await raw.info("memory"))["used_memory"]
    await raw.config_set("maxmemory", used + 1_000_000)

    with pytest.raises(Full):
        await write(redis_store, key, refused, expected=0, commit_id="c")

    assert await raw.zrange("hope:t:acme:sessions", 0, -1) == [b"user-7"]
    assert (await redis_store.sessions("acme")).heads == ()


async def test_sessions_of_one_moment_are_all_listed(redis_store, raw):
    for i in range(7):
        await commit(redis_store, SessionKey("acme", f"s{i}"), 1)
        await raw.zadd("hope:t:acme:sessions", {f"s{i}": 5.0})

    listed, cursor = [], None
    while not listed or cursor:
        page = await redis_store.sessions("acme", cursor=cursor, limit=2)
        listed += [head.key.session for head in page.heads]
        cursor = page.cursor

    assert listed == [f"s{i}" for i in reversed(range(7))]


async def test_deleting_removes_everything_but_the_tombstone(redis_store, raw, key):
    for version in (1, 2):
        turn = TurnRecord(f"t{version}", {"text": "secret"})
        await commit(redis_store, key, version, put={"a": bytes([version])}, turn=turn)

    receipt = await redis_store.delete(key)

    assert set(await limits(raw, "*")) == {b"hope:{acme:user-7}:h"}
    assert set(await raw.hgetall("hope:{acme:user-7}:h")) == {b"ver", b"tomb"}
    assert receipt.keys == 5  # two blobs, one older manifest, items, references


async def test_a_session_deleted_while_a_commit_is_staging_stays_deleted(redis_store, raw, key):
    await commit(redis_store, key, 1, put={"a": b"1"})
    staged = len(await limits(raw)) + 1
    blobs = {f"big/{i}": os.urandom(4_000_000) for i in range(8)}
    late = asyncio.create_task(commit(redis_store, key, 2, put=blobs))
    async with asyncio.timeout(10):
        while len(await limits(raw)) < staged:
            pass

    await redis_store.delete(key)

    with pytest.raises(Deleted):
        await late
    assert set(await limits(raw, "*")) == {b"hope:{acme:user-7}:h"}


async def test_a_commit_that_lost_the_race_leaves_nothing_behind(redis_store, raw, key):
    blobs = {f"big/{i}": os.urandom(4_000_000) for i in range(8)}
    slow = asyncio.create_task(commit(redis_store, key, 1, put=blobs))
    async with asyncio.timeout(10):
        while not await limits(raw):
            pass
    winner = Change(FINGERPRINT, {}, put={"a": b"1"})
    await write(redis_store, key, winner, expected=0, commit_id="winner")

    with pytest.raises(Fenced):
        await slow

    assert list((await limits(raw)).values()) == [-1]


async def test_staged_blobs_expire_until_they_are_committed(redis_store, raw, key):
    blobs = {f"big/{i}": os.urandom(4_000_000) for i in range(8)}
    task = asyncio.create_task(commit(redis_store, key, 1, put=blobs))
    seen = {}
    while not task.done():
        seen |= {name: limit for name, limit in (await limits(raw)).items() if limit != -1}

    await task

    assert seen
    assert all(3500 < limit <= 3600 for limit in seen.values() if limit != -2)
    assert set((await limits(raw)).values()) == {-1}


async def test_a_full_server_refuses_and_the_old_version_stays(redis_store, raw, key):
    old = {"a": os.urandom(100_000)}
    await commit(redis_store, key, 1, put=old)
    used = (await raw.info("memory"))["used_memory"]
    await raw.config_set("maxmemory", used + 3_000_000)

    with pytest.raises(Full, match="raise its maxmemory or delete sessions"):
        await commit(redis_store, key, 2, put={"a": os.urandom(8_000_000)})

    assert (await load(redis_store, key)).blobs == old
    assert set((await limits(raw)).values()) == {-1}


async def test_a_server_that_is_full_at_the_commit_changes_nothing(redis_store, raw, key):
    await commit(redis_store, key, 1, put={"a": b"1"})
    await raw.config_set("maxmemory", 1)

    with pytest.raises(Full):
        await commit(redis_store, key, 2, keep={"a"})

    assert (await load(redis_store, key)).head.version == 1


async def test_sessions_of_a_full_server_can_be_deleted(redis_store, raw, key):
    await commit(redis_store, key, 1, put={"a": b"1"})
    await raw.config_set("maxmemory", 1)

    receipt = await redis_store.delete(key)

    assert receipt.keys == 2


async def test_a_cancelled_commit_happens_wholly_or_not_at_all(redis_store, key):
    lease = await redis_store.acquire(key, "tester", seconds=30)
    for version in range(1, 6):
        blobs = {"a": os.urandom(2_000_000), "b": bytes([version])}
        change = Change(FINGERPRINT, {}, put=blobs)
        work = redis_store.commit(lease, change, expected=version - 1, commit_id=f"c{version}")
        task = asyncio.create_task(work)
        await asyncio.sleep(0.003 * version)
        task.cancel()
        await asyncio.wait([task])
        async with asyncio.timeout(10):
            while not await is_at(redis_store, key, version):
                pass

        assert (await load(redis_store, key)).blobs == blobs


async def is_at(store, key, version):
    return any(head.version == version for head in (await store.sessions(key.tenant)).heads)


async def test_a_lost_script_cache_is_refilled(redis_store, raw, key):
    await commit(redis_store, key, 1)
    await raw.script_flush()

    done = await commit(redis_store, key, 2)

    assert done.version == 2


async def test_a_session_from_before_leases_goes_on(redis_store, raw, key):
    """Until format 2 a head had no fence, a manifest no owner, and a turn no version."""
    await commit(redis_store, key, 1, put={"a": b"1"}, turn=TurnRecord("t1", {"text": "old one"}))
    await commit(redis_store, key, 2, keep={"a"})
    head, items = "hope:{acme:user-7}:h", "hope:{acme:user-7}:i"
    await raw.hdel(head, "fence", "holder")
    await raw.hset(head, "man", as_format_1(await raw.hget(head, "man")))
    await raw.set("hope:{acme:user-7}:m:1", as_format_1(await raw.get("hope:{acme:user-7}:m:1")))
    await raw.hset(items, "t:t1", json.dumps({"text": "old one"}))

    await commit(redis_store, key, 3, keep={"a"}, turn=TurnRecord("t3", {}))

    assert (await load(redis_store, key)).blobs == {"a": b"1"}
    assert [found.version for found in await redis_store.versions(key)] == [3, 2, 1]
    assert await redis_store.turns(key) == [
        TurnRecord("t1", {"text": "old one"}),
        TurnRecord("t3", {}, version=3),
    ]


def as_format_1(manifest):
    content = json.loads(manifest.partition(b"\n")[2])
    for name in ("owner", "chain", "undone"):
        del content[name]
    body = encode_json(content | {"format": 1})
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body
