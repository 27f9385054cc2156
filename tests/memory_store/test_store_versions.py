"""Older versions: kept, read, and gone on from; held against every backend."""

import pytest

from memory_store import (
    Change,
    Deleted,
    Incomplete,
    NoVersion,
    SessionKey,
    TurnRecord,
)
from tests.tools.leases import put as write

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"


async def commit(store, key, version, expected=None, **parts):
    """Make version `version` with a turn of that number."""
    turns = parts.pop("turns", (TurnRecord(f"t{version}", {"made": version}),))
    change = Change(FINGERPRINT, {"at": version}, turns=turns, **parts)
    expected = version - 1 if expected is None else expected
    return await write(store, key, change, expected=expected, commit_id=f"c{version}")


async def five(store, key):
    """Make versions 1 to 5, each with its own `fast` blob and the `slow` one of version 1."""
    await commit(store, key, 1, put={"fast": b"1", "slow": b"slow"})
    for version in range(2, 6):
        await commit(store, key, version, put={"fast": b"%d" % version}, keep={"slow"})


async def load(store, key, version=None):
    return await store.load(key, fingerprint=FINGERPRINT, version=version)


async def ids(store, key, version=None):
    return [turn.turn_id for turn in await store.turns(key, version=version)]


async def test_kept_versions_are_listed_the_newest_first(store, key):
    await five(store, key)
    await commit(store, key, 6)

    heads = await store.versions(key)

    assert [head.version for head in heads] == [6, 5, 4, 3, 2]
    assert [head.meta["at"] for head in heads] == [6, 5, 4, 3, 2]
    assert heads[0] == await store.head(key)


async def test_an_older_version_is_read_as_it_was(store, key):
    await five(store, key)

    older = await load(store, key, 2)

    assert older.blobs == {"fast": b"2", "slow": b"slow"}
    assert (older.head.version, older.head.meta, older.latest) == (2, {"at": 2}, 5)
    assert older.damaged == {}
    assert await ids(store, key, 2) == ["t1", "t2"]
    assert (await load(store, key)).latest == 5


@pytest.mark.parametrize("version", [0, 1, 7, -1])
async def test_a_version_that_is_not_kept_is_not_read_or_gone_on_from(store, key, version):
    await five(store, key)
    await commit(store, key, 6)

    for question in (load(store, key, version), store.turns(key, version=version)):
        with pytest.raises(NoVersion, match="versions 2 to 6 are kept") as caught:
            await question
        assert caught.value.kept == (2, 6)
    with pytest.raises(NoVersion):
        await commit(store, key, 7, base=version)
    assert (await store.head(key)).version == 6


async def test_a_session_that_does_not_exist_has_nothing_to_go_on_from(store, key):
    with pytest.raises(NoVersion):
        await commit(store, key, 1, base=3)


async def test_going_on_from_an_older_version_takes_its_blobs_and_turns(store, key):
    await five(store, key)

    done = await commit(store, key, 6, base=2, put={"new": b"6"}, keep={"fast", "slow"})

    now = await load(store, key)
    assert done.version == 6
    assert now.blobs == {"fast": b"2", "new": b"6", "slow": b"slow"}
    assert (now.head.version, now.head.parent) == (6, 2)
    assert await ids(store, key) == ["t1", "t2", "t6"]
    assert await ids(store, key, 5) == ["t1", "t2", "t3", "t4", "t5"]


async def test_a_chain_goes_on_from_where_its_version_was(store, key):
    other = SessionKey("acme", "straight")
    await five(store, key)
    await commit(store, key, 6, base=2)
    for version, turn in enumerate(("t1", "t2", "t6"), start=1):
        await commit(store, other, version, turns=(TurnRecord(turn, {}),))

    chains = [head.chain for head in await store.versions(key)]

    assert (await store.head(key)).chain == (await store.head(other)).chain
    assert len(set(chains)) == len(chains)


async def test_a_rollback_can_be_rolled_back(store, key):
    await five(store, key)
    await commit(store, key, 6, base=2, keep={"fast"})
    await commit(store, key, 7, base=5, keep={"fast", "slow"})

    now = await load(store, key)

    assert now.blobs == {"fast": b"5", "slow": b"slow"}
    assert await ids(store, key) == ["t1", "t2", "t3", "t4", "t5", "t7"]
    assert await ids(store, key, 6) == ["t1", "t2", "t6"]
    await commit(store, key, 8, base=6)
    assert await ids(store, key) == ["t1", "t2", "t6", "t8"]


async def test_going_on_from_the_current_version_undoes_nothing(store, key):
    await five(store, key)

    await commit(store, key, 6, base=5, keep={"fast", "slow"})

    assert await ids(store, key) == ["t1", "t2", "t3", "t4", "t5", "t6"]


