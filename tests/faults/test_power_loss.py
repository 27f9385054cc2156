"""The store's host loses power: simulated by cutting off what its append-only file had not synced.

No file system that forgets (LazyFS) can be had everywhere, so the file is cut after the fact: at
the length that it had when the server last confirmed a sync, or anywhere at all.
"""

import os
import random
import time

import pytest

from memory_store import Change, Conflict, NotFound, RedisStore, Regressed, SessionKey
from tests.tools.engines import KINDS, Engine
from tests.tools.leases import put

pytestmark = [pytest.mark.anyio, pytest.mark.long]

FINGERPRINT = "f"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def key(name):
    return SessionKey("acme", str(name))


def change(version):
    return Change(FINGERPRINT, {"at": version}, put={"level": os.urandom(50_000), "a": b"a"})


def log_of(engine):
    """Return the file that commands are appended to."""
    return max((engine.folder / "appendonlydir").glob("*.incr.aof"))


def lose_power(engine, length):
    """Kill the server, and leave of its file what was on disk by then."""
    engine.kill()
    with log_of(engine).open("r+b") as file:
        file.truncate(length)
    engine.restart()


async def commit(store, name, version, **options):
    return await put(
        store,
        key(name),
        change(version),
        expected=version - 1,
        commit_id=f"{name}-{version}",
        **options,
    )


async def version(store, name):
    """Return where a session is, once it is known to be whole; 0 where it is not there."""
    try:
        snapshot = await store.load(key(name), fingerprint=FINGERPRINT)
    except NotFound:
        return 0
    assert snapshot.damaged == {}
    assert snapshot.head.meta == {"at": snapshot.head.version}
    return snapshot.head.version


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_syncs_always_loses_nothing(tmp_path, kind):
    with Engine(tmp_path, kind, {"appendfsync": "always"}) as engine:
        store = await RedisStore.open(engine.url)
        synced = 0
        for each in range(1, 31):
            await commit(store, each % 3, (each + 2) // 3)
            synced = log_of(engine).stat().st_size  # the reply came after the sync

        lose_power(engine, synced)

        assert [await version(store, name) for name in range(3)] == [10, 10, 10]
        await store.close()


async def test_durable_commits_survive_and_what_came_after_them_is_never_lost_in_silence(tmp_path):
    with Engine(tmp_path, "valkey", {"appendfsync": "everysec"}) as engine:
        store = await RedisStore.open(engine.url)
        for each in range(1, 6):
            done = await commit(store, "a", each, durable=True)
            assert done.durable
        synced = log_of(engine).stat().st_size
        lease = await store.acquire(key("a"), "tester", seconds=60)
        for each in range(6, 20):
            await store.commit(lease, change(each), expected=each - 1, commit_id=f"after-{each}")

        lose_power(engine, synced)

        assert await version(store, "a") == 5
        with pytest.raises((Regressed, Conflict)):
            await store.commit(lease, change(20), expected=19, commit_id="late")
        assert (await store.acquire(key("a"), "tester", seconds=60)).version == 5
        await store.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_syncs_every_second_loses_no_more_than_two(tmp_path, kind):
    with Engine(tmp_path, kind, {"appendfsync": "everysec"}) as engine:
        store = await RedisStore.open(engine.url)
        acknowledged = []  # (when, version, length of the file)
        began = time.monotonic()
        while (now := time.monotonic()) < began + 4:
            done = await commit(store, "a", len(acknowledged) + 1)
            acknowledged.append((now, done.version, log_of(engine).stat().st_size))
        old = [each for each in acknowledged if each[0] < time.monotonic() - 2]

        lose_power(engine, old[-1][2])  # the worst that two seconds without a sync can do

        assert await version(store, "a") == old[-1][1] >= 10
        await store.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_is_cut_anywhere_leaves_every_session_whole(tmp_path, kind):
    chance = random.Random(3)
    with Engine(tmp_path, kind) as engine:
        store = await RedisStore.open(engine.url)
        for each in range(1, 41):
            await commit(store, each % 4, (each + 3) // 4)
        versions, length = [10] * 4, log_of(engine).stat().st_size
        for _ in range(25):
            length = chance.randrange(int(0.9 * length), length)
            lose_power(engine, length)

            found = [await version(store, name) for name in range(4)]

            assert all(now <= before for now, before in zip(found, versions, strict=True))
            versions = found
            length = log_of(engine).stat().st_size
        assert sum(versions) < 40
        await store.close()
