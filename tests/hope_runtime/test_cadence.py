"""Cadence: chunks lie on an absolute grid, whatever the calls."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hope_runtime.cadence import Due, completed, horizon, until_boundary
from hope_runtime.config import LevelConfig
from hope_runtime.weights.random import tiny_config

TINY = tiny_config()  # fast every 8 tokens, slow every 16, a window of 32
NONE = replace(TINY, levels=())


def levels(*chunks):
    return replace(
        TINY,
        levels=tuple(LevelConfig(f"every {c}", c, (i,), 0.1, 0.9) for i, c in enumerate(chunks)),
    )


configs = st.lists(st.integers(2, 32), min_size=1, max_size=3, unique=True).map(
    lambda chunks: levels(*chunks)
)


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
            n for n in range(1, end + 1) if n % level.chunk == 0
        ]
        assert all(d.end - d.start == level.chunk for d in parts if d.level == level.name)


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
