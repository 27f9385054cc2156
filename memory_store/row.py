"""The head of a session as it lies in Redis: one small hash, read before anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_store.codec import Manifest, decode_manifest
from memory_store.errors import Corrupt, Deleted, NotFound
from memory_store.keys import Keys
from memory_store.link import Command, Link
from memory_store.snapshot import SessionKey


@dataclass(frozen=True, slots=True)
class Row:
    """A session that was not deleted; at version 0 it does not exist."""

    key: SessionKey
    version: int
    encoded: bytes
    commits: Mapping[str, int]  # the last commit ids and the versions they made

    def manifest(self) -> Manifest:
        """Decode the current version's manifest (NotFound, Corrupt, Incompatible)."""
        if not self.version:
            raise NotFound(self.key.session)
        manifest = decode_manifest(self.key.session, self.encoded)
        if manifest.version != self.version:
            stated = f"manifest: it is of version {manifest.version}, the head of {self.version}"
            raise Corrupt(self.key.session, stated)
        return manifest


async def read_row(link: Link, key: SessionKey) -> Row:
    [found] = await link.ask([row_query(key)])
    return decode_row(key, found)


def row_query(key: SessionKey) -> Command:
    return ("HMGET", Keys(key).head, "ver", "tomb", "man", "cids")


def decode_row(key: SessionKey, found: Sequence[bytes | None]) -> Row:
    """Read the reply to `row_query` (Deleted, Corrupt)."""
    version, tombstone, manifest, commits = found
    if tombstone is not None:
        raise Deleted(key.session)
    try:
        return Row(key, int(version or 0), manifest or b"", dict(json.loads(commits or b"[]")))
    except (ValueError, TypeError) as error:
        raise Corrupt(key.session, f"head: {error}") from error
