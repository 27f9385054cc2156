"""A session in one safetensors file that anybody can open, and that is read back with suspicion.

The tensors of all blobs are in it as `<blob>::<tensor>`; a manifest in its metadata says what
each blob's own header and sha256 were, so that every blob comes back byte for byte. Whatever the
file claims is checked before room is made for it. Knows no database, no model, and no socket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from memory_store.codec import encode_json
from memory_store.headers import (
    SIZES,
    BadArchive,
    Fields,
    Tensor,
    check,
    json_object,
    layout,
    named,
    short,
    size,
)
from memory_store.snapshot import Meta, TurnRecord

FORMAT: Final = 1
HEADER: Final = 32 << 20  # bytes

_CHUNK = 1 << 20  # bytes
# The bits that are all set in infinity and NaN, and in no other float.
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80 << 16, "F64": 0x7FF0 << 48}

_METADATA: Fields = dict.fromkeys(("format", "format_version", "manifest", "sha256"), (str,))
_MANIFEST: Fields = {
    **dict.fromkeys(("source", "fingerprint"), (str,)),
    "version": (int,),
    **dict.fromkeys(("created", "updated", "exported"), (float, int)),
    **dict.fromkeys(("meta", "blobs"), (dict,)),
    "turns": (list,),
}
_BLOB: Fields = {"sha256": (str,), "length": (int,), "header": (str,)}


@dataclass(frozen=True, slots=True)
class Archive:
    """A session on its way out of one store or into another."""

    source: str  # the session's name where it was exported
    fingerprint: str
    version: int
    created: float
    updated: float
    exported: float  # seconds since the epoch
    meta: Meta
    blobs: Mapping[str, bytes]
    turns: tuple[TurnRecord, ...]


def write(archive: Archive) -> tuple[int, Iterator[bytes]]:
    """Return the file's length and its bytes in chunks; one chunk at a time is in memory.

    Raises:
        BadArchive: a blob is not safetensors, or the header is larger than a reader would take.
        TypeError, ValueError: `meta` or a turn is not JSON.
    """
    blobs: dict[str, dict[str, Any]] = {}
    parts: list[tuple[str, Tensor, memoryview]] = []
    for blob, data in archive.blobs.items():
        body = 8 + int.from_bytes(data[:8], "little")
        tensors = layout(where := named("blob", blob), json_object(where, data[8:body]))
        if body + size(tensors) != len(data):
            raise BadArchive(f"{where} has {len(data)} bytes, not {body + size(tensors)}")
        view = memoryview(data)[body:]
        parts += [(f"{blob}::{n}", t, view[t.start : t.end]) for n, t in tensors.items()]
        sha256, header = hashlib.sha256(data).hexdigest(), data[8:body].decode()
        blobs[blob] = {"sha256": sha256, "length": len(data), "header": header}
    turns = [[turn.turn_id, dict(turn.payload)] for turn in archive.turns]
    said = {name: getattr(archive, name) for name in _MANIFEST}
    said |= {"meta": dict(archive.meta), "blobs": blobs, "turns": turns}
    manifest = encode_json(said)
    metadata = {
        "format": "hope-session",
        "format_version": str(FORMAT),
        "manifest": manifest.decode(),
        "sha256": hashlib.sha256(manifest).hexdigest(),
    }
    # Wide items first: then each tensor lies at a multiple of its item's size.
    parts.sort(key=lambda part: -SIZES[part[1].dtype])
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor, view in parts:
        start, end = end, end + len(view)
        shape = list(tensor.shape)
        entries[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
    head = encode_json(entries)
    head += b" " * (-len(head) % 8)
    if len(head) > HEADER:
        raise BadArchive(f"the header would have {len(head)} bytes; {HEADER} are allowed")
    _plan(head)  # what could not be read back is not written
    head = len(head).to_bytes(8, "little") + head
    return len(head) + end, _chunks([memoryview(head), *(view for _, _, view in parts)])


class Reader:
    """Takes a file as it arrives, and refuses it as soon as it is known to be bad.

    >>> Reader(limit=1 << 30).feed(bytes([255] * 8))
    Traceback (most recent call last):
    memory_store.headers.BadArchive: the header's length is 18446744073709551615, not 3 to 33554432
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit  # bytes of the whole file
        self._held = bytearray()  # of the header's length, then the header, then the tensors
        self._wanted = 8
        self._body = 0  # where the tensors start; 0: not known yet
        self._plan: _Plan | None = None

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes (BadArchive); nothing is kept of what is more than announced."""
        rest = memoryview(chunk)
        while rest:
            room = self._wanted - len(self._held)
            if self._plan is not None and len(rest) > room:
                raise BadArchive(f"bytes follow the {self._body + self._wanted} of the file")
            self._held += rest[:room]
            rest = rest[room:]
            if len(self._held) == self._wanted and self._plan is None:
                self._advance()

    def done(self) -> Archive:
        """Return what the file held, once every checksum and every float has been looked at.

        Raises:
            BadArchive: the file is not whole, or its tensors are not what the manifest says.
        """
        if self._plan is None or len(self._held) < self._wanted:
            part = "tensors" if self._plan else "header" if self._body else "header's length"
            found = f"{len(self._held)} of the {self._wanted} bytes"
            raise BadArchive(f"the file ends after {found} of its {part}")
        body = memoryview(self._held)
        blobs = {name: blob.read(name, body) for name, blob in self._plan.blobs.items()}
        return replace(self._plan.archive, blobs=blobs)

    def _advance(self) -> None:
        """Look at the header's length, or at the header, now that it is whole."""
        if self._body:
            plan = _plan(bytes(self._held))
            self._allow(self._body + plan.length)
            self._wanted, self._plan = plan.length, plan
        else:
            length = int.from_bytes(self._held, "little")
            if not 2 < length <= HEADER:
                raise BadArchive(f"the header's length is {length}, not 3 to {HEADER}")
            self._allow(8 + length)
            self._wanted, self._body = length, 8 + length
        self._held = bytearray()

    def _allow(self, length: int) -> None:
        if length > self._limit:
            raise BadArchive(f"the file has {length} bytes or more; {self._limit} are allowed")


