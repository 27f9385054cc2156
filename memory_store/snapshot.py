"""A session at rest: what is stored, what a turn changed, and what the store tells about it.

Values only; nothing here knows a database or a model. Blobs are opaque safetensors bytes with
a name (`level/fast`, `window/1024-1088`); small facts travel as JSON in `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Meta = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Whose session: every key of the store starts from these two names.

    >>> SessionKey("acme", "user-7").tag
    'acme:user-7'
    """

    tenant: str
    session: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", self.tenant):
            raise ValueError(f"tenant {self.tenant!r}: use 1 to 64 of A-Z a-z 0-9 . _ @ -")
        if not _NAME.match(self.session):
            raise ValueError(f"session id {self.session!r}: use 1 to 128 of A-Z a-z 0-9 . _ : @ -")

    @property
    def tag(self) -> str:
        """The Cluster hash tag: all keys of one session live in one slot."""
        return f"{self.tenant}:{self.session}"


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One finished turn as it is kept for the transcript, and for a client that asks again."""

    turn_id: str
    payload: Meta  # JSON: input items, output text, usage, outcome


@dataclass(frozen=True, slots=True)
class Change:
    """What a turn (or a consolidation) changed: new blobs, blobs still in use, new small facts.

    Blobs neither put nor kept are no longer part of the session from this version on.
    """

    fingerprint: str
    meta: Meta
    put: Mapping[str, bytes] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    turn: TurnRecord | None = None

    def __post_init__(self) -> None:
        if both := self.keep & self.put.keys():
            raise ValueError(f"blob {min(both)!r} is both put and kept; say which one is meant")


@dataclass(frozen=True, slots=True)
class Committed:
    version: int
    written: int  # bytes that went to the store (compressed)
    # This commit id had been committed before, perhaps by a try of this very call whose reply
    # was lost; the call changed nothing.
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class BlobInfo:
    length: int  # bytes as given to commit
    stored: int  # bytes at rest


@dataclass(frozen=True, slots=True)
class Head:
    """A session without its blobs."""

    key: SessionKey
    version: int
    parent: int
    fingerprint: str
    created: float  # seconds since the epoch: the session's first commit
    updated: float  # this version's commit
    meta: Meta
    blobs: Mapping[str, BlobInfo]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session with its blobs, checksums verified."""

    head: Head
    blobs: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a tenant's sessions, most recently committed first."""

    heads: tuple[Head, ...]
    cursor: str | None  # give back to get the next page; None at the end


@dataclass(frozen=True, slots=True)
class Deletion:
    """A receipt: what was there and is gone."""

    session: str
    keys: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Durability:
    """What the store promises, as read from the running server and not from our settings."""

    mode: str  # "memory", "none", "everysec", "always"; "unknown" where the server will not say
    engine: str  # "valkey 9.1.0", "redis 7.0.15", "memory"
    policy: str  # maxmemory-policy; "unknown" where the server will not say
    aof: bool
    where: str  # address without credentials
