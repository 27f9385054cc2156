"""When levels learn: integers only, a function of the token stream alone.

Chunk boundaries fall at absolute multiples of a level's chunk length, however the stream was
split into calls. A chunk [start, end) is due when its last token has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hope_runtime.config import HopeConfig


class Due(NamedTuple):
    """A chunk that is complete and waits for its consolidation."""

    level: str
    start: int
    end: int


def until_boundary(position: int, config: HopeConfig) -> int | None:
    """Return how many tokens may be read before the next boundary of any level.

    Where there are memories, the place before a boundary is one as well: from there the chunk's
    first target is predicted, and what the memories held there is marked.

    >>> from hope_runtime.weights.random import tiny_config, tiny_native
    >>> [until_boundary(p, tiny_config()) for p in (0, 7, 8, 15)]
    [8, 1, 8, 1]
    >>> [until_boundary(p, tiny_native()) for p in (0, 6, 7, 8)]
    [7, 1, 1, 7]
    """
    ends = [level.chunk - position % level.chunk for level in config.levels]
    if config.memory_blocks:
        ends += [end - 1 for end in ends if end > 1]
    return min(ends, default=None)


def marked(position: int, due: Sequence[Due], config: HopeConfig) -> set[int]:
    """Return the positions, up to this one, from which a chunk begun or due is to be read again."""
    if not config.memory_blocks:
        return set()
    chunks = [level.chunk for level in config.levels]
    begun = [position - position % chunk - 1 for chunk in chunks]
    begins = [position for chunk in chunks if (position + 1) % chunk == 0]  # with the next token
    return {p for p in [*begun, *begins, *(d.start - 1 for d in due)] if p > 0}


def completed(start: int, end: int, config: HopeConfig) -> list[Due]:
    """Return the chunks whose last token is in [start, end), in the order they are applied.

    At a shared boundary the slowest level goes first: what it learns is there before the
    faster ones refine it.
    """
    found = [
        Due(level.name, last - level.chunk, last)
        for level in config.levels
        for last in range((start // level.chunk + 1) * level.chunk, end + 1, level.chunk)
    ]
    chunk = {level.name: level.chunk for level in config.levels}
    return sorted(found, key=lambda due: (due.end, -chunk[due.level]))


def horizon(position: int, due: Sequence[Due], config: HopeConfig) -> int:
    """Return the first position that attention or a pending chunk can still look at."""
    begun = (position - position % level.chunk for level in config.levels)
    pending = min([position, *begun, *(d.start for d in due)])
    seen = config.window if config.attention_blocks else 0
    return pending - seen - 1  # a chunk's first target is predicted by the token before
