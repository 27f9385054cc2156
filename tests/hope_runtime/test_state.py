"""States at rest: what is stored is what is read, and damage is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from hope_runtime.blobs import StateError
from hope_runtime.cadence import completed, horizon, marked
from hope_runtime.config import MemoryConfig
from hope_runtime.consolidation import learnable
from hope_runtime.layers import memory
from hope_runtime.layers.memory import Memories
from hope_runtime.levels import LevelState, level_shapes
from hope_runtime.state import (
    Mark,
    Piece,
    State,
    between,
    compact,
    dump,
    extend,
    join,
    restore,
    settle,
    trim,
)
from hope_runtime.storage import Form, Storage
from hope_runtime.weights.random import tiny_config, tiny_mixed, tiny_native

SMALL = {"width": 8, "hidden": 8}
ATTENTION = {"heads": 2, "key_heads": 1, "head_width": 4}
REMEMBERING = {"memory": MemoryConfig(heads=2, head_width=4, taps=3)}
CONFIGS = {
    "attention": tiny_config(**SMALL, **ATTENTION),
    "memory": tiny_native(**SMALL, **REMEMBERING),
    "both": tiny_mixed(**SMALL, **ATTENTION, **REMEMBERING),
}
CONFIG = CONFIGS["both"]  # has every kind of blob
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def memories_of(config, position, first=0, dtype=torch.float32):
    """Return what the memory blocks from block `first` on might hold at a position."""
    if not config.memory_blocks:
        return None
    generator = torch.Generator().manual_seed(position)
    blocks = sum(i >= first for i in config.memory_blocks)
    like = memory.empty(config.memory, blocks, torch.empty(0, dtype=dtype))
    return Memories(*(torch.randn(t.shape, generator=generator).to(t.dtype) for t in like))


def piece_of(start, length, *, config=CONFIG, dtype=torch.float32, weight=1.0):
    generator = torch.Generator().manual_seed(start)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    kv = (len(config.attention_blocks), config.key_heads, length, config.head_width)
    return Piece(
        start,
        torch.randint(0, config.vocabulary, (length,), generator=generator),
        torch.full((length,), weight),
        draw(*kv),
        draw(*kv),
        draw(length, config.width),
    )


def learned(state, level, updates=1, *, config=CONFIG):
    generator = torch.Generator().manual_seed(updates)
    delta = {
        name: torch.randn(shape, generator=generator)
        for name, shape in level_shapes(config, level).items()
    }
    moved = LevelState(delta, updates, state.position, 2.5, "applied", 0.01)
    return replace(state, levels={**state.levels, level: moved})


def take_turn(state, lengths, *, config=CONFIG, weight=1.0, dtype=torch.float32):
    """Read calls of these lengths, record the chunks they complete, and end the turn."""
    begin = state.position
    state = replace(state, carry=())
    for length in lengths:
        whole = piece_of(state.position, length, config=config, weight=weight, dtype=dtype)
        ends = {p for p in range(whole.start + 1, whole.end) if p in marked(p, (), config)}
        for start, stop in pairwise(sorted({whole.start, *ends, whole.end})):
            state = extend(state, whole.cut(start, stop), config)
            if stop in marked(stop, (), config):
                mark = Mark(stop, memories_of(config, stop, config.first_level_block, dtype))
                state = replace(state, marks=(*state.marks, mark))
            due = completed(start, stop, config)
            due = tuple(each for each in due if learnable(state, each))
            state = trim(replace(state, due=(*state.due, *due)), config)
    state = replace(state, memories=memories_of(config, state.position, dtype=dtype))
    return replace(compact(state, begin, config), carry=((7, 0.0), (10, 1.0)))


def session(turns=6, *, config=CONFIG, **options):
    state = State()
    for _ in range(turns):
        state = take_turn(state, (9, 1, 4), config=config, **options)
        state = trim(replace(learned(state, "fast", config=config), due=()), config)
    return state


def stored(state, before=None):
    """Return facts as they come back from JSON, and all blobs."""
    facts, put, keep = dump(state, before)
    return json.loads(json.dumps(facts)), put, keep


def restored(facts, blobs, dtype=torch.float32, *, config=CONFIG):
    return restore(facts, blobs, config, dtype)


def assert_equal(one, other):
    """Compare two states (or parts of them) number for number."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, (State, Piece, Mark, LevelState)):
        for part in fields(one):
            assert_equal(getattr(one, part.name), getattr(other, part.name))
    else:
        assert one == other


