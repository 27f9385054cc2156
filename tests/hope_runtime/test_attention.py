"""Windowed attention with sinks: what a token sees, and at which distance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hope_runtime.config import RotaryScaling
from hope_runtime.lanes import Lanes
from hope_runtime.layers.attention import attend, frequencies, geometry, rotate, rotation
from hope_runtime.model import Hope
from hope_runtime.weights.random import random_checkpoint, tiny_config

CPU = torch.device("cpu")
SHAPES = {
    "some sinks": {"window": 16, "sinks": 3},
    "no sinks": {"window": 16, "sinks": 0},
    "odd window": {"window": 13, "sinks": 1},
    "more sinks than window": {"window": 4, "sinks": 7},
    "one key head": {"window": 16, "sinks": 3, "key_heads": 1},
    "as many key heads as heads": {"window": 16, "sinks": 3, "key_heads": 4},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def config_of(shape):
    return tiny_config(levels=(), blocks=2, **shape)


def tokens_of(count, seed=0):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def logits_in_calls(model, tokens, sizes):
    """Read tokens through a lane in calls of the given sizes, the last size again and again."""
    lanes, said, start = Lanes(model, 1), [], 0
    sizes = list(sizes)
    while start < len(tokens):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        part = tokens[start : start + size]
        at = torch.tensor([start])
        read = model.run(model.embed(part[None]), at, lanes.view(0, 1, start), [{}])
        lanes.append(0, at, read)
        said.append(model.logits(read.hidden[0]))
        start += len(part)
    return torch.cat(said)


@shapes
def test_far_beyond_the_window_the_model_agrees_with_its_definition(plain, shape):
    config = config_of(shape)
    checkpoint = random_checkpoint(config)
    model, tokens = Hope(config, checkpoint.weights), tokens_of(61)

    expected = plain(config, checkpoint.weights).read(tokens.tolist(), {})

    for sizes in [(1,), (3,), (1, 4, 2, 3)]:
        found = logits_in_calls(model, tokens, sizes)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_lies_outside_window_and_sinks_is_not_seen():
    config = config_of(SHAPES["some sinks"])  # 16 and 3
    model = Hope(replace(config, blocks=1), random_checkpoint(config).weights)
    tokens = tokens_of(40)

    def last(changed):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % 256
        return logits_in_calls(model, other, [5])[-1]

    seen = [i for i in range(40) if not torch.equal(last(i), last([]))]
    assert seen == [0, 1, 2, *range(24, 40)]


@pytest.mark.parametrize("start", [5, 10**9], ids=["early", "after a billion tokens"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_attend_agrees_with_a_loop_over_the_allowed_keys(plain, start, sinks):
    config = tiny_config(levels=(), window=9, sinks=sinks)
    reference = plain(config, {})
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    # what a ring holds: the sinks, then the window's keys in any order
    near = [p for p in range(start - 9, start) if p >= sinks]
    near = near[4:] + near[:4]
    positions = [*range(sinks), *near]
    old, old_values = draw(len(positions), 2, 8), draw(len(positions), 2, 8)
    query, key, value = draw(5, 4, 8), draw(5, 2, 8), draw(5, 2, 8)
    frequency = frequencies(config, CPU)
    rotated = rotate(old[None], rotation(torch.tensor([positions]), frequency)).transpose(1, 2)
    past = rotated, old_values[None].transpose(1, 2)
    place = geometry(
        torch.tensor([start]), 5, torch.tensor([positions]), frequency, window=9, sinks=sinks
    )

    found, _ = attend(query[None], key[None], value[None].transpose(1, 2), past, place, sinks=sinks)

    everything = dict(zip(positions, zip(old, old_values, strict=True), strict=True))
    everything |= {start + i: (key[i], value[i]) for i in range(5)}
    for i in range(5):
        now = start + i
        allowed = [p for p in everything if p <= now and (p > now - 9 or p < sinks)]
        expected = []
        for head in range(4):
            scores, values = [], []
            for p in allowed:
                distance = now - p if p > now - 9 else min(now, 9 + sinks - 1) - p
                turned = reference.rotate(query[i, head].double(), distance)
                scores.append(float(turned @ everything[p][0][head // 2].double()) / math.sqrt(8))
                values.append(everything[p][1][head // 2].double())
            weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
            expected.append(weights @ torch.stack(values))
        torch.testing.assert_close(found[0, i].double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_billion_tokens_on_rotation_still_tells_the_distance():
    frequency = frequencies(tiny_config(head_width=64), CPU)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 64, generator=generator) for _ in range(2))

    def score(now, before):
        turned = (
            rotate(x, rotation(torch.tensor([[p]]), frequency))
            for x, p in ((query, now), (key, before))
        )
        one, other = turned
        return float((one.double() * other.double()).sum())

    for distance in (0, 1, 17, 1023):
        far = score(10**9 + 7, 10**9 + 7 - distance)
        assert far == pytest.approx(score(distance, 0), abs=2e-5)


def test_the_model_after_a_billion_tokens_is_the_model_of_early_tokens():
    """Without sinks only distances count: the same tokens give the same logits anywhere."""
    config = config_of(SHAPES["no sinks"])
    model = Hope(config, random_checkpoint(config).weights)
    tokens = tokens_of(40)

    def read(first):
        lanes, said = Lanes(model, 1), []
        for i, token in enumerate(tokens):
            at = torch.tensor([first + i])
            read = model.run(model.embed(token[None, None]), at, lanes.view(0, 1, first + i), [{}])
            lanes.append(0, at, read)
            said.append(model.logits(read.hidden[0, -1]))
        return torch.stack(said)

    torch.testing.assert_close(read(10**9), read(0), rtol=1e-4, atol=1e-4)


@shapes
def test_later_tokens_change_no_bit_of_earlier_outputs(shape):
    config = config_of(shape)
    model = Hope(config, random_checkpoint(config).weights)
    tokens = tokens_of(48)
    other = torch.cat([tokens[:30], tokens_of(18, seed=1)])

    one = logits_in_calls(model, tokens, [4])
    two = logits_in_calls(model, other, [4])

    assert torch.equal(one[:30], two[:30])
    assert not torch.equal(one[30:], two[30:])


def test_each_group_of_query_heads_reads_its_own_key_head():
    """Changing the second key head leaves the first two of four query heads as they were."""
    frequency = frequencies(tiny_config(), CPU)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 6, heads, 8, generator=generator) for heads in (4, 2))
    value = torch.randn(1, 2, 6, 8, generator=generator)
    nothing = torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8)
    place = geometry(
        torch.tensor([0]), 6, torch.zeros(1, 0, dtype=torch.long), frequency, window=32, sinks=0
    )
    turned = key.clone()
    turned[:, :, 1] *= -1

    before, _ = attend(query, key, value, nothing, place, sinks=0)
    after, _ = attend(query, turned, value, nothing, place, sinks=0)

    same = (before == after).view(6, 4, 8).all(-1)
    assert same[:, :2].all()
    assert not same[1:, 2:].any()


def test_more_tokens_than_the_window_in_one_pass_are_refused():
    config = config_of(SHAPES["odd window"])
    model = Hope(config, random_checkpoint(config).weights)

    with pytest.raises(ValueError, match="at most 13 tokens"):
        logits_in_calls(model, tokens_of(14), [14])


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (
            RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            RotaryScaling("llama3", 32.0, 1.0, 4.0, 4096),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
        ),
        (RotaryScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    ],
    ids=["llama3", "llama3 of another length", "linear"],
)
def test_scaled_frequencies_are_those_of_transformers(scaling, parameters):
    theirs = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **parameters},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs)
    plain = frequencies(tiny_config(head_width=128, rotary_base=500000.0), CPU)

    found = frequencies(
        tiny_config(head_width=128, rotary_base=500000.0, rotary_scaling=scaling), CPU
    )

    assert factor == 1.0
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
    assert (found < plain).any()
