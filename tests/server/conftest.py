"""A small server without a port: a real model, engine, store and application, made in a moment."""

import asyncio
import os
import time
from collections import deque
from contextlib import asynccontextmanager, contextmanager

import httpx2
import pytest
import torch
from redis.asyncio import Redis
from starlette.testclient import TestClient

from hope_runtime.engine import Engine
from hope_runtime.model import Hope
from hope_runtime.sampling import Sampling
from hope_runtime.tokenizer import Message, Role
from hope_runtime.weights.random import random_checkpoint, tiny_config
from memory_store import EmbeddedValkey, LocalStore, RedisStore, SessionKey, Unavailable
from server.app import serving
from server.security import LOCAL
from server.service import Card
from server.settings import Settings
from server.turn import Ask, Ended, Words
from server.wire import Mode

GREEDY = Sampling(temperature=0.0)
URL = "http://127.0.0.1:8000"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("HOPE_"):
            monkeypatch.delenv(name)


class Fragile:
    """A store in RAM that fails and stalls as it is told."""

    def __init__(self):
        self.kept = LocalStore(kept_versions=8)
        self.commits = 0
        self.failures = deque()  # what the next commits raise; None: one that succeeds
        self.going_on = asyncio.Event()  # while it is not set, commits wait
        self.going_on.set()
        self.down = None  # what every other call raises
        self.deaf = None  # what renewals raise
        self.renewals = 0
        self.mute = False  # whether what commits reply is lost, though they are made

    async def commit(self, lease, change, *, expected, commit_id, durable=False):
        await self.going_on.wait()
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            raise failure
        done = await self.kept.commit(lease, change, expected=expected, commit_id=commit_id)
        self.commits += 1
        if self.mute:
            raise Unavailable("127.0.0.1:6379", "connection reset")
        return done

    async def acquire(self, key, owner, *, seconds):
        self._answer()
        return await self.kept.acquire(key, owner, seconds=seconds)

    async def renew(self, held, *, seconds):
        self._answer()
        if self.deaf is not None:
            raise self.deaf
        self.renewals += 1
        return await self.kept.renew(held, seconds=seconds)

    async def release(self, held):
        await self.kept.release(held)

    async def load(self, key, *, fingerprint, version=None):
        self._answer()
        return await self.kept.load(key, fingerprint=fingerprint, version=version)

    async def versions(self, key):
        self._answer()
        return await self.kept.versions(key)

    async def owned(self, tenant, owner):
        self._answer()
        return await self.kept.owned(tenant, owner)

    async def turn(self, key, turn_id):
        self._answer()
        return await self.kept.turn(key, turn_id)

    async def head(self, key):
        self._answer()
        return await self.kept.head(key)

    async def sessions(self, tenant, *, cursor=None, limit=50):
        self._answer()
        return await self.kept.sessions(tenant, cursor=cursor, limit=limit)

    async def turns(self, key, *, limit=200, version=None):
        self._answer()
        return await self.kept.turns(key, limit=limit, version=version)

    async def delete(self, key):
        self._answer()
        return await self.kept.delete(key)

    async def durability(self):
        self._answer()
        return await self.kept.durability()

    async def close(self):
        await self.kept.close()

    def _answer(self):
        if self.down is not None:
            raise self.down