@each_config
def test_what_is_stored_is_what_is_read(config):
    state = take_turn(session(config=config), (40,), config=config)
    assert state.due
    assert bool(state.marks) == (state.memories is not None) == bool(config.memory_blocks)
    facts, blobs, keep = stored(state)

    again = restored(facts, blobs, config=config)

    assert keep == set()
    assert_equal(again, state)


@each_config
def test_storing_again_gives_the_same_bytes(config):
    facts, blobs, _ = stored(session(config=config))

    facts_again, blobs_again, _ = stored(restored(facts, blobs, config=config))

    assert facts_again == facts
    assert blobs_again == blobs


@each_config
def test_a_new_session_is_stored_as_nothing_but_facts(config):
    facts, blobs, _ = stored(State())

    assert blobs == {}
    assert_equal(restored(facts, blobs, config=config), State())


@each_config
def test_a_turn_stores_its_own_tokens_and_memory_and_keeps_the_rest(config):
    before = session(config=config)
    after = learned(take_turn(before, (5,), config=config), "slow", config=config)

    _, put, keep = stored(after, before)

    start, new = before.position, {"level/slow"}
    begun = {f"mark/{mark.position:012d}" for mark in after.marks}
    assert start == 84
    if config.memory_blocks:
        assert begun == {"mark/000000000079", "mark/000000000087"}
        new |= {"memory", "mark/000000000087"}
    assert put.keys() == {f"window/{start:012d}-{start + 5:012d}", *new}
    assert keep == {
        *(["sinks"] if config.sinks else []),
        "level/fast",
        *(f"window/{p.start:012d}-{p.end:012d}" for p in after.pieces[:-1]),
        *(begun - new),
    }


@each_config
def test_a_turn_that_reads_nothing_stores_nothing_again(config):
    before = session(config=config)

    _, put, keep = stored(replace(before, carry=()), before)

    assert put == {}
    assert keep == stored(before)[1].keys()


@each_config
def test_what_one_turn_kept_and_put_is_all_that_the_next_needs(config):
    state, blobs = State(), {}
    for turn in range(9):
        before, state = state, take_turn(state, (3 + turn, 6), config=config)
        if turn % 3 == 1:
            moved = learned(state, "fast", turn, config=config)
            state = trim(replace(moved, due=()), config)
        facts, put, keep = stored(state, before)
        blobs = {name: blob for name, blob in blobs.items() if name in keep} | put

        assert_equal(restored(facts, blobs, config=config), state)


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
    assert_equal(again.levels, state.levels)  # deltas are float32 in any, as memories are
    pairs = zip((state, *state.marks), (again, *again.marks), strict=True)
    for old, new in ((a.memories, b.memories) for a, b in pairs):
        assert new.live.dtype == new.anchor.dtype == torch.float32
        assert_equal((new.live, new.anchor), (old.live, old.anchor))
        assert_equal(new.ring, old.ring.to(there))


# --- damage -----------------------------------------------------------------------------------

GOOD, BLOBS, _ = stored(take_turn(session(), (5,)))
NAMES = sorted(BLOBS)
EVERY_TENSOR = [
    (name, part)
    for name in NAMES
    for part, tensor in load_tensors(BLOBS[name]).items()
    if tensor.numel()
]
PIECES = [name for name in NAMES if name.startswith("window/")]


def changed(name, **tensors):
    return {**BLOBS, name: save_tensors({**load_tensors(BLOBS[name]), **tensors})}


