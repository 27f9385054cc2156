"""Sessions in this process's memory, chosen explicitly: nothing survives the process.

The same rules as every store: compare-and-set, commit ids, tombstones.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from memory_store.codec import encode_json
from memory_store.errors import Conflict, Deleted, Incompatible, Incomplete, NotFound
from memory_store.index import Place, check_limit
from memory_store.snapshot import (
    BlobInfo,
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)

V = TypeVar("V")

_REMEMBERED_COMMITS = 32
_REMEMBERED_TURNS = 1000


@dataclass(slots=True)
class _Session:
    snapshot: Snapshot
    commits: OrderedDict[str, int] = field(default_factory=OrderedDict)
    turns: OrderedDict[str, bytes] = field(default_factory=OrderedDict)


class LocalStore:
    """A `MemoryStore` in RAM; atomic because nothing in it waits for anything."""

    def __init__(self) -> None:
        self._sessions: dict[SessionKey, _Session] = {}
        self._tombstones: set[SessionKey] = set()

    async def commit(
        self, key: SessionKey, change: Change, *, expected: int, commit_id: str
    ) -> Committed:
        session = self._find(key)
        if session and commit_id in session.commits:
            return Committed(session.commits[commit_id], written=0, duplicate=True)
        found = session.snapshot.head.version if session else 0
        if found != expected:
            raise Conflict(key.session, expected=expected, found=found)

        snapshot = _next(key, change, session.snapshot if session else None)
        record = encode_json(change.turn.payload) if change.turn else b""
        if session is None:
            session = self._sessions[key] = _Session(snapshot)
        session.snapshot = snapshot
        _remember(session.commits, commit_id, snapshot.head.version, _REMEMBERED_COMMITS)
        if change.turn:
            _remember(session.turns, change.turn.turn_id, record, _REMEMBERED_TURNS)
        return Committed(snapshot.head.version, written=sum(map(len, change.put.values())))

    async def load(self, key: SessionKey, *, fingerprint: str) -> Snapshot:
        snapshot = self._existing(key).snapshot
        if snapshot.head.fingerprint != fingerprint:
            raise Incompatible(key.session, expected=fingerprint, found=snapshot.head.fingerprint)
        return snapshot

    async def head(self, key: SessionKey) -> Head:
        return self._existing(key).snapshot.head

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        check_limit(limit)
        heads = {
            Place(session.snapshot.head.updated, key.session): session.snapshot.head
            for key, session in self._sessions.items()
            if key.tenant == tenant
        }
        after = None if cursor is None else Place.parse(cursor)
        places = sorted((p for p in heads if after is None or p < after), reverse=True)
        page = tuple(heads[place] for place in places[:limit])
        return Page(page, str(places[limit - 1]) if len(places) > limit else None)

    async def turns(self, key: SessionKey, *, limit: int = 200) -> Sequence[TurnRecord]:
        check_limit(limit)
        turns = self._existing(key).turns
        return [TurnRecord(turn_id, json.loads(r)) for turn_id, r in list(turns.items())[-limit:]]

    async def delete(self, key: SessionKey) -> Deletion:
        session = self._existing(key)
        del self._sessions[key]
        self._tombstones.add(key)
        blobs, turns = session.snapshot.blobs.values(), session.turns.values()
        return Deletion(
            key.session,
            keys=1 + len(blobs) + bool(turns),
            bytes=sum(map(len, blobs)) + sum(map(len, turns)),
        )

    async def durability(self) -> Durability:
        return Durability(
            mode="memory", engine="memory", policy="noeviction", aof=False, where="this process"
        )

    async def close(self) -> None:
        """Keep everything: whoever holds the store may go on reading."""

    def _find(self, key: SessionKey) -> _Session | None:
        if key in self._tombstones:
            raise Deleted(key.session)
        return self._sessions.get(key)

    def _existing(self, key: SessionKey) -> _Session:
        session = self._find(key)
        if session is None:
            raise NotFound(key.session)
        return session


def _next(key: SessionKey, change: Change, before: Snapshot | None) -> Snapshot:
    old = before.blobs if before else {}
    if missing := change.keep - old.keys():
        raise Incomplete(key.session, min(missing))
    blobs = {name: old[name] for name in sorted(change.keep)} | dict(change.put)
    now = time.time()
    head = Head(
        key=key,
        version=before.head.version + 1 if before else 1,
        parent=before.head.version if before else 0,
        fingerprint=change.fingerprint,
        created=before.head.created if before else now,
        updated=now,
        meta=json.loads(encode_json(change.meta)),
        blobs={name: BlobInfo(len(raw), len(raw)) for name, raw in blobs.items()},
    )
    return Snapshot(head, blobs)


def _remember(entries: OrderedDict[str, V], key: str, value: V, limit: int) -> None:
    entries[key] = value
    if len(entries) > limit:
        entries.popitem(last=False)
