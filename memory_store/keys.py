"""The names of everything that a session has in Redis.

All keys of one session share a hash tag, so they live in one Cluster slot and one script may
touch them all. The scripts build the names of blobs and of older kept manifests
(`hope:{...}:m:<version>`, STR) from the head's.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_store.snapshot import SessionKey


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one session.

    >>> Keys(SessionKey("acme", "user-7")).blob("5f")
    'hope:{acme:user-7}:b:5f'
    """

    session: SessionKey

    @property
    def head(self) -> str:
        """HASH: ver, man, old (oldest kept version), cids (last commits), or ver and tomb."""
        return self._named("h")

    @property
    def items(self) -> str:
        """HASH: the records of the last turns and their order."""
        return self._named("i")

    @property
    def references(self) -> str:
        """HASH: blob id to the last version that names it, and its bytes."""
        return self._named("r")

    @property
    def scripted(self) -> list[str]:
        """The keys that both scripts are given; they derive the others from the first."""
        return [self.head, self.items, self.references]

    def blob(self, blob_id: str) -> str:
        """HASH: the blob's fields, by number."""
        return self._named(f"b:{blob_id}")

    def _named(self, end: str) -> str:
        return f"hope:{{{self.session.tag}}}:{end}"
