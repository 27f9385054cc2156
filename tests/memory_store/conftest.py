"""Real servers for the store's tests: our Valkey always, Debian's Redis where it is installed."""

import shutil
from pathlib import Path

import pytest
from redis.asyncio import Redis

from memory_store import EmbeddedValkey, LocalStore, RedisStore, SessionKey

ENGINES = ("valkey", "redis")


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


@pytest.fixture(params=("local", *ENGINES))
async def store(request, anyio_backend):
    """Every backend in turn, empty."""
    if request.param == "local":
        yield LocalStore()
        return
    url = request.getfixturevalue(f"{request.param}_url")
    client = Redis.from_url(url)
    await client.flushall()
    await client.aclose()
    store = await RedisStore.open(url)
    yield store
    await store.close()


@pytest.fixture
def key():
    return SessionKey("acme", "user-7")
