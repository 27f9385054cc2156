"""The GGUF container: metadata and tensors of one file, every length checked before it is used."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hope_runtime.weights.checkpoint import CheckpointError
from hope_runtime.weights.quants import FORMATS, Bytes, Floats, Format

_TEXT, _LIST = 8, 9
_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file, and how."""

    shape: tuple[int, ...]
    format: Format
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) // self.format.values * self.format.size


@dataclass(frozen=True, slots=True)
class GgufFile:
    path: Path
    metadata: Metadata
    tensors: Mapping[str, StoredTensor]
    header: int  # bytes before the first tensor
    content: Bytes

    def read(self, name: str) -> Floats:
        """Return a tensor as numbers of its own: nothing of the file is held."""
        tensor = self.tensors[name]
        content = self.content[tensor.start : tensor.start + tensor.size]
        blocks = content.reshape(-1, tensor.format.size)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return tensor.format.decode(blocks).reshape(tensor.shape)


@dataclass(frozen=True, slots=True)
class Metadata:
    """The key-value pairs of a file, each asked for by type."""

    path: Path
    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, int, default)
        assert isinstance(value, int)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, (int, float), default)
        assert isinstance(value, int | float)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, str, default)
        assert isinstance(value, str)
        return value

    def texts(self, key: str) -> list[str]:
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        return self._list(key, int)

    def _list(self, key: str, kind: type[Any]) -> list[Any]:
        values = self._get(key, list, None)
        assert isinstance(values, list)
        if not all(isinstance(value, kind) for value in values[:1]):
            raise self._wrong(key, values)
        return values

    def _get(self, key: str, kind: type[Any] | tuple[type[Any], ...], default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.path}: the metadata lacks {key!r}; convert the model again with a "
                "current llama.cpp"
            )
        if not isinstance(value, kind):
            raise self._wrong(key, value)
        return value

    def _wrong(self, key: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the metadata {key!r} is {str(value)[:60]!r}, which no supported model "
            "has; convert the model again with a current llama.cpp"
        )


def open_gguf(path: Path) -> GgufFile:
    """Map a file into memory and read all but its tensors' numbers."""
    try:
        size = path.stat().st_size
        content = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}; check the path"
        ) from error
    return _Reader(path, np.asarray(content)).file()


class _Reader:
    """A position in a file that never leaves it."""

    def __init__(self, path: Path, content: Bytes) -> None:
        self.path = path
        self.content = content
        self.view = memoryview(content.data)
        self.position = 0

    def file(self) -> GgufFile:
        if bytes(self.take(min(4, len(self.view)))) != b"GGUF":
            raise self.broken("it does not begin with 'GGUF'", "choose a GGUF file")
        version = self.number("<u4")
        if version not in (2, 3):
            raise self.broken(
                f"its version {version} is not supported",
                "convert the model with a current llama.cpp, on a little-endian machine",
            )
        n_tensors, n_pairs = self.number("<u8"), self.number("<u8")
        pairs = self.pairs(n_pairs)
        infos = [self.info() for _ in range(self.count(n_tensors, least=24))]
        header = self.aligned(pairs.get("general.alignment", 32))
        tensors = {name: self.placed(name, tensor, header) for name, tensor in infos}
        if len(tensors) != len(infos):
            raise self.broken("two tensors have the same name")
        return GgufFile(self.path, Metadata(self.path, pairs), tensors, header, self.content)

    def pairs(self, count: int) -> dict[str, Any]:
        pairs = {}
        for _ in range(self.count(count, least=13)):
            key = self.text()
            pairs[key] = self.value(self.number("<u4"))
        return pairs

    def info(self) -> tuple[str, StoredTensor]:
        """Read a tensor's description; its start is still relative to the first tensor."""
        name = self.text()
        n_axes = self.number("<u4")
        if not 1 <= n_axes <= 4:
            raise self.broken(f"the tensor {name!r} has {n_axes} axes")
        shape = tuple(reversed([self.number("<u8") for _ in range(n_axes)]))
        kind, start = self.number("<u4"), self.number("<u8")
        if kind not in FORMATS:
            known = ", ".join(format.name for format in FORMATS.values())
            raise CheckpointError(
                f"{self.path}: the tensor {name!r} is stored in format {kind}; supported are "
                f"{known}: choose such a file"
            )
        if min(shape) < 1 or shape[-1] % FORMATS[kind].values:
            raise self.broken(f"the tensor {name!r} has the impossible shape {list(shape)}")
        return name, StoredTensor(shape, FORMATS[kind], start)

    def placed(self, name: str, tensor: StoredTensor, header: int) -> StoredTensor:
        start = header + tensor.start
        if start + tensor.size > len(self.view):
            raise self.broken(f"it ends before the tensor {name!r} does")
        return StoredTensor(tensor.shape, tensor.format, start)

    def aligned(self, alignment: object) -> int:
        if not isinstance(alignment, int) or alignment < 1:
            raise self.broken(f"its alignment is {alignment!r}")
        return -(-self.position // alignment) * alignment

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            return self.values()
        return self.numbers(kind, 1)[0]

    def values(self) -> list[Any]:
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == _TEXT:
            return [self.text() for _ in range(self.count(count, least=8))]
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        name = _NUMBERS[kind] if kind < len(_NUMBERS) else ""
        if not name:
            raise self.broken(f"its metadata holds a value of unknown type {kind}")
        numbers = np.frombuffer(self.take(np.dtype(name).itemsize * count), name)
        if name == "<f4":  # 1e-05, not 9.999999747378752e-06
            return [float(str(number)) for number in numbers]
        values: list[Any] = numbers.tolist()
        return values

    def text(self) -> str:
        try:
            return str(self.take(self.number("<u8")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("its metadata holds a text that is not UTF-8") from error

    def number(self, kind: str) -> int:
        layout = _LAYOUTS[kind]
        number: int = layout.unpack(self.take(layout.size))[0]
        return number

    def count(self, count: int, *, least: int) -> int:
        """Refuse a count of things that could not fit into the rest, `least` bytes each."""
        if count * least > len(self.view) - self.position:
            raise self.broken(f"it announces {count} entries, more than it can hold")
        return count

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.view):
            raise self.broken("it ends too early")
        part = self.view[self.position : end]
        self.position = end
        return part

    def broken(self, what: str, remedy: str = "download it again") -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable GGUF file: {what}; {remedy}")


_LAYOUTS = {"<u4": struct.Struct("<I"), "<u8": struct.Struct("<Q")}
