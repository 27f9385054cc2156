"""Which servers are accepted, and what is said of those that are not."""

import pytest

from memory_store import (
    Change,
    Durability,
    EmbeddedValkey,
    RedisStore,
    SessionKey,
    Unavailable,
    Unsafe,
)
from memory_store.durability import refuse_unsafe
from tests.tools.leases import put


@pytest.mark.anyio
async def test_durability_is_read_from_the_running_server(redis_store, raw):
    modes = []
    for setting, value in (("appendfsync", "always"), ("appendfsync", "no"), ("appendonly", "no")):
        await raw.config_set(setting, value)
        modes.append((await redis_store.durability()).mode)
    await raw.config_set("appendfsync", "everysec")
    modes.append((await redis_store.durability()).mode)
    await raw.config_set("appendonly", "yes")

    assert modes == ["always", "none", "none", "none"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "replicas", "durable"),
    [
        ({"appendfsync": "always"}, 0, True),  # its very reply comes after the fsync
        ({"appendfsync": "always"}, 1, False),
        ({"appendonly": "no"}, 0, False),
    ],
    ids=["always", "no replica", "no AOF"],
)
async def test_a_durable_commit_claims_only_what_the_server_keeps(
    url, raw, key, settings, replicas, durable
):
    for name, value in settings.items():
        await raw.config_set(name, value)
    store = await RedisStore.open(url, replicas=replicas, patience=0.5)
    lease = await store.acquire(key, "a", seconds=30)

    done = await store.commit(lease, Change("f", {}), expected=0, commit_id="c", durable=True)

    await raw.config_set("appendfsync", "everysec")
    await raw.config_set("appendonly", "yes")
    await store.close()
    assert (done.version, done.durable) == (1, durable)


@pytest.mark.anyio
async def test_a_server_that_hides_its_settings_is_unknown_and_works(url, raw):
    rules = ("~hope:*", "+@all", "-config", "-info")
    await raw.execute_command("ACL", "SETUSER", "hope", "on", ">hunter2", *rules)
    store = await RedisStore.open(url.replace("unix://", "unix://hope:hunter2@"))

    found = await store.durability()
    key = SessionKey("acme", "user-7")
    await put(store, key, Change("f", {}, put={"a": b"1"}), expected=0, commit_id="c")
    await store.delete(key)

    await store.close()
    await raw.execute_command("ACL", "DELUSER", "hope")
    assert (found.mode, found.policy, found.engine) == ("unknown", "unknown", "redis unknown")
    assert "hunter2" not in found.where


@pytest.mark.anyio
async def test_an_address_where_nothing_answers_is_named_without_the_password():
    with pytest.raises(Unavailable, match=r"the store at 127\.0\.0\.1:1 does not answer") as caught:
        await RedisStore.open("redis://hope:hunter2@127.0.0.1:1/0")

    assert "hunter2" not in str(caught.value)


@pytest.mark.anyio
async def test_a_wrong_password_is_unavailable_and_not_repeated(url, raw):
    with pytest.raises(Unavailable, match="invalid username-password") as caught:
        await RedisStore.open(url.replace("unix://", "unix://hope:hunter2@"))

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:6379",
        "http://localhost:6379",
        "redis://:hun/ter2@localhost:6379",
        "redis://localhost:hunter2",
        "redis://localhost/?colour=hunter2",
    ],
)
@pytest.mark.anyio
async def test_an_address_that_cannot_be_read_is_explained_and_not_repeated(address):
    with pytest.raises(ValueError, match="write redis://") as caught:
        await RedisStore.open(address)

    assert "ter2" not in str(caught.value)


@pytest.mark.anyio
async def test_a_server_that_goes_away_is_unavailable(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        store = await RedisStore.open(server.url)

    with pytest.raises(Unavailable, match="unix:///"):
        await store.head(SessionKey("acme", "user-7"))

    await store.close()


@pytest.mark.anyio
async def test_kept_versions_cannot_be_negative(url):
    with pytest.raises(ValueError, match="kept_versions -1"):
        await RedisStore.open(url, kept_versions=-1)


def test_a_server_too_old_for_the_scripts_is_refused():
    old = Durability("everysec", "redis 6.2.14", "noeviction", aof=True, where="localhost:6379")

    with pytest.raises(Unsafe, match=r"localhost:6379 is redis 6\.2\.14; use Redis 7"):
        refuse_unsafe(old, allow_eviction=True)
