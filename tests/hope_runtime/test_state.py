"""States at rest: what is stored is what is read, and damage is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from hope_runtime.cadence import completed, horizon
from hope_runtime.consolidation import learnable
from hope_runtime.state import (
    LevelState,
    Piece,
    State,
    StateError,
    between,
    compact,
    dump,
    extend,
    join,
    level_shapes,
    restore,
    trim,
)
from hope_runtime.weights.random import tiny_config

CONFIG = tiny_config(width=8, blocks=4, heads=2, key_heads=1, head_width=4, hidden=8)


def piece_of(start, length, *, dtype=torch.float32, weight=1.0):
    generator = torch.Generator().manual_seed(start)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    kv = (CONFIG.blocks, CONFIG.key_heads, length, CONFIG.head_width)
    return Piece(
        start,
        torch.randint(0, CONFIG.vocabulary, (length,), generator=generator),
        torch.full((length,), weight),
        draw(*kv),
        draw(*kv),
        draw(length, CONFIG.width),
    )


def learned(state, level, updates=1):
    generator = torch.Generator().manual_seed(updates)
    delta = {
        name: torch.randn(shape, generator=generator)
        for name, shape in level_shapes(CONFIG, level).items()
    }
    moved = LevelState(delta, updates, state.position, 2.5, "applied", 0.01)
    return replace(state, levels={**state.levels, level: moved})


def take_turn(state, lengths, *, weight=1.0, dtype=torch.float32):
    """Read calls of these lengths, record the chunks they complete, and end the turn."""
    begin = state.position
    state = replace(state, carry=())
    for length in lengths:
        piece = piece_of(state.position, length, weight=weight, dtype=dtype)
        state = extend(state, piece, CONFIG)
        due = completed(piece.start, piece.end, CONFIG)
        due = tuple(each for each in due if learnable(state, each))
        state = trim(replace(state, due=(*state.due, *due)), CONFIG)
    return replace(compact(state, begin, CONFIG), carry=((7, 0.0), (10, 1.0)))


def session(turns=6, **options):
    state = State()
    for _ in range(turns):
        state = take_turn(state, (9, 1, 4), **options)
        state = trim(replace(learned(state, "fast"), due=()), CONFIG)
    return state


def stored(state, before=None):
    """Return facts as they come back from JSON, and all blobs."""
    facts, put, keep = dump(state, before)
    return json.loads(json.dumps(facts)), put, keep


def restored(facts, blobs, dtype=torch.float32):
    return restore(facts, blobs, CONFIG, dtype)


def assert_equal(one, other):
    """Compare two states (or parts of them) number for number."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, tuple) and one and isinstance(one[0], Piece):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, (State, Piece, LevelState)):
        for part in fields(one):
            assert_equal(getattr(one, part.name), getattr(other, part.name))
    else:
        assert one == other


def test_what_is_stored_is_what_is_read():
    state = take_turn(session(), (40,))
    assert state.due
    facts, blobs, keep = stored(state)

    again = restored(facts, blobs)

    assert keep == set()
    assert_equal(again, state)


def test_storing_again_gives_the_same_bytes():
    facts, blobs, _ = stored(session())

    facts_again, blobs_again, _ = stored(restored(facts, blobs))

    assert facts_again == facts
    assert blobs_again == blobs


def test_a_new_session_is_stored_as_nothing_but_facts():
    facts, blobs, _ = stored(State())

    assert blobs == {}
    assert_equal(restored(facts, blobs), State())


def test_a_turn_stores_its_own_tokens_and_keeps_the_rest():
    before = session()
    after = learned(take_turn(before, (5,)), "slow")

    _, put, keep = stored(after, before)

    start = before.position
    assert put.keys() == {f"window/{start:012d}-{start + 5:012d}", "level/slow"}
    assert keep == {
        "sinks",
        "level/fast",
        *(f"window/{p.start:012d}-{p.end:012d}" for p in after.pieces[:-1]),
    }