def assert_damaged(name, blobs, facts=GOOD):
    with pytest.raises(StateError) as found:
        restored(facts, blobs)
    assert repr(name) in str(found.value)


def test_the_session_to_be_damaged_has_every_kind_of_blob():
    assert len(PIECES) > 2
    assert sum(name.startswith("mark/") for name in NAMES) > 1
    assert {name.partition("/")[0] for name in NAMES} == {
        "sinks",
        "window",
        "level",
        "memory",
        "mark",
    }
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


def test_a_chunk_that_cannot_be_read_again_for_want_of_a_mark_is_named():
    assert_damaged("mark/000000000079", BLOBS, {**GOOD, "marks": GOOD["marks"][1:]})


def test_memories_are_no_part_of_a_model_that_only_attends():
    config = CONFIGS["attention"]
    facts, blobs, _ = stored(session(config=config))

    with pytest.raises(StateError, match="'mark/000000000079': the model has no memories"):
        restored({**facts, "marks": [79]}, {**BLOBS, **blobs}, config=config)


def test_another_format_is_refused():
    with pytest.raises(StateError, match="format 3"):
        restored({**GOOD, "format": 3}, BLOBS)


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


# --- damage to what is written in fewer bits ----------------------------------------------------


def in_form(form):
    storage = Storage(memory=form, every=form)
    return dump(settle(take_turn(session(), (5,)), None, storage), None, storage)[1]


INT8, BF16 = in_form(Form.INT8), in_form(Form.BF16)
SCALES = [
    (name, part)
    for name, blob in sorted(INT8.items())
    for part, tensor in load_tensors(blob).items()
    if part.endswith(".scale") and tensor.numel()
]
each_scale = pytest.mark.parametrize(("name", "part"), SCALES)


def scaled(name, part, change):
    """Return the int8 blobs with something done to the scales of one tensor."""
    tensors = load_tensors(INT8[name])
    tensors[part] = change(tensors[part].clone())
    return {**INT8, name: save_tensors({key: t for key, t in tensors.items() if t is not None})}


def last(value):
    def change(scale):
        scale.view(-1)[-1] = value
        return scale

    return change


def test_the_session_in_fewer_bits_has_scales_of_levels_of_the_memory_and_of_marks():
    assert {name.partition("/")[0] for name, _ in SCALES} == {"level", "memory", "mark"}
    restored(GOOD, INT8)
    restored(GOOD, BF16)


@each_scale
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: None, "found nothing"),
        (lambda scale: scale[:-1], r"should be \(.*\), found \("),
        (lambda scale: scale[..., None], r"should be \(.*\), found \("),
        (last(torch.nan), "is not finite"),
        (last(torch.inf), "is not finite"),
        (last(-1e-9), "is not a scale"),
        (lambda scale: scale.to(torch.int8), "is not a scale"),
    ],
    ids=["missing", "a row short", "an axis more", "nan", "infinite", "negative", "no numbers"],
)
def test_scales_that_cannot_be_are_named(name, part, change, message):
    blobs = scaled(name, part, change)

    assert_damaged(name, blobs)
    with pytest.raises(StateError, match=f"{part} {message}|{part} .*{message}"):
        restored(GOOD, blobs)


@each_scale
def test_a_scale_that_makes_numbers_too_large_is_named(name, part):
    assert_damaged(name, scaled(name, part, lambda scale: torch.full_like(scale, 3e38)))


@each_scale
def test_codes_of_another_shape_are_named(name, part):
    whole = part.removesuffix(".scale")
    codes = load_tensors(INT8[name])[whole]
    tensors = {**load_tensors(INT8[name]), whole: torch.cat([codes, codes[:1]])}

    assert_damaged(name, {**INT8, name: save_tensors(tensors)})


