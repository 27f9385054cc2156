"""Encryption at rest: each tenant's values sealed with its own keys, bound to where they belong.

AES-256-GCM, one envelope per value: magic and version, key id, nonce, ciphertext and tag. Moved
to another tenant or another place (the context), a value no longer opens. An older value put
back into its own place does: no seal can tell. Lengths are not hidden either.
Knows no database and no session.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from memory_store.errors import StoreError
from memory_store.snapshot import SessionKey

_MAGIC = b"\x89HS\x01"  # the last byte is the version; no JSON, zstd or safetensors starts so
_KEY = 32
_NONCE = 12
_TAG = 16
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")  # shorter than any key in base64

OVERHEAD = len(_MAGIC) + 1 + 32 + _NONCE + _TAG  # bytes that sealing adds, at most


class BadKeyring(StoreError):
    """The keyring cannot be used as it is; the message never holds key material."""


class Sealed(StoreError):
    """The key is not there, or no longer: an erased tenant's sessions answer this for ever."""

    def __init__(self, tenant: str, key_id: str) -> None:
        super().__init__(
            f"tenant {tenant!r} has no key {key_id!r}, which this was sealed with; put the key "
            "back into the keyring, or, if it was erased on purpose, delete the session"
        )
        self.tenant, self.key_id = tenant, key_id


class Tampered(StoreError):
    def __init__(self, context: str, what: str) -> None:
        super().__init__(f"{context!r} is not what was stored there: {what}; restore a backup")
        self.context, self.what = context, what


