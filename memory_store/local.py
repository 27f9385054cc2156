"""Sessions in this process's memory, chosen explicitly: nothing survives the process.

The same rules as every store: leases and fences, compare-and-set, commit ids, tombstones.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from memory_store.codec import encode_json
from memory_store.commit import linked
from memory_store.errors import (
    Conflict,
    Deleted,
    Fenced,
    Held,
    Incompatible,
    Incomplete,
    NotFound,
    NoVersion,
    Regressed,
    Repeated,
)
from memory_store.index import Place, check_limit
from memory_store.snapshot import (
    BlobInfo,
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Lease,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
    included,
)

V = TypeVar("V")

_REMEMBERED_COMMITS = 32
_REMEMBERED_TURNS = 1000


@dataclass(frozen=True, slots=True)
class _Version:
    snapshot: Snapshot
    undone: tuple[tuple[int, int], ...] = ()

    def includes(self, version: int) -> bool:
        return included(version, self.snapshot.head.version, self.undone)


@dataclass(slots=True)
class _Session:
    fence: int = 0
    writer: str = ""  # who has raised the fence to this
    holder: str | None = None
    until: float = 0.0  # on the monotonic clock
    user: str | None = None
    version: int = 0  # 0: acquired, but never committed to
    kept: dict[int, _Version] = field(default_factory=dict)
    commits: OrderedDict[str, int] = field(default_factory=OrderedDict)
    turns: OrderedDict[str, tuple[int, bytes]] = field(default_factory=OrderedDict)


class LocalStore:
    """A `MemoryStore` in RAM; atomic because nothing in it waits for anything."""

    def __init__(self, *, kept_versions: int = 4) -> None:
        self._kept_versions = kept_versions
        self._sessions: dict[SessionKey, _Session] = {}
        self._tombstones: set[SessionKey] = set()
        self._fences = count(1)  # for all sessions: one that is let go takes no fence with it

    async def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        session = self._living(key) or _Session()
        left = session.until - time.monotonic()
        if session.holder not in (None, owner) and left > 0:
            raise Held(key.session, seconds=left)
        self._sessions[key] = session
        session.fence, session.writer = next(self._fences), owner
        session.holder, session.until = owner, time.monotonic() + seconds
        commit = next(reversed(session.commits), "")
        return Lease(key, owner, session.fence, session.version, commit)

    async def renew(self, held: Lease, *, seconds: float) -> bool:
        session = self._sessions.get(held.key)
        if session is None or (session.fence, session.writer) != (held.fence, held.owner):
            return False
        session.holder, session.until = held.owner, time.monotonic() + seconds
        return True

    async def release(self, held: Lease) -> None:
        session = self._sessions.get(held.key)
        if session is not None and session.fence == held.fence:
            session.holder = None
            if not session.version:
                del self._sessions[held.key]  # fences are counted for all: none comes twice

    async def commit(
        self,
        lease: Lease,
        change: Change,
        *,
        expected: int,
        commit_id: str,
        durable: bool = False,
    ) -> Committed:
        key = lease.key
        session = self._living(key) or _Session()
        if commit_id in session.commits:
            return Committed(session.commits[commit_id], written=0, duplicate=True)
        if lease.fence < session.fence:
            raise Fenced(key.session)
        if (lease.fence, lease.owner) != (session.fence, session.writer):
            raise Regressed(key.session)  # it was let go before its first commit
        if session.version != expected:
            raise Conflict(key.session, expected=expected, found=session.version)
        for turn in change.turns:
            if turn.turn_id in session.turns:
                raise Repeated(key.session, turn.turn_id)
        base = session.version if change.base is None else change.base
        before = self._kept(key, session, base) if base or change.base is not None else None
        after = _next(key, change, session, before)
        records = [(turn.turn_id, encode_json(turn.payload)) for turn in change.turns]

        version = after.snapshot.head.version
        session.version = version
        session.user = after.snapshot.head.owner
        session.kept[version] = after
        for old in [each for each in session.kept if each < version - self._kept_versions]:
            del session.kept[old]
        _remember(session.commits, commit_id, version, _REMEMBERED_COMMITS)
        for turn_id, record in records:
            _remember(session.turns, turn_id, (version, record), _REMEMBERED_TURNS)
        return Committed(version, written=sum(map(len, change.put.values())))

    async def load(
        self, key: SessionKey, *, fingerprint: str, version: int | None = None
    ) -> Snapshot:
        session = self._existing(key)
        wanted = session.version if version is None else version
        snapshot = self._kept(key, session, wanted).snapshot
        if snapshot.head.fingerprint != fingerprint:
            raise Incompatible(key.session, expected=fingerprint, found=snapshot.head.fingerprint)
        return Snapshot(snapshot.head, snapshot.blobs, latest=session.version)

    async def head(self, key: SessionKey) -> Head:
        session = self._existing(key)
        return session.kept[session.version].snapshot.head

    async def versions(self, key: SessionKey) -> Sequence[Head]:
        kept = self._existing(key).kept
        return [kept[version].snapshot.head for version in sorted(kept, reverse=True)]

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        check_limit(limit)
        found = (
            session.kept[session.version].snapshot.head
            for key, session in self._sessions.items()
            if key.tenant == tenant and session.version
        )
        heads = {Place(head.updated, head.key.session): head for head in found}
        after = None if cursor is None else Place.parse(cursor)
        places = sorted((p for p in heads if after is None or p < after), reverse=True)
        page = tuple(heads[place] for place in places[:limit])
        return Page(page, str(places[limit - 1]) if len(places) > limit else None)

    async def owned(self, tenant: str, owner: str) -> Sequence[SessionKey]:
        return [
            key
            for key, session in sorted(self._sessions.items(), key=lambda item: item[0].session)
            if key.tenant == tenant and session.user == owner
        ]

    async def turns(
        self, key: SessionKey, *, limit: int = 200, version: int | None = None
    ) -> Sequence[TurnRecord]:
        check_limit(limit)
        session = self._existing(key)
        wanted = self._kept(key, session, session.version if version is None else version)
        found = [
            TurnRecord(turn_id, json.loads(record), made)
            for turn_id, (made, record) in session.turns.items()
            if wanted.includes(made)
        ]
        return found[-limit:]

    async def turn(self, key: SessionKey, turn_id: str) -> TurnRecord | None:
        session = self._living(key)
        if session is None or turn_id not in session.turns:
            return None
        version, record = session.turns[turn_id]
        return TurnRecord(turn_id, json.loads(record), version)

    async def delete(self, key: SessionKey) -> Deletion:
        session = self._existing(key)
        del self._sessions[key]
        self._tombstones.add(key)
        blobs = {id(b): b for kept in session.kept.values() for b in kept.snapshot.blobs.values()}
        records = [record for _, record in session.turns.values()]
        return Deletion(
            key.session,
            keys=len(session.kept) + len(blobs) + bool(records),
            bytes=sum(map(len, blobs.values())) + sum(map(len, records)),
        )

    async def durability(self) -> Durability:
        return Durability(
            mode="memory", engine="memory", policy="noeviction", aof=False, where="this process"
        )

    async def close(self) -> None:
        """Keep everything: whoever holds the store may go on reading."""

    def _living(self, key: SessionKey) -> _Session | None:
        if key in self._tombstones:
            raise Deleted(key.session)
        return self._sessions.get(key)

    def _existing(self, key: SessionKey) -> _Session:
        session = self._living(key)
        if session is None or not session.version:
            raise NotFound(key.session)
        return session

    def _kept(self, key: SessionKey, session: _Session, version: int) -> _Version:
        if version not in session.kept:
            kept = (min(session.kept, default=0), session.version)
            raise NoVersion(key.session, version, kept=kept)
        return session.kept[version]


def _next(key: SessionKey, change: Change, session: _Session, before: _Version | None) -> _Version:
    old = before.snapshot.blobs if before else {}
    if missing := change.keep - old.keys():
        raise Incomplete(key.session, min(missing))
    blobs = {name: old[name] for name in sorted(change.keep)} | dict(change.put)
    was = before.snapshot.head if before else None
    undone = before.undone if before else ()
    if was and was.version < session.version:
        undone = (*undone, (was.version, session.version))
    now = time.time()
    head = Head(
        key=key,
        version=max(session.version, change.above) + 1,
        parent=was.version if was else 0,
        fingerprint=change.fingerprint,
        created=was.created if was else now,
        updated=now,
        meta=json.loads(encode_json(change.meta)),
        blobs={name: BlobInfo(len(raw), len(raw)) for name, raw in blobs.items()},
        owner=change.owner or session.user,
        chain=linked(was.chain if was else "", change.turns),
    )
    return _Version(Snapshot(head, blobs), undone)


def _remember(entries: OrderedDict[str, V], key: str, value: V, limit: int) -> None:
    entries[key] = value
    if len(entries) > limit:
        entries.popitem(last=False)