class House:
    """One served application, and short ways to talk to its inside."""

    def __init__(self, app, engine, store):
        self.app, self.engine, self.store = app, engine, store
        self.service = app.state.service
        self.turns = self.service.turns
        self.metrics = self.service.metrics

    def client(self, key=None, **headers):
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        transport = httpx2.ASGITransport(app=self.app)
        return httpx2.AsyncClient(transport=transport, base_url=URL, headers=headers)

    def start(self, text, session="s", most=8, **changes):
        """Begin a greedy turn; `session=None` is a turn without one."""
        defaults = {
            "key": SessionKey(LOCAL, session) if session else None,
            "messages": (Message(Role.USER, text),),
            "instructions": None,
            "sampling": GREEDY,
            "most": most,
        }
        return self.turns.start(Ask(**defaults | changes))

    async def turn(self, text, session="s", most=8, **changes):
        """Have a turn, consolidation included; return everything that happened in it."""
        return [happening async for happening in self.start(text, session, most, **changes)]

    async def ended(self, text, session="s", most=8, **changes):
        happenings = await self.turn(text, session, most, **changes)
        [ended] = [each for each in happenings if isinstance(each, Ended)]
        return ended

    async def reply(self, text, session="s", most=8, **changes):
        """Have a turn; return its text alone."""
        happenings = await self.turn(text, session, most, **changes)
        return "".join(each.text for each in happenings if isinstance(each, Words))

    async def probe(self, session="s"):
        """Return what the session's memory makes of a question that it does not keep."""
        return await self.reply("who am I, and what?", session, 24, mode=Mode.READ_ONLY)

    async def head(self, session="s"):
        return await self.store.head(SessionKey(LOCAL, session))

    @property
    def quiet(self):
        """Tell whether nothing is left of any turn: no job, no task, no work for the device."""
        return self.engine.idle and not self.turns._worker.running and not self.turns._tasks

    async def idle(self, seconds=5.0):
        """Wait until nothing is left of any turn."""
        deadline = time.monotonic() + seconds
        while not self.quiet:
            assert time.monotonic() < deadline, "something goes on"
            await asyncio.sleep(0.005)

    def sample(self, name, **labels):
        """Return the value of one metric."""
        return self.metrics.registry.get_sample_value(name, labels)


class Builder:
    """Builds houses: `async with build(store, stops=False, turns_waiting=0) as house`."""

    def __init__(self, config=None):
        torch.set_num_threads(1)
        self.config = config or tiny_config()
        self.checkpoint = random_checkpoint(self.config)
        self.model = Hope(
            self.config, self.checkpoint.weights, device=torch.device("cpu"), dtype=torch.float32
        )

    @asynccontextmanager
    async def __call__(self, store=None, *, stops=True, lanes=4, **settings):
        """Args: with `stops` off, the model never ends a reply by itself."""
        tokenizer = random_checkpoint(self.config).tokenizer
        if not stops:
            tokenizer.stop_ids = frozenset()
        store = LocalStore() if store is None else store
        card = Card("random", self.checkpoint.fingerprint, self.config, "cpu", "float32", 1)
        engine = Engine(self.model, tokenizer, lanes=lanes, clock=time.perf_counter)
        chosen = Settings(model="random", store="memory", **{"shutdown_timeout": 1} | settings)
        async with serving(chosen, card, self.model, tokenizer, engine, store) as app:
            yield House(app, engine, store)


@pytest.fixture(scope="session")
def builder():
    """Return what makes builders of houses with other models: `builder(config)`."""
    return Builder


@pytest.fixture(scope="session")
def build(builder):
    return builder()


@pytest.fixture
async def house(build, anyio_backend):
    """A server that stops replies as its model does."""
    async with build() as house:
        yield house


@pytest.fixture
async def endless(build, anyio_backend):
    """A server whose replies go on to their limit."""
    async with build(stops=False) as house:
        yield house


@pytest.fixture
def fragile():
    return Fragile()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory):
    """The address of a real store."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture
async def raw(valkey, anyio_backend):
    """A plain client of the real store, which is empty: to look at what is there, and harm it."""
    client = Redis.from_url(valkey)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def lasting(valkey, raw):
    """A store on disk."""
    store = await RedisStore.open(valkey)
    yield store
    await store.close()


class Living:
    """A house as an application that starts and ends with its test client."""

    def __init__(self, opening):
        self._opening = opening
        self.house = None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "lifespan":
            await self.house.app(scope, receive, send)
            return
        await receive()
        async with self._opening as self.house:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture
def door(build):
    """Return what opens a house to sockets, as a client and a house."""

    @contextmanager
    def opened(store=None, **options):
        living = Living(build(store, **options))
        with TestClient(living, base_url=URL) as client:
            yield client, living.house

    return opened
