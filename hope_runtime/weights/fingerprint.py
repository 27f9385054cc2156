"""The identity of a checkpoint, short enough to read: `SmolLM2-135M-Instruct@0123456789abcdef`.

The hash covers the configuration, the tokenizer and the weights. Of a weight file larger than
256 MiB it covers size, header, and the first and last MiB: gigabytes are not read twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

MIB = 1 << 20
WHOLE = 256 * MIB


def fingerprint(name: str, parts: Iterable[bytes]) -> str:
    """Name a checkpoint by the hash of its parts.

    >>> fingerprint("tiny", [b"config", b"weights"])
    'tiny@283c9b27814cd2a2'
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{name}@{digest.hexdigest()[:16]}"


def file_parts(path: Path, *, header: int, whole: int = WHOLE) -> Iterator[bytes]:
    """Yield what identifies a weight file whose first `header` bytes describe its tensors."""
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        if size <= whole:
            while part := file.read(MIB):
                yield part
            return
        yield file.read(header + MIB)
        file.seek(-MIB, 2)
        yield file.read()
