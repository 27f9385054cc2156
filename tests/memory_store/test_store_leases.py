"""Who may write a session, held against every backend."""

import asyncio

import pytest

from memory_store import (
    Change,
    Conflict,
    Deleted,
    Fenced,
    Held,
    NotFound,
    RedisStore,
    Regressed,
)

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"


def change(**parts):
    return Change(FINGERPRINT, {}, **parts)


async def test_every_acquisition_raises_the_fence(store, key):
    first = await store.acquire(key, "a", seconds=30)
    again = await store.acquire(key, "a", seconds=30)
    await store.release(again)
    other = await store.acquire(key, "b", seconds=30)

    assert first.fence < again.fence
    assert (first.key, first.owner, first.version, first.commit) == (key, "a", 0, "")
    assert other.owner == "b"


async def test_a_lease_knows_the_version_and_the_commit_that_made_it(store, key):
    first = await store.acquire(key, "a", seconds=30)
    await store.commit(first, change(above=6), expected=0, commit_id="c1")

    second = await store.acquire(key, "a", seconds=30)

    assert (second.version, second.commit) == (7, "c1")


async def test_a_lease_of_another_is_held_for_some_seconds(store, key):
    await store.acquire(key, "a", seconds=30)

    with pytest.raises(Held, match="in use by another server") as caught:
        await store.acquire(key, "b", seconds=30)

    assert 25 < caught.value.seconds <= 30


async def test_a_lease_runs_out(store, key):
    await store.acquire(key, "a", seconds=0.05)
    await asyncio.sleep(0.1)

    assert (await store.acquire(key, "b", seconds=30)).owner == "b"


async def test_a_released_lease_is_free_at_once(store, key):
    lease = await store.acquire(key, "a", seconds=30)
    await store.commit(lease, change(), expected=0, commit_id="c1")
    await store.release(lease)
    await store.release(lease)

    other = await store.acquire(key, "b", seconds=30)

    assert other.fence > lease.fence


async def test_a_lease_that_moved_is_not_released_by_its_last_holder(store, key):
    old = await store.acquire(key, "a", seconds=30)
    await store.acquire(key, "a", seconds=30)

    await store.release(old)

    with pytest.raises(Held):
        await store.acquire(key, "b", seconds=30)


async def test_a_renewed_lease_is_held_for_longer(store, key):
    lease = await store.acquire(key, "a", seconds=5)

    assert await store.renew(lease, seconds=60)

    with pytest.raises(Held) as caught:
        await store.acquire(key, "b", seconds=30)
    assert caught.value.seconds > 50


async def test_a_lease_that_ran_out_can_be_renewed_while_nobody_wanted_it(store, key):
    lease = await store.acquire(key, "a", seconds=0.05)
    await asyncio.sleep(0.1)

    assert await store.renew(lease, seconds=30)

    with pytest.raises(Held):
        await store.acquire(key, "b", seconds=30)


@pytest.mark.parametrize("owner", ["a", "b"])
async def test_a_lease_that_another_acquired_cannot_be_renewed(store, key, owner):
    lease = await store.acquire(key, "a", seconds=0.05)
    await asyncio.sleep(0.1)
    await store.acquire(key, owner, seconds=30)

    assert not await store.renew(lease, seconds=30)


async def test_a_lease_that_ran_out_still_commits_while_nobody_wanted_it(store, key):
    lease = await store.acquire(key, "a", seconds=0.05)
    await asyncio.sleep(0.1)

    done = await store.commit(lease, change(), expected=0, commit_id="c1")

    assert done.version == 1


async def test_a_commit_after_another_acquired_is_fenced_even_at_the_right_version(store, key):
    old = await store.acquire(key, "a", seconds=0.05)
    await asyncio.sleep(0.1)
    new = await store.acquire(key, "b", seconds=30)

    with pytest.raises(Fenced, match="another took it, or its lease ran out"):
        await store.commit(old, change(put={"a": b"old"}), expected=0, commit_id="old")

    await store.commit(new, change(put={"a": b"new"}), expected=0, commit_id="new")
    with pytest.raises(Fenced):
        await store.commit(old, change(), expected=0, commit_id="old")
    assert (await store.load(key, fingerprint=FINGERPRINT)).blobs == {"a": b"new"}


async def test_a_fenced_writer_still_learns_that_its_commit_was_made(store, key):
    old = await store.acquire(key, "a", seconds=30)
    await store.commit(old, change(), expected=0, commit_id="c1")
    await store.release(old)
    await store.acquire(key, "b", seconds=30)

    again = await store.commit(old, change(), expected=0, commit_id="c1")

    assert (again.version, again.duplicate) == (1, True)


