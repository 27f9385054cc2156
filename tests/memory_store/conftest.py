"""Real servers for the store's tests: our Valkey always, Debian's Redis where it is installed."""

import shutil
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster

from memory_store import EmbeddedValkey, LocalStore, RedisStore, SessionKey
from memory_store.address import connect
from memory_store.seal import Keyring
from tests.tools.engines import Cluster

ENGINES = ("valkey", "redis")
KEYRING = Keyring().with_new_key("acme").with_new_key("globex")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory):
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    with EmbeddedValkey(tmp_path_factory.mktemp("redis"), binary=Path(binary)) as server:
        yield server.url


@pytest.fixture(params=ENGINES)
def url(request):
    """The address of an empty server."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def raw(url, anyio_backend):
    """A plain client of the same server, to look at what is there and to damage it."""
    client = Redis.from_url(url)
    await client.flushall()
    yield client
    await client.config_set("maxmemory", 0)
    await client.config_set("maxmemory-policy", "noeviction")
    await client.aclose()


@pytest.fixture
async def redis_store(url, raw):
    store = await RedisStore.open(url)
    yield store
    await store.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_url(cluster):
    return cluster.url


async def empty(url):
    """Remove everything from the server, or from each of a cluster's."""
    client, _ = connect(url, connections=1, timeout=5)
    if isinstance(client, RedisCluster):
        await client.flushall(target_nodes=RedisCluster.PRIMARIES)
    else:
        await client.flushall()
    await client.aclose()


@pytest.fixture(params=("local", *ENGINES, "cluster", "sealed"))
async def store(request, anyio_backend):
    """Every backend in turn, empty."""
    if request.param == "local":
        yield LocalStore()
        return
    sealed = request.param == "sealed"
    url = request.getfixturevalue(f"{'valkey' if sealed else request.param}_url")
    await empty(url)
    store = await RedisStore.open(url, keyring=KEYRING if sealed else None)
    yield store
    await store.close()


@pytest.fixture
def key():
    return SessionKey("acme", "user-7")
