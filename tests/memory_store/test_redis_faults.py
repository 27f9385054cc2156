"""Connections that break at the worst moment: a proxy that cuts them stands before the server."""

import asyncio
import os
from contextlib import suppress

import pytest

from memory_store import Change, Committed, RedisStore, SessionKey, Unavailable
from tests.tools.leases import put as write

pytestmark = pytest.mark.anyio

FINGERPRINT = "hope-nano/1"

COMMIT = b"INCOMPLETE"  # a word of that script only
STAGING, READING = b"\r\nHSET\r\n", b"\r\nHGET\r\n"  # commands, not words of a script


class Cutter:
    """Passes everything on, but cuts the connection instead of answering a certain word."""

    def __init__(self, upstream):
        self.upstream = upstream
        self.word = b""
        self.times = 0

    def cut(self, word, times=1):
        self.word, self.times = word, times

    async def serve(self, reader, writer):
        answers, requests = await asyncio.open_unix_connection(self.upstream)
        passing = asyncio.create_task(self.answer(answers, writer))
        while request := await reader.read(1 << 16):
            lost = self.times > 0 and self.word in request
            if lost:
                self.times -= 1
                passing.cancel()
            requests.write(request)
            await requests.drain()
            if lost:
                await asyncio.sleep(0.02)  # the server does what it was told
                break
        passing.cancel()
        for end in (requests, writer):
            end.close()
            with suppress(OSError):
                await end.wait_closed()

    async def answer(self, answers, writer):
        while answer := await answers.read(1 << 16):
            writer.write(answer)
            await writer.drain()


@pytest.fixture
async def cutter(url, tmp_path):
    cutter = Cutter(url.removeprefix("unix://"))
    cutter.path = tmp_path / "s"
    server = await asyncio.start_unix_server(cutter.serve, cutter.path)
    yield cutter
    server.close()
    await server.wait_closed()


@pytest.fixture
async def store(cutter, raw):
    """A store behind the proxy, its scripts known to the server."""
    store = await RedisStore.open(f"unix://{cutter.path}")
    key = SessionKey("acme", "warm")
    await write(store, key, Change("f", {}), expected=0, commit_id="warm")
    await store.delete(key)
    await raw.flushall()
    yield store
    await store.close()


async def commit(store, key, version, put):
    change = Change(FINGERPRINT, {}, put=put)
    return await write(store, key, change, expected=version - 1, commit_id=f"c{version}")


async def limits(raw):
    return [await raw.ttl(name) async for name in raw.scan_iter("*:b:*")]


async def test_a_commit_whose_answer_is_lost_happens_once(store, cutter, raw, key):
    put = {"a": os.urandom(1_500_000), "b": b"2"}
    cutter.cut(COMMIT)

    done = await commit(store, key, 1, put)

    assert done == Committed(version=1, written=0, duplicate=True)
    assert await limits(raw) == [-1, -1]
    assert (await store.load(key, fingerprint=FINGERPRINT)).blobs == put


async def test_staging_that_breaks_is_tried_again_under_other_names(store, cutter, raw, key):
    put = {"a": os.urandom(1_500_000), "b": b"2"}
    cutter.cut(STAGING)

    done = await commit(store, key, 1, put)

    found = await limits(raw)
    assert done == Committed(version=1, written=1_500_001)
    assert found.count(-1) == 2
    assert all(3500 < limit <= 3600 for limit in found if limit != -1)
    assert (await store.load(key, fingerprint=FINGERPRINT)).blobs == put


async def test_reading_is_tried_again(store, cutter, key):
    put = {"a": os.urandom(1_500_000)}
    await commit(store, key, 1, put)
    cutter.cut(READING, times=2)

    assert (await store.load(key, fingerprint=FINGERPRINT)).blobs == put


async def test_after_three_tries_the_store_is_unavailable(store, cutter, raw, key):
    cutter.cut(STAGING, times=3)

    with pytest.raises(Unavailable):
        await commit(store, key, 1, {"a": b"1"})

    assert -1 not in await limits(raw)
    assert (await commit(store, key, 1, {"a": b"1"})).version == 1


async def test_a_commit_in_doubt_is_settled_by_asking_again(store, cutter, raw, key):
    cutter.cut(COMMIT, times=3)
    with pytest.raises(Unavailable):
        await commit(store, key, 1, {"a": b"1"})

    again = await commit(store, key, 1, {"a": b"1"})

    assert again == Committed(version=1, written=0, duplicate=True)
    assert await limits(raw) == [-1]


async def test_more_callers_than_connections_take_turns(store, key):
    put = {"a": os.urandom(200_000)}
    await commit(store, key, 1, put)

    loads = (store.load(key, fingerprint=FINGERPRINT) for _ in range(60))

    assert all(snapshot.blobs == put for snapshot in await asyncio.gather(*loads))
