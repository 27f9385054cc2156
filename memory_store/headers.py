"""Headers of safetensors files from anywhere: strict JSON, and tensors that lie end to end.

What a header claims is checked against itself before a byte is reserved for it. `BadArchive` names
what is wrong.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memory_store.errors import StoreError

_MARKS = 1 << 20  # brackets and commas in JSON: they bound what it grows to in memory
_DEPTH = 64
_AXES = 32  # as many as numpy 1 has
_NAME = 512  # characters
_HUGE = 1 << 63

SIZES = {f"{kind}{8 * size}": size for kind in "UI" for size in (1, 2, 4, 8)}
SIZES |= {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}

Fields = Mapping[str, tuple[type, ...]]

_TENSOR: Fields = {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}

_reprs = reprlib.Repr()
_reprs.maxstring, _reprs.maxlevel = 80, 1
short = _reprs.repr


class BadArchive(StoreError):
    """A file that is not a whole, sound session; the message names what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def layout(where: str, entries: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that the entries of a header describe, in the order of their bytes."""
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise BadArchive(f"{where}: its metadata are {short(metadata)}, not text by name")
    tensors = {name: _tensor(f"{where}: {named('tensor', name)}", e) for name, e in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, tensor in tensors.items():
        if tensor.start != end:
            what = f"{where}: {named('tensor', name)} starts at {tensor.start}"
            raise BadArchive(f"{what}, not at {end}, where the one before it ends")
        end = tensor.end
    return tensors


def _tensor(where: str, entry: Any) -> Tensor:
    check(where, entry, _TENSOR)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in SIZES:
        raise BadArchive(f"{where} has dtype {short(dtype)}; known are {', '.join(SIZES)}")
    if len(shape) > _AXES or not all(map(_natural, shape)):
        raise BadArchive(f"{where} has shape {short(shape)}, which no tensor has")
    if len(offsets) != 2 or not all(map(_natural, offsets)):
        raise BadArchive(f"{where} has data_offsets {short(offsets)}, not a start and an end")
    # An axis of no length does not excuse the others: strides are computed from them all.
    if math.prod(max(n, 1) for n in shape) * SIZES[dtype] >= _HUGE:
        raise BadArchive(f"{where} has shape {short(shape)}, which is too large")
    size, (start, end) = math.prod(shape) * SIZES[dtype], offsets
    if size != end - start:
        what = f"{where} of shape {short(shape)} and dtype {dtype} has {size} bytes"
        raise BadArchive(f"{what}, not the {end - start} from {start} to {end}")
    return Tensor(dtype, tuple(shape), start, end)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _HUGE  # bool is an int to Python only


def size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.end - tensor.start for tensor in tensors.values())


def named(kind: str, name: str) -> str:
    """Return the thing as a message calls it, unless nothing may be called that."""
    if not (name.isprintable() and 0 < len(name) <= _NAME):
        raise BadArchive(f"{kind} {short(name)}: use 1 to {_NAME} printable characters")
    return f"{kind} {short(name)}"


def check(where: str, value: Any, fields: Fields) -> None:
    """Refuse what has not just these fields, each of one of its types, and numbers in range."""
    if type(value) is not dict or value.keys() != fields.keys():
        found = short(list(value) if isinstance(value, dict) else value)
        raise BadArchive(f"{where} should have {', '.join(fields)}, found {found}")
    for name, kinds in fields.items():
        if type(value[name]) not in kinds:
            kind = kinds[0].__name__
            raise BadArchive(f"{where}: {name} should be {kind}, found {short(value[name])}")
        if isinstance(value[name], (int, float)) and not 0 <= value[name] < _HUGE:
            raise BadArchive(f"{where}: {name} is {short(value[name])}, which is out of range")


def json_object(where: str, data: bytes) -> dict[str, Any]:
    """Return a JSON object without the liberties that Python takes."""
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > _MARKS:
        raise BadArchive(f"{where} has more than {_MARKS} brackets and commas")
    try:
        if data[:1] != b"{":
            raise ValueError("it does not start with {")
        content: dict[str, Any] = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_number,
            parse_float=_number,
            # to a reader of whole numbers, which safetensors is, minus zero is none
            parse_int=lambda text: -0.0 if text == "-0" else int(text),
        )
    except (ValueError, RecursionError) as error:
        raise BadArchive(f"{where} is not sound JSON: {error}") from error
    level: list[Any] = [content]
    for _ in range(_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for part in inner for each in part if isinstance(each, (dict, list))]
    if level:
        raise BadArchive(f"{where} is nested deeper than {_DEPTH} levels")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(name)} is there twice")
    return content


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{short(text)} is no number")
    return number
