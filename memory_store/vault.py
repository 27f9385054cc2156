"""What goes into the store is sealed on its way in and opened on its way out, or passed on.

Every value is tied to its place (whose session, which blob, which field), so that nothing can be
moved to where it does not belong. Session ids, turn ids and sizes stay readable.
"""

from __future__ import annotations

from memory_store.errors import Corrupt
from memory_store.seal import Keyring, Sealed, Tampered, key_of
from memory_store.snapshot import SessionKey


class Vault:
    """Seals with a keyring; without one, everything is stored as it is."""

    def __init__(self, keyring: Keyring | None = None) -> None:
        self.keyring = keyring

    def close(self, key: SessionKey, place: str, data: bytes | memoryview) -> bytes | memoryview:
        """Return what is to be stored (BadKeyring: the tenant has no key)."""
        if self.keyring is None:
            return data
        return self.keyring.seal(key.tenant, _context(key, place), data)

    def open(self, key: SessionKey, place: str, data: bytes) -> bytes:
        """Return what was stored.

        Raises:
            Sealed: by a key that is not there.
            Corrupt: it is not what was stored at this place.
        """
        if self.keyring is None:
            if (sealed_by := key_of(data)) is not None:
                raise Sealed(key.tenant, sealed_by)
            return data
        try:
            return self.keyring.open(key.tenant, _context(key, place), data)
        except Tampered as error:
            raise Corrupt(key.session, f"{place}: {error}") from error


def _context(key: SessionKey, place: str) -> str:
    return f"{key.tag} {place}"


MANIFEST = "manifest"


def turn_place(turn_id: str) -> str:
    return f"turn {turn_id}"


def field_place(blob_id: str, number: int, fields: int) -> str:
    return f"blob {blob_id} {number}/{fields}"
