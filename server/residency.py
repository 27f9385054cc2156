"""Which sessions are in RAM: loaded from the store when asked for, dropped when room is needed.

Everything here was committed before it came here, so anything may be dropped at any time. What
is here also knows what the store has acknowledged, and so notices a store that went back.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hope_runtime.config import HopeConfig
from hope_runtime.state import State, dump, restore, settle
from hope_runtime.storage import EXACT, Storage
from memory_store import (
    Change,
    Committed,
    Corrupt,
    Fenced,
    Head,
    Incomplete,
    Lease,
    MemoryStore,
    NotFound,
    SessionKey,
    Snapshot,
    TurnRecord,
)
from server.book import Book

log = logging.getLogger(__name__)

Source = Literal["host", "store", "new"]
Dumped = tuple[dict[str, Any], dict[str, bytes], set[str]]

_HISTORY = 32  # commits of a session that are remembered beside it, as many as the store does
_RECENT = 8  # turns whose records are remembered, should the store lose them
_NEVER = -1  # a version that no session is at
_SEEN = 100_000  # sessions whose highest version is remembered after they were dropped


NOBODY = SessionKey("nobody", "nobody")  # whose a turn without a session is


@dataclass(frozen=True, slots=True)
class Resident:
    """A session as of a committed version."""

    key: SessionKey
    version: int
    state: State
    book: Book
    owner: str | None = None
    commits: tuple[str, ...] = ()  # ids of the last commits that led here, the latest last
    recent: tuple[TurnRecord, ...] = ()  # the last turns that were committed from here

    def stands_for(self, head: Head) -> bool:
        """Tell whether this is the stored version, and not another one of that number."""
        return self.version == head.version and self.book.to_json() == head.meta["book"]


@dataclass(frozen=True, slots=True)
class Found:
    """A session that was asked for: where it was, and what was wrong with it."""

    resident: Resident
    source: Source
    recovered: str | None = None  # what the store had lost or damaged, and what stands in for it


class Residency:
    """Sessions in RAM, least recently used first out, within a budget of bytes."""

    def __init__(
        self,
        store: MemoryStore,
        config: HopeConfig,
        dtype: torch.dtype,
        fingerprint: str,
        *,
        budget: int,
        storage: Storage = EXACT,
        evicted: Callable[[], None] = lambda: None,
        regressed: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.fingerprint = fingerprint
        self.config = config
        self._dtype = dtype
        self._budget = budget
        self._storage = storage
        self._evicted = evicted
        self._regressed = regressed
        self._held: OrderedDict[SessionKey, Resident] = OrderedDict()
        self._seen: OrderedDict[SessionKey, int] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    async def get(self, lease: Lease) -> Found:
        """Return the session's last committed state, to be written; an unknown one is new.

        A version that the store has lost since it acknowledged it is committed again from RAM,
        where it is still here; one that is damaged, from the newest kept one that is whole.

        Raises:
            StoreError, StateError: it exists and cannot be read whole.
        """
        key = lease.key
        held = self._held.get(key)
        if held is not None and held.commits[-1:] == (lease.commit,):
            self._held.move_to_end(key)
            return Found(held, "host")
        lost = self._seen.get(key, 0)
        note = None
        if lost > lease.version or (held is not None and held.version == lease.version):
            self._regressed()
            note = _gone_back(lost, lease.version)
            log.error("session %s: %s", key, note)
            if held is not None and (lease.commit in held.commits or not lease.version):
                return await self._offer(held, lease, note)
            note += ", which stands: what came after it is lost"
        self.drop(key)
        try:
            snapshot = await self.store.load(key, fingerprint=self.fingerprint)
        except NotFound:
            if lease.version:
                raise Fenced(key.session) from None
            return Found(Resident(key, 0, State(), Book()), "new", note)
        if snapshot.latest != lease.version:  # somebody has acquired it since
            raise Fenced(key.session)
        resident = await self.restored(snapshot, lease.commit)
        if snapshot.damaged:
            resident, mended = await self._mend(lease, snapshot, resident)
            note = f"{note}; {mended}" if note else mended
        self._hold(resident)
        return Found(resident, "store", note)

    async def look(self, key: SessionKey) -> Found:
        """Return the session's last committed state, only to be read (raises as `get` does)."""
        lost = self._seen.get(key, 0)
        try:
            head = await self.store.head(key)
        except NotFound:
            note = _gone_back(lost, 0) if lost else None
            return Found(Resident(key, 0, State(), Book()), "new", note)
        except Corrupt:  # then `load` tells what stands in for it
            head = None
        held = self._held.get(key)
        if head is not None and held is not None and held.stands_for(head):
            return Found(held, "host")
        snapshot = await self.store.load(key, fingerprint=self.fingerprint)
        note = _gone_back(lost, snapshot.latest) if lost > snapshot.latest else None
        note = "; ".join(filter(None, (note, _stand_in(snapshot)))) or None
        return Found(await self.restored(snapshot, ""), "store", note)

    async def restored(self, snapshot: Snapshot, commit: str) -> Resident:
        """Return a session that was loaded, as it goes on (StateError)."""
        meta, head = snapshot.head.meta, snapshot.head
        state = await asyncio.to_thread(
            restore, meta["state"], snapshot.blobs, self.config, self._dtype
        )
        commits = (commit,) if commit else ()
        return Resident(head.key, snapshot.latest, state, Book(**meta["book"]), head.owner, commits)

    async def commit(
        self,
        base: Resident,
        state: State,
        book: Book,
        *,
        lease: Lease,
        commit_id: str,
        turns: tuple[TurnRecord, ...] = (),
        owner: str | None = None,
        durable: bool = False,
    ) -> tuple[Resident, Committed]:
        """Make `state` the session's next version; return it and what the store says of it.

        What is stored in fewer bits is what the session goes on from, here as after a restart.

        Raises:
            StoreError: nothing was committed, or (Unavailable) it is unknown whether it was.
                What is in RAM stays: the store may turn out to have gone back.
        """
        stored = base.state if base.version else None
        state, (facts, put, keep) = await asyncio.to_thread(self._dumped, state, stored)
        change = Change(
            fingerprint=self.fingerprint,
            meta={"state": facts, "book": book.to_json()},
            put=put,
            keep=frozenset(keep),
            turns=turns,
            owner=owner,
        )
        after = replace(base, state=state, book=book, owner=owner or base.owner)
        try:
            return await self.publish(
                after, change, lease=lease, commit_id=commit_id, durable=durable
            )
        except Incomplete as error:
            if not keep:
                raise
            log.error("session %s: %s; all of it is written anew", base.key, error)
        _, put, _ = await asyncio.to_thread(dump, state, None, self._storage)
        whole = replace(change, put=put, keep=frozenset())
        return await self.publish(after, whole, lease=lease, commit_id=commit_id, durable=durable)

    async def publish(
        self,
        session: Resident,
        change: Change,
        *,
        lease: Lease,
        commit_id: str,
        durable: bool = False,
    ) -> tuple[Resident, Committed]:
        """Commit a change that makes of the stored session what `session` holds, but its version.

        `session.version` is the one that the store is at. Raises as `commit` does.
        """
        change = replace(change, above=max(change.above, self._seen.get(session.key, 0)))
        done = await self.store.commit(
            lease, change, expected=session.version, commit_id=commit_id, durable=durable
        )
        records = tuple(replace(turn, version=done.version) for turn in change.turns)
        resident = replace(
            session,
            version=done.version,
            commits=(*session.commits, commit_id)[-_HISTORY:],
            recent=(*session.recent, *records)[-_RECENT:],
        )
        self._hold(resident)
        return resident, done

    async def confirm(self, lease: Lease, *, durable: bool) -> bool:
        """Wait until all that was committed to the session is on disk; tell whether it is."""
        held = self._held.get(lease.key)
        last = held.commits[-1] if held is not None and held.commits else lease.commit
        # made before under this id; else no session is at that version, and nothing is done
        nothing = Change(fingerprint=self.fingerprint, meta={})
        done = await self.store.commit(
            lease, nothing, expected=_NEVER, commit_id=last, durable=durable
        )
        return done.durable

    def drop(self, key: SessionKey) -> None:
        """Forget the copy in RAM."""
        if (resident := self._held.pop(key, None)) is not None:
            self.bytes -= resident.state.bytes

    def forget(self, key: SessionKey) -> None:
        """Forget all of a session that was deleted."""
        self.drop(key)
        self._seen.pop(key, None)

    def _dumped(self, state: State, stored: State | None) -> tuple[State, Dumped]:
        settled = settle(state, stored, self._storage)
        return settled, dump(settled, stored, self._storage)

    # --- mending ------------------------------------------------------------------------------

    async def _offer(self, held: Resident, lease: Lease, note: str) -> Found:
        """Commit the copy in RAM again, whole, above every version that was ever told."""
        state, (facts, put, _) = await asyncio.to_thread(self._dumped, held.state, None)
        change = Change(
            fingerprint=self.fingerprint,
            meta={"state": facts, "book": held.book.to_json()},
            put=put,
            turns=tuple(turn for turn in held.recent if turn.version > lease.version),
            owner=held.owner,
        )
        at = replace(held, version=lease.version, state=state)
        resident, _ = await self.publish(at, change, lease=lease, commit_id=uuid.uuid4().hex)
        note += f"; version {held.version} was restored from memory as {resident.version}"
        return Found(resident, "host", note)

    async def _mend(
        self, lease: Lease, snapshot: Snapshot, resident: Resident
    ) -> tuple[Resident, str]:
        """Make the whole version that was loaded the current one."""
        change = Change(
            fingerprint=self.fingerprint,
            meta=snapshot.head.meta,
            keep=frozenset(snapshot.head.blobs),
            base=snapshot.head.version,
        )
        mended, _ = await self.publish(resident, change, lease=lease, commit_id=uuid.uuid4().hex)
        return mended, f"{_stand_in(snapshot)}; it is version {mended.version} now"

    # --- holding ------------------------------------------------------------------------------

    def _hold(self, resident: Resident) -> None:
        self.drop(resident.key)
        self._held[resident.key] = resident
        self._saw(resident.key, resident.version)
        self.bytes += resident.state.bytes
        while self.bytes > self._budget and len(self._held) > 1:
            oldest = next(iter(self._held))
            self.drop(oldest)
            self._evicted()

    def _saw(self, key: SessionKey, version: int) -> None:
        self._seen[key] = max(version, self._seen.pop(key, 0))
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)


def _gone_back(lost: int, found: int) -> str:
    return f"the store went back from version {lost} to {found}"


def _stand_in(snapshot: Snapshot) -> str | None:
    if not snapshot.damaged:
        return None
    damaged = "; ".join(f"version {v} is damaged ({why})" for v, why in snapshot.damaged.items())
    return f"{damaged}; version {snapshot.head.version} stands in"
