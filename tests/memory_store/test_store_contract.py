"""The contract of `MemoryStore`, held against every backend."""

import asyncio
import os

import pytest

from memory_store import (
    BlobInfo,
    Change,
    Committed,
    Conflict,
    Deleted,
    Fenced,
    Held,
    Incompatible,
    Incomplete,
    NotFound,
    Repeated,
    SessionKey,
    TurnRecord,
)
from tests.tools.leases import put as write

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"


def change(put=None, keep=(), meta=None, turn=None):
    turns = (turn,) if turn else ()
    return Change(FINGERPRINT, meta or {}, put=put or {}, keep=frozenset(keep), turns=turns)


async def commit(store, key, version, **changes):
    """Make version `version` of a session."""
    return await write(
        store, key, change(**changes), expected=version - 1, commit_id=f"{key.session}-{version}"
    )


async def load(store, key):
    return await store.load(key, fingerprint=FINGERPRINT)


async def test_what_was_committed_is_what_is_loaded(store, key):
    blobs = {"level/fast": os.urandom(5000), "level/slow": bytes(5000), "window/0-64": b""}
    meta = {"position": 12, "due": [1, 2.5, None], "title": "naïve \ud800"}

    done = await commit(store, key, 1, put=blobs, meta=meta)

    snapshot = await load(store, key)
    assert done.version == 1
    assert done.written > 5000
    assert snapshot.blobs == blobs
    assert snapshot.head.meta == meta
    assert snapshot.head.blobs["level/slow"].length == 5000
    assert snapshot.head == await store.head(key)


async def test_a_head_tells_version_parent_and_times(store, key):
    await commit(store, key, 1, put={"a": b"1"})
    first = await store.head(key)
    await commit(store, key, 2, keep={"a"})

    second = await store.head(key)

    assert (first.version, first.parent, first.key) == (1, 0, key)
    assert (second.version, second.parent, second.fingerprint) == (2, 1, FINGERPRINT)
    assert first.created == first.updated == second.created
    assert second.updated > second.created
    assert second.blobs == {"a": BlobInfo(length=1, stored=1)}


async def test_blobs_are_put_kept_and_dropped_by_name(store, key):
    await commit(store, key, 1, put={"fast": b"1", "slow": b"2", "window": b"3"})

    await commit(store, key, 2, put={"fast": b"4", "new": b"5"}, keep={"slow"})

    assert (await load(store, key)).blobs == {"fast": b"4", "new": b"5", "slow": b"2"}


async def test_a_commit_on_another_version_changes_nothing(store, key):
    await commit(store, key, 1, put={"a": b"1"})

    with pytest.raises(Conflict, match="at version 1, not 4") as caught:
        await commit(store, key, 5, put={"a": b"2"})

    assert (caught.value.expected, caught.value.found) == (4, 1)
    assert (await load(store, key)).blobs == {"a": b"1"}


async def test_a_session_that_exists_is_not_created_again(store, key):
    await commit(store, key, 1, put={"a": b"1"})

    with pytest.raises(Conflict):
        await write(store, key, change(), expected=0, commit_id="another")


async def test_a_session_that_does_not_exist_has_no_later_version(store, key):
    with pytest.raises(Conflict, match="at version 0, not 3"):
        await commit(store, key, 4)

    with pytest.raises(NotFound):
        await load(store, key)


async def test_the_same_commit_id_is_committed_once(store, key):
    await commit(store, key, 1, put={"a": b"1"})
    await commit(store, key, 2, put={"a": b"2"})

    again = await write(
        store, key, change(put={"a": b"other"}), expected=0, commit_id=f"{key.session}-1"
    )

    assert again == Committed(version=1, written=0, duplicate=True)
    assert (await load(store, key)).blobs == {"a": b"2"}


