"""What can be done to a session besides talking to it: its versions, copies, and its end.

Whatever writes does so as a turn does: alone, under the lease, as one commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hope_runtime.blobs import StateError
from hope_runtime.difference import Apart, differences
from hope_runtime.state import State
from memory_store import (
    Change,
    Corrupt,
    Deleted,
    Deletion,
    Head,
    Incompatible,
    Lease,
    MemoryStore,
    NotFound,
    SessionKey,
    Snapshot,
    TurnRecord,
)
from memory_store.archive import Archive
from memory_store.headers import BadArchive
from server.book import Book
from server.errors import ApiError
from server.record import check
from server.residency import Residency, Resident
from server.turns import Turns
from server.wire import METADATA_KEYS

_IMPORTS = 2  # files that may be in memory at once
TRANSCRIPT_BYTES = 1 << 20  # of the latest turns that go along with a copy
_FARTHEST = 1 << 53  # tokens; no session reads so many


class Sessions:
    """Operations on sessions; all of them raise StoreError and ApiError."""

    def __init__(self, store: MemoryStore, residency: Residency, turns: Turns) -> None:
        self._store = store
        self._residency = residency
        self._turns = turns
        self.importing = asyncio.Semaphore(_IMPORTS)

    async def create(self, key: SessionKey, metadata: Mapping[str, str], owner: str | None) -> Head:
        """Make an empty session."""
        async with self._turns.writing(key) as hold:
            _must_be_new(hold.lease)
            with hold.deciding():
                await self._residency.commit(
                    Resident(key, 0, State(), Book()),
                    State(),
                    Book(metadata=metadata),
                    lease=hold.lease,
                    commit_id=uuid.uuid4().hex,
                    owner=owner,
                )
        return await self._store.head(key)

    async def rollback(self, key: SessionKey, version: int, if_version: int | None) -> Head:
        """Go on from an older kept version, as a new one; what came after it can still be had.

        The transcript goes back with it. A turn id of what was rolled back stays known.
        """
        async with self._turns.writing(key) as hold:
            _must_be(hold.lease, if_version)
            with contextlib.suppress(Corrupt):  # a damaged one can be rolled back too
                _must_not_be_frozen(await self._store.head(key))
            snapshot = await self._store.load(
                key, fingerprint=self._residency.fingerprint, version=version
            )
            session = await self._residency.restored(snapshot, hold.lease.commit)
            session = replace(session, book=replace(session.book, frozen=False))
            change = Change(
                fingerprint=self._residency.fingerprint,
                meta={**snapshot.head.meta, "book": session.book.to_json()},
                keep=frozenset(snapshot.blobs),
                base=version,
            )
            with hold.deciding():
                await self._residency.publish(
                    session, change, lease=hold.lease, commit_id=uuid.uuid4().hex
                )
        return await self._store.head(key)

    async def freeze(self, key: SessionKey, frozen: bool, if_version: int | None) -> Head:
        """Let turns read the session, and nothing change it; or let them write again."""
        async with self._turns.writing(key) as hold:
            _must_be(hold.lease, if_version)
            resident = (await self._turns.current(hold)).resident
            if resident.book.frozen != frozen:
                with hold.deciding():
                    await self._residency.commit(
                        resident,
                        resident.state,
                        replace(resident.book, frozen=frozen),
                        lease=hold.lease,
                        commit_id=uuid.uuid4().hex,
                    )
        return await self._store.head(key)

    async def fork(
        self, key: SessionKey, target: SessionKey, version: int | None, owner: str | None
    ) -> Head:
        """Make a new session of what another one is, or was; the two share nothing from then on."""
        snapshot = await self._whole(key, version)
        turns = await self._transcript(key, snapshot.head.version)
        session = await self._residency.restored(snapshot, "")
        book = replace(session.book, frozen=False)
        change = Change(
            fingerprint=self._residency.fingerprint,
            meta={**snapshot.head.meta, "book": book.to_json()},
            put=snapshot.blobs,
            turns=turns,
            owner=owner or session.owner,
        )
        copy = Resident(target, 0, session.state, book, change.owner)
        async with self._turns.writing(target) as hold:
            _must_be_new(hold.lease)
            with hold.deciding():
                await self._residency.publish(
                    copy, change, lease=hold.lease, commit_id=uuid.uuid4().hex
                )
        return await self._store.head(target)

    async def difference(
        self, key: SessionKey, before: int | None, after: int | None
    ) -> tuple[Head, Head, list[Apart]]:
        """Compare two kept versions; left out, they are the one before the last, and the last."""
        if before is None or after is None:
            kept = [head.version for head in await self._store.versions(key)][:2]
            before = kept[-1] if before is None else before
            after = kept[0] if after is None else after
        one, other = await self._whole(key, before), await self._whole(key, after)
        states = [await self._residency.restored(each, "") for each in (one, other)]
        apart = await asyncio.to_thread(differences, states[0].state, states[1].state)
        return one.head, other.head, apart

    async def export(self, key: SessionKey, version: int | None) -> Archive:
        """Return all of a session, for one file."""
        snapshot = await self._whole(key, version)
        head = snapshot.head
        return Archive(
            source=key.session,
            fingerprint=head.fingerprint,
            version=head.version,
            created=head.created,
            updated=head.updated,
            exported=time.time(),
            meta=head.meta,
            blobs=snapshot.blobs,
            turns=tuple(await self._transcript(key, head.version)),
        )

    async def bring_in(
        self,
        key: SessionKey,
        archive: Archive,
        owner: str | None,
        told: Callable[[Head], object] = lambda head: None,
    ) -> Head:
        """Make a new session of a file, once all of it is known to fit the model.

        Nothing of the file is stored as it came: all is written anew from what was understood.
        `told` raises ValueError where the session could not be told of on the wire.
        """
        fingerprint = self._residency.fingerprint
        if archive.fingerprint != fingerprint:
            raise Incompatible(key.session, expected=fingerprint, found=archive.fingerprint)
        head = Head(
            key=key,
            version=0,
            parent=0,
            fingerprint=fingerprint,
            created=archive.created,
            updated=archive.updated,
            meta=archive.meta,
            blobs={},
            owner=owner,
        )
        try:
            session = await self._residency.restored(Snapshot(head, archive.blobs), "")
            self._check(session.state)
            _check_book(session.book)
            for turn in archive.turns:
                check(turn)
            told(head)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BadArchive(f"the file is no session of this model: {_said(error)}") from error
        async with self._turns.writing(key) as hold:
            _must_be_new(hold.lease)
            with hold.deciding():
                await self._residency.commit(
                    Resident(key, 0, State(), Book()),
                    session.state,
                    replace(session.book, frozen=False),
                    lease=hold.lease,
                    commit_id=uuid.uuid4().hex,
                    turns=_fitting(archive.turns),
                    owner=owner,
                )
        return await self._store.head(key)

    async def delete(self, key: SessionKey) -> Deletion:
        """Delete a session, whatever runs in it: the tombstone fences out every writer."""
        try:
            receipt = await self._store.delete(key)
        except Deleted:
            self._turns.expel(key)
            raise
        self._turns.expel(key)
        return receipt

    async def delete_of(self, tenant: str, user: str) -> list[Deletion]:
        """Delete every session of a person; those that are made meanwhile too."""
        self._turns.expel_user(tenant, user)
        receipts: list[Deletion] = []
        tried: set[SessionKey] = set()
        while keys := set(await self._store.owned(tenant, user)) - tried:
            tried |= keys
            for key in sorted(keys, key=lambda each: each.session):
                with contextlib.suppress(Deleted, NotFound):  # somebody else did
                    receipts.append(await self.delete(key))
        return receipts

    # --- parts --------------------------------------------------------------------------------

    async def _whole(self, key: SessionKey, version: int | None) -> Snapshot:
        """Load a version, and let no other one stand in for it."""
        fingerprint = self._residency.fingerprint
        snapshot = await self._store.load(key, fingerprint=fingerprint, version=version)
        if snapshot.damaged:
            what = "; ".join(f"version {v}: {why}" for v, why in snapshot.damaged.items())
            whole = f"version {snapshot.head.version} is whole and can be asked for"
            raise Corrupt(key.session, f"{what}; {whole}")
        return snapshot

    def _check(self, state: State) -> None:
        """Look at a state that came from elsewhere as closely as the device will need."""
        config = self._residency.config
        if not 0 <= state.position < _FARTHEST:
            raise ValueError(f"position {state.position} is out of range")
        if not all(0 <= token < config.vocabulary for token, _ in state.carry):
            raise ValueError("tokens are not all of the vocabulary")
        seen = state.position + len(state.carry)
        names = {level.name for level in state.own or config.levels}
        for due in state.due:
            if due.level not in names or not 0 <= due.start < due.end <= seen:
                raise ValueError(f"{due} cannot be consolidated")

    async def _transcript(self, key: SessionKey, version: int) -> tuple[TurnRecord, ...]:
        return _fitting(await self._store.turns(key, limit=1000, version=version))


def _must_be_new(lease: Lease) -> None:
    if lease.version:
        raise ApiError(
            409,
            "session_exists",
            f"session {lease.key.session!r} exists already; choose another id, or delete it",
            param="id",
        )


def _must_be(lease: Lease, if_version: int | None) -> None:
    """Check that the session exists, at the version that is asked for."""
    if not lease.version:
        raise NotFound(lease.key.session)
    if if_version not in (None, lease.version):
        raise ApiError(
            412,
            "precondition_failed",
            f"the session is at version {lease.version}, not {if_version}; reload it",
            param="If-Match",
        )


def _must_not_be_frozen(head: Head) -> None:
    if head.meta["book"].get("frozen"):
        raise ApiError(
            409,
            "session_frozen",
            f"session {head.key.session!r} is frozen; unfreeze it first",
        )


def _check_book(book: Book) -> None:
    """Look at a book that came from elsewhere as closely as its readers will need."""
    for text in (book.first, book.chain, book.instructions, *book.learned_at, *book.metadata):
        text.encode()  # half a surrogate pair could not be told again
    for text in book.metadata.values():
        text.encode()
    numbers = [book.turns, book.items, *book.learned_at.values()]
    if not all(type(number) in (int, float) and number >= 0 for number in numbers):
        raise TypeError("the book has other things than numbers where numbers belong")
    if len(book.metadata) > METADATA_KEYS:
        raise ValueError(f"{len(book.metadata)} metadata keys are more than {METADATA_KEYS}")


def _fitting(turns: Sequence[TurnRecord]) -> tuple[TurnRecord, ...]:
    """Return the latest turns that together are not too large for one commit."""
    kept: list[TurnRecord] = []
    room = TRANSCRIPT_BYTES
    for turn in reversed(turns):
        room -= sum(len(text.encode(errors="replace")) for _, text in turn.payload["items"]) + 2048
        if room < 0:
            break
        kept.append(turn)
    return tuple(reversed(kept))


def _said(error: Exception) -> str:
    if isinstance(error, StateError):
        return str(error)
    return f"{type(error).__name__}: {str(error)[:200]}"
