"""Every way a store can refuse or fail, by name.

StoreError
├── NotFound        no such session (or another tenant's: the two look the same)
├── Deleted         the session was deleted; its tombstone is still there
├── NoVersion       the session has no such version any more, or has not had it yet
├── Held            another server has the session's lease
├── Fenced          another server has acquired the session since; this one's work is void
├── Regressed       the store went back: it knows less than it had acknowledged
├── Repeated        a turn of that id was committed before; nothing was changed
├── Conflict        somebody committed first: the expected version is not the stored one
├── Incompatible    the snapshot was made by another model or another format
├── Corrupt         a blob or manifest does not match its checksum or length
├── Incomplete      a commit names blobs that were not staged whole; nothing was changed
├── Full            the store has no memory left; nothing was changed
├── Unavailable     the store does not answer; whether a commit happened may be unknown
├── Unsafe          the store's settings would lose data silently; refused at start
└── CannotStart     the embedded server could not be started; the message says why
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of all errors of this package; the message names the value and the remedy."""


class NotFound(StoreError):
    def __init__(self, session: str) -> None:
        super().__init__(f"there is no session {session!r}")
        self.session = session


class Deleted(StoreError):
    def __init__(self, session: str) -> None:
        super().__init__(f"session {session!r} was deleted; choose another id")
        self.session = session


class NoVersion(StoreError):
    def __init__(self, session: str, version: int, *, kept: tuple[int, int]) -> None:
        oldest, newest = kept
        super().__init__(
            f"session {session!r} has no version {version}: versions {oldest} to {newest} are kept"
        )
        self.session, self.version, self.kept = session, version, kept


class Held(StoreError):
    def __init__(self, session: str, *, seconds: float) -> None:
        super().__init__(
            f"session {session!r} is in use by another server; retry when its turn has ended, "
            f"or in {seconds:.0f} s should it have died"
        )
        self.session, self.seconds = session, seconds


class Fenced(StoreError):
    def __init__(self, session: str) -> None:
        super().__init__(
            f"session {session!r} is no longer this server's: another took it, or its lease ran "
            "out before it could be renewed; nothing of this turn was kept, send it again"
        )
        self.session = session


class Regressed(StoreError):
    def __init__(self, session: str) -> None:
        super().__init__(
            f"session {session!r}: the store has gone back to before this server acquired the "
            "session; nothing of this turn was kept, send it again"
        )
        self.session = session


class Repeated(StoreError):
    def __init__(self, session: str, turn_id: str) -> None:
        super().__init__(
            f"session {session!r} has committed turn {turn_id!r} before; nothing was changed"
        )
        self.session, self.turn_id = session, turn_id


class Conflict(StoreError):
    def __init__(self, session: str, *, expected: int, found: int) -> None:
        super().__init__(
            f"session {session!r} is at version {found}, not {expected}: "
            "someone else committed first; reload it and try again"
        )
        self.session, self.expected, self.found = session, expected, found


class Incompatible(StoreError):
    def __init__(self, session: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"session {session!r} was saved by {found!r} and cannot be read by {expected!r}; "
            "serve the model that made it, or start a new session"
        )
        self.session, self.expected, self.found = session, expected, found


class Corrupt(StoreError):
    def __init__(self, session: str, what: str) -> None:
        super().__init__(f"session {session!r} is damaged at rest: {what}")
        self.session, self.what = session, what


class Incomplete(StoreError):
    def __init__(self, session: str, blob: str) -> None:
        super().__init__(
            f"session {session!r}: blob {blob!r} was not staged whole; nothing was committed"
        )
        self.session, self.blob = session, blob


class Full(StoreError):
    def __init__(self, detail: str) -> None:
        super().__init__(
            f"the store is full ({detail}); raise its maxmemory or delete sessions; "
            "nothing was changed"
        )


class Unavailable(StoreError):
    def __init__(self, where: str, detail: str) -> None:
        super().__init__(f"the store at {where} does not answer: {detail}")
        self.where, self.detail = where, detail


class Unsafe(StoreError):
    """The server's settings (an evicting policy, say) would lose acknowledged sessions."""


class CannotStart(StoreError):
    """No server binary, a data directory in use, or a server that died; says what to do."""
