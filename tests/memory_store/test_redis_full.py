"""A server, or one node of a cluster, whose memory is full, or that would evict."""

import os

import pytest

from memory_store import Change, Full, RedisStore, SessionKey, TurnRecord, Unsafe
from tests.memory_store.conftest import empty

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"
EVICTING = [
    f"{whose}-{which}" for whose in ("allkeys", "volatile") for which in ("lru", "lfu", "random")
]
EVICTING.append("volatile-ttl")


class Place:
    """A store, and what fills all of its servers up."""

    def __init__(self, store, url, configure):
        self.store, self.url, self.configure = store, url, configure


@pytest.fixture(params=["valkey", "redis", "cluster"])
async def place(request, anyio_backend):
    url = request.getfixturevalue(f"{request.param}_url")
    await empty(url)
    store = await RedisStore.open(url)

    async def configure(name, value):
        await store._link.each("CONFIG", "SET", name, value)

    yield Place(store, url, configure)
    await configure("maxmemory", "0")
    await configure("maxmemory-policy", "noeviction")
    await store.close()


async def test_a_full_store_refuses_what_grows_and_does_the_rest(place, key):
    store, other = place.store, SessionKey("acme", "new")
    lease = await store.acquire(key, "a", seconds=30)
    first = Change(FINGERPRINT, {}, put={"a": b"1"}, turns=(TurnRecord("t", {}),), owner="nora")
    await store.commit(lease, first, expected=0, commit_id="c1")
    await place.configure("maxmemory", "1")

    growing = [
        store.acquire(other, "a", seconds=30),
        store.acquire(key, "a", seconds=30),
        store.commit(lease, Change(FINGERPRINT, {}), expected=1, commit_id="c2"),
        store.commit(lease, Change(FINGERPRINT, {}, put={"b": b"2"}), expected=1, commit_id="c3"),
    ]
    for refused in growing:
        with pytest.raises(Full, match="raise its maxmemory or delete sessions"):
            await refused

    assert await store.renew(lease, seconds=30)
    again = await store.commit(lease, first, expected=0, commit_id="c1", durable=True)
    assert (again.version, again.duplicate) == (1, True)
    assert again.durable is (await store.durability()).waits
    assert (await store.load(key, fingerprint=FINGERPRINT)).blobs == {"a": b"1"}
    assert (await store.head(key)).version == 1
    assert len(await store.versions(key)) == len(await store.turns(key)) == 1
    assert (await store.turn(key, "t")).version == 1
    assert [head.key for head in (await store.sessions("acme")).heads] == [key]
    assert await store.owned("acme", "nora") == [key]
    await store.release(lease)
    assert (await store.delete(key)).left == 0


async def test_what_was_staged_on_a_full_store_is_let_go(place, key):
    lease = await place.store.acquire(key, "a", seconds=30)
    big = Change(FINGERPRINT, {}, put={str(i): os.urandom(1_000_000) for i in range(12)})
    [info, *others] = [
        each for each in await place.store._link.each("INFO", "memory") if isinstance(each, dict)
    ] or [{}]
    used = max(int(each.get("used_memory", 0)) for each in (info, *others)) or 6_000_000
    await place.configure("maxmemory", str(used + 6_000_000))

    with pytest.raises(Full):
        await place.store.commit(lease, big, expected=0, commit_id="c1")

    assert await place.store._link.scan("hope:{acme:user-7}:b:*") == []
    await place.configure("maxmemory", "0")
    done = await place.store.commit(lease, big, expected=0, commit_id="c1")
    assert done.version == 1


@pytest.mark.parametrize("policy", EVICTING)
async def test_a_server_that_evicts_is_refused(url, raw, policy):
    await raw.config_set("maxmemory-policy", policy)

    with pytest.raises(Unsafe, match=f"maxmemory-policy {policy}.*set `maxmemory-policy noev"):
        await RedisStore.open(url)


@pytest.mark.parametrize("policy", EVICTING)
async def test_a_cluster_of_which_one_node_evicts_is_refused(cluster, policy):
    node = cluster.masters[2]
    node.set("maxmemory-policy", policy)

    try:
        with pytest.raises(Unsafe, match=f"cluster .* has maxmemory-policy {policy}"):
            await RedisStore.open(cluster.url)
    finally:
        node.set("maxmemory-policy", "noeviction")


async def test_a_server_that_evicts_is_accepted_when_told_so(url, raw):
    await raw.config_set("maxmemory-policy", "allkeys-lru")

    store = await RedisStore.open(url, allow_eviction=True)

    assert (await store.durability()).policy == "allkeys-lru"
    await store.close()