@dataclass(frozen=True, slots=True)
class _Keys:
    current: str
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True, repr=False)
class Keyring:
    """The keys of all tenants. Never changes: what adds or forgets a key returns another ring.

    >>> ring = Keyring().with_new_key("acme")
    >>> sealed = ring.seal("acme", "user-7/5f/0", b"hello")
    >>> ring.with_new_key("acme").open("acme", "user-7/5f/0", sealed)
    b'hello'
    """

    _tenants: Mapping[str, _Keys] = field(default_factory=dict)

    def __repr__(self) -> str:
        listed = {tenant: [*entry.keys] for tenant, entry in self._tenants.items()}
        return f"Keyring({listed})"

    @classmethod
    def read(cls, path: Path) -> Keyring:
        """Read the file, unless others than its owner can.

        Raises:
            BadKeyring: the file is not there, not private, or not a keyring.
        """
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o066:
                    raise BadKeyring(f"group or others may read or write it; chmod 600 {path}")
                return cls.parse(file.read().decode())
        except OSError as error:
            raise BadKeyring(f"keyring {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise BadKeyring(f"keyring {path} is not UTF-8 text") from None
        except BadKeyring as error:
            raise BadKeyring(f"keyring {path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read `{"acme": {"current": "k2", "keys": {"k1": "<base64>", "k2": "<base64>"}}}`.

        Raises:
            BadKeyring: it is anything else, or one key stands in two places.
        """
        try:
            content = json.loads(text, object_pairs_hook=_no_name_twice)
        except (ValueError, RecursionError):  # whose text may quote the file
            raise BadKeyring("it is not JSON") from None
        if not isinstance(content, dict):
            raise BadKeyring("it is not a JSON object with a tenant's name for each entry")
        tenants = {tenant: _keys(tenant, entry) for tenant, entry in content.items()}
        _check_each_key_has_one_place(tenants)
        return cls(tenants)

    def dump(self) -> str:
        """Return the JSON that `parse` reads: all keys, in the clear."""
        content = {
            tenant: {
                "current": entry.current,
                "keys": {
                    key_id: base64.b64encode(key).decode() for key_id, key in entry.keys.items()
                },
            }
            for tenant, entry in self._tenants.items()
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def save(self, path: Path) -> None:
        """Replace the file, whole or not at all, for its owner's eyes only.

        Raises:
            BadKeyring: it cannot be written; the file is as it was.
        """
        # Through a link: the file it points to must not keep keys that were forgotten.
        path = path.resolve()
        try:
            _replace(path, self.dump().encode("ascii"))
        except OSError as error:
            raise BadKeyring(f"keyring {path} cannot be saved: {error.strerror}") from error

    @property
    def tenants(self) -> frozenset[str]:
        return frozenset(self._tenants)

    def current(self, tenant: str) -> str:
        """Return the id of the key that new values are sealed with."""
        return self._of(tenant).current

    def with_new_key(self, tenant: str) -> Keyring:
        """Add a random key and make it current; values sealed before still open.

        The id is never one used before, not even by a key that is forgotten by now: what that
        one sealed must go on being `Sealed`, and not look `Tampered`.
        """
        _check_name(tenant)
        keys = self._tenants[tenant].keys if tenant in self._tenants else {}
        numbers = [int(found[1]) for key_id in keys if (found := re.match(r"k(\d{1,9})\b", key_id))]
        key_id = f"k{max(numbers, default=0) + 1}-{secrets.token_hex(4)}"
        entry = _Keys(key_id, {**keys, key_id: os.urandom(_KEY)})
        return Keyring({**self._tenants, tenant: entry})

    def without_key(self, tenant: str, key_id: str) -> Keyring:
        """Forget a retired key: what is still sealed with it never opens again."""
        entry = self._of(tenant)
        if key_id == entry.current:
            raise BadKeyring(f"key {key_id!r} of tenant {tenant!r} is in use; add a new one first")
        if key_id not in entry.keys:
            raise BadKeyring(f"tenant {tenant!r} has no key {key_id!r} to forget")
        kept = {other: key for other, key in entry.keys.items() if other != key_id}
        return Keyring({**self._tenants, tenant: replace(entry, keys=kept)})

    def without(self, tenant: str) -> Keyring:
        """Forget a tenant's keys: once no copy of the keyring has them, its data is erased."""
        self._of(tenant)
        return Keyring({name: keys for name, keys in self._tenants.items() if name != tenant})

    def seal(self, tenant: str, context: str, data: bytes | memoryview) -> bytes:
        """Encrypt data for one place, with the tenant's current key.

        The nonce is random (96 bits): a key is good for 2^32 values (NIST SP 800-38D, 8.3),
        and a new key starts from zero.

        Raises:
            BadKeyring: the tenant has no key.
        """
        entry = self._of(tenant)
        key_id = entry.current.encode("ascii")
        header = _MAGIC + bytes([len(key_id)]) + key_id
        nonce = os.urandom(_NONCE)
        cipher = AESGCM(entry.keys[entry.current])
        return header + nonce + cipher.encrypt(nonce, data, _bound(header, tenant, context))

    def open(self, tenant: str, context: str, sealed: bytes | memoryview) -> bytes:
        """Decrypt what was sealed for this place.

        Raises:
            Sealed: the tenant does not have the key.
            Tampered: it was altered, comes from another place, or is not sealed at all.
        """
        key_id = key_of(sealed)
        if key_id is None:
            raise Tampered(context, "it is not sealed, or not whole")
        if tenant not in self._tenants or key_id not in self._tenants[tenant].keys:
            raise Sealed(tenant, key_id)
        cipher = AESGCM(self._tenants[tenant].keys[key_id])
        view = memoryview(sealed)
        start = len(_MAGIC) + 1 + len(key_id)
        header, nonce, rest = bytes(view[:start]), view[start:][:_NONCE], view[start + _NONCE :]
        try:
            return cipher.decrypt(nonce, rest, _bound(header, tenant, context))
        except InvalidTag:
            raise Tampered(context, "its seal is broken") from None

    def _of(self, tenant: str) -> _Keys:
        if tenant not in self._tenants:
            raise BadKeyring(f"tenant {tenant!r} has no key; add one to the keyring")
        return self._tenants[tenant]


def key_of(sealed: bytes | memoryview) -> str | None:
    """Return the id of the key that a value was sealed with; None if it is no whole envelope.

    Nothing is verified: only `Keyring.open` tells whether it is what was sealed.

    >>> key_of(b"hello")
    """
    start = len(_MAGIC) + 1
    if len(sealed) < start or bytes(sealed[: len(_MAGIC)]) != _MAGIC:
        return None
    end = start + sealed[start - 1]
    key_id = bytes(sealed[start:end]).decode("latin-1")
    whole = len(sealed) >= end + _NONCE + _TAG
    return key_id if whole and _KEY_ID.fullmatch(key_id) else None


def _bound(header: bytes, tenant: str, context: str) -> bytes:
    # No two places look the same: a header knows its length, and no tenant's name has a zero.
    return header + tenant.encode("ascii") + b"\0" + context.encode("utf-8", "surrogatepass")


def _check_name(tenant: str) -> None:
    try:
        SessionKey(tenant, "any")
    except ValueError as error:
        raise BadKeyring(str(error)) from None


def _keys(tenant: str, entry: Any) -> _Keys:
    _check_name(tenant)
    match entry:
        case {"current": str(current), "keys": dict(encoded), **rest} if encoded and not rest:
            keys = {key_id: _key(tenant, key_id, text) for key_id, text in encoded.items()}
        case _:
            shape = '{"current": "<id>", "keys": {"<id>": "<base64>", ...}}'
            raise BadKeyring(f"tenant {tenant!r}: its entry is not {shape} with at least one key")
    if current not in keys:  # and perhaps no id at all, so it is not told
        raise BadKeyring(f"tenant {tenant!r}: its current key is not among {[*keys]}")
    return _Keys(current, keys)


def _key(tenant: str, key_id: str, text: Any) -> bytes:
    if not _KEY_ID.fullmatch(key_id):  # perhaps a key in the wrong place, so it is not told
        raise BadKeyring(f"tenant {tenant!r}: use 1 to 32 of A-Z a-z 0-9 . _ - as key id")
    key = b""
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(text, validate=True)
    if len(key) != _KEY:
        remedy = f"openssl rand -base64 {_KEY}"
        raise BadKeyring(
            f"tenant {tenant!r}: key {key_id!r} is not base64 of {_KEY} bytes; make one: {remedy}"
        )
    return key


def _check_each_key_has_one_place(tenants: Mapping[str, _Keys]) -> None:
    # Else a tenant's data would outlive its key, under the other name.
    seen: dict[bytes, str] = {}
    for tenant, entry in tenants.items():
        for key_id, key in entry.keys.items():
            place = f"{key_id!r} of tenant {tenant!r}"
            if (other := seen.setdefault(key, place)) != place:
                raise BadKeyring(f"keys {other} and {place} are the same; make a new one")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise BadKeyring("a name stands twice in one object")
    return content


def _replace(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
