"""A model whose memories are plain Titans: a stream may be cut anywhere, kept, and taken up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_runtime.config import ConfigError, Form, HopeConfig, MemoryConfig, Rule
from hope_runtime.lanes import Lanes
from hope_runtime.layers import memory
from hope_runtime.model import Hope
from hope_runtime.state import State
from hope_runtime.training.initial import initial
from hope_runtime.weights.random import tiny_native

MEMORY = MemoryConfig(heads=2, head_width=8, rule=Rule(chunk=4), form=Form.TITANS)
CONFIG = tiny_native(memory=MEMORY, levels=())


@pytest.fixture(scope="module")
def model():
    return Hope(CONFIG, {n: t.double() for n, t in initial(CONFIG).items()}, dtype=torch.float64)


def read(model, tokens, start, past, lengths=None):
    at = torch.full((len(tokens),), start)
    return model.run(
        model.embed(tokens), at, past, [dict[str, torch.Tensor]()] * len(tokens), lengths=lengths
    )


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("cut", [1, 4, 7, 20])
def test_splitting_a_stream_changes_nothing(model, tokens, cut):
    whole = read(model, tokens, 0, model.nothing(2))
    first = read(model, tokens[:, :cut], 0, model.nothing(2))
    past = model.nothing(2)._replace(memories=first.memories)
    second = read(model, tokens[:, cut:], cut, past)

    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], 1), whole.hidden)
    for found, wanted in zip(second.memories, whole.memories, strict=True):
        torch.testing.assert_close(found, wanted)


def test_filler_writes_nothing(model, tokens):
    own = read(model, tokens[:, :9], 0, model.nothing(2))
    padded = read(model, tokens, 0, model.nothing(2), torch.tensor([9, 9]))

    for found, wanted in zip(padded.memories, own.memories, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_velocity_is_part_of_what_a_session_holds(model, tokens):
    after = read(model, tokens, 0, model.nothing(2)).memories

    assert after.velocity.shape == (2, 2, 2, 8, 8)
    assert after.velocity.abs().max() > 0
    hope = memory.empty(replace(MEMORY, form=Form.HOPE), 2, torch.zeros(1))
    assert hope.velocity.shape == (2, 0, 8, 8)


def test_a_lane_gives_back_what_it_took(model, tokens):
    held = read(model, tokens, 0, model.nothing(2))
    lanes = Lanes(model, 2)
    lanes.append(0, torch.zeros(2, dtype=torch.int64), held)
    taken = lanes.memories(1)
    lanes.load(0, State(memories=taken))

    for found, wanted in zip(lanes.memories(0), held.memories.session(1), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_form_is_part_of_the_configuration_and_of_a_sessions_fingerprint():
    assert HopeConfig.from_json(CONFIG.to_json()) == CONFIG
    hope = replace(CONFIG, memory=replace(MEMORY, form=Form.HOPE))
    assert hope.learning_digest != CONFIG.learning_digest
    with pytest.raises(ConfigError, match="adaptive_query"):
        replace(MEMORY, adaptive_query=True)
    with pytest.raises(ConfigError, match="nonsense"):
        HopeConfig.from_json(
            {
                **CONFIG.to_json(),
                "memory": {"heads": 1, "head_width": 1, "rule": {}, "form": "nonsense"},
            }
        )
