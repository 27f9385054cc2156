"""A session at rest: what is stored, what a turn changed, and what the store tells about it.

Values only; nothing here knows a database or a model. Blobs are opaque safetensors bytes with
a name (`level/fast`, `window/1024-1088`); small facts travel as JSON in `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
    version: int = 0  # the one that its commit made; the store fills it in


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a session, until another acquires it or its time runs out.

    The time only spares wasted work. What keeps a session whole is the fence, a number that
    every acquisition raises: a commit with an older one is refused however late it comes.
    """

    key: SessionKey
    owner: str
    fence: int
    version: int  # the session's when the lease was acquired; 0: it does not exist
    commit: str = ""  # the id of the commit that made that version


@dataclass(frozen=True, slots=True)
class Change:
    """What a turn (or a consolidation) changed: new blobs, blobs still in use, new small facts.

    Blobs neither put nor kept are no longer part of the session from this version on. With
    `base`, the session goes on from that older kept version: `keep` names its blobs, and what
    was recorded after it is no longer part of the transcript.
    """

    fingerprint: str
    meta: Meta
    put: Mapping[str, bytes] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    turns: tuple[TurnRecord, ...] = ()
    base: int | None = None
    owner: str | None = None  # the person whose session it is; None leaves it as it was
    above: int = 0  # the new version is higher than this one too

    def __post_init__(self) -> None:
        if both := self.keep & self.put.keys():
            raise ValueError(f"blob {min(both)!r} is both put and kept; say which one is meant")
        if len({turn.turn_id for turn in self.turns}) < len(self.turns):
            raise ValueError("two turns have the same id")


def included(version: int, current: int, undone: Iterable[tuple[int, int]]) -> bool:
    """Tell whether what was recorded at some version is part of the session as of `current`.

    `undone` are the spans (after, up to) of versions that were rolled back on the way there.

    >>> [included(version, 5, [(1, 3)]) for version in (1, 2, 3, 4, 5, 6)]
    [True, False, False, True, True, False]
    """
    return version <= current and not any(after < version <= last for after, last in undone)


@dataclass(frozen=True, slots=True)
class Committed:
    version: int
    written: int  # bytes that went to the store (compressed)
    # This commit id had been committed before, perhaps by a try of this very call whose reply
    # was lost; the call changed nothing.
    duplicate: bool = False
    durable: bool = False  # on disk (and on as many replicas as asked), as the server confirmed


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
    owner: str | None = None  # the person whose session it is
    chain: str = ""  # rolling digest of the ids of all turns up to this version


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session with its blobs, checksums verified.

    Where the current version is damaged this is the newest kept one that is whole, and `damaged`
    says what was passed over: never less than all of a version, and never in silence.
    """

    head: Head
    blobs: Mapping[str, bytes]
    latest: int = 0  # the current version: what a commit has to expect
    damaged: Mapping[int, str] = field(default_factory=dict)


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
    left: int = 0  # keys of the session beside its tombstone that a last scan found


@dataclass(frozen=True, slots=True)
class Durability:
    """What the store promises, as read from the running server and not from our settings."""

    mode: str  # "memory", "none", "everysec", "always"; "unknown" where the server will not say
    engine: str  # "valkey 9.1.0", "redis 7.0.15", "memory"
    policy: str  # maxmemory-policy; "unknown" where the server will not say
    aof: bool
    where: str  # address without credentials
    waits: bool = False  # WAITAOF can be had: a commit can wait until it is on disk
    replicas: int = 0  # connected now; of a cluster, of the master that has the fewest
    evicted: int = 0  # keys that the server has thrown away since it was started
