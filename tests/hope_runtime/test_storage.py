"""Sessions in fewer bits: what was committed is the state, whether it is read again or not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors

from hope_runtime.config import LevelConfig, Variant
from hope_runtime.engine import Consolidation, Engine, Turn
from hope_runtime.model import Hope
from hope_runtime.own_levels import add_level
from hope_runtime.report import Finished, Learned
from hope_runtime.sampling import Sampling
from hope_runtime.state import State, dump, restore, settle
from hope_runtime.storage import EXACT, Form, Storage, packed, rounded, unpacked
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_mixed, tiny_native

LOSSY = (Form.BF16, Form.INT8)
each_form = pytest.mark.parametrize("form", LOSSY)

# --- tensors ------------------------------------------------------------------------------------

SHAPES = {
    "matrix": (12, 7),
    "thin": (9, 2),
    "memories": (2, 3, 8, 8),
    "no velocity": (2, 0, 8, 8),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_read_back_is_what_rounding_gave(form, shape):
    tensor = draw(*shape)

    near = rounded(tensor, form)

    assert torch.equal(unpacked("x", packed("x", tensor, form)), near)
    assert torch.equal(unpacked("x", packed("x", near, form)), near)
    torch.testing.assert_close(near, tensor, rtol=0.0, atol=0.02)


def test_float32_is_left_alone():
    tensor = draw(3, 4)

    assert packed("x", tensor, Form.FP32) == {"x": tensor}
    assert rounded(tensor, Form.FP32) is tensor


def test_bfloat16_is_torch_s():
    assert packed("x", draw(3, 4), Form.BF16)["x"].dtype is torch.bfloat16
    assert torch.equal(rounded(draw(3, 4), Form.BF16), draw(3, 4).bfloat16().float())


@each_form
def test_a_model_in_float64_stays_in_it(form):
    near = rounded(draw(3, 4).double(), form)

    assert near.dtype is torch.float64
    assert torch.equal(near, rounded(draw(3, 4), form).double())


@each_form
@given(seed=st.integers(0, 1 << 30), low=st.integers(-170, 125), spread=st.integers(0, 40))
def test_rounding_again_changes_no_bit(form, seed, low, spread):
    """Whatever the sizes of numbers and rows, so small that they vanish, or near the largest."""
    powers = low + spread * torch.rand(16, 1, generator=torch.Generator().manual_seed(seed))
    tensor = draw(16, 5, seed=seed).double() * torch.exp2(powers.double())
    once = rounded(tensor.clamp(-3e38, 3e38).float(), form)

    assert torch.equal(bits(rounded(once, form)), bits(once))
    again = packed("x", once, form)
    assert all(torch.equal(again[n], t) for n, t in packed("x", rounded(once, form), form).items())


def test_every_scale_is_found_again_in_what_it_makes_of_the_largest_code():
    """All mantissas; exponents only shift them."""
    mantissas = torch.arange(1 << 23, dtype=torch.int32)
    for exponent in (0x00F, 0x07F, 0x0FD):
        largest = (mantissas + (exponent << 23)).view(torch.float32)[:, None]
        once = rounded(largest, Form.INT8)
        assert torch.equal(
            packed("", once, Form.INT8)[".scale"], packed("", largest, Form.INT8)[".scale"]
        )


def test_a_row_s_largest_number_has_the_largest_code_and_others_are_off_by_half_a_step():
    tensor = draw(64, 33) * torch.exp2(draw(64, 1, seed=1) * 10)

    found = packed("x", tensor, Form.INT8)

    assert found["x"].dtype is torch.int8
    assert found["x.scale"].shape == (64,)
    assert torch.equal(found["x"].abs().amax(-1), torch.full((64,), 127, dtype=torch.int8))
    step = found["x.scale"][:, None]
    assert bool(((unpacked("x", found) - tensor).abs() <= 0.5001 * step).all())


@each_form
def test_a_row_of_zeros_comes_back_as_zeros_and_next_to_nothing_as_nothing(form):
    tensor = torch.stack([torch.zeros(4), torch.tensor([0.0, 1e-44, -3e-45, 0.0]), draw(4)])

    near = rounded(tensor, form)

    assert not near[0].any()
    assert torch.equal(near[2], rounded(tensor[2:], form)[0])
    assert float(near[1].abs().max()) < 1e-43


# --- the setting --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fast", "slow", "memory"),
    [
        ("", "fp32", "fp32", "fp32"),
        ("bf16", "bf16", "bf16", "fp32"),
        ("memory=int8", "fp32", "fp32", "int8"),
        ("slow=int8,fast=bf16,memory=fp32", "bf16", "int8", "fp32"),
        (" int8 , fast = fp32, memory=bf16,", "fp32", "int8", "bf16"),
    ],
)
def test_the_setting_says_what_each_part_is_written_in(text, fast, slow, memory):
    found = Storage.parse(text, ["fast", "slow"])

    assert (found.level("fast"), found.level("slow"), found.memory) == (fast, slow, memory)


def test_a_level_that_a_session_has_for_itself_is_written_as_every_level():
    assert Storage.parse("bf16,fast=int8", ["fast"]).level("its own") is Form.BF16


def test_nothing_said_is_fp32():
    assert Storage.parse("", ["fast"]) == Storage() == EXACT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slwo=int8", "'slwo=int8': there is no 'slwo'; known: fast, slow, memory"),
        ("int4", "'int4': no form 'int4'; known: fp32, bf16, int8"),
        ("slow=INT8", "'slow=INT8': no form 'INT8'"),
        ("slow=", "'slow=': no form ''"),
        ("=int8", "'=int8': there is no ''"),
        ("slow", "'slow': no form 'slow'"),
        ("slow=int8,slow=bf16", "twice what slow is in"),
        ("int8,bf16", "twice what every level is in"),
    ],
)
def test_what_the_setting_cannot_mean_is_named(text, message):
    with pytest.raises(ValueError, match="storage") as found:
        Storage.parse(text, ["fast", "slow"])

    assert message in str(found.value)


# --- sessions -----------------------------------------------------------------------------------

FAST = LevelConfig("fast", 8, (3,), rate=0.01, retain=0.99)
SLOW = LevelConfig("slow", 16, (2,), rate=0.01, retain=0.999)
NESTED = {"variant": Variant.NESTED}
CONFIGS = {
    "attention": tiny_config(levels=(FAST, SLOW)),
    "low rank": tiny_config(levels=(replace(FAST, rank=3), replace(SLOW, rank=5))),
    "adam": tiny_config(levels=(replace(FAST, optimiser="adam"), SLOW)),
    "nested": tiny_config(levels=(replace(FAST, start_rate=0.3), SLOW), **NESTED),
    "nested, low rank": tiny_config(
        levels=(replace(FAST, start_rate=0.3, rank=4), replace(SLOW, rank=4)), **NESTED
    ),
    "nested without a start": tiny_config(levels=(FAST, SLOW), **NESTED),
    "memory": tiny_native(),
    "both": tiny_mixed(),
}
STORAGES = {
    "bf16": Storage(memory=Form.BF16, every=Form.BF16),
    "int8": Storage(memory=Form.INT8, every=Form.INT8),
    "mixed": Storage(memory=Form.BF16, levels={"fast": Form.INT8}),
    "fp32": EXACT,
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


class Served:
    """A session as a server has it: a commit after every turn, another after what that left due."""

    def __init__(self, config, *, restarts, dtype=torch.float32):
        checkpoint = random_checkpoint(config)
        self.model = Hope(config, checkpoint.weights, dtype=dtype)
        self.engine = Engine(self.model, checkpoint.tokenizer, lanes=1, clock=lambda: 0.0)
        self.restarts = restarts
        self.state = State()
        self.blobs = {}
        self.facts = {}
        self.learned = 0

    def take(self, length, storage, *, seed, most=0):
        """Read some tokens and say some; with `most`, chunks are left due for a second commit."""
        tokens = torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed))
        given = tuple((token, 1.0) for token in tokens.tolist())
        sampling = Sampling(seed=1)
        turn = Turn("t", self.state, given, ((10, 0.0),), most, 1.0, sampling, (), True)
        self.run(turn, storage)
        if self.state.due:
            self.run(Consolidation("c", self.state), storage)

    def run(self, job, storage):
        self.engine.submit(job)
        facts = []
        while not self.engine.idle:
            facts += self.engine.step()
        self.learned += sum(isinstance(fact, Learned) for fact in facts)
        (finished,) = [fact for fact in facts if isinstance(fact, Finished)]
        self.commit(finished.state, storage)

    def commit(self, state, storage):
        before = self.state if self.facts else None
        state = settle(state, before, storage)
        facts, put, keep = dump(state, before, storage)
        self.facts = json.loads(json.dumps(facts))
        self.blobs = {name: blob for name, blob in self.blobs.items() if name in keep} | put
        assert self.blobs.keys() == keep | put.keys()
        assert_same(state, self.stored)
        self.state = self.stored if self.restarts else state

    @property
    def stored(self):
        return restore(self.facts, self.blobs, self.model.config, self.model.dtype)


def assert_same(one, other):
    """Compare states bit for bit, whatever form they are stored in."""
    assert dump(one, None)[:2] == dump(other, None)[:2]


def talked(config, storage, turns=4, **options):
    served = Served(config, restarts=False, **options)
    for turn, length in enumerate((13, 19, 5, 24)[:turns]):
        served.take(length, storage, seed=turn, most=3 * (turn % 2))
    return served


def dtypes(blob):
    return {name: tensor.dtype for name, tensor in load_tensors(blob).items()}


@each_config
@each_storage
def test_restarted_after_every_commit_or_never_a_session_goes_on_the_same(config, storage):
    never, always = Served(config, restarts=False), Served(config, restarts=True)
    waited = set()
    for turn, length in enumerate((13, 19, 5, 23, 12, 17)):
        for served in (never, always):
            served.take(length, storage, seed=turn, most=11 * (turn % 2))
        waited.add(len(never.state.marks))
        assert_same(never.state, always.state)

    assert never.learned == always.learned > 8
    assert bool(max(waited)) == bool(config.memory_blocks)


@each_storage
def test_a_model_in_bfloat16_or_float64_too(storage):
    for dtype in (torch.bfloat16, torch.float64):
        never, always = (Served(CONFIGS["both"], restarts=r, dtype=dtype) for r in (False, True))
        for turn, length in enumerate((13, 19, 23)):
            for served in (never, always):
                served.take(length, storage, seed=turn, most=5)
            assert_same(never.state, always.state)
        assert never.state.memories.ring.dtype is dtype


@each_config
def test_in_fp32_the_state_is_what_it_was_and_so_are_its_blobs(config):
    state = talked(config, EXACT).state

    assert settle(state, None, EXACT) is state
    assert dump(state, None, EXACT) == dump(state, None)
    for name, blob in dump(state, None)[1].items():
        assert set(dtypes(blob).values()) <= {torch.float32, torch.int64}, name


@each_config
@each_form
def test_settling_what_is_settled_changes_nothing(config, form):
    storage = Storage(memory=form, every=form)
    state = talked(config, storage).state

    assert settle(state, state, storage) is state
    assert_same(settle(state, None, storage), state)  # as when it is forked


@each_form
def test_only_what_a_turn_changed_is_rounded(form):
    storage = Storage(memory=form, every=form)
    before = talked(CONFIGS["both"], EXACT).state
    delta = {name: d + 1.0 for name, d in before.levels["fast"].delta.items()}
    moved = replace(before.levels["fast"], delta=delta)
    after = replace(before, levels={**before.levels, "fast": moved})

    settled = settle(after, before, storage)

    assert settled.levels["slow"] is before.levels["slow"]
    assert settled.memories is before.memories
    assert all(one is other for one, other in zip(settled.marks, before.marks, strict=True))
    for name, d in settled.levels["fast"].delta.items():
        assert torch.equal(d, rounded(delta[name], form))
        assert not torch.equal(d, delta[name])
    assert dump(settled, before, storage)[1].keys() == {"level/fast"}


@each_form
def test_the_setting_may_change_while_a_session_lives(form):
    """What was stored before stays as it was stored until it changes."""
    never, always = (Served(CONFIGS["both"], restarts=r) for r in (False, True))
    settings = [EXACT, Storage(memory=form, every=form), *STORAGES.values()]
    for turn, storage in enumerate(settings):
        for served in (never, always):
            served.take(5, storage, seed=turn, most=4)
        assert_same(never.state, always.state)

    kept = talked(CONFIGS["both"], STORAGES["int8"])
    kept.take(1, EXACT, seed=9)
    assert torch.int8 in dtypes(kept.blobs["level/slow"]).values()
    assert torch.int8 not in dtypes(kept.blobs["memory"]).values()
    assert_same(kept.state, kept.stored)


@each_form
def test_a_nested_level_that_has_just_begun_again_is_still_at_its_start(form):
    storage = Storage(every=form)
    served = Served(CONFIGS["nested"], restarts=False)
    served.take(16, storage, seed=0)
    fast = served.state.levels["fast"]

    assert fast.start
    assert fast.delta is fast.start
    again = served.stored.levels["fast"]
    assert again.delta is again.start
    assert set(dtypes(served.blobs["level/fast"]).values()) == {torch.float32}


@each_form
def test_what_a_level_begins_from_and_what_its_rule_remembers_stay_in_fp32(form):
    nested = replace(FAST, start_rate=0.3, optimiser="adam")
    served = Served(tiny_config(levels=(nested, SLOW), **NESTED), restarts=False)
    served.take(25, Storage(every=form), seed=0)

    found = dtypes(served.blobs["level/fast"])

    written = {Form.BF16: torch.bfloat16, Form.INT8: torch.int8}[form]
    aside = {name for name in found if name.startswith(("start/", "moments/"))}
    assert {name.partition("/")[0] for name in aside} == {"start", "moments"}
    assert {found[name] for name in aside} == {torch.float32, torch.int64}
    assert {found[name] for name in ("blocks.3.gate_up", "blocks.3.down")} == {written}


@each_form
def test_the_ring_of_a_memory_is_context_and_stays_as_it_is(form):
    state = talked(CONFIGS["memory"], EXACT).state

    settled = settle(state, None, Storage(memory=form))

    assert settled.memories.ring is state.memories.ring
    assert torch.equal(settled.memories.live, rounded(state.memories.live, form))
    assert torch.equal(settled.memories.anchor, rounded(state.memories.anchor, form))


@each_form
def test_a_mark_at_the_end_of_a_turn_holds_what_the_next_token_finds(form):
    served = Served(CONFIGS["both"], restarts=False)
    served.take(15, Storage(memory=form), seed=0)

    (mark,) = [mark for mark in served.state.marks if mark.position == 15]

    held = served.state.memories.blocks(len(served.state.memories.live) - len(mark.memories.live))
    for one, other in zip(mark.memories, held, strict=True):
        assert torch.equal(one, other)


def test_a_level_added_to_a_session_is_stored_like_every_other():
    config = tiny_config(levels=(FAST,), blocks=5)
    served = Served(replace(config, levels=(replace(FAST, blocks=(2, 3)),)), restarts=True)
    served.take(9, STORAGES["int8"], seed=0)
    model = served.model.config
    served.commit(add_level(served.state, replace(SLOW, blocks=(4,)), model), STORAGES["int8"])
    served.take(30, STORAGES["int8"], seed=1)

    assert served.state.levels["slow"].updates
    assert torch.int8 in dtypes(served.blobs["level/slow"]).values()


def test_fewer_bits_are_fewer_bytes():
    sizes = {}
    for name, storage in STORAGES.items():
        for part, blob in talked(CONFIGS["both"], storage).blobs.items():
            sizes[name, part] = len(blob)

    marks = [part for name, part in sizes if name == "fp32" and part.startswith("mark/")]
    assert marks
    for part in ("level/fast", "level/slow"):
        assert sizes["bf16", part] < 0.53 * sizes["fp32", part]
        assert sizes["int8", part] < 0.32 * sizes["fp32", part]
    for part in ("memory", *marks):  # here the ring weighs more than it would in a larger model
        assert sizes["int8", part] < sizes["bf16", part] < 0.7 * sizes["fp32", part]
