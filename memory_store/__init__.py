"""Sessions at rest: versioned snapshots of named bytes, committed atomically or not at all.

Three backends keep one contract (`MemoryStore`): `RedisStore` on a server of yours, the same on
an `EmbeddedValkey` started here, and `LocalStore`, which forgets when the process ends. This
package knows bytes and small JSON facts; never a model, never a connection to a user.
"""

from __future__ import annotations

from memory_store.base import MemoryStore
from memory_store.embedded import EmbeddedValkey
from memory_store.errors import (
    CannotStart,
    Conflict,
    Corrupt,
    Deleted,
    Fenced,
    Full,
    Held,
    Incompatible,
    Incomplete,
    NotFound,
    NoVersion,
    Regressed,
    Repeated,
    StoreError,
    Unavailable,
    Unsafe,
)
from memory_store.local import LocalStore
from memory_store.redis import RedisStore
from memory_store.seal import Keyring
from memory_store.snapshot import (
    BlobInfo,
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Lease,
    Meta,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)

__all__ = [
    "BlobInfo",
    "CannotStart",
    "Change",
    "Committed",
    "Conflict",
    "Corrupt",
    "Deleted",
    "Deletion",
    "Durability",
    "EmbeddedValkey",
    "Fenced",
    "Full",
    "Head",
    "Held",
    "Incompatible",
    "Incomplete",
    "Keyring",
    "Lease",
    "LocalStore",
    "MemoryStore",
    "Meta",
    "NoVersion",
    "NotFound",
    "Page",
    "RedisStore",
    "Regressed",
    "Repeated",
    "SessionKey",
    "Snapshot",
    "StoreError",
    "TurnRecord",
    "Unavailable",
    "Unsafe",
]
