"""Models that remember instead of attending, held against five explicit memories a head.

The reference (`plain`) is float64, one token after another, every memory a matrix of its own; the
model keeps one matrix a head and works in chunks, in batches, and in calls of any length.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_runtime.config import HopeConfig, MemoryConfig, Mixer, Rule, Variant
from hope_runtime.engine import Consolidation, Engine, Turn
from hope_runtime.lanes import Lanes
from hope_runtime.layers.cms import mlp_name
from hope_runtime.layers.memory import Memories
from hope_runtime.model import Hope
from hope_runtime.report import Finished
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.weights.random import random_checkpoint, tiny_mixed, tiny_native

EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
TOKENS = torch.randint(0, 259, (75,), generator=torch.Generator().manual_seed(3)).tolist()


def remembering(heads=2, head_width=16, *, taps=4, adaptive_query=False, **rule):
    """Return the configuration of memories, with changes to the rule of the tiny model."""
    return MemoryConfig(heads, head_width, taps, adaptive_query, Rule(**{"chunk": 4, **rule}))


NATIVE = {
    "native": tiny_native(),
    "one head, one MLP a block": tiny_native(chain=1, levels=(), memory=remembering(1, 32)),
    "three heads, three MLPs": tiny_native(chain=3, memory=remembering(3, 8)),
    "MLPs beside each other": tiny_native(chain=3, variant=Variant.INDEPENDENT),
    "token by token": tiny_native(memory=remembering(chunk=1)),
    "chunks of 32": tiny_native(memory=remembering(chunk=32)),
    "adaptive queries, one tap": tiny_native(memory=remembering(adaptive_query=True, taps=1)),
    "limits that bind": tiny_native(memory=remembering(target_norm=0.3, memory_norm=0.5)),
    "a head of its own": tiny_native(tied_head=False),
}
MIXED = {
    "attention, then memory": tiny_mixed(window=8, sinks=2, levels=()),
    "memory, then attention": tiny_mixed(
        window=8,
        sinks=0,
        levels=(),
        mixers=(Mixer.MEMORY, Mixer.ATTENTION) * 2,
        memory=remembering(3, 8, chunk=32),
        chain=2,
        variant=Variant.INDEPENDENT,
    ),
}
CONFIGS = NATIVE | MIXED
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_dtype = pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])


def model_of(config: HopeConfig, dtype=torch.float64) -> Hope:
    return Hope(config, random_checkpoint(config).weights, dtype=dtype)


def deltas_of(config: HopeConfig, dtype=torch.float64, seed=5):
    """Return what a session might have learned at every MLP of every other block."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for i in range(0, config.blocks, 2):
        for name in (mlp_name(i, place) for place in range(config.chain)):
            for part, shape in (
                ("gate_up", (2 * config.hidden, config.width)),
                ("down", (config.width, config.hidden)),
            ):
                drawn = 0.05 * torch.randn(shape, generator=generator)
                deltas[f"{name}.{part}"] = drawn.to(dtype)
    return deltas


class Reader:
    """Sessions on lanes that read tokens without anything learned in between."""

    def __init__(self, model: Hope, count=1, deltas=None) -> None:
        self.model = model
        self.lanes = Lanes(model, count)
        self.positions = [0] * count
        self.deltas = deltas or [{} for _ in range(count)]

    @torch.no_grad()
    def read(self, parts, first=0):
        """Let lanes from `first` on read their parts in one pass; return what each found."""
        rows = range(first, first + len(parts))
        start = torch.tensor([self.positions[row] for row in rows])
        past = self.lanes.view(first, first + len(parts), int(start.max()))
        lengths = [len(part) for part in parts]
        filled = [part + [0] * (max(lengths) - len(part)) for part in parts]
        own = torch.tensor(lengths) if min(lengths) < max(lengths) else None
        x = self.model.embed(torch.tensor(filled))
        deltas = [self.deltas[row] for row in rows]
        found = self.model.run(x, start, past, deltas, lengths=own)
        self.lanes.append(first, start, found, lengths)
        for row, length in zip(rows, lengths, strict=True):
            self.positions[row] += length
        return [found.hidden[b, :length] for b, length in enumerate(lengths)]

    def whole(self, tokens, *ends):
        """Read tokens in calls that end at `ends`; return their hidden states."""
        cuts = sorted({0, len(tokens), *ends})
        return torch.cat([self.read([tokens[a:b]])[0] for a, b in pairwise(cuts)])

    def memories(self, row=0) -> Memories:
        found = self.lanes.memories(row)
        assert found is not None
        return found


