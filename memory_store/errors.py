"""Every way a store can refuse or fail, by name.

StoreError
├── NotFound        no such session (or another tenant's: the two look the same)
├── Deleted         the session was deleted; its tombstone is still there
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
