"""Sealing anew what lies in a store: values of older keys, and values that were never sealed.

Each value is replaced on its own, by compare-and-set, while servers go on: a reader finds the old
one or the new one, and the keyring opens both. Nothing is decompressed, nothing moves.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from memory_store.codec import Manifest
from memory_store.durability import read_durability
from memory_store.errors import Corrupt, Deleted, Incompatible, NotFound, NoVersion
from memory_store.keys import Keys, heads_of, session_of
from memory_store.link import Link
from memory_store.row import Row, read_manifest, read_row
from memory_store.scripts import script
from memory_store.seal import Keyring, key_of
from memory_store.snapshot import SessionKey
from memory_store.vault import MANIFEST, Vault, field_place, turn_place

_RESEAL = script("reseal.lua")
_TRIES = 5  # a value that changed meanwhile is read again


@dataclass(slots=True)
class Tally:
    """What was found."""

    sessions: int = 0
    resealed: int = 0
    kept: int = 0  # sealed with the current key before


class Resealer:
    """Goes through all sessions of a tenant."""

    def __init__(self, link: Link, keyring: Keyring) -> None:
        self._link = link
        self._keyring = keyring
        self._vault = _Lenient(keyring)

    @classmethod
    async def open(cls, url: str, keyring: Keyring) -> Resealer:
        """Connect (Unavailable; ValueError where the address cannot be read)."""
        link = Link(url)
        try:
            await link.run(read_durability(link))
        except BaseException:
            await link.close()
            raise
        return cls(link, keyring)

    async def tenant(
        self, tenant: str, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> Tally:
        """Seal everything of a tenant with its current key; run it again after a failure.

        Raises:
            Sealed: some value's key is not in the ring.
            Corrupt: some value is not what was stored; the others before it are done.
        """
        tally = Tally()
        heads = await self._link.run(self._link.scan(heads_of(tenant)))
        for number, head in enumerate(heads, 1):
            with contextlib.suppress(Deleted, NotFound):
                await self._link.run(self._session(session_of(head), tally))
            tell(number, len(heads))
        return tally

    async def close(self) -> None:
        await self._link.close()

    async def _session(self, key: SessionKey, tally: Tally) -> None:
        row = await read_row(self._link, key)
        if not row.version:
            return
        keys = Keys(key)
        tally.sessions += 1
        await self._value(key, keys.head, "man", MANIFEST, tally)
        for version in range(max(row.oldest, 1), row.version):
            await self._value(key, keys.manifest(version), "", MANIFEST, tally)
        blobs: dict[str, int] = {}
        for manifest in await self._manifests(row):
            blobs |= {blob.id: blob.fields for blob in manifest.blobs.values()}
        for blob_id, fields in blobs.items():
            for number in range(fields):
                place = field_place(blob_id, number, fields)
                await self._value(key, keys.blob(blob_id), str(number), place, tally)
        [names] = await self._link.ask([("HKEYS", keys.items)])
        for name in names:
            if name.startswith(b"t:"):
                turn_id = name[2:].decode()
                await self._value(key, keys.items, f"t:{turn_id}", turn_place(turn_id), tally)

    async def _manifests(self, row: Row) -> list[Manifest]:
        found = []
        for version in range(max(row.oldest, 1), row.version + 1):
            try:
                found.append(await read_manifest(self._link, self._vault, row, version))
            except (NoVersion, Corrupt, Incompatible):
                continue  # an older one that is lost or damaged holds nothing up
        return found

    async def _value(
        self, key: SessionKey, name: str, field: str, place: str, tally: Tally
    ) -> None:
        query = ("HGET", name, field) if field else ("GET", name)
        for _ in range(_TRIES):
            [stored] = await self._link.ask([query])
            if stored is None:
                return
            before, body = _split(stored) if field.startswith("t:") else (b"", stored)
            if key_of(body) == self._keyring.current(key.tenant):
                tally.kept += 1
                return
            sealed = before + bytes(
                self._vault.close(key, place, self._vault.open(key, place, body))
            )
            read = hashlib.sha1(stored, usedforsecurity=False).hexdigest()
            [reply] = await self._link.call(_RESEAL, [name], (field, read, sealed))
            if reply == [b"OK"]:
                tally.resealed += 1
                return


class _Lenient(Vault):
    """Also opens what was never sealed."""

    def open(self, key: SessionKey, place: str, data: bytes) -> bytes:
        return data if key_of(data) is None else super().open(key, place, data)


def _split(stored: bytes) -> tuple[bytes, bytes]:
    """Part `<version> ` from a turn's record (see transcript.py)."""
    version, space, body = stored.partition(b" ")
    return (version + space, body) if space and version.isdigit() else (b"", stored)
