"""The head of a session as it lies in Redis: one small hash, read before anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_store.codec import Manifest, decode_manifest
from memory_store.errors import Corrupt, Deleted, NotFound, NoVersion
from memory_store.keys import Keys
from memory_store.link import Command, Link
from memory_store.snapshot import SessionKey
from memory_store.vault import MANIFEST, Vault

_FIELDS = ("ver", "tomb", "man", "cids", "old", "fence", "holder", "user")


@dataclass(frozen=True, slots=True)
class Row:
    """A session that was not deleted; at version 0 it does not exist."""

    key: SessionKey
    version: int
    oldest: int  # of the versions that are kept
    encoded: bytes
    commits: Mapping[str, int]  # the last commit ids and the versions they made, oldest first
    fence: int = 0
    holder: str = ""  # who has raised the fence to this
    user: str | None = None  # the person whose session it is

    @property
    def last_commit(self) -> str:
        """The id of the commit that made this version, if it is remembered."""
        return next((commit for commit, made in self.commits.items() if made == self.version), "")

    def manifest(self, vault: Vault) -> Manifest:
        """Decode the current version's manifest (NotFound, Corrupt, Incompatible, Sealed)."""
        if not self.version:
            raise NotFound(self.key.session)
        return _decoded(self.key, vault, self.version, self.encoded)


async def read_row(link: Link, key: SessionKey) -> Row:
    [found] = await link.ask([row_query(key)])
    return decode_row(key, found)


async def read_manifest(link: Link, vault: Vault, row: Row, version: int) -> Manifest:
    """Return a kept version's manifest (NotFound, NoVersion, Corrupt, Incompatible, Sealed)."""
    if version == row.version or not row.version:
        return row.manifest(vault)
    if not row.oldest <= version < row.version:
        raise NoVersion(row.key.session, version, kept=(row.oldest, row.version))
    [encoded] = await link.ask([("GET", Keys(row.key).manifest(version))])
    if encoded is None:  # a lost one, or a number that was skipped
        raise NoVersion(row.key.session, version, kept=(row.oldest, row.version))
    return _decoded(row.key, vault, version, encoded)


def row_query(key: SessionKey) -> Command:
    return ("HMGET", Keys(key).head, *_FIELDS)


def decode_row(key: SessionKey, found: Sequence[bytes | None]) -> Row:
    """Read the reply to `row_query` (Deleted, Corrupt)."""
    version, tombstone, manifest, commits, oldest, fence, holder, user = found
    if tombstone is not None:
        raise Deleted(key.session)
    if version is None and (manifest is not None or commits is not None):
        raise Corrupt(key.session, "head: its version is missing")
    try:
        return Row(
            key,
            version=int(version or 0),
            oldest=int(oldest or 1),
            encoded=manifest or b"",
            commits=dict(json.loads(commits or b"[]")),
            fence=int(fence or 0),
            holder=(holder or b"").decode(),
            user=None if user is None else user.decode(),
        )
    except (ValueError, TypeError) as error:
        raise Corrupt(key.session, f"head: {error}") from error


def _decoded(key: SessionKey, vault: Vault, version: int, encoded: bytes) -> Manifest:
    manifest = decode_manifest(key.session, vault.open(key, MANIFEST, encoded))
    if manifest.version != version:
        stated = f"manifest: it is of version {manifest.version}, the head of {version}"
        raise Corrupt(key.session, stated)
    return manifest