def test_what_one_turn_kept_and_put_is_all_that_the_next_needs():
    state, blobs = State(), {}
    for turn in range(9):
        before, state = state, take_turn(state, (3 + turn, 6))
        if turn % 3 == 1:
            state = trim(replace(learned(state, "fast", turn), due=()), CONFIG)
        facts, put, keep = stored(state, before)
        blobs = {name: blob for name, blob in blobs.items() if name in keep} | put

        assert_equal(restored(facts, blobs), state)


@pytest.mark.parametrize(
    ("here", "there"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["to bfloat16", "to float32"],
)
def test_a_server_in_another_precision_reads_the_same_session(here, there):
    state = session(dtype=here)
    facts, blobs, _ = stored(state)

    again = restored(facts, blobs, there)

    for old, new in zip((*state.pieces, state.sinks), (*again.pieces, again.sinks), strict=True):
        for part in ("keys", "values", "inputs"):
            assert getattr(new, part).dtype == there
            assert torch.equal(getattr(new, part), getattr(old, part).to(there))
        assert torch.equal(new.tokens, old.tokens)
    assert_equal(again.levels, state.levels)  # deltas are float32 in any


# --- damage -----------------------------------------------------------------------------------

GOOD, BLOBS, _ = stored(session())
NAMES = sorted(BLOBS)
PARTS = ("start", "tokens", "weights", "keys", "values", "inputs")
EVERY_TENSOR = [(name, part) for name in NAMES for part in load_tensors(BLOBS[name])]
PIECES = [name for name in NAMES if name.startswith("window/")]


def changed(name, **tensors):
    return {**BLOBS, name: save_tensors({**load_tensors(BLOBS[name]), **tensors})}


def assert_damaged(name, blobs, facts=GOOD):
    with pytest.raises(StateError) as found:
        restored(facts, blobs)
    assert repr(name) in str(found.value)


def test_the_session_to_be_damaged_has_every_kind_of_blob():
    assert len(PIECES) > 2
    assert {name.partition("/")[0] for name in NAMES} == {"sinks", "window", "level"}
    restored(GOOD, BLOBS)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_blob_is_named(name):
    assert_damaged(name, {n: blob for n, blob in BLOBS.items() if n != name})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"no safetensors", lambda b: b[:-1], lambda b: b[: len(b) // 2]],
    ids=["empty", "other bytes", "one byte short", "half"],
)
def test_bytes_that_are_not_safetensors_are_named(name, damage):
    assert_damaged(name, {**BLOBS, name: damage(BLOBS[name])})


@pytest.mark.parametrize(("name", "part"), EVERY_TENSOR)
def test_a_tensor_of_another_shape_is_named(name, part):
    tensor = load_tensors(BLOBS[name])[part]

    assert_damaged(name, changed(name, **{part: torch.cat([tensor, tensor[:1]])}))


@pytest.mark.parametrize(("name", "part"), EVERY_TENSOR)
def test_a_missing_tensor_is_named(name, part):
    tensors = {key: t for key, t in load_tensors(BLOBS[name]).items() if key != part}

    assert_damaged(name, {**BLOBS, name: save_tensors(tensors)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "part"), [pair for pair in EVERY_TENSOR if pair[1] not in ("start", "tokens")]
)
def test_a_number_that_is_not_finite_is_named(name, part, value):
    tensor = load_tensors(BLOBS[name])[part].clone()
    tensor.view(-1)[-1] = value

    assert_damaged(name, changed(name, **{part: tensor}))


@pytest.mark.parametrize("token", [-1, CONFIG.vocabulary])
def test_a_token_outside_the_vocabulary_is_named(token):
    tokens = load_tensors(BLOBS[PIECES[1]])["tokens"].clone()
    tokens[0] = token

    assert_damaged(PIECES[1], changed(PIECES[1], tokens=tokens))


def test_a_piece_in_another_s_place_is_named():
    same_length = {**BLOBS, PIECES[1]: BLOBS[PIECES[2]]}

    assert_damaged(PIECES[1], same_length)


def test_a_gap_in_the_pieces_is_named():
    starts = GOOD["pieces"]
    facts = {**GOOD, "pieces": [starts[0], *starts[2:]]}

    assert_damaged(f"window/{starts[0]:012d}-{starts[2]:012d}", BLOBS, facts)


def test_a_session_that_has_read_something_needs_a_window():
    with pytest.raises(StateError, match="no window"):
        restored({**GOOD, "pieces": []}, BLOBS)


def test_an_unknown_level_is_named():
    facts = {**GOOD, "levels": {**GOOD["levels"], "glacial": GOOD["levels"]["fast"]}}

    assert_damaged("glacial", BLOBS, facts)


def test_another_format_is_refused():
    with pytest.raises(StateError, match="format 2"):
        restored({**GOOD, "format": 2}, BLOBS)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0), st.integers(1, 255))
