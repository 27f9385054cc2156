"""The names of everything that a session has in Redis.

All keys of one session share a hash tag, so they live in one Cluster slot and one script may
touch them all. The scripts build the names of blobs and of older kept manifests
(`hope:{...}:m:<version>`, STR) from the head's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memory_store.snapshot import SessionKey

_HEAD = re.compile(r"hope:\{([^:}]+):([^}]+)\}:h")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one session.

    >>> Keys(SessionKey("acme", "user-7")).blob("5f")
    'hope:{acme:user-7}:b:5f'
    """

    session: SessionKey

    @property
    def head(self) -> str:
        """HASH: ver, fence, man, old (oldest kept version), cids (last commits), user; or tomb."""
        return self._named("h")

    @property
    def lease(self) -> str:
        """STR: who may write, for as long as it lives."""
        return self._named("l")

    @property
    def items(self) -> str:
        """HASH: the records of the last turns and their order."""
        return self._named("i")

    @property
    def references(self) -> str:
        """HASH: blob id to the last version that names it, and its bytes."""
        return self._named("r")

    @property
    def committed(self) -> list[str]:
        """The keys that the scripts of a commit and of a deletion are given."""
        return [self.head, self.items, self.references, self.lease]

    @property
    def leased(self) -> list[str]:
        """The keys that the scripts of a lease are given."""
        return [self.head, self.lease]

    @property
    def all(self) -> str:
        """The pattern of every key of the session."""
        return self._named("*")

    def blob(self, blob_id: str) -> str:
        """HASH: the blob's fields, by number."""
        return self._named(f"b:{blob_id}")

    def manifest(self, version: int) -> str:
        """STR: the manifest of an older kept version."""
        return self._named(f"m:{version}")

    def _named(self, end: str) -> str:
        return f"hope:{{{self.session.tag}}}:{end}"


def heads_of(tenant: str) -> str:
    """Return the pattern of the heads of all sessions of a tenant.

    >>> heads_of("acme")
    'hope:{acme:*}:h'
    """
    return f"hope:{{{tenant}:*}}:h"


def session_of(head: str) -> SessionKey:
    """Return whose head this is.

    >>> session_of("hope:{acme:user:7}:h")
    SessionKey(tenant='acme', session='user:7')
    """
    found = _HEAD.fullmatch(head)
    if found is None:
        raise ValueError(f"{head!r} is no head of a session")
    return SessionKey(found[1], found[2])