@dataclass(frozen=True, slots=True)
class _Blob:
    """How a blob is put together again from the file."""

    head: bytes  # the length of its header, and its header
    sha256: str
    parts: Mapping[str, Tensor]  # in the blob's order; name and place are those in the file

    def read(self, name: str, body: memoryview) -> bytes:
        for part, tensor in self.parts.items():
            if not _finite(tensor.dtype, body[tensor.start : tensor.end]):
                raise BadArchive(f"{named('tensor', part)} is not finite")
        data = b"".join([self.head, *(body[t.start : t.end] for t in self.parts.values())])
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BadArchive(f"{named('blob', name)}: its checksum does not match")
        return data


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a header says, once all of it is known to be true of itself."""

    archive: Archive  # without blobs
    blobs: Mapping[str, _Blob]
    length: int  # bytes of all tensors


def _plan(header: bytes) -> _Plan:
    entries = json_object("the header", header)
    manifest = _manifest(entries.pop("__metadata__", None))
    tensors = layout("the header", entries)
    length = size(tensors)
    blobs = {name: _blob(name, entry, tensors) for name, entry in manifest["blobs"].items()}
    if tensors:
        raise BadArchive(f"{named('tensor', min(tensors))} belongs to no blob of the manifest")
    turns = tuple(map(_turn, manifest["turns"]))
    archive = Archive(**{**manifest, "blobs": {}, "turns": turns})
    return _Plan(archive, blobs, length)


def _manifest(metadata: Any) -> dict[str, Any]:
    said = metadata if isinstance(metadata, dict) else {}
    if said.get("format") != "hope-session":
        raise BadArchive(f"the file's format is {short(said.get('format'))}, not 'hope-session'")
    if said.get("format_version") != str(FORMAT):
        found = short(said.get("format_version"))
        raise BadArchive(f"the file has session format {found}; this build reads {FORMAT!r} only")
    check("the metadata", metadata, _METADATA)
    text = metadata["manifest"].encode(errors="replace")
    if hashlib.sha256(text).hexdigest() != metadata["sha256"]:
        raise BadArchive("the manifest's checksum does not match")
    manifest = json_object("the manifest", text)
    check("the manifest", manifest, _MANIFEST)
    return manifest


def _turn(entry: Any) -> TurnRecord:
    match entry:
        case [str(turn_id), dict(payload)]:
            return TurnRecord(turn_id=turn_id, payload=payload)
    raise BadArchive(f"the manifest: {short(entry)} is no turn")


def _blob(blob: str, entry: Any, tensors: dict[str, Tensor]) -> _Blob:
    """Take a blob's tensors out of `tensors`."""
    check(where := named("blob", blob), entry, _BLOB)
    header = entry["header"].encode(errors="replace")
    own = layout(where, json_object(where, header))
    if 8 + len(header) + size(own) != entry["length"]:
        length = short(entry["length"])
        raise BadArchive(f"{where} has {8 + len(header) + size(own)} bytes, not {length}")
    parts: dict[str, Tensor] = {}
    for name, tensor in own.items():
        found = tensors.pop(part := f"{blob}::{name}", None)
        if found is None:
            raise BadArchive(f"{named('tensor', part)} is missing")
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise BadArchive(f"{named('tensor', part)} is not as its blob's header says")
        parts[part] = found
    return _Blob(len(header).to_bytes(8, "little") + header, entry["sha256"], parts)


def _finite(dtype: str, data: memoryview) -> bool:
    if dtype not in _EXPONENTS:
        return True
    kind, mask = f"<u{SIZES[dtype]}", _EXPONENTS[dtype]
    words = (np.frombuffer(data[i : i + _CHUNK], kind) for i in range(0, len(data), _CHUNK))
    return not any(bool(((each & mask) == mask).any()) for each in words)


def _chunks(views: Iterable[memoryview]) -> Iterator[bytes]:
    """Cut the long and join the short."""
    held = bytearray()
    for view in views:
        for start in range(0, len(view), _CHUNK):
            held += view[start : start + _CHUNK]
            if len(held) >= _CHUNK:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)