async def test_a_holder_at_another_version_is_in_conflict(store, key):
    lease = await store.acquire(key, "a", seconds=30)

    with pytest.raises(Conflict):
        await store.commit(lease, change(), expected=3, commit_id="c1")


async def test_a_lease_makes_no_session(store, key):
    lease = await store.acquire(key, "a", seconds=30)

    for question in (store.head(key), store.versions(key), store.turns(key), store.delete(key)):
        with pytest.raises(NotFound):
            await question
    assert (await store.sessions("acme")).heads == ()
    assert await store.owned("acme", "nora") == []
    assert await store.turn(key, "t") is None
    await store.release(lease)
    with pytest.raises(NotFound):
        await store.head(key)


async def test_a_deleted_session_cannot_be_acquired_renewed_or_committed_to(store, key):
    lease = await store.acquire(key, "a", seconds=30)
    await store.commit(lease, change(), expected=0, commit_id="c1")
    await store.delete(key)

    with pytest.raises(Deleted):
        await store.acquire(key, "a", seconds=30)
    assert not await store.renew(lease, seconds=30)
    await store.release(lease)
    for commit_id in ("c1", "c2"):
        with pytest.raises(Deleted):
            await store.commit(lease, change(), expected=1, commit_id=commit_id)


async def test_the_head_of_a_session_that_was_only_acquired_expires(redis_store, raw, key):
    head = "hope:{acme:user-7}:h"
    lease = await redis_store.acquire(key, "a", seconds=30)
    await raw.expire(head, 100)

    assert await redis_store.renew(lease, seconds=30)

    assert 3500 < await raw.ttl(head) <= 3600
    assert 0 < await raw.ttl("hope:{acme:user-7}:l") <= 30
    await redis_store.commit(lease, change(), expected=0, commit_id="c1")
    assert await raw.ttl(head) == -1
    await redis_store.acquire(key, "a", seconds=30)
    assert await raw.ttl(head) == -1


async def test_a_lease_that_the_store_does_not_know_has_regressed(redis_store, raw, key):
    head = "hope:{acme:user-7}:h"
    first = await redis_store.acquire(key, "a", seconds=30)
    await redis_store.commit(first, change(), expected=0, commit_id="c1")
    before = await raw.dump(head)
    lease = await redis_store.acquire(key, "a", seconds=30)
    await redis_store.commit(lease, change(), expected=1, commit_id="c2")
    await raw.restore(head, 0, before, replace=True)

    with pytest.raises(Regressed, match="has gone back"):
        await redis_store.commit(lease, change(), expected=1, commit_id="c3")

    assert not await redis_store.renew(lease, seconds=30)
    await raw.delete(head)
    with pytest.raises(Regressed):
        await redis_store.commit(lease, change(), expected=0, commit_id="c3")
    with pytest.raises(NotFound):
        await redis_store.head(key)


async def test_a_fence_that_another_has_reached_after_a_regression_is_not_mistaken(
    redis_store, raw, key
):
    head = "hope:{acme:user-7}:h"
    first = await redis_store.acquire(key, "a", seconds=30)
    await redis_store.commit(first, change(), expected=0, commit_id="c1")
    before = await raw.dump(head)
    lease = await redis_store.acquire(key, "a", seconds=30)
    await raw.restore(head, 0, before, replace=True)
    await redis_store.release(first)
    other = await redis_store.acquire(key, "b", seconds=30)
    assert other.fence == lease.fence

    with pytest.raises(Regressed):
        await redis_store.commit(lease, change(), expected=1, commit_id="c2")

    assert not await redis_store.renew(lease, seconds=30)
    await redis_store.release(lease)
    with pytest.raises(Held):
        await redis_store.acquire(key, "c", seconds=30)


async def test_leases_are_renewed_while_all_lines_for_blobs_are_busy(url, raw, key):
    store = await RedisStore.open(url)
    lease = await store.acquire(key, "a", seconds=30)
    async with asyncio.TaskGroup() as busy:
        held = [busy.create_task(_held(store._link.bulk)) for _ in range(16)]
        await asyncio.sleep(0)

        async with asyncio.timeout(2):
            assert await store.renew(lease, seconds=30)

        for task in held:
            task.cancel()
    await store.close()


async def _held(lane):
    async with lane.one():
        await asyncio.sleep(60)
