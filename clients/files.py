"""The files that sessions go to and come from; knows of no server.

A path is written under a temporary name beside it and gets its own when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

Place = str | os.PathLike[str] | BinaryIO
Progress = Callable[[int, int], None]  # bytes so far, bytes in all

CHUNK = 1 << 20


@contextlib.asynccontextmanager
async def writing(place: Place) -> AsyncIterator[BinaryIO]:
    """Open a place to be filled; a path that cannot be filled to its end stays as it was."""
    if not isinstance(place, str | os.PathLike):
        yield place
        return
    path = Path(place)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    file = await asyncio.to_thread(draft.open, "xb")
    try:
        with file:
            yield file
            await asyncio.to_thread(_settle, file)
        await asyncio.to_thread(draft.replace, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.asynccontextmanager
async def reading(place: Place) -> AsyncIterator[tuple[BinaryIO, int]]:
    """Open a place to be read; yields it and how many bytes it has to give."""
    if not isinstance(place, str | os.PathLike):
        yield place, await asyncio.to_thread(_remaining, place)
        return
    with await asyncio.to_thread(Path(place).open, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


async def chunks(file: BinaryIO, size: int, progress: Progress | None) -> AsyncGenerator[bytes]:
    """Read a file from where it stands, and tell how far that is."""
    done = 0
    while chunk := await asyncio.to_thread(file.read, CHUNK):
        yield chunk
        done += len(chunk)
        if progress is not None:
            progress(done, size)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remaining(file: BinaryIO) -> int:
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    return end - here