def fitting(config, tokens):
    """Return the fewest calls that a window lets a text be read in."""
    return range(config.window, len(tokens), config.window) if config.attention_blocks else ()


def assert_close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)


def assert_same_memories(one: Memories, other: Memories, tolerance):
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, tolerance)


@each_dtype
@each_config
def test_logits_are_those_of_explicit_memories_read_token_by_token(plain, config, dtype):
    checkpoint, deltas = random_checkpoint(config), deltas_of(config, dtype)
    reference = plain(config, checkpoint.weights)
    expected = reference.read(TOKENS, deltas)
    reader = Reader(Hope(config, checkpoint.weights, dtype=dtype), deltas=[deltas])

    logits = reader.model.logits(reader.whole(TOKENS, *fitting(config, TOKENS)))

    assert float(expected.std()) > 0.1  # a model that says something
    assert logits.dtype == dtype
    assert_close(logits, expected, EXACT[dtype])
    held = reader.memories()
    for kept, block in enumerate(config.memory_blocks):
        _, live, anchor = reference.history[block][-1]
        eye = torch.eye(held.live.shape[-1], dtype=torch.float64)
        assert float((live["common"] - eye).norm()) > 0.1  # a memory that holds something
        assert_close(held.live[kept], live["common"] - eye, EXACT[dtype])
        assert_close(held.anchor[kept], anchor["common"] - eye, EXACT[dtype])
        inputs = [seen for seen, _, _ in reference.history[block]]
        taps = config.memory.taps - 1
        if taps:
            assert_close(held.ring[kept], torch.stack(inputs[-taps:]), EXACT[dtype])


def test_the_limits_that_bind_do_bind(plain):
    config = CONFIGS["limits that bind"]
    tokens = TOKENS[: -(len(TOKENS) % 4)]  # to the end of a chunk
    free = replace(config, memory=remembering())
    sizes = []
    for each in (config, free):
        reader = Reader(model_of(each))
        reader.whole(tokens)
        sizes.append(torch.linalg.vector_norm(reader.memories().live, dim=(-2, -1)))

    assert float(sizes[0].max()) == pytest.approx(0.5)
    assert float(sizes[1].min()) > 0.5