async def test_a_blob_of_the_current_version_cannot_be_kept_from_an_older_one(store, key):
    await commit(store, key, 1, put={"a": b"1"})
    await commit(store, key, 2, put={"b": b"2"})

    with pytest.raises(Incomplete, match="'b'"):
        await commit(store, key, 3, base=1, keep={"b"})


async def test_a_blob_gone_on_with_outlives_the_version_that_made_it(store, key):
    await commit(store, key, 1, put={"slow": b"slow"})
    await commit(store, key, 2)
    await commit(store, key, 3, base=1, keep={"slow"})
    for version in range(4, 12):
        await commit(store, key, version, keep={"slow"})

    assert (await load(store, key)).blobs == {"slow": b"slow"}


async def test_versions_can_be_made_higher_than_one_that_was_lost(store, key):
    await commit(store, key, 1)
    done = await commit(store, key, 4, expected=1, above=3)
    later = await commit(store, key, 5, above=2)

    assert (done.version, later.version) == (4, 5)
    assert [head.version for head in await store.versions(key)] == [5, 4, 1]
    assert await ids(store, key) == ["t1", "t4", "t5"]
    with pytest.raises(NoVersion):
        await load(store, key, 3)


async def test_a_leap_of_versions_is_no_longer_work_than_a_step(store, key):
    await commit(store, key, 1, put={"a": b"1"})

    done = await commit(store, key, 2, above=10**12, put={"a": b"2"})

    assert done.version == 10**12 + 1
    assert (await load(store, key)).blobs == {"a": b"2"}
    assert (await store.delete(key)).left == 0


async def test_a_turn_is_known_rolled_back_or_not(store, key):
    await five(store, key)
    await commit(store, key, 6, base=2)

    assert await store.turn(key, "t2") == TurnRecord("t2", {"made": 2}, version=2)
    assert await store.turn(key, "t4") == TurnRecord("t4", {"made": 4}, version=4)
    assert await store.turn(key, "t7") is None
    assert await store.turn(SessionKey("acme", "nobody"), "t1") is None


async def test_the_last_turns_are_those_of_the_version(store, key):
    await five(store, key)
    await commit(store, key, 6, base=2)

    turns = await store.turns(key, limit=2)

    assert [turn.turn_id for turn in turns] == ["t2", "t6"]


async def test_several_turns_are_committed_at_once_in_their_order(store, key):
    turns = tuple(TurnRecord(f"import-{i}", {"i": i}) for i in range(250))

    await commit(store, key, 1, turns=turns)

    found = await store.turns(key, limit=200)
    assert [turn.payload["i"] for turn in found] == list(range(50, 250))
    assert {turn.version for turn in found} == {1}


async def test_a_person_finds_all_of_their_sessions(store):
    keys = [SessionKey("acme", f"s:{i}") for i in range(4)]
    for key, owner in zip(keys, ("nora", "omar", None, "nora"), strict=True):
        await commit(store, key, 1, owner=owner)
    await commit(store, SessionKey("globex", "s:9"), 1, owner="nora")
    await commit(store, keys[2], 2, owner="nora")
    await store.delete(keys[3])

    found = await store.owned("acme", "nora")

    assert sorted(key.session for key in found) == ["s:0", "s:2"]
    assert await store.owned("acme", "nobody") == []


async def test_a_session_stays_its_owners_until_it_is_given_away(store, key):
    await commit(store, key, 1, owner="nora")
    await commit(store, key, 2)
    assert (await store.head(key)).owner == "nora"
    await commit(store, key, 3, owner="omar")

    await commit(store, key, 4, base=2)  # what is rolled back is what was learned

    assert (await store.head(key)).owner == "omar"
    assert await store.owned("acme", "omar") == [key]
    assert await store.owned("acme", "nora") == []
    assert (await load(store, key, 2)).head.owner == "nora"


async def test_a_deletion_leaves_nothing(store, key):
    await five(store, key)
    await commit(store, key, 6, base=2, owner="nora")

    receipt = await store.delete(key)

    assert receipt.left == 0
    assert receipt.keys >= 8
    assert await store.owned("acme", "nora") == []
    with pytest.raises(Deleted):
        await store.versions(key)
    with pytest.raises(Deleted):
        await store.turn(key, "t1")


async def test_a_durable_commit_says_whether_it_is_on_disk(store, key):
    promised = await store.durability()
    lease = await store.acquire(key, "tester", seconds=30)
    change = Change(FINGERPRINT, {}, put={"a": b"1"})

    done = await store.commit(lease, change, expected=0, commit_id="c1", durable=True)
    again = await store.commit(lease, change, expected=0, commit_id="c1", durable=True)
    hasty = await store.commit(lease, change, expected=1, commit_id="c2")

    assert (done.version, done.durable) == (1, promised.waits)
    assert (again.duplicate, again.durable) == (True, promised.waits)
    assert not hasty.durable
