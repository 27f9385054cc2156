"""Blobs and manifests as bytes, without a server."""

import dataclasses
import os

import pytest

from memory_store import Corrupt, Incompatible
from memory_store.codec import FIELD, Manifest, decode_manifest, encode_manifest, pack, unpack

MANIFEST = Manifest(
    version=3,
    parent=2,
    fingerprint="hope-nano/1",
    created=1.5,
    updated=2.5,
    meta={"position": 7},
    blobs={"level/fast": pack(b"hello").named("5f")},
    owner="nora",
    chain="c0ffee",
    undone=((1, 2),),
)


@pytest.mark.parametrize(
    "raw",
    [b"", b"x", bytes(FIELD), os.urandom(FIELD), os.urandom(FIELD + 1), bytes(3 * FIELD)],
    ids=["empty", "one byte", "zeros", "one field", "one byte more", "three fields of zeros"],
)
def test_a_packed_blob_unpacks_to_itself(raw):
    packed = pack(raw)
    fields = [bytes(field) for field in packed.fields()]

    assert all(len(field) <= FIELD for field in fields)
    assert len(fields) == packed.named("5f").fields
    assert unpack("s", "a", packed.named("5f"), fields) == raw


def test_bytes_that_do_not_shrink_are_kept_raw():
    assert pack(os.urandom(10_000)).encoding == "raw"


def test_no_more_is_decompressed_than_the_manifest_states():
    bomb = pack(bytes(1 << 24))
    blob = dataclasses.replace(bomb.named("5f"), length=1000)

    with pytest.raises(Corrupt, match="its length is not 1000"):
        unpack("s", "a", blob, [bytes(field) for field in bomb.fields()])


def test_an_unknown_encoding_is_named():
    blob = dataclasses.replace(pack(b"hello").named("5f"), encoding="lzma")

    with pytest.raises(Corrupt, match="'a': unknown encoding 'lzma'"):
        unpack("s", "a", blob, [b"hello"])


def test_a_manifest_is_read_back_as_written():
    assert decode_manifest("s", encode_manifest(MANIFEST)) == MANIFEST


def test_every_flipped_bit_of_a_manifest_is_found():
    encoded = encode_manifest(MANIFEST)

    for place in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[place] ^= 1
        with pytest.raises(Corrupt, match="manifest"):
            decode_manifest("s", bytes(damaged))


@pytest.mark.parametrize("encoded", [b"", b"\n", b"{}"])
def test_what_is_no_manifest_is_corrupt(encoded):
    with pytest.raises(Corrupt, match="manifest"):
        decode_manifest("s", encoded)


def test_a_manifest_of_a_later_format_is_incompatible(monkeypatch):
    monkeypatch.setattr("memory_store.codec.FORMAT", 3)
    later = encode_manifest(MANIFEST)
    monkeypatch.undo()

    with pytest.raises(Incompatible, match=r"'format 3'.*'snapshot format 2'"):
        decode_manifest("s", later)
