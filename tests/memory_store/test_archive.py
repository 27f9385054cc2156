"""A session in one file: what is exported is what is imported, and every lie is refused early."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import load_file, save

from hope_runtime.config import MemoryConfig
from hope_runtime.layers import memory
from hope_runtime.state import Piece, State, dump, extend, restore
from hope_runtime.weights.random import tiny_mixed
from memory_store import StoreError, TurnRecord
from memory_store.archive import FORMAT, HEADER, Archive, BadArchive, Reader, write

LIMIT = 1 << 26
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = {
    "half": torch.tensor([1.5, -2.0, 65504.0], dtype=torch.float16),
    "brain": torch.full((3, 5), 3.0e38, dtype=torch.bfloat16),
    "single": torch.tensor([[1e-45, 3.4e38]]),
    "double": torch.tensor([-1.7e308], dtype=torch.float64),
    "all ones": torch.tensor([-1, 0x7F800000, 0x7FC00000], dtype=torch.int32),
    "bytes": torch.tensor([0, 255, 127], dtype=torch.uint8),
    "small": torch.tensor(-1, dtype=torch.int8),
    "words": torch.tensor([-1, 31744], dtype=torch.int16),
    "long": torch.tensor([2**63 - 1, -(2**63)]),
    "nothing": torch.zeros(0, 3),
    "one": torch.tensor(2.5),
}
LEVEL = {"blocks.0.down": torch.arange(6.0).view(2, 3), "start/blocks.0.down": torch.ones(2, 3)}
ARCHIVE = Archive(
    source="user-7",
    fingerprint="hope-nano/1",
    version=3,
    created=1.5,
    updated=2.25,
    exported=1e9,
    meta={"position": 64, "carry": [[7, 0.0]], "who": "Zoë \ud800 東京"},
    blobs={
        "level/fast": save(LEVEL),
        "kinds": save(KINDS),
        "window/000000000000-000000000064": save({"tokens": torch.arange(64)}),
        "empty": save({}),
    },
    turns=(
        TurnRecord(turn_id="t1", payload={"text": 'a, b {c} [d] \\ "'}),
        TurnRecord(turn_id="", payload={}),
    ),
)


def written(archive: Archive) -> bytes:
    length, chunks = write(archive)
    data = b"".join(chunks)
    assert len(data) == length
    return data


def read(data: bytes, step: int | None = None, limit: int = LIMIT) -> Archive:
    reader = Reader(limit=limit)
    for i in range(0, len(data), step or max(1, len(data))):
        reader.feed(data[i : i + (step or len(data))])
    return reader.done()


FILE = written(ARCHIVE)
BODY = 8 + int.from_bytes(FILE[:8], "little")


def taken_apart(data: bytes = FILE) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return the header, the manifest and the tensors' bytes."""
    body = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:body])
    return header, json.loads(header["__metadata__"]["manifest"]), data[body:]


