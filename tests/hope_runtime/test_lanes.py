"""Lanes: what is loaded onto one is what reading would have built up there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_runtime.config import HopeConfig
from hope_runtime.lanes import Lanes
from hope_runtime.layers.memory import Memories
from hope_runtime.model import Hope
from hope_runtime.state import Piece, State, compact, extend, trim
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_mixed, tiny_native

CONFIG = tiny_config(window=16, sinks=3)
MIXED = tiny_mixed(window=16, sinks=3)


@pytest.fixture(scope="module", params=[CONFIG, MIXED], ids=["attention", "both"])
def model(request) -> Hope:
    return Hope(request.param, random_checkpoint(request.param).weights)


@pytest.fixture(scope="module")
def native() -> Hope:
    return Hope(tiny_native(), random_checkpoint(tiny_native()).weights)


@torch.no_grad()
def read(model, lanes, lane, state, count, *, size=5):
    """Read some tokens on a lane, a few at a time; return the state after them."""
    config: HopeConfig = model.config
    end = state.position + count
    while state.position < end:
        tokens = [
            (7 * p + lane) % 256 for p in range(state.position, min(state.position + size, end))
        ]
        start = torch.tensor([state.position])
        past = lanes.view(lane, lane + 1, state.position)
        found = model.run(model.embed(torch.tensor([tokens])), start, past, [{}])
        lanes.append(lane, start, found)
        piece = Piece(
            state.position,
            torch.tensor(tokens),
            torch.ones(len(tokens)),
            found.keys[:, 0],
            found.values[:, 0],
            found.inputs[0],
        )
        state = trim(extend(state, piece, config), config)
    return replace(state, memories=lanes.memories(lane))


def held(lanes, lane, state):
    """Return what a lane holds, by position: the places are the lane's own affair."""
    rotated, values, positions, _ = lanes.view(lane, lane + 1, state.position)
    return {
        int(position): (rotated[:, 0, :, place], values[:, 0, :, place])
        for place, position in enumerate(positions[0].tolist())
        if position >= 0
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for position, (rotated, value) in one.items():
        torch.testing.assert_close(rotated, other[position][0], rtol=0, atol=1e-6)
        assert torch.equal(value, other[position][1])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 16, 19, 20, 75])
def test_a_loaded_lane_holds_what_reading_built_up(model, count):
    lanes = Lanes(model, 2)
    state = read(model, lanes, 0, State(), count)

    lanes.load(1, state)

    built = held(lanes, 0, state)
    assert_same(held(lanes, 1, state), built)
    assert built.keys() == {*range(min(3, count)), *range(max(count - 16, 0), count)}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 75])
def test_a_loaded_memory_is_what_reading_built_up(native, count):
    lanes = Lanes(native, 3)
    state = read(native, lanes, 0, State(), count)
    read(native, lanes, 1, State(), 9)

    lanes.load(1, state)
    lanes.load(2, State())

    assert_same_memories(lanes.memories(1), lanes.memories(0))
    assert all(not bool(tensor.any()) for tensor in lanes.memories(2))
    more = [read(native, lanes, lane, state, 11) for lane in (0, 1)]  # the lane's own tokens
    assert more[0].position == more[1].position
    assert lanes.memories(0).live.any()


