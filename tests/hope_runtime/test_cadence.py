"""Cadence: chunks lie on an absolute grid, whatever the calls."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hope_runtime.cadence import Due, begun, completed, horizon, until_boundary
from hope_runtime.config import LevelConfig, Variant
from hope_runtime.weights.random import tiny_config

TINY = tiny_config()  # fast every 8 tokens, slow every 16, a window of 32
NONE = replace(TINY, levels=())


def levels(*grids):
    """Return a configuration with a level for each (chunk, offset)."""
    return replace(
        TINY,
        levels=tuple(
            LevelConfig(f"every {chunk}", chunk, (i,), 0.1, 0.9, offset=offset % chunk)
            for i, (chunk, offset) in enumerate(grids)
        ),
    )


configs = st.lists(
    st.tuples(st.integers(2, 32), st.integers(0, 31)),
    min_size=1,
    max_size=3,
    unique_by=lambda grid: grid[0],
).map(lambda grids: levels(*grids))


def test_a_chunk_is_complete_with_its_last_token():
    assert completed(0, 7, TINY) == []
    assert completed(7, 8, TINY) == [Due("fast", 0, 8)]
    assert completed(8, 15, TINY) == []


def test_at_a_shared_boundary_the_slowest_level_goes_first():
    assert completed(15, 16, TINY) == [Due("slow", 0, 16), Due("fast", 8, 16)]
    assert completed(0, 33, TINY) == [
        Due("fast", 0, 8),
        Due("slow", 0, 16),
        Due("fast", 8, 16),
        Due("fast", 16, 24),
        Due("slow", 16, 32),
        Due("fast", 24, 32),
    ]


@given(configs, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_splitting_a_stream_into_calls_changes_no_chunk(config, sizes):
    end = sum(sizes)
    parts, start = [], 0
    for size in sizes:
        parts += completed(start, start + size, config)
        start += size

    assert parts == completed(0, end, config)
    for level in config.levels:
        assert [d.end for d in parts if d.level == level.name] == [
            n for n in range(1, end + 1) if n % level.chunk == level.offset
        ]
        ours = [d for d in parts if d.level == level.name]
        # they follow each other without a gap, and only the first may be shorter
        assert [d.start for d in ours] == [0, *(d.end for d in ours)][: len(ours)]
        assert all(d.end - d.start == level.chunk for d in ours[1:])


@given(configs, st.integers(0, 10**6))
def test_a_chunk_began_where_the_last_boundary_was(config, position):
    for level in config.levels:
        start = begun(position, level)
        assert 0 <= start <= position < start + level.chunk
        assert start == 0 or start % level.chunk == level.offset


def test_levels_with_offsets_do_not_learn_at_the_same_token():
    together = levels((8, 0), (16, 0), (32, 0))
    apart = levels((8, 0), (16, 4), (32, 2))

    assert len({due.end for due in completed(0, 320, together)}) == 40
    assert len({due.end for due in completed(0, 320, apart)}) == len(completed(0, 320, apart))


def test_nested_levels_end_from_the_inside_out():
    nested = replace(TINY, variant=Variant.NESTED)

    assert completed(15, 16, nested) == [Due("fast", 8, 16), Due("slow", 0, 16)]


@given(configs, st.integers(0, 10**9))
def test_until_boundary_reaches_exactly_the_next_chunk_s_end(config, position):
    left = until_boundary(position, config)

    assert left is not None
    assert left >= 1
    assert completed(position, position + left - 1, config) == []
    assert completed(position, position + left, config) != []


def test_a_model_without_levels_has_no_boundary():
    assert until_boundary(5, NONE) is None
    assert completed(0, 1000, NONE) == []


@given(configs, st.integers(0, 500), st.integers(1, 100))
def test_the_horizon_keeps_whatever_a_chunk_still_to_come_looks_at(config, position, more):
    """The first of a chunk's targets is predicted by the token before, which sees a window."""
    oldest = horizon(position, (), config)

    assert oldest <= position - config.window + 1
    for due in completed(position, position + more, config):
        assert oldest <= (due.start - 1) - config.window + 1


def test_a_pending_chunk_holds_the_horizon_back():
    assert horizon(100, (), TINY) == 96 - 32 - 1
    assert horizon(100, (Due("slow", 48, 64), Due("fast", 56, 64)), TINY) == 48 - 32 - 1
    assert horizon(100, (), NONE) == 100 - 32 - 1