async def test_the_last_32_commit_ids_are_remembered(store, key):
    for version in range(1, 35):
        await commit(store, key, version)

    remembered = await write(store, key, change(), expected=7, commit_id=f"{key.session}-3")

    assert remembered == Committed(version=3, written=0, duplicate=True)
    with pytest.raises(Conflict):
        await write(store, key, change(), expected=7, commit_id=f"{key.session}-2")


async def test_a_blob_that_is_not_there_cannot_be_kept(store, key):
    await commit(store, key, 1, put={"a": b"1"})

    with pytest.raises(Incomplete, match="'b' was not staged whole"):
        await commit(store, key, 2, keep={"a", "b"})

    assert (await store.head(key)).version == 1


async def test_a_dropped_blob_cannot_be_kept_later(store, key):
    await commit(store, key, 1, put={"a": b"1"})
    await commit(store, key, 2)

    with pytest.raises(Incomplete):
        await commit(store, key, 3, keep={"a"})


def test_a_blob_is_either_put_or_kept():
    with pytest.raises(ValueError, match="'a' is both put and kept"):
        change(put={"a": b"1"}, keep={"a"})


async def test_big_blobs_come_back_whole(store, key):
    blobs = {"random": os.urandom(3_500_000), "regular": bytes(range(256)) * 10_000}

    await commit(store, key, 1, put=blobs)

    assert (await load(store, key)).blobs == blobs


async def test_many_small_blobs_come_back_by_name(store, key):
    blobs = {f"window/{i}": os.urandom(100 + i) for i in range(200)}

    await commit(store, key, 1, put=blobs)

    assert (await load(store, key)).blobs == blobs


async def test_a_session_of_another_model_is_not_read(store, key):
    await commit(store, key, 1, put={"a": b"1"})

    with pytest.raises(Incompatible, match="saved by 'hope-nano/1'"):
        await store.load(key, fingerprint="hope-nano/2")

    assert (await store.head(key)).fingerprint == FINGERPRINT


async def test_meta_that_is_not_json_is_refused_before_anything_is_written(store, key):
    with pytest.raises(ValueError, match="JSON"):
        await commit(store, key, 1, meta={"surprise": float("nan")})

    with pytest.raises(NotFound):
        await store.head(key)


async def test_an_unknown_session_is_not_found_by_any_question(store, key):
    for question in (load(store, key), store.head(key), store.turns(key), store.delete(key)):
        with pytest.raises(NotFound, match="no session 'user-7'"):
            await question


async def test_a_deleted_session_leaves_only_its_tombstone(store, key):
    turn = TurnRecord("t1", {"text": "hello"})
    await commit(store, key, 1, put={"a": b"1", "b": bytes(100)}, turn=turn)

    receipt = await store.delete(key)

    assert receipt.session == "user-7"
    assert receipt.keys >= 4
    assert receipt.bytes > 0
    for question in (load(store, key), store.head(key), store.turns(key), store.delete(key)):
        with pytest.raises(Deleted, match="choose another id"):
            await question
    for version in (1, 2):
        with pytest.raises(Deleted):
            await commit(store, key, version, put={"a": b"2"})
    assert (await store.sessions("acme")).heads == ()


async def test_sessions_are_listed_in_pages_the_latest_first(store):
    keys = [SessionKey("acme", f"s:{i}") for i in range(5)]
    for key in keys:
        await commit(store, key, 1, put={"a": b"1"})
    await commit(store, keys[1], 2)

    pages, cursor = [], None
    while not pages or cursor:
        page = await store.sessions("acme", cursor=cursor, limit=2)
        pages.append([head.key.session for head in page.heads])
        cursor = page.cursor

    assert pages == [["s:1", "s:4"], ["s:3", "s:2"], ["s:0"]]


async def test_a_page_that_holds_everything_is_the_last(store, key):
    await commit(store, key, 1)

    page = await store.sessions("acme", limit=1)

    assert [head.version for head in page.heads] == [1]
    assert page.cursor is None
    assert (await store.sessions("nobody")).heads == ()


