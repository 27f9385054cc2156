"""The contract of a memory store; every backend passes the same test file.

A commit is atomic: afterwards the session is at its new version with all blobs of the change, or
nothing happened. Only who holds the session's lease commits, and only while nobody has acquired
it since. A store never invents: what cannot be read whole is an error, or an older version that
is whole and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from memory_store.snapshot import (
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
)


class MemoryStore(Protocol):
    async def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        """Take the right to write the session, whether it exists or not.

        It is taken from a lease of the same owner (a server that was started again) at once, and
        from another's when that was released or has run out.

        Raises:
            Held: another owner has it, for some seconds more.
            Deleted, Corrupt, Full, Unavailable: see `memory_store.errors`.
        """
        ...

    async def renew(self, lease: Lease, *, seconds: float) -> bool:
        """Hold the lease for `seconds` from now; False: another has acquired the session since."""
        ...

    async def release(self, lease: Lease) -> None:
        """Let others acquire the session now; nothing happens where it is another's already."""
        ...

    async def commit(
        self,
        lease: Lease,
        change: Change,
        *,
        expected: int,
        commit_id: str,
        durable: bool = False,
    ) -> Committed:
        """Make `change` the session's next version, if it is at version `expected` now.

        `expected=0` creates the session. The same `commit_id` again returns the version it made
        the first time (`duplicate=True`) and changes nothing, whoever has the session now. With
        `durable`, return only when the server has it on disk, or has not managed to in time or
        never could: the commit stands, and `Committed.durable` tells which.

        Raises:
            Fenced: another has acquired the session since.
            Regressed: the store does not know this lease (any more): it has gone back.
            Conflict: the session is at another version.
            Repeated: one of the change's turns was committed before.
            Deleted: the session has a tombstone.
            NoVersion: the version to go on from is not kept.
            Corrupt: the version to go on from is damaged (an older one may be whole).
            Incomplete: a kept blob does not exist, or a staged one is not whole.
            Full, Unavailable: see `memory_store.errors`.
        """
        ...

    async def load(
        self, key: SessionKey, *, fingerprint: str, version: int | None = None
    ) -> Snapshot:
        """Return the current version (or an older kept one) with all its blobs, verified.

        Where the current version is damaged, the newest kept one that is whole is returned, and
        says so (`Snapshot.damaged`).

        Raises:
            NotFound, Deleted, Unavailable: see `memory_store.errors`.
            NoVersion: that version is not kept.
            Corrupt: no kept version (or not the one asked for) can be read whole.
            Incompatible: it was saved under another fingerprint, or in a newer format.
        """
        ...

    async def head(self, key: SessionKey) -> Head:
        """Return the current version without blobs (NotFound, Deleted, Corrupt, Unavailable)."""
        ...

    async def versions(self, key: SessionKey) -> Sequence[Head]:
        """Return the kept versions, the newest first; those that cannot be read are left out."""
        ...

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        """Return the tenant's sessions, most recently committed first."""
        ...

    async def owned(self, tenant: str, owner: str) -> Sequence[SessionKey]:
        """Return every session of a person, found by looking at all of the tenant's."""
        ...

    async def turns(
        self, key: SessionKey, *, limit: int = 200, version: int | None = None
    ) -> Sequence[TurnRecord]:
        """Return the last `limit` turns of the current (or an older kept) version, oldest first.

        Raises:
            NotFound, Deleted, Corrupt, Unavailable: see `memory_store.errors`.
            NoVersion: that version is not kept.
        """
        ...

    async def turn(self, key: SessionKey, turn_id: str) -> TurnRecord | None:
        """Return what was recorded of a turn, rolled back or not; None: it was not committed.

        An unknown session has no turns (Deleted, Corrupt, Unavailable).
        """
        ...

    async def delete(self, key: SessionKey) -> Deletion:
        """Leave a tombstone and remove everything else (NotFound, Deleted, Unavailable).

        No lease is needed: whoever holds it hears `Deleted` from the next commit.
        """
        ...

    async def durability(self) -> Durability:
        """Ask the server what it promises now (Unavailable when it does not answer)."""
        ...

    async def close(self) -> None: ...