@pytest.mark.parametrize("name", [name for name in NAMES if INT8[name] != BLOBS[name]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_in_bfloat16_that_is_not_finite_is_named(name, value):
    for part, tensor in load_tensors(BF16[name]).items():
        if tensor.dtype is torch.bfloat16 and tensor.numel():
            tensor.view(-1)[-1] = value
            tensors = {**load_tensors(BF16[name]), part: tensor}
            assert_damaged(name, {**BF16, name: save_tensors(tensors)})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([INT8, BF16]), st.sampled_from(NAMES), st.integers(0), st.integers(1, 255))
def test_a_changed_byte_in_fewer_bits_is_only_a_number_too_or_an_error(blobs, name, at, by):
    damaged = bytearray(blobs[name])
    damaged[at % len(damaged)] ^= by

    try:
        restored(GOOD, {**blobs, name: bytes(damaged)})
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


@each_config
@settings(max_examples=25, deadline=None)
@given(plan=st.lists(turns, min_size=1, max_size=6))
def test_after_any_turns_the_pieces_reach_back_to_the_horizon_and_are_stored_whole(config, plan):
    state, everything = State(), []
    for lengths, weight, then in plan:
        begin = state.position
        for length in lengths:
            everything.append(piece_of(begin, length, config=config, weight=weight))
            begin += length
        before, state = state, take_turn(state, lengths, config=config, weight=weight)
        if then == "consolidate":
            state = trim(replace(state, due=()), config)

        oldest = max(horizon(state.position, state.due, config), 0)
        kept = join(between(state.pieces, oldest, state.position))
        read = join(between(everything, oldest, state.position))
        assert_equal(kept, read)
        first = between(everything, 0, config.sinks)
        assert_equal(state.sinks, join(first) if first else None)
        begins = {max(due.start - 1, 0) for due in state.due} - {0}
        if config.memory_blocks:
            assert {mark.position for mark in state.marks} >= begins
        # all but the oldest of the turns are within reach
        assert all(p.end > oldest for p in state.pieces)
        facts, put, keep = stored(state, before)
        assert_equal(restored(facts, dump(before, None)[1] | put, config=config), state)
        assert keep <= dump(before, None)[1].keys()


def test_a_piece_must_begin_where_the_session_is():
    state = take_turn(State(), (5,))

    with pytest.raises(ValueError, match="starts at 6, the session is at 5"):
        extend(state, piece_of(6, 2), CONFIG)


@each_config
def test_a_long_turn_is_stored_without_what_nobody_can_reach(config):
    state = take_turn(State(), (32,) * 9, config=config, weight=0.0)

    (piece,) = state.pieces
    assert piece.start == horizon(state.position, (), config)
    assert piece.end == 288


@each_config
def test_bytes_counts_every_tensor_once(config):
    state = session(config=config)
    _, put, _ = stored(state)
    numbers = sum(t.nbytes for blob in put.values() for t in load_tensors(blob).values())

    pieces = len(state.pieces) + (state.sinks is not None)
    assert state.bytes == numbers - 8 * pieces  # `start` is no tensor in RAM


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


def test_what_does_not_last_goes_with_the_window():
    config = tiny_config()
    levels = tuple(replace(each, lasts=each.name == "slow") for each in config.levels)
    config = replace(config, levels=levels)
    delta = {"blocks.3.mlp.down": torch.ones(2, 2)}
    learned = {name: LevelState(delta, updates=3, movement=0.1) for name in ("fast", "slow")}
    state = State(position=9, carry=((1, 0.0),), levels=learned)

    cleared = state.cleared(config)

    assert (cleared.position, cleared.carry, cleared.pieces, cleared.due) == (0, (), (), ())
    assert cleared.levels["slow"] is learned["slow"]
    assert not cleared.levels["fast"].delta
    assert cleared.levels["fast"].updates == 3
    assert cleared.levels["fast"].movement == 0.0
    facts, blobs, _ = dump(State(levels={"fast": cleared.levels["fast"]}), None)
    again = restore(facts, blobs, config, torch.float32)
    assert not again.levels["fast"].delta