async def test_a_commit_between_two_pages_repeats_no_session(store):
    for i in range(4):
        await commit(store, SessionKey("acme", f"s{i}"), 1)
    first = await store.sessions("acme", limit=2)
    await commit(store, SessionKey("acme", "s3"), 2)

    second = await store.sessions("acme", cursor=first.cursor, limit=2)

    assert [head.key.session for head in second.heads] == ["s1", "s0"]


@pytest.mark.parametrize("cursor", ["", "yesterday", "1723.5", "soon:s1"])
async def test_a_cursor_that_no_page_gave_is_refused(store, cursor):
    with pytest.raises(ValueError, match="give back the one"):
        await store.sessions("acme", cursor=cursor)


async def test_tenants_do_not_see_each_other(store, key):
    other = SessionKey("globex", key.session)
    await commit(store, key, 1, put={"a": b"ours"})
    await commit(store, other, 1, put={"a": b"theirs"})

    await store.delete(other)

    assert (await load(store, key)).blobs == {"a": b"ours"}
    assert [head.key for head in (await store.sessions("acme")).heads] == [key]


async def test_the_transcript_gives_the_last_turns_the_oldest_first(store, key):
    for version in range(1, 7):
        turn = TurnRecord(f"turn {version}", {"text": f"say {version}"})
        await commit(store, key, version, turn=turn if version != 3 else None)

    turns = await store.turns(key, limit=3)

    assert turns == [TurnRecord(f"turn {i}", {"text": f"say {i}"}, version=i) for i in (4, 5, 6)]
    assert len(await store.turns(key)) == 5


async def test_a_turn_is_committed_once(store, key):
    await commit(store, key, 1, put={"a": b"1"}, turn=TurnRecord("a", {"version": 1}))
    await commit(store, key, 2, put={"a": b"2"})

    with pytest.raises(Repeated, match="has committed turn 'a' before") as caught:
        await commit(store, key, 3, put={"a": b"3"}, turn=TurnRecord("a", {"version": 3}))

    assert caught.value.turn_id == "a"
    assert await store.turns(key) == [TurnRecord("a", {"version": 1}, version=1)]
    assert (await load(store, key)).blobs == {"a": b"2"}


def test_a_change_has_no_turn_twice():
    with pytest.raises(ValueError, match="two turns have the same id"):
        Change(FINGERPRINT, {}, turns=(TurnRecord("a", {}), TurnRecord("a", {})))


async def test_a_session_without_turns_has_an_empty_transcript(store, key):
    await commit(store, key, 1)

    assert list(await store.turns(key)) == []


@pytest.mark.parametrize("servers", [("a", "b", "c", "d"), ("a", "a", "a")], ids=["four", "one"])
async def test_of_many_writers_exactly_one_makes_each_version(store, key, servers):
    async def race(writer, server):
        made = []
        while (found := await version(store, key)) < 5:
            try:
                lease = await store.acquire(key, server, seconds=30)
                put = {"by": bytes([writer]), "big": os.urandom(2000)}
                commit_id = f"{writer}-{found}"
                work = store.commit(lease, change(put=put), expected=found, commit_id=commit_id)
                made.append((await work).version)
                await store.release(lease)
            except (Conflict, Fenced, Held):
                await asyncio.sleep(0.01 * writer)
        return made

    made = await asyncio.gather(*(race(*each) for each in enumerate(servers)))

    versions = sorted(number for numbers in made for number in numbers)
    assert versions == list(range(1, versions[-1] + 1))
    assert versions[-1] >= 5
    assert (await load(store, key)).head.version == versions[-1]


async def version(store, key):
    try:
        return (await store.head(key)).version
    except NotFound:
        return 0


async def test_the_store_says_what_it_promises(store):
    found = await store.durability()

    assert (found.mode, found.aof) in {("memory", False), ("everysec", True)}
    assert found.policy == "noeviction"
    assert found.engine.split()[0] in {"memory", "valkey", "redis"}