def assert_same_memories(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memories_are_moved_and_swapped_with_their_lanes(native):
    lanes = Lanes(native, 3)
    first, second, third = (
        read(native, lanes, lane, State(), 5 + lane).memories for lane in range(3)
    )

    lanes.swap(0, 2)
    lanes.move(2, 1)

    assert_same_memories(lanes.memories(0), third)
    assert_same_memories(lanes.memories(1), first)
    assert_same_memories(lanes.memories(2), first)
    assert not torch.equal(first.live, second.live)


def test_what_a_lane_gave_does_not_change_when_the_lane_does(native):
    lanes = Lanes(native, 1)
    state = read(native, lanes, 0, State(), 5)
    before = [tensor.clone() for tensor in state.memories]

    read(native, lanes, 0, state, 5)

    assert_same_memories(state.memories, before)


def test_turns_stored_as_one_piece_load_the_same(model):
    lanes = Lanes(model, 2)
    state = read(model, lanes, 0, State(), 50)
    state = compact(state, 0, model.config)
    state = compact(read(model, lanes, 0, state, 13), 50, model.config)
    assert len(state.pieces) == 2

    lanes.load(1, state)

    assert_same(held(lanes, 1, state), held(lanes, 0, state))


def test_sinks_stay_and_window_places_are_used_again_in_turn(model):
    lanes = Lanes(model, 1)
    state = read(model, lanes, 0, State(), 5 * 16 + 9, size=7)

    _, _, positions, _ = lanes.view(0, 1, state.position)

    assert positions[0, :3].tolist() == [0, 1, 2]
    ring = positions[0, 3:].tolist()
    assert sorted(ring) == list(range(state.position - 16, state.position))
    assert [(position - 3) % 16 for position in ring] == list(range(16))


def test_loading_a_shorter_session_leaves_nothing_of_the_longer_one(model):
    lanes = Lanes(model, 2)
    read(model, lanes, 0, State(), 60)
    short = read(model, lanes, 1, State(), 6)

    lanes.load(0, short)

    assert_same(held(lanes, 0, short), held(lanes, 1, short))
    assert held(lanes, 0, short).keys() == set(range(6))


def test_numbers_that_are_not_finite_do_not_outlive_their_session(model):
    lanes = Lanes(model, 2)
    long = read(model, lanes, 0, State(), 60)
    bad = [replace(p, keys=p.keys * torch.nan, values=p.values * torch.nan) for p in long.pieces]
    held = long.memories and Memories(*(t * torch.nan for t in long.memories))
    lanes.load(0, replace(long, pieces=tuple(bad), memories=held))
    short = read(model, lanes, 1, State(), 6)

    lanes.load(0, short)
    start = torch.tensor([6])
    found = model.run(model.embed(torch.tensor([[9]])), start, lanes.view(0, 1, 6), [{}])

    assert found.hidden.isfinite().all()


def test_move_copies_a_lane_and_swap_exchanges_two(model):
    lanes = Lanes(model, 3)
    states = [read(model, lanes, lane, State(), 20 + 10 * lane) for lane in range(3)]
    first, second, third = (
        {p: (r.clone(), v.clone()) for p, (r, v) in held(lanes, lane, state).items()}
        for lane, state in enumerate(states)
    )

    lanes.swap(0, 2)
    assert_same(held(lanes, 0, states[2]), third)
    assert_same(held(lanes, 1, states[1]), second)
    assert_same(held(lanes, 2, states[0]), first)

    lanes.move(1, 2)
    assert_same(held(lanes, 1, states[1]), second)
    assert_same(held(lanes, 2, states[1]), second)

    lanes.swap(1, 1)
    lanes.move(0, 0)
    assert_same(held(lanes, 0, states[2]), third)
    assert_same(held(lanes, 1, states[1]), second)


def test_lanes_of_one_batch_are_read_and_written_apart(model):
    """Sessions of different lengths decode together as each would alone."""
    together, alone = Lanes(model, 3), Lanes(model, 3)
    states = [read(model, together, lane, State(), 4 + 30 * lane) for lane in range(3)]
    for lane, state in enumerate(states):
        alone.load(lane, state)

    start = torch.tensor([state.position for state in states])
    for step in range(20):
        tokens = torch.tensor([[step + 1], [2 * step + 50], [3 * step + 100]])
        past = together.view(0, 3, int(start.max()))
        batch = model.run(model.embed(tokens), start, past, [{}] * 3)
        together.append(0, start, batch)
        for lane in range(3):
            at = start[lane : lane + 1]
            past = alone.view(lane, lane + 1, int(at))
            single = model.run(model.embed(tokens[lane : lane + 1]), at, past, [{}])
            alone.append(lane, at, single)
            torch.testing.assert_close(batch.hidden[lane], single.hidden[0], rtol=1e-4, atol=1e-4)
        start = start + 1


def test_the_size_of_the_lanes_is_that_of_their_keys_and_values_and_memories(model, native):
    def memories(config):
        rings = (config.memory.taps - 1) * 2 * 2 * 16
        return 5 * 4 * len(config.memory_blocks) * (2 * 2 * 16 * 16 + rings)

    kv = 5 * 2 * 4 * (len(model.config.attention_blocks) * 2 * 19 * 8)
    own = memories(model.config) if model.config.memory_blocks else 0
    assert Lanes(model, 5).bytes == kv + own
    assert Lanes(native, 5).bytes == memories(native.config)