def test_a_changed_byte_is_either_only_a_number_or_an_error_that_names_the_blob(name, at, by):
    """Never anything else: the store's checksums find the former."""
    damaged = bytearray(BLOBS[name])
    damaged[at % len(damaged)] ^= by

    try:
        restored(GOOD, {**BLOBS, name: bytes(damaged)})
    except StateError as error:
        message = str(error)
    else:
        message = f"no error for {name!r}"

    assert repr(name) in message


# --- any sequence of turns --------------------------------------------------------------------

turns = st.tuples(
    st.lists(st.integers(1, CONFIG.window), min_size=1, max_size=4),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["consolidate", "leave due"]),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(turns, min_size=1, max_size=6))
def test_after_any_turns_the_pieces_reach_back_to_the_horizon_and_are_stored_whole(plan):
    state, everything = State(), []
    for lengths, weight, then in plan:
        begin = state.position
        for length in lengths:
            everything.append(piece_of(begin, length, weight=weight))
            begin += length
        before, state = state, take_turn(state, lengths, weight=weight)
        if then == "consolidate":
            state = trim(replace(state, due=()), CONFIG)

        oldest = max(horizon(state.position, state.due, CONFIG), 0)
        kept = join(between(state.pieces, oldest, state.position))
        read = join(between(everything, oldest, state.position))
        assert_equal(kept, read)
        sinks = join(between(everything, 0, CONFIG.sinks))
        assert_equal(state.sinks, sinks)
        # all but the oldest of the turns are within reach
        assert all(p.end > oldest for p in state.pieces)
        facts, put, keep = stored(state, before)
        assert_equal(restored(facts, dump(before, None)[1] | put), state)
        assert keep <= dump(before, None)[1].keys()


def test_a_piece_must_begin_where_the_session_is():
    state = take_turn(State(), (5,))

    with pytest.raises(ValueError, match="starts at 6, the session is at 5"):
        extend(state, piece_of(6, 2), CONFIG)


def test_a_long_turn_is_stored_without_what_nobody_can_reach():
    state = take_turn(State(), (32,) * 9, weight=0.0)

    (piece,) = state.pieces
    assert piece.start == horizon(state.position, (), CONFIG)
    assert piece.end == 288


def test_bytes_counts_every_tensor_once():
    state = session()
    _, put, _ = stored(state)
    numbers = sum(t.nbytes for blob in put.values() for t in load_tensors(blob).values())

    assert state.bytes == numbers - 8 * (len(state.pieces) + 1)  # `start` is no tensor in RAM


def test_a_stretch_is_found_among_many_pieces_without_looking_at_all():
    looked = []

    class Place:
        def __init__(self, start):
            self.start = start

        @property
        def end(self):
            looked.append(self.start)
            return self.start + 1

        def cut(self, start, end):
            return self.start

    places = [Place(start) for start in range(4096)]

    assert between(places, 4000, 4003) == [4000, 4001, 4002]
    assert between(places, -5, 1) == [0]
    assert between(places, 5000, 6000) == []
    assert len(looked) < 64
