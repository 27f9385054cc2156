"""A wall clock that jumps by days between any two looks at it changes no order and no lease."""

import asyncio
import random
import time
from contextlib import asynccontextmanager, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_store import Change, LocalStore, SessionKey, StoreError, TurnRecord
from tests.faults.houses import EXACT, RATES, builder, memory, redis, say, told
from tests.faults.talk import BEFORE

DAY_S = 86_400.0
LASTS_S = 1000.0  # a lease, in these tests; on the clock that counts

_numbers = iter(range(1_000_000))


@contextmanager
def jumping_clock(seed):
    """Let every look at the wall clock find it somewhere within some days."""
    chance, real = random.Random(seed), time.time
    time.time = lambda: real() + chance.uniform(-3 * DAY_S, 3 * DAY_S)
    try:
        yield
    finally:
        time.time = real


# --- the store ----------------------------------------------------------------------------------

SESSIONS, OWNERS = ("a", "b"), ("one", "two")

step = st.one_of(
    st.tuples(st.just("acquire"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("release"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("renew"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("commit"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("again"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("back"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("read"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
    st.tuples(st.just("delete"), st.sampled_from(SESSIONS), st.sampled_from(OWNERS)),
)


class Script:
    """What is done to a store, and all that it answers but for times."""

    def __init__(self, store, tenant):
        self.store, self.tenant = store, tenant
        self.leases, self.last, self.versions = {}, {}, {}
        self.answers = []

    async def run(self, steps):
        for number, (what, session, owner) in enumerate(steps):
            key = SessionKey(self.tenant, session)
            try:
                self.answers.append(await self._do(what, key, owner, number))
            except StoreError as error:
                self.answers.append(type(error).__name__)
        page = await self.store.sessions(self.tenant)
        self.answers.append(sorted((head.key.session, head.version) for head in page.heads))
        return self.answers

    async def _do(self, what, key, owner, number):
        held = self.leases.get((key, owner))
        match what:
            case "acquire":
                held = await self.store.acquire(key, owner, seconds=LASTS_S)
                self.leases[key, owner] = held
                return "acquired", held.version
            case "read":
                return await self._read(key)
            case "delete":
                return "deleted", (await self.store.delete(key)).left
            case _ if held is None:
                return "no lease"
            case "release":
                return await self.store.release(held)
            case "renew":
                return await self.store.renew(held, seconds=LASTS_S)
            case "commit":
                commit = Change("model", {"n": number}, {"x": b"%d" % number}, turns=_turn(number))
                self.last[key, owner] = commit, f"commit-{number}"
                return await self._commit(held, commit, f"commit-{number}")
            case "again":
                commit, id = self.last.get((key, owner), (Change("model", {}), f"commit-{number}"))
                return await self._commit(held, commit, id)
            case "back":
                commit = Change("model", {"n": number}, base=self.versions.get(key, 0) - 1)
                return await self._commit(held, commit, f"commit-{number}")

    async def _commit(self, held, change, id):
        expected = self.versions.get(held.key, 0)
        done = await self.store.commit(held, change, expected=expected, commit_id=id)
        self.versions[held.key] = max(expected, done.version)
        return done.version, done.duplicate

    async def _read(self, key):
        found = await self.store.load(key, fingerprint="model")
        turns = [turn.turn_id for turn in await self.store.turns(key)]
        versions = [head.version for head in await self.store.versions(key)]
        return found.head.version, dict(found.head.meta), dict(found.blobs), turns, versions


def _turn(number):
    return (TurnRecord(f"turn-{number}", {"items": []}),)


def scripted(open_store, steps, seed=None):
    """Return what a store answers to these steps, on a clock that jumps, or on a good one."""

    async def run():
        async with open_store() as store:
            begun = [("acquire", session, "one") for session in SESSIONS]
            return await Script(store, f"clock{next(_numbers)}").run([*begun, *steps])

    if seed is None:
        return asyncio.run(run())
    with jumping_clock(seed):
        return asyncio.run(run())


@asynccontextmanager
async def local():
    yield LocalStore(kept_versions=4)


steps_and_seeds = given(st.lists(step, min_size=4, max_size=40), st.integers(0, 1 << 32))
few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@steps_and_seeds
def test_a_store_in_ram_takes_no_notice_of_the_clock(steps, seed):
    assert scripted(local, steps, seed) == scripted(local, steps)


@few
@steps_and_seeds
def test_a_store_on_a_server_takes_no_notice_of_the_clock(store, steps, seed):
    def served():
        return redis(store.url, kept_versions=4)

    assert scripted(served, steps, seed) == scripted(served, steps)


# --- the server ---------------------------------------------------------------------------------

TURNS = ("it rains in the hills", "tell me more", "why?", "remember the blue door", "go on")


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(3))
async def test_sessions_go_on_and_move_as_they_would_on_a_good_clock(store, seed):
    build, session = builder(), f"clock-{seed}"
    async with build(**EXACT) as house:
        calm = [
            told(await house.turn(text, "calm", 12, rates=RATES))[0] for text in (BEFORE, *TURNS)
        ]
        expected = await memory(house, "calm")
    with jumping_clock(seed):
        async with (
            redis(store.url) as left,
            redis(store.url) as right,
            build(left, server_id="one", lease_seconds=5, **EXACT) as one,
            build(right, server_id="two", lease_seconds=5, **EXACT) as two,
        ):
            versions, replies = [], []
            for text, house in zip((BEFORE, *TURNS), (one, two, two, one, two, one), strict=True):
                reply, ended = told(await house.turn(text, session, 12, rates=RATES))
                assert ended.memory.outcome == "committed"
                versions += [ended.memory.base_version, ended.memory.committed_version]
                replies.append(reply)
            assert versions == sorted(versions)
            assert replies == calm
            assert (await memory(one, session))[0] == expected[0]


@pytest.mark.anyio
async def test_a_lease_is_kept_from_another_server_whatever_the_clock_says(store):
    build = builder()
    with jumping_clock(8):
        async with (
            redis(store.url) as left,
            redis(store.url) as right,
            build(left, server_id="one", stops=False, lease_seconds=1, **EXACT) as one,
            build(right, server_id="two", stops=False, lease_seconds=1, **EXACT) as two,
        ):
            await say(one, "leased", BEFORE)
            turn = one.start("go on", "leased", 4000, rates=RATES)
            refusals = []
            while not turn.ended and len(refusals) < 2:
                ended = await say(two, "leased", "me first", 4)
                assert ended.status == "failed"
                refusals.append(ended.error.code)
            assert set(refusals) == {"session_busy"}
            turn.cancel(keep=True)
            _, ended = told([happening async for happening in turn])
            assert ended.memory.outcome == "committed"
            assert (await say(two, "leased", "and now", 4)).memory.outcome == "committed"
            assert (await two.head("leased")).meta["book"]["turns"] == 3
