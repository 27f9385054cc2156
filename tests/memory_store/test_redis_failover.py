"""A master dies: what was acknowledged as durable is there after it, what is lost says so."""

import asyncio
import time

import pytest

from memory_store import Change, Conflict, NotFound, RedisStore, Regressed, SessionKey, Unavailable
from tests.tools.engines import Cluster, Sentinels, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.long]

FINGERPRINT = "hope-nano/1"


def change(version):
    return Change(FINGERPRINT, {"at": version}, put={"a": b"%d" % version})


async def patiently(question, seconds=20):
    """Ask again while the store does not answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await question()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def follow(sentinels):
    """Wait until the replica has all that its master has."""
    wait_until(lambda: offset(sentinels.replica) >= offset(sentinels.master), "it lags behind")


def offset(engine):
    return engine.ask("INFO", "replication")["master_repl_offset"]


async def test_durable_commits_outlive_their_master(tmp_path, key):
    with Sentinels(tmp_path) as sentinels:
        store = await RedisStore.open(sentinels.url, replicas=1, patience=2.0)
        assert (await store.durability()).replicas == 1
        lease = await store.acquire(key, "a", seconds=60)
        version = 0
        for _ in range(10):
            done = await store.commit(
                lease,
                change(version + 1),
                expected=version,
                commit_id=f"c{version + 1}",
                durable=True,
            )
            assert done.durable
            version = done.version

        sentinels.kill_master()
        sentinels.wait_for_failover()

        found = await patiently(lambda: store.load(key, fingerprint=FINGERPRINT))
        assert found.blobs == {"a": b"10"}
        more = await store.commit(lease, change(11), expected=10, commit_id="c11", durable=True)
        assert (more.version, more.durable) == (11, False)  # no replica is left to have it
        await store.close()


async def test_what_a_failover_lost_is_never_lost_in_silence(tmp_path, key):
    with Sentinels(tmp_path) as sentinels:
        store = await RedisStore.open(sentinels.url, patience=2.0)
        lease = await store.acquire(key, "a", seconds=60)
        await store.commit(lease, change(1), expected=0, commit_id="c1", durable=True)
        follow(sentinels)
        # Paused, the replica would find in its socket's buffer what it had missed.
        sentinels.master.ask("ACL", "SETUSER", "default", "-psync", "-sync")
        sentinels.master.ask("CLIENT", "KILL", "TYPE", "replica")
        await store.commit(lease, change(2), expected=1, commit_id="c2")
        late = await store.acquire(SessionKey("acme", "late"), "a", seconds=60)
        await store.commit(late, change(1), expected=0, commit_id="c1")
        sentinels.kill_master()
        sentinels.wait_for_failover()

        # The fence of this session's lease was known to the replica, its last version was not.
        with pytest.raises(Conflict, match="at version 1, not 2"):
            await patiently(lambda: store.commit(lease, change(3), expected=2, commit_id="c3"))
        with pytest.raises(Regressed):
            await store.commit(late, change(2), expected=1, commit_id="c2")
        with pytest.raises(NotFound):
            await store.head(late.key)

        again = await store.acquire(key, "a", seconds=60)
        assert (again.version, again.commit) == (1, "c1")
        await store.close()


async def test_a_cluster_goes_on_once_its_dead_master_is_back(tmp_path, key):
    with Cluster(tmp_path) as cluster:
        store = await RedisStore.open(cluster.url, patience=2.0)
        lease = await store.acquire(key, "a", seconds=60)
        await store.commit(lease, change(1), expected=0, commit_id="c1", durable=True)
        node = cluster.master_of("hope:{acme:user-7}:h")
        node.kill()
        with pytest.raises(Unavailable):
            await store.commit(lease, change(2), expected=1, commit_id="c2")

        node.restart()
        cluster.wait()

        done = await patiently(
            lambda: store.commit(lease, change(2), expected=1, commit_id="c2", durable=True)
        )
        assert (done.version, done.durable) == (2, True)
        await store.close()
