"""When levels learn: integers only, a function of the token stream alone.

Chunk boundaries fall at absolute multiples of a level's chunk length, moved by its offset,
however the stream was split into calls. A chunk [start, end) is due when its last token has been
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hope_runtime.config import HopeConfig, LevelConfig, Variant


class Due(NamedTuple):
    """A chunk that is complete and waits for its consolidation."""

    level: str
    start: int
    end: int


def begun(position: int, level: LevelConfig) -> int:
    """Return where the chunk that a position lies in began; with an offset the first is shorter.

    >>> level = LevelConfig("fast", 8, (0,), rate=0.1, retain=0.9, offset=3)
    >>> [begun(p, level) for p in (0, 2, 3, 10, 11)]
    [0, 0, 3, 3, 11]
    """
    return max(position - (position - level.offset) % level.chunk, 0)


def _left(position: int, level: LevelConfig) -> int:
    """Return how many tokens the chunk that a position lies in still lacks."""
    return level.chunk - (position - level.offset) % level.chunk


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
    ends = [_left(position, level) for level in config.levels]
    if config.memory_blocks:
        ends += [end - 1 for end in ends if end > 1]
    return min(ends, default=None)


def marked(
    position: int,
    due: Sequence[Due],
    config: HopeConfig,
    since: Mapping[str, int] | None = None,
) -> set[int]:
    """Return the positions, up to this one, from which a chunk begun or due is to be read again.

    A chunk that began at or before a level's `since` is one that it will not learn.
    """
    if not config.memory_blocks:
        return set()
    starts = [d.start for d in due]
    for level in config.levels:
        ours = [begun(position, level)]
        ours += [position + 1] if _left(position, level) == 1 else []
        starts += [start for start in ours if start > (since or {}).get(level.name, -1)]
    return {start - 1 for start in starts if start > 1}


def completed(start: int, end: int, config: HopeConfig) -> list[Due]:
    """Return the chunks whose last token is in [start, end), in the order they are applied.

    At a shared boundary the slowest level goes first: what it learns is there before the
    faster ones refine it. Where levels are nested it goes last: the end of its chunk is the end
    of theirs, and they begin again.
    """
    found = [
        Due(level.name, max(last - level.chunk, 0), last)
        for level in config.levels
        for last in range(start + _left(start, level), end + 1, level.chunk)
    ]
    sign = 1 if config.variant is Variant.NESTED else -1
    order = {level.name: sign * level.chunk for level in config.levels}
    return sorted(found, key=lambda due: (due.end, order[due.level]))


def horizon(position: int, due: Sequence[Due], config: HopeConfig) -> int:
    """Return the first position that attention or a pending chunk can still look at."""
    starts = (begun(position, level) for level in config.levels)
    pending = min([position, *starts, *(d.start for d in due)])
    seen = config.window if config.attention_blocks else 0
    return pending - seen - 1  # a chunk's first target is predicted by the token before