def framed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def sealed(header: dict[str, Any], manifest: Any, body: bytes = b"") -> bytes:
    """Return a file whose manifest has a good checksum, whatever the manifest says."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    metadata = {**header["__metadata__"], "manifest": text, "sha256": checksum}
    return framed({**header, "__metadata__": metadata}, body)


def forged(tensors: dict[str, Any], body: bytes = b"") -> bytes:
    """Return a file of one blob, in which header and manifest tell the same lie."""
    header, manifest, _ = taken_apart()
    inner = json.dumps(tensors)
    size = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in tensors.values())
    raw = framed(inner.encode(), body)
    entry = {"header": inner, "length": 8 + len(inner) + size}
    manifest["blobs"] = {"b": {**entry, "sha256": hashlib.sha256(raw).hexdigest()}}
    outer = {f"b::{name}": tensor for name, tensor in tensors.items()}
    return sealed({"__metadata__": header["__metadata__"], **outer}, manifest, body)


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused_early(data: bytes, match: str, limit: int = LIMIT) -> None:
    """Check that the header alone is refused, and that nothing was set aside for tensors."""
    body = 8 + int.from_bytes(data[:8], "little")
    reader = Reader(limit=limit)
    tracemalloc.start()
    try:
        with pytest.raises(BadArchive, match=match):
            reader.feed(data[:body])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + 30 * len(data)


# --- what goes round ---------------------------------------------------------------------------


def test_a_session_comes_back_as_it_was():
    assert read(FILE) == ARCHIVE


@pytest.mark.parametrize("step", [1, 2, 7, 8, 9, 4096])
def test_how_the_bytes_are_cut_does_not_matter(step):
    assert read(FILE, step) == ARCHIVE


def test_what_was_read_is_written_alike():
    assert written(read(FILE)) == FILE


def test_a_session_of_nothing_comes_back():
    nothing = replace(ARCHIVE, blobs={}, turns=(), meta={})

    assert read(written(nothing)) == nothing


def test_a_session_of_a_model_is_restored_from_its_file():
    remembering = MemoryConfig(heads=2, head_width=4, taps=3)
    shape = {"width": 8, "hidden": 8, "heads": 2, "key_heads": 1, "head_width": 4}
    config = tiny_mixed(**shape, memory=remembering)
    kv = (len(config.attention_blocks), 1, 5, 4)
    parts = (torch.randn(kv), torch.randn(kv), torch.randn(5, 8))
    state = extend(State(), Piece(0, torch.arange(5), torch.ones(5), *parts), config)
    nothing = memory.empty(remembering, len(config.memory_blocks), torch.empty(0))
    state = replace(state, memories=memory.Memories(*(t.clone() for t in nothing)))
    facts, blobs, _ = dump(state, None)

    back = read(written(replace(ARCHIVE, meta=facts, blobs=blobs)))

    assert back.blobs == blobs
    assert dump(restore(back.meta, back.blobs, config, torch.float32), None)[:2] == (facts, blobs)


def test_anybody_can_open_the_file(tmp_path):
    (tmp_path / "session.safetensors").write_bytes(FILE)

    tensors = load_file(tmp_path / "session.safetensors")
    with safe_open(tmp_path / "session.safetensors", "pt") as file:
        metadata = file.metadata()

    assert tensors.keys() == {
        *(f"level/fast::{name}" for name in LEVEL),
        *(f"kinds::{name}" for name in KINDS),
        "window/000000000000-000000000064::tokens",
    }
    for name, expected in KINDS.items():
        found = tensors[f"kinds::{name}"]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert metadata["format"] == "hope-session"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["manifest"])["version"] == 3


def test_every_tensor_lies_at_a_multiple_of_its_items():
    header, _, _ = taken_apart()
    del header["__metadata__"]
    sizes = {name: KINDS[name].element_size() for name in KINDS}

    assert BODY % 8 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] % sizes.get(name.removeprefix("kinds::"), 4) == 0


def test_a_blob_of_another_writer_keeps_its_layout():
    header = b"""{"z": {"data_offsets": [0, 1], "shape": [1], "dtype": "U8"},
        "__metadata__": {"a": "b"},
        "a": {"dtype": "I16", "shape": [1], "data_offsets": [1, 3]}} """
    other = framed(header, b"\1\2\3")
    archive = replace(ARCHIVE, blobs={"x": other})

    assert read(written(archive)) == archive


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text("ab:/é", min_size=1, max_size=4),
        st.dictionaries(
            st.text("ab:.", min_size=1, max_size=3),
            st.tuples(
                st.sampled_from([*FLOATS, torch.int8, torch.int64]),
                st.lists(st.integers(0, 3), max_size=3),
            ),
            max_size=4,
        ),
        max_size=4,
    )
)
def test_any_blobs_come_back(blobs):
    names = [f"{blob}::{name}" for blob, tensors in blobs.items() for name in tensors]
    assume(len(names) == len(set(names)))
    packed = {
        blob: save({name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in each.items()})
        for blob, each in blobs.items()
    }
    archive = replace(ARCHIVE, blobs=packed)
    data = written(archive)

    assert read(data) == archive
    assert sorted(name for name, _ in deserialize(data)) == sorted(names)


# --- what is not written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blobs", "match"),
    [
        ({"a": b""}, "blob 'a' is not sound JSON"),
        ({"a": b"not safetensors"}, "blob 'a' is not sound JSON"),
        ({"a": ARCHIVE.blobs["kinds"][:-1]}, r"blob 'a' has \d+ bytes, not \d+"),
        ({"a": ARCHIVE.blobs["kinds"] + b"\0"}, r"blob 'a' has \d+ bytes, not \d+"),
        ({"a\n": ARCHIVE.blobs["kinds"]}, "use 1 to 512 printable characters"),
        ({"": ARCHIVE.blobs["kinds"]}, "use 1 to 512 printable characters"),
        ({"a:": save({"b": torch.ones(1)}), "a": save({":b": torch.ones(1)})}, "'a:::b'"),
        ({"a": save({"b": torch.ones(1, dtype=torch.bool)})}, "dtype 'BOOL'; known are U8"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(blobs, match):
    with pytest.raises(BadArchive, match=match):
        write(replace(ARCHIVE, blobs=blobs))


def test_a_transcript_too_long_for_the_header_is_not_written():
    long = TurnRecord(turn_id="t", payload={"text": "x" * HEADER})

    with pytest.raises(BadArchive, match="33554432 are allowed"):
        write(replace(ARCHIVE, turns=(long,)))


# --- what is refused before the tensors --------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, HEADER + 1, 2**60, 2**63, 2**64 - 1])
def test_a_header_length_out_of_bounds_is_refused_at_its_eighth_byte(length):
    reader = Reader(limit=2**70)
    data = length.to_bytes(8, "little")
    reader.feed(data[:7])

    with pytest.raises(BadArchive, match=f"the header's length is {length}, not 3 to"):
        reader.feed(data[7:])


def test_a_header_longer_than_the_limit_is_refused_at_its_eighth_byte():
    with pytest.raises(BadArchive, match=r"1008 bytes or more; 1007 are allowed"):
        Reader(limit=1007).feed((1000).to_bytes(8, "little"))


def test_a_file_of_the_limit_is_read_and_one_byte_more_refused():
    assert read(FILE, limit=len(FILE)) == ARCHIVE
    refused_early(FILE, f"{len(FILE)} bytes or more", limit=len(FILE) - 1)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[1]", "does not start with {"),
        (b" {}", "does not start with {"),
        (b"{x}", "not sound JSON"),
        (b"{} x", "Extra data"),
        (b"\xff{}", "does not start with {"),
        (b'{"\xff":1}', "can't decode byte 0xff"),
        (b'{"a":1,"a":1}', "'a' is there twice"),
        (b'{"a":{"b":1,"c":2,"b":3}}', "'b' is there twice"),
        (b'{"a":NaN}', "'NaN' is no number"),
        (b'{"a":-Infinity}', "'-Infinity' is no number"),
        (b'{"a":1e999}', "'1e999' is no number"),
        (b'{"a":' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not sound JSON"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
        (b'{"a":' + b'{"a":' * 64 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b'{"a":[' + b"[]," * 600_000 + b"1]}", "more than 1048576 brackets and commas"),
        (b"{  }", "format is None, not 'hope-session'"),
        (b'{"__metadata__":7}', "format is None"),
        (b'{"__metadata__":{"format":"pt"}}', "format is 'pt', not 'hope-session'"),
    ],
)
def test_what_is_no_header_is_refused(header, match):
    refused_early(framed(header), match)


def test_a_name_twice_is_found_in_no_time():
    names = [f'"{i}":1' for i in range(300_000)]
    data = framed(f"{{{','.join([*names, names[-1]])}}}".encode())

    with pytest.raises(BadArchive, match="'299999' is there twice"):
        Reader(limit=LIMIT).feed(data)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"t": tensor("F32", [2**62], [0, 2**64])}, "data_offsets .* not a start and an end"),
    ({"t": tensor("F32", [2**62], [0, 2**62])}, "'b::t' has shape .* too large"),
    ({"t": tensor("I8", [2**62], [0, 2**62])}, r"bytes or more; 67108864 are allowed"),
    ({"t": tensor("F32", [2**40], [0, 2**42])}, r"bytes or more; 67108864 are allowed"),
    ({"t": tensor("F32", [2**32, 2**32], [0, 0])}, "too large"),
    ({"t": tensor("F32", [2**31, 2**31, 4], [0, 0])}, "too large"),
    ({"t": tensor("F32", [0, 2**62, 2**62], [0, 0])}, "too large"),
    ({"t": tensor("F32", [2**64], [0, 0])}, "no tensor has"),
    ({"t": tensor("F32", [10**4000], [0, 0])}, "no tensor has"),
    ({"t": tensor("F32", [-1], [0, 4])}, r"shape \[-1\], which no tensor has"),
    ({"t": tensor("F32", [-1, -1], [0, 4])}, "no tensor has"),
    ({"t": tensor("F32", [True], [0, 4])}, r"shape \[True\], which no tensor has"),
    ({"t": tensor("F32", [1.0], [0, 4])}, r"shape \[1.0\], which no tensor has"),
    ({"t": tensor("F32", ["1"], [0, 4])}, "no tensor has"),
    ({"t": tensor("F32", [None], [0, 4])}, "no tensor has"),
    ({"t": tensor("F32", [[1]], [0, 4])}, "no tensor has"),
    ({"t": tensor("F32", [1] * 33, [0, 4])}, "no tensor has"),
    ({"t": tensor("F32", 1, [0, 4])}, "shape should be list, found 1"),
    ({"t": tensor("F32", None, [0, 4])}, "shape should be list, found None"),
    ({"t": tensor("F32", [1], [0, 3])}, "has 4 bytes, not the 3 from 0 to 3"),
    ({"t": tensor("F32", [1], [0, 8])}, "has 4 bytes, not the 8 from 0 to 8"),
    ({"t": tensor("F32", [1], [4, 0])}, "has 4 bytes, not the -4 from 4 to 0"),
    ({"t": tensor("F32", [1], [1, 5])}, "starts at 1, not at 0"),
    ({"t": tensor("F32", [1], [-4, 0])}, "not a start and an end"),
    ({"t": tensor("F32", [1], [0, True])}, "not a start and an end"),
    ({"t": tensor("F32", [1], [0.0, 4.0])}, "not a start and an end"),
    ({"t": tensor("F32", [1], [0, 4, 4])}, "not a start and an end"),
    ({"t": tensor("F32", [1], [2**63, 2**63 + 4])}, "not a start and an end"),
    ({"t": tensor("F31", [1], [0, 4])}, "has dtype 'F31'; known are"),
    ({"t": tensor("f32", [1], [0, 4])}, "has dtype 'f32'"),
    ({"t": tensor(32, [1], [0, 4])}, "dtype should be str, found 32"),
    ({"t": tensor(), "u": tensor()}, "'b::u' starts at 0, not at 4"),
    ({"t": tensor(), "u": tensor(offsets=[2, 6])}, "'b::u' starts at 2, not at 4"),
    ({"t": tensor(), "u": tensor(offsets=[8, 12])}, "'b::u' starts at 8, not at 4"),
    ({"t": {**tensor(), "more": 1}}, "should have dtype, shape, data_offsets"),
    ({"t\n": tensor()}, "printable"),
    ({"t" * 600: tensor()}, "printable"),
    ({"\ud800": tensor()}, "printable"),
]


@pytest.mark.parametrize(("tensors", "match"), LIES)
def test_a_lie_about_tensors_is_refused_before_they_come(tensors, match):
    refused_early(forged(tensors), match)


def test_minus_zero_is_no_length():
    header, manifest, _ = taken_apart()
    data = sealed({**header, "t": tensor("F32", ["?"], [0, 0])}, manifest)
    header_bytes = data[8:].replace(b'"?"', b"-0")

    refused_early(framed(header_bytes), "no tensor has")


@pytest.mark.parametrize("entry", [None, 1, "x", [], {}, {"dtype": "F32", "shape": [1]}])
def test_what_is_no_tensor_is_refused(entry):
    header, manifest, _ = taken_apart()

    refused_early(sealed({**header, "t": entry}, manifest), "tensor 't' should have dtype")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "pt"}, "the file's format is 'pt', not 'hope-session'"),
        ({"format_version": "2"}, "session format '2'; this build reads 1 only"),
        ({"format_version": "0"}, "session format '0'; this build reads 1 only"),
        ({"format_version": 1}, "session format 1; this build reads 1 only"),
        ({"manifest": 7}, "manifest should be str, found 7"),
        ({"manifest": {}}, "manifest should be str"),
        ({"manifest": "{}"}, "manifest's checksum does not match"),
        ({"manifest": "\ud800"}, "manifest's checksum does not match"),
        ({"sha256": None}, "sha256 should be str, found None"),
        ({"more": "x"}, "should have format, format_version, manifest, sha256"),
    ],
)
def test_metadata_of_another_kind_are_refused(change, match):
    header, _, _ = taken_apart()
    metadata = {**header["__metadata__"], **change}

    refused_early(framed({**header, "__metadata__": metadata}), match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the manifest is not sound JSON"),
        ("[]", "does not start with {"),
        ('{"a":1,"a":2}', "'a' is there twice"),
        ('{"version":NaN}', "'NaN' is no number"),
        ("{}", "the manifest should have source, fingerprint"),
        ('{"a":[' + "\\u005b," * 2 + "1]}", "not sound JSON"),
        ('{"a":' + "[" * 100 + "]" * 100 + "}", "nested deeper"),
    ],
)
def test_what_is_no_manifest_is_refused(text, match):
    refused_early(sealed(taken_apart()[0], text), match)


def test_escaped_brackets_do_not_hide_from_being_counted():
    text = json.dumps('{"a":[' + "[]," * 600_000 + "1]}")
    text = text.replace("[", "\\u005b").replace(",", "\\u002c")
    checksum = hashlib.sha256(json.loads(text).encode()).hexdigest()
    metadata = f'"format":"hope-session","format_version":"1","sha256":"{checksum}"'
    header = f'{{"__metadata__":{{{metadata},"manifest":{text}}}}}'

    with pytest.raises(BadArchive, match="the manifest has more than 1048576 brackets"):
        Reader(limit=LIMIT).feed(framed(header.encode()))


FIELDS = {
    "source": [None, 1, [], {}],
    "fingerprint": [None, 1, [], {}],
    "version": [None, "1", 1.0, True, -1, 2**63, []],
    "created": [None, "1", True, -1.0, 1e300, []],
    "updated": [None, "1", True, -1.0, 1e300, []],
    "exported": [None, "1", True, -1.0, 1e300, []],
    "meta": [None, 1, "x", []],
    "blobs": [None, 1, "x", [], {"empty": 1}, {"empty": {}}, {"empty": []}],
    "turns": [None, 1, {}, [1], [[]], [["t"]], [["t", []]], [[1, {}]], [["t", {}, 1]], [{}]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in FIELDS.items() for v in vs])
def test_a_manifest_of_wrong_types_is_refused(name, value):
    header, manifest, _ = taken_apart()

    refused_early(sealed(header, {**manifest, name: value}), name.removesuffix("s"))


@pytest.mark.parametrize("name", FIELDS)
def test_a_manifest_that_lacks_something_is_refused(name):
    header, manifest, _ = taken_apart()
    del manifest[name]

    refused_early(sealed(header, manifest), "the manifest should have")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sha256": 1}, "sha256 should be str"),
        ({"length": "7"}, "length should be int"),
        ({"length": True}, "length should be int"),
        ({"length": -7}, "length is -7, which is out of range"),
        ({"length": 7}, r"blob 'level/fast' has \d+ bytes, not 7"),
        ({"header": None}, "header should be str"),
        ({"header": ""}, "blob 'level/fast' is not sound JSON"),
        ({"header": "{}"}, r"blob 'level/fast' has 10 bytes, not \d+"),
        ({"header": "{}", "length": 10}, "belongs to no blob of the manifest"),
        ({"more": 1}, "blob 'level/fast' should have sha256, length, header"),
    ],
)
def test_a_blob_of_wrong_facts_is_refused(change, match):
    header, manifest, _ = taken_apart()
    manifest["blobs"]["level/fast"].update(change)

    refused_early(sealed(header, manifest), match)


def test_a_blob_header_that_differs_from_the_file_is_refused():
    header, manifest, _ = taken_apart()
    entry = manifest["blobs"]["level/fast"]

    entry["header"] = entry["header"].replace("[2,3]", "[3,2]", 1)
    refused_early(sealed(header, manifest), "is not as its blob's header says")

    entry["header"] = entry["header"].replace("[3,2]", "[2,3]", 1).replace("F32", "I32")
    refused_early(sealed(header, manifest), "is not as its blob's header says")

    entry["header"] = entry["header"].replace("{", '{"__metadata__":{"a":1},', 1)
    refused_early(sealed(header, manifest), "metadata are {'a': 1}, not text by name")


def test_a_missing_blob_is_refused():
    header, manifest, _ = taken_apart()
    del manifest["blobs"]["window/000000000000-000000000064"]

    refused_early(sealed(header, manifest), "tensor 'window/.*::tokens' belongs to no blob")


def test_an_extra_tensor_is_refused():
    header, manifest, body = taken_apart()
    header["kinds::more"] = tensor("U8", [1], [len(body), len(body) + 1])

    refused_early(sealed(header, manifest), "tensor 'kinds::more' belongs to no blob")


def test_a_missing_tensor_is_refused():
    header, manifest, _ = taken_apart()
    del header["kinds::nothing"]

    refused_early(sealed(header, manifest), "tensor 'kinds::nothing' is missing")


def test_a_refusal_is_short_and_a_store_error():
    name = "x" * 500

    with pytest.raises(StoreError) as refusal:
        Reader(limit=LIMIT).feed(forged({name: tensor("F32", list(range(10_000)))}))

    assert len(str(refusal.value)) < 300


# --- what is refused at the end ----------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused():
    for end in [*range(12), *range(12, len(FILE), 37), BODY - 1, BODY, BODY + 1, len(FILE) - 1]:
        with pytest.raises(BadArchive, match=r"the file ends after \d+ of the \d+ bytes of its"):
            read(FILE[:end])


@pytest.mark.parametrize("more", [b"\0", b"x" * 1000])
def test_trailing_bytes_are_refused_as_they_come(more):
    with pytest.raises(BadArchive, match=f"bytes follow the {len(FILE)} of the file"):
        Reader(limit=LIMIT).feed(FILE + more)

    reader = Reader(limit=LIMIT)
    reader.feed(FILE)
    with pytest.raises(BadArchive, match="bytes follow"):
        reader.feed(more)
    assert reader.done() == ARCHIVE


def test_bytes_after_a_file_without_tensors_are_refused():
    with pytest.raises(BadArchive, match="bytes follow"):
        read(written(replace(ARCHIVE, blobs={})) + b"\0")


def test_a_refused_file_stays_refused():
    reader = Reader(limit=LIMIT)

    for more in (framed(b"{x}"), b"more"):
        with pytest.raises(BadArchive, match="not sound JSON"):
            reader.feed(more)
    with pytest.raises(BadArchive, match="the file ends"):
        reader.done()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_float_that_is_not_finite_is_refused_by_name(dtype, value):
    sick = torch.zeros(1 << 20, dtype=dtype)
    sick[-1] = value
    data = written(replace(ARCHIVE, blobs={"level/fast": save({"a": sick, "b": sick[:1] * 0 + 1})}))

    with pytest.raises(BadArchive, match="tensor 'level/fast::a' is not finite"):
        read(data)


def test_a_wrong_checksum_is_refused_by_name():
    header, manifest, body = taken_apart()
    manifest["blobs"]["kinds"]["sha256"] = "0" * 64

    with pytest.raises(BadArchive, match="blob 'kinds': its checksum does not match"):
        read(sealed(header, manifest, body))


@settings(deadline=None, max_examples=300)
@given(st.integers(8 * BODY, 8 * len(FILE) - 1))
def test_any_flipped_bit_of_the_tensors_is_found(bit):
    damaged = bytearray(FILE)
    damaged[bit // 8] ^= 1 << bit % 8

    with pytest.raises(BadArchive):
        read(bytes(damaged))


def test_every_flipped_bit_of_the_header_is_found():
    small = written(replace(ARCHIVE, blobs={"b": save({"t": torch.ones(2), "e": torch.ones(0)})}))
    for bit in range(8 * (8 + int.from_bytes(small[:8], "little"))):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadArchive):
            read(bytes(damaged))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50), st.booleans())
def test_noise_is_refused_and_nothing_else_happens(noise, step, is_framed):
    with pytest.raises(BadArchive):
        read(framed(noise) if is_framed else noise, step)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    deeper = [(*path, key) for key, _ in inner]
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(each, (dict, list)):
            deeper += places(each, (*path, key))
    return deeper


@settings(deadline=None, max_examples=300)
@given(st.data(), json_values, st.booleans())
def test_anything_anywhere_in_a_header_is_read_or_refused(data, value, in_manifest):
    header, manifest, body = taken_apart()
    target = manifest if in_manifest else header
    *path, last = data.draw(st.sampled_from(places(target)))
    for key in path:
        target = target[key]
    target[last] = value
    file = sealed(header, manifest, body) if in_manifest else framed(header, body)

    try:
        archive = read(file)
    except BadArchive:
        return
    assert archive.blobs == ARCHIVE.blobs
    assert json.loads(json.dumps(archive.meta, allow_nan=False)) == archive.meta


def test_the_format_is_the_one_that_is_documented():
    assert FORMAT == 1
    _, manifest, _ = taken_apart()
    assert manifest["turns"] == [["t1", ARCHIVE.turns[0].payload], ["", {}]]
    assert manifest["meta"] == ARCHIVE.meta


# --- what it costs -----------------------------------------------------------------------------


def test_no_more_than_the_file_and_the_blobs_are_in_memory():
    size = 1 << 24
    archive = replace(ARCHIVE, blobs={"a": save({"t": torch.ones(size // 4)})})

    tracemalloc.start()
    try:
        _, chunks = write(archive)
        reader = Reader(limit=2 * size)
        for chunk in chunks:
            assert len(chunk) <= 2 << 20
            reader.feed(chunk)
        _, fed = tracemalloc.get_traced_memory()
        back = reader.done()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert back == archive
    assert fed < 1.3 * size + (4 << 20)
    assert peak < 2.3 * size + (4 << 20)
