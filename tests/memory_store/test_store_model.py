"""Whatever is done in whatever order, a store does what a few dictionaries say it should.

The model is written from the contract alone: each version carries its own blobs and its own
turns, so nothing in it rolls back, refers, or cleans up.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from memory_store import (
    Change,
    Conflict,
    Corrupt,
    Deleted,
    Fenced,
    Held,
    Incomplete,
    Lease,
    LocalStore,
    NotFound,
    NoVersion,
    RedisStore,
    Repeated,
    SessionKey,
    TurnRecord,
)
from memory_store.keys import Keys

FINGERPRINT = "hope-nano/1"
KEPT = 2
SESSIONS = [SessionKey("acme", name) for name in ("one", "two")]
NAMES, PEOPLE, SERVERS = ("fast", "slow", "window"), ("nora", "omar"), ("a", "b")
QUICK = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=600, stateful_step_count=80)


@dataclass
class Blob:
    data: bytes
    damaged: bool = False


@dataclass
class Version:
    number: int
    blobs: dict[str, Blob]
    turns: list[TurnRecord]
    owner: str | None
    damaged: bool = False

    @property
    def whole(self):
        return not self.damaged and not any(blob.damaged for blob in self.blobs.values())


@dataclass
class Session:
    leases: list[Lease] = field(default_factory=list)
    holder: str | None = None
    released: bool = False
    deleted: bool = False
    kept: list[Version] = field(default_factory=list)
    commits: dict[str, int] = field(default_factory=dict)
    turns: dict[str, TurnRecord] = field(default_factory=dict)
    owner: str | None = None
    moment: int = 0  # of the last commit

    @property
    def version(self):
        return self.kept[-1].number if self.kept else 0

    @property
    def unused(self):
        """It was let go before its first commit: what becomes of its leases is not said."""
        return self.released and not self.kept

    def find(self, number):
        return next((one for one in self.kept if one.number == number), None)


class Local:
    """The store in this process; its leases run out when told to."""

    damages = False  # and nothing to look into

    def __init__(self):
        self.store = LocalStore(kept_versions=KEPT)

    async def expire(self, key):
        if key in self.store._sessions:
            self.store._sessions[key].until = 0.0

    async def close(self):
        await self.store.close()


class Served:
    """A store on a real server, and a client beside it that does harm."""

    damages = True

    @classmethod
    async def open(cls, url):
        self = cls()
        self.raw = Redis.from_url(url)
        await self.raw.flushall()
        self.store = await RedisStore.open(url, kept_versions=KEPT)
        return self

    async def expire(self, key):
        await self.raw.delete(Keys(key).lease)

    async def damage_manifest(self, key, version, *, current):
        if current:
            value = await self.raw.hget(Keys(key).head, "man")
            await self.raw.hset(Keys(key).head, "man", _flipped(value))
        else:
            value = await self.raw.get(Keys(key).manifest(version))
            await self.raw.set(Keys(key).manifest(version), _flipped(value))

    async def damage_blob(self, key, data):
        """Flip a bit of the blob that has these (unique, incompressible) bytes."""
        async for name in self.raw.scan_iter(Keys(key).blob("*")):
            if await self.raw.hget(name, 0) == data:
                await self.raw.hset(name, 0, _flipped(data))

    async def lasting_blobs(self, key):
        """Count the blobs that do not expire."""
        names = [name async for name in self.raw.scan_iter(Keys(key).blob("*"), count=1000)]
        return [await self.raw.ttl(name) for name in names].count(-1)

    async def close(self):
        await self.store.close()
        await self.raw.aclose()


def _flipped(value):
    return value[:-1] + bytes([value[-1] ^ 1])


class StoreMachine(RuleBasedStateMachine):
    a_session = st.sampled_from(SESSIONS)
    a_lease = st.sampled_from([-1, -1, -1, -1, -1, -2, -3])  # the last, or one before it

    def __init__(self, opened):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.backend = self.loop.run_until_complete(opened())
        self.store = self.backend.store
        self.model = {key: Session() for key in SESSIONS}
        self.numbers = itertools.count(1)

    def teardown(self):
        self.loop.run_until_complete(self.backend.close())
        self.loop.close()

    def ask(self, question, *allowed):
        """Return the answer; where refusals are allowed it must be one of them."""
        try:
            answer = self.loop.run_until_complete(question)
        except allowed:
            return None
        assert not allowed, f"{answer!r} instead of {allowed}"
        return answer

    def missing(self, session):
        """Which refusal every question about a session without versions gets."""
        if session.deleted:
            return [Deleted]
        return [] if session.kept else [NotFound]

    # --- leases -------------------------------------------------------------------------------

    @initialize()
    def begin(self):
        for key in SESSIONS:
            self.acquire(key, "a")

    @rule(key=a_session, owner=st.sampled_from(SERVERS))
    def acquire(self, key, owner):
        session = self.model[key]
        refusals = [Deleted] if session.deleted else []
        if not refusals and session.holder not in (None, owner):
            refusals = [Held]
        lease = self.ask(self.store.acquire(key, owner, seconds=600), *refusals)
        if refusals:
            return
        assert (lease.key, lease.owner, lease.version) == (key, owner, session.version)
        assert session.version == session.commits.get(lease.commit, 0)
        assert all(lease.fence > before.fence for before in session.leases)
        session.leases.append(lease)
        session.holder, session.released = owner, False

    def lease(self, key, which):
        """Return a lease, and whether it is the last that was acquired."""
        leases = self.model[key].leases
        which = max(which, -len(leases))
        return leases[which], which == -1

    @rule(key=a_session, which=a_lease)
    def renew(self, key, which):
        session = self.model[key]
        if session.unused:
            return
        lease, last = self.lease(key, which)
        holds = last and not session.deleted
        assert self.ask(self.store.renew(lease, seconds=600)) is holds
        if holds:
            session.holder, session.released = lease.owner, False

    @rule(key=a_session, which=a_lease)
    def release(self, key, which):
        session = self.model[key]
        lease, last = self.lease(key, which)
        self.ask(self.store.release(lease))
        if last:
            session.holder, session.released = None, True

    @rule(key=a_session)
    def expire(self, key):
        self.loop.run_until_complete(self.backend.expire(key))
        self.model[key].holder = None

    # --- commits ------------------------------------------------------------------------------

    @rule(key=a_session, data=st.data())
    def commit_twice(self, key, data):
        for _ in range(2):
            self.commit(key, -1, data)

    @rule(key=a_session, which=a_lease, data=st.data())
    def commit(self, key, which, data):
        session = self.model[key]
        if session.unused:
            return
        lease, last = self.lease(key, which)
        expected = max(0, session.version + data.draw(st.sampled_from([0] * 18 + [1, -1])))
        change = self.change(session, data.draw)
        commit_id = f"c{change.meta['number']}"
        refusals = self.refusals(session, change, expected, last=last)
        work = self.store.commit(lease, change, expected=expected, commit_id=commit_id)
        done = self.ask(work, *refusals)
        if not refusals:
            assert done.version == max(session.version, change.above) + 1
            assert not done.duplicate
            self.committed(session, change, done.version, commit_id)
            self.look(key)

    def change(self, session, draw):
        """Return a change that is mostly possible."""
        number = next(self.numbers)
        older = [one.number for one in session.kept]
        base = draw(st.sampled_from([None] * 4 + older * 2 + [session.version - KEPT - 1]))
        before = session.find(session.version if base is None else base)
        there = [*(before.blobs if before else {})]
        put = draw(st.sets(st.sampled_from(NAMES)))
        keep = draw(st.sets(st.sampled_from(there))) if there else set()
        keep |= draw(st.sampled_from([set()] * 9 + [{"slow"}]))
        turns = [f"t{number}-{i}" for i in range(draw(st.integers(0, 2)))]
        if session.turns:
            turns += draw(st.sampled_from([[]] * 9 + [[next(iter(session.turns))]]))
        return Change(
            FINGERPRINT,
            {"number": number},
            put={name: f"{number} {name}".encode() for name in put},
            keep=frozenset(keep - put),
            turns=tuple(TurnRecord(turn, {"number": number}) for turn in turns),
            base=base,
            owner=draw(st.sampled_from([None, None, *PEOPLE])),
            above=session.version + draw(st.sampled_from([0, 0, 0, 0, 1, 2, -1])),
        )

    def refusals(self, session, change, expected, *, last):
        if session.deleted:
            return [Deleted]
        if not last:
            return [Fenced]
        if session.version != expected:
            return [Conflict]
        found = []
        before = session.find(session.version if change.base is None else change.base)
        if before is None and (session.kept or change.base is not None):
            found.append(NoVersion)
        elif before and before.damaged:
            found.append(Corrupt)
        elif change.keep - (before.blobs if before else {}).keys():
            found.append(Incomplete)
        if any(turn.turn_id in session.turns for turn in change.turns):
            found.append(Repeated)
        return found

    def committed(self, session, change, version, commit_id):
        before = session.find(session.version if change.base is None else change.base)
        kept = {name: before.blobs[name] for name in change.keep}
        made = [TurnRecord(turn.turn_id, turn.payload, version) for turn in change.turns]
        session.owner = change.owner or session.owner
        session.kept.append(
            Version(
                version,
                kept | {name: Blob(data) for name, data in change.put.items()},
                (before.turns if before else []) + made,
                session.owner,
            )
        )
        session.kept = [one for one in session.kept if one.number >= version - KEPT]
        session.commits[commit_id] = version
        session.turns |= {turn.turn_id: turn for turn in made}
        session.moment = change.meta["number"]

    @rule(key=a_session, which=a_lease, place=st.integers(0, 31))
    def commit_again(self, key, which, place):
        session = self.model[key]
        if not session.commits or session.deleted:
            return
        lease, _ = self.lease(key, which)
        remembered = [*session.commits][-32:]
        commit_id = remembered[place % len(remembered)]
        change = Change(FINGERPRINT, {}, put={"fast": b"never"})
        again = self.ask(self.store.commit(lease, change, expected=0, commit_id=commit_id))
        assert (again.version, again.duplicate) == (session.commits[commit_id], True)

    @rule(key=a_session, really=st.sampled_from([False] * 9 + [True]))
    def delete(self, key, really):
        session = self.model[key]
        if not really and session.kept:
            return
        receipt = self.ask(self.store.delete(key), *self.missing(session))
        if not self.missing(session):
            assert (receipt.session, receipt.left) == (key.session, 0)
            session.deleted = True

    # --- damage -------------------------------------------------------------------------------

    @precondition(lambda self: self.backend.damages)
    @rule(key=a_session, data=st.data())
    def damage_a_manifest(self, key, data):
        session = self.model[key]
        if session.deleted or not any(not one.damaged for one in session.kept):
            return
        version = data.draw(st.sampled_from([one for one in session.kept if not one.damaged]))
        current = version is session.kept[-1]
        self.loop.run_until_complete(
            self.backend.damage_manifest(key, version.number, current=current)
        )
        version.damaged = True

    @precondition(lambda self: self.backend.damages)
    @rule(key=a_session, data=st.data())
    def damage_a_blob(self, key, data):
        session = self.model[key]
        blobs = [b for one in session.kept[-1:] for b in one.blobs.values() if not b.damaged]
        if session.deleted or not blobs:
            return
        blob = data.draw(st.sampled_from(blobs))
        self.loop.run_until_complete(self.backend.damage_blob(key, blob.data))
        blob.damaged = True

    # --- reading ------------------------------------------------------------------------------

    @rule(key=a_session)
    def look(self, key):
        """Ask everything about a session, and what there is beside it."""
        session = self.model[key]
        self.load(key)
        self.versions(key)
        self.turns(key, None, 3)
        for number in range(session.version - KEPT - 1, session.version + 2):
            self.load_a_version(key, number)
            self.turns(key, number, 100)
        for turn_id in (*session.turns, "never"):
            self.turn(key, turn_id)
        self.sessions(1)
        for person in PEOPLE:
            self.owned(person)
        if self.backend.damages:
            living = {id(blob) for one in session.kept for blob in one.blobs.values()}
            lasting = self.loop.run_until_complete(self.backend.lasting_blobs(key))
            assert lasting == (0 if session.deleted else len(living))

    def load(self, key):
        session = self.model[key]
        newest_first = session.kept[::-1]
        standing = next((one for one in newest_first if one.whole), None)
        refusals = self.missing(session) or ([] if standing else [Corrupt])
        found = self.ask(self.store.load(key, fingerprint=FINGERPRINT), *refusals)
        if not refusals:
            passed = [one.number for one in newest_first if one.number > standing.number]
            assert set(passed) <= found.damaged.keys()
            assert all(standing.number < number for number in found.damaged)
            assert found.latest == session.version
            self.compare(found, standing)

    def load_a_version(self, key, number):
        session = self.model[key]
        wanted = session.find(number)
        refusals = self.missing(session)
        if not refusals and not (wanted and wanted.whole):
            refusals = [Corrupt if wanted else NoVersion]
        work = self.store.load(key, fingerprint=FINGERPRINT, version=number)
        found = self.ask(work, *refusals)
        if not refusals:
            assert not found.damaged
            self.compare(found, wanted)

    def compare(self, found, version):
        assert found.head.version == version.number
        assert found.head.owner == version.owner
        assert dict(found.blobs) == {name: blob.data for name, blob in version.blobs.items()}

    def versions(self, key):
        session = self.model[key]
        heads = self.ask(self.store.versions(key), *self.missing(session))
        if not self.missing(session):
            readable = [one.number for one in session.kept[::-1] if not one.damaged]
            assert [head.version for head in heads] == readable

    def turns(self, key, number, limit):
        session = self.model[key]
        wanted = session.find(session.version if number is None else number)
        refusals = self.missing(session)
        if not refusals and (wanted is None or wanted.damaged):
            refusals = [Corrupt if wanted else NoVersion]
        found = self.ask(self.store.turns(key, limit=limit, version=number), *refusals)
        if not refusals:
            assert list(found) == wanted.turns[-limit:]

    def turn(self, key, turn_id):
        session = self.model[key]
        found = self.ask(self.store.turn(key, turn_id), *([Deleted] if session.deleted else []))
        if not session.deleted:
            assert found == session.turns.get(turn_id)

    def sessions(self, limit):
        living = {key: one for key, one in self.model.items() if one.kept and not one.deleted}
        listed = [key for key, one in living.items() if not one.kept[-1].damaged]
        listed.sort(key=lambda key: -living[key].moment)
        found, cursor = [], None
        while not found or cursor:
            page = self.ask(self.store.sessions("acme", cursor=cursor, limit=limit))
            found += [head.key for head in page.heads]
            cursor = page.cursor
            if not page.heads:
                break
        assert found == listed

    def owned(self, person):
        found = self.ask(self.store.owned("acme", person))
        theirs = {k for k, one in self.model.items() if one.owner == person and not one.deleted}
        assert set(found) == theirs


async def _local():
    return Local()


@pytest.mark.parametrize("profile", [QUICK, pytest.param(LONG, marks=pytest.mark.long)])
def test_the_local_store_does_what_the_model_does(profile):
    run_state_machine_as_test(lambda: StoreMachine(_local), settings=profile)


@pytest.mark.parametrize("profile", [QUICK, pytest.param(LONG, marks=pytest.mark.long)])
def test_the_store_on_valkey_does_what_the_model_does(profile, valkey_url):
    run_state_machine_as_test(
        lambda: StoreMachine(lambda: Served.open(valkey_url)), settings=profile
    )