@each_config
def test_no_token_hears_of_a_later_one(config):
    """In one call of fixed shape: not a bit of what came before changes."""
    tokens = TOKENS[: config.window] if config.attention_blocks else TOKENS
    model = model_of(config, torch.float32)
    before = Reader(model).read([tokens])[0]
    for changed in (1, 4, 5, len(tokens) // 2, len(tokens) - 1):
        other = [*tokens[:changed], *((token + 7) % 256 for token in tokens[changed:])]
        after = Reader(model).read([other])[0]

        assert torch.equal(after[:changed], before[:changed])
        assert not torch.equal(after[changed:], before[changed:])


SPLIT = {**MIXED, **{name: NATIVE[name] for name in ("native", "token by token", "chunks of 32")}}


@cache
def whole_of(name, dtype):
    config = SPLIT[name]
    reader = Reader(model_of(config, dtype))
    return reader.whole(TOKENS, *fitting(config, TOKENS)), reader.memories(), reader.model


@each_dtype
@pytest.mark.parametrize("name", SPLIT)
@settings(max_examples=15, deadline=None)
@given(ends=st.sets(st.integers(1, len(TOKENS) - 1), max_size=len(TOKENS) - 1))
def test_however_a_text_is_cut_into_calls_all_is_the_same(name, dtype, ends):
    expected, memories, model = whole_of(name, dtype)
    reader = Reader(model)

    found = reader.whole(TOKENS, *ends, *fitting(SPLIT[name], TOKENS))

    assert_close(found, expected, EXACT[dtype])
    assert_same_memories(reader.memories(), memories, EXACT[dtype])


@each_dtype
@each_config
def test_a_batch_of_strangers_reads_as_each_alone(config, dtype):
    """At different places of their chunks, with texts of different length beside each other."""
    model = model_of(config, dtype)
    learned = [deltas_of(config, dtype, seed) if seed else {} for seed in range(4)]
    together, alone = (Reader(model, 4, learned) for _ in range(2))
    begun = [[TOKENS[:n]] for n in (1, 6, 7, 4)]
    for row, parts in enumerate(begun):
        for reader in (together, alone):
            reader.read(parts, row)
    for lengths in [(5, 1, 3, 8), (1, 1, 1, 1), (2, 8, 8, 1), (7, 7, 7, 7), (1, 1, 1, 1)]:
        parts = [TOKENS[-n - row :][:n] for row, n in enumerate(lengths)]

        batch = together.read(parts)

        for row, part in enumerate(parts):
            (single,) = alone.read([part], row)
            assert_close(batch[row], single, EXACT[dtype])
            assert_same_memories(together.memories(row), alone.memories(row), EXACT[dtype])


@pytest.mark.parametrize("name", ["native", "MLPs beside each other", "attention, then memory"])
def test_a_rate_of_zero_is_the_same_model_with_an_empty_memory_bit_for_bit(name):
    config = CONFIGS[name]
    weights = random_checkpoint(config).weights
    still = replace(config, memory=remembering(rate_max=0.0))
    resting = Reader(Hope(still, weights))
    emptied, learning = Reader(Hope(config, weights)), Reader(Hope(config, weights))
    for token in TOKENS[:20]:
        (found,), (expected,) = resting.read([[token]]), emptied.read([[token]])
        learning.read([[token]])
        assert emptied.lanes._memories is not None
        for matrices in (emptied.lanes._memories.live, emptied.lanes._memories.anchor):
            matrices.zero_()

        assert torch.equal(found, expected)
    assert float(resting.memories().live.abs().max()) == 0.0
    assert float(learning.memories().live.abs().max()) > 0.0


@each_config
def test_serving_and_learning_never_change_the_base(config):
    levels = tiny_native().levels if config.chain == 2 and config.memory_blocks == (0, 1) else ()
    config = replace(config, levels=levels)
    checkpoint = random_checkpoint(config)
    given = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    model = Hope(config, checkpoint.weights)
    held = list(tensors(model))
    before = [tensor.clone() for tensor in held]
    engine = Engine(model, checkpoint.tokenizer, lanes=2, clock=lambda: 0.0)
    state = State()
    for text in (b"a good deal of text to learn from", b"more", b"and more"):
        for job in (
            Turn("a", state, tuple((byte, 1.0) for byte in text), (), 9, 1.0, Sampling(), (), True),
            None,
        ):
            engine.submit(job or Consolidation("a", state))
            facts = []
            while not engine.idle:
                facts += engine.step()
            (state,) = [fact.state for fact in facts if isinstance(fact, Finished)]

    assert state.position > 40
    assert bool(state.deltas) == bool(config.levels)
    assert len(held) > len(given) // 2
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert all(torch.equal(tensor, given[name]) for name, tensor in checkpoint.weights.items())


def tensors(model):
    """Yield every tensor of a model."""
    yield from (model.embedding, model.norm, model.head)
    for block in model.blocks:
        parts = [block.shares, *(part for mlp in block.mlps for part in mlp)]
        if isinstance(block.mixer, tuple):
            parts += [*block.mixer[:-1], *block.mixer.weights]
        else:
            parts += [getattr(block.mixer, name) for name in block.mixer.__slots__]
        yield from (part for part in parts if isinstance(part, torch.Tensor))
