"""Text as bytes, for how many bits a model needs for each: from a folder, held-out part apart."""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hope_runtime.evaluation.drawn import Drawn

VOCABULARY = 256
HELD_OUT = 0.1  # the last share of a text that comes without a part of its own to judge by

Bytes = NDArray[np.uint8]


class TextError(ValueError):
    """A folder without the text; the message names what was looked for."""


class Text(NamedTuple):
    """A text, apart into what is trained on and what is judged by."""

    train: Bytes
    held_out: Bytes


def shakespeare(folder: Path) -> Text:
    """Read tinyshakespeare; its last tenth is held out."""
    whole = _plain(folder, "tinyshakespeare.txt")
    cut = int(len(whole) * (1.0 - HELD_OUT))
    return Text(whole[:cut], whole[cut:])


def wikitext(folder: Path) -> Text:
    """Read WikiText-2: the validation part to train on, for it is small; the test part held out."""
    return Text(_member(folder, "valid"), _member(folder, "test"))


def lambada(folder: Path) -> list[str]:
    """Read the passages of LAMBADA's test part, one a line; the last word is the one to find."""
    lines = bytes(_plain(folder, "lambada_test.txt")).decode().splitlines()
    return [line.strip() for line in lines if " " in line.strip()]


TEXTS: dict[str, Callable[[Path], Text]] = {"shakespeare": shakespeare, "wikitext": wikitext}


def rows(chance: np.random.Generator, count: int, *, text: Bytes, length: int) -> Drawn:
    """Draw rows from random places of a text; all bytes but the first count."""
    starts = chance.integers(0, len(text) - length, count)
    return _drawn(text[starts[:, None] + np.arange(length + 1)])


def in_order(chance: np.random.Generator, count: int, *, text: Bytes, length: int) -> Drawn:
    """Cut rows from the beginning of a text, each byte once; nothing is left to chance."""
    count = min(count, (len(text) - 1) // length)
    starts = length * np.arange(count)
    return _drawn(text[starts[:, None] + np.arange(length + 1)])


def _drawn(found: Bytes) -> Drawn:
    scored = np.ones(found.shape, bool)
    scored[:, 0] = False
    return Drawn(found.astype(np.int64), scored)


def _plain(folder: Path, name: str) -> Bytes:
    if (path := folder / name).is_file():
        return np.frombuffer(path.read_bytes(), np.uint8)
    if (path := folder / f"{name}.xz").is_file():
        return np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
    raise TextError(f"{folder} has neither {name} nor {name}.xz; name its folder with --data")


def _member(folder: Path, part: str) -> Bytes:
    path = folder / "wikitext2.tar.xz"
    if not path.is_file():
        raise TextError(f"{folder} has no wikitext2.tar.xz; name its folder with --data")
    with tarfile.open(path) as archive:
        for member in archive:
            if part in Path(member.name).name and (file := archive.extractfile(member)):
                return np.frombuffer(file.read(), np.uint8)
    raise TextError(f"{path} has no file for {part!r}; take the archive of WikiText-2 as published")
