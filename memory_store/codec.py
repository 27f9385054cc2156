"""Bytes at rest: blobs packed into fields of at most 1 MiB, and the manifest that names them.

Whatever does not match its length or checksum is `Corrupt`, by name. Knows no database.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from memory_store.errors import Corrupt, Incompatible
from memory_store.snapshot import BlobInfo, Head, Meta, SessionKey, included

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")

FORMAT = 2
FIELD = 1 << 20  # bytes; larger values stall the server and every client that shares it

_LEVEL = 1
_FELT = 1 << 18  # bytes
_WORTH = 0.95  # compressed blobs larger than this share of the raw ones are kept raw


@dataclass(frozen=True, slots=True)
class Blob:
    """What a manifest says of one blob; the checksum is of the bytes as given to commit."""

    id: str
    length: int
    stored: int
    fields: int
    sha256: str
    encoding: str  # "raw" or "zstd"


@dataclass(frozen=True, slots=True)
class Packed:
    """A blob ready to be staged, not yet named."""

    data: bytes
    length: int
    sha256: str
    encoding: str

    def fields(self) -> list[memoryview]:
        view = memoryview(self.data)
        return [view[i : i + FIELD] for i in range(0, max(1, len(view)), FIELD)]

    def named(self, blob_id: str) -> Blob:
        return Blob(
            id=blob_id,
            length=self.length,
            stored=len(self.data),
            fields=len(self.fields()),
            sha256=self.sha256,
            encoding=self.encoding,
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of a session, complete but for the blobs' bytes."""

    version: int
    parent: int
    fingerprint: str
    created: float
    updated: float
    meta: Meta
    blobs: Mapping[str, Blob]
    owner: str | None
    chain: str  # rolling digest of the ids of all turns
    undone: tuple[tuple[int, int], ...]  # versions (after, up to) whose turns were rolled back

    def head(self, key: SessionKey) -> Head:
        blobs = {name: BlobInfo(blob.length, blob.stored) for name, blob in self.blobs.items()}
        return Head(
            key=key,
            version=self.version,
            parent=self.parent,
            fingerprint=self.fingerprint,
            created=self.created,
            updated=self.updated,
            meta=self.meta,
            blobs=blobs,
            owner=self.owner,
            chain=self.chain,
        )

    def includes(self, version: int) -> bool:
        """Tell whether what was recorded at some version is part of the session as of this one."""
        return included(version, self.version, self.undone)


def pack(raw: bytes) -> Packed:
    """Compress where it pays.

    >>> pack(bytes(1000)).encoding, pack(bytes(range(256))).encoding
    ('zstd', 'raw')
    """
    data, encoding = zstd.compress(raw, level=_LEVEL), "zstd"
    if len(data) > _WORTH * len(raw):
        data, encoding = raw, "raw"
    return Packed(data, len(raw), hashlib.sha256(raw).hexdigest(), encoding)


def unpack(session: str, name: str, blob: Blob, fields: Sequence[bytes | None]) -> bytes:
    """Join the fields of a blob and return its raw bytes, verified.

    Raises:
        Corrupt: a field is missing, or the length or the checksum does not match.
    """
    if None in fields:
        missing = f"field {fields.index(None)} of {blob.fields} is missing"
        raise Corrupt(session, f"blob {name!r}: {missing}")
    data = b"".join(field for field in fields if field is not None)
    if len(data) != blob.stored:
        raise Corrupt(session, f"blob {name!r}: {len(data)} bytes stored, not {blob.stored}")
    raw = _decode(session, name, blob, data)
    if len(raw) != blob.length:
        raise Corrupt(session, f"blob {name!r}: its length is not {blob.length}")
    if hashlib.sha256(raw).hexdigest() != blob.sha256:
        raise Corrupt(session, f"blob {name!r}: its checksum does not match")
    return raw


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as one line of sha256 and one line of JSON.

    Raises:
        TypeError, ValueError: `meta` is not JSON.
    """
    blobs = {name: asdict(blob) for name, blob in manifest.blobs.items()}
    rest = {name: getattr(manifest, name) for name in Manifest.__slots__ if name != "blobs"}
    body = encode_json({"format": FORMAT, **rest, "blobs": blobs})
    return _checksum_line(body) + body


def decode_manifest(session: str, data: bytes) -> Manifest:
    """Read a manifest back.

    Raises:
        Corrupt: it is not what was written.
        Incompatible: it has another format version.
    """
    checksum, separator, body = data.partition(b"\n")
    if checksum + separator != _checksum_line(body):
        raise Corrupt(session, "manifest: its checksum does not match")
    try:
        content = json.loads(body)
        found = content.pop("format")
        for older in range(found, FORMAT):
            content = _MIGRATIONS[older](content)
        if found <= FORMAT:
            return _manifest(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(session, f"manifest: {error}") from error
    raise Incompatible(session, expected=f"snapshot format {FORMAT}", found=f"format {found}")


def encode_json(value: Any) -> bytes:
    """Return compact ASCII JSON (so that no text, however odd, can fail to be encoded).

    Raises:
        TypeError, ValueError: the value is not JSON; NaN and infinity are not either.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


async def off_the_loop(size: int, work: Callable[[], T]) -> T:
    """Do work on `size` bytes in a thread if the event loop would feel it."""
    return await asyncio.to_thread(work) if size > _FELT else work()


def _decode(session: str, name: str, blob: Blob, data: bytes) -> bytes:
    if blob.encoding == "raw":
        return data
    if blob.encoding != "zstd":
        raise Corrupt(session, f"blob {name!r}: unknown encoding {blob.encoding!r}")
    try:
        # One byte more than stated is enough to notice a bomb, and all that one gets.
        return zstd.ZstdDecompressor().decompress(data, max_length=blob.length + 1)
    except zstd.ZstdError as error:
        raise Corrupt(session, f"blob {name!r}: {error}") from error


def _manifest(content: dict[str, Any]) -> Manifest:
    blobs = {name: Blob(**entry) for name, entry in content.pop("blobs").items()}
    undone = tuple((int(after), int(last)) for after, last in content.pop("undone"))
    return Manifest(blobs=blobs, undone=undone, **content)


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Before format 2 nothing could be rolled back, and no session had an owner."""
    return {**content, "owner": None, "chain": "", "undone": []}


# from each format that was ever written to the next one
_MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def _checksum_line(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode("ascii") + b"\n"
