"""Reading sessions back from Redis: a version is whole, or it is passed over and named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from memory_store.codec import FIELD, Blob, Manifest, off_the_loop, unpack
from memory_store.errors import Corrupt, Incompatible, NotFound, NoVersion
from memory_store.keys import Keys
from memory_store.link import Link
from memory_store.row import Row, read_manifest, read_row
from memory_store.snapshot import Head, SessionKey, Snapshot
from memory_store.staging import Step, batches
from memory_store.vault import Vault, field_place

_log = logging.getLogger(__name__)


class Reader:
    """Loads versions of sessions, verified."""

    def __init__(self, link: Link, vault: Vault) -> None:
        self._link = link
        self._vault = vault

    async def newest(self, key: SessionKey, fingerprint: str) -> Snapshot:
        """Return the newest version that is whole, and say what was passed over."""
        row = await read_row(self._link, key)
        damaged: dict[int, str] = {}
        version = row.version
        while True:
            try:
                manifest = await self._readable(row, version, fingerprint)
                blobs = await self._blobs(key, manifest)
                break
            except (Corrupt, NoVersion) as error:
                # Commits may have moved on for so long that a blob of this version has expired.
                newer = await read_row(self._link, key)
                if newer.version != row.version:
                    row, version, damaged = newer, newer.version, {}
                    continue
                damaged[version] = error.what if isinstance(error, Corrupt) else "it is not there"
                version -= 1
                if version < max(row.oldest, 1):
                    raise Corrupt(key.session, _all_of(damaged)) from error
        if damaged:
            _log.error("session %s: version %d stands in: %s", key, version, _all_of(damaged))
        return Snapshot(manifest.head(key), blobs, latest=row.version, damaged=damaged)

    async def version(self, key: SessionKey, fingerprint: str, version: int) -> Snapshot:
        row = await read_row(self._link, key)
        manifest = await self._readable(row, version, fingerprint)
        try:
            blobs = await self._blobs(key, manifest)
        except Corrupt:
            newer = await read_row(self._link, key)
            if version < newer.oldest:  # dropped by commits since
                kept = (newer.oldest, newer.version)
                raise NoVersion(key.session, version, kept=kept) from None
            raise
        return Snapshot(manifest.head(key), blobs, latest=row.version)

    async def _readable(self, row: Row, version: int, fingerprint: str) -> Manifest:
        manifest = await read_manifest(self._link, self._vault, row, version)
        if manifest.fingerprint != fingerprint:
            raise Incompatible(row.key.session, expected=fingerprint, found=manifest.fingerprint)
        return manifest

    async def _blobs(self, key: SessionKey, manifest: Manifest) -> dict[str, bytes]:
        keys = Keys(key)
        steps = [
            Step(min(blob.stored, FIELD), (("HGET", keys.blob(blob.id), number),))
            for blob in manifest.blobs.values()
            for number in range(blob.fields)
        ]
        fields: list[bytes | None] = []
        for batch in batches(steps):
            fields += await self._link.ask(batch)
        return await off_the_loop(
            sum(blob.length for blob in manifest.blobs.values()),
            lambda: self._unpacked(key, manifest.blobs, fields),
        )

    def _unpacked(
        self, key: SessionKey, blobs: Mapping[str, Blob], fields: Sequence[bytes | None]
    ) -> dict[str, bytes]:
        raw: dict[str, bytes] = {}
        start = 0
        for name, blob in blobs.items():
            opened = [
                None
                if field is None
                else self._vault.open(key, field_place(blob.id, number, blob.fields), field)
                for number, field in enumerate(fields[start : start + blob.fields])
            ]
            raw[name] = unpack(key.session, name, blob, opened)
            start += blob.fields
        return raw

    async def versions(self, key: SessionKey) -> list[Head]:
        row = await read_row(self._link, key)
        if not row.version:
            raise NotFound(key.session)
        heads: list[Head] = []
        for version in range(row.version, max(row.oldest, 1) - 1, -1):
            try:
                manifest = await read_manifest(self._link, self._vault, row, version)
            except (NoVersion, Corrupt, Incompatible) as error:
                _log.warning("left out of the versions: %s", error)
            else:
                heads.append(manifest.head(key))
        return heads


def _all_of(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"version {version}: {what}" for version, what in damaged.items())
