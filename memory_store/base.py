"""The contract of a memory store; every backend passes the same test file.

A commit is atomic: afterwards the session is at `version` with all blobs of the change, or
nothing happened. A store never invents: a session that cannot be read whole is an error.
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
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)


class MemoryStore(Protocol):
    async def commit(
        self, key: SessionKey, change: Change, *, expected: int, commit_id: str
    ) -> Committed:
        """Make `change` the session's next version, if it is at version `expected` now.

        `expected=0` creates the session. The same `commit_id` again returns the version it made
        the first time (`duplicate=True`) and changes nothing.

        Raises:
            Conflict: the session is at another version.
            Deleted: the session has a tombstone.
            Incomplete: a kept blob does not exist, or a staged one is not whole.
            Full, Unavailable: see `memory_store.errors`.
        """
        ...

    async def load(self, key: SessionKey, *, fingerprint: str) -> Snapshot:
        """Return the current version with all its blobs, verified.

        Raises:
            NotFound, Deleted, Corrupt, Unavailable: see `memory_store.errors`.
            Incompatible: it was saved under another fingerprint.
        """
        ...

    async def head(self, key: SessionKey) -> Head:
        """Return the current version without blobs (NotFound, Deleted, Corrupt, Unavailable)."""
        ...

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        """Return the tenant's sessions, most recently committed first."""
        ...

    async def turns(self, key: SessionKey, *, limit: int = 200) -> Sequence[TurnRecord]:
        """Return the last `limit` recorded turns, oldest first."""
        ...

    async def delete(self, key: SessionKey) -> Deletion:
        """Leave a tombstone and remove everything else (NotFound, Deleted, Unavailable)."""
        ...

    async def durability(self) -> Durability:
        """Ask the server what it promises now (Unavailable when it does not answer)."""
        ...

    async def close(self) -> None: ...
