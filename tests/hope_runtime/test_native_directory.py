"""Directories of native models: what is written is what is read, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch

from hope_runtime import weights
from hope_runtime.config import ConfigError, HopeConfig, MemoryConfig, Rule
from hope_runtime.training.vocabulary import save_vocabulary, train_vocabulary
from hope_runtime.weights.checkpoint import CheckpointError
from hope_runtime.weights.native import read_native, write_native
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native


@pytest.fixture(scope="module")
def tokenizer():
    return train_vocabulary([], ["a text of some words"], size=300)


@pytest.fixture
def saved(tmp_path, tokenizer):
    config = tiny_native(vocabulary=tokenizer.vocabulary)
    path = tmp_path / "tiny-native"
    save_vocabulary(tokenizer, path)
    write_native(path, config, random_checkpoint(config).weights, context=64)
    return path


def test_what_is_written_is_what_is_read(saved, tokenizer):
    config = tiny_native(vocabulary=tokenizer.vocabulary)
    given = random_checkpoint(config).weights

    found = weights.read(saved)

    assert (found.name, found.config, found.context) == ("tiny-native", config, 64)
    assert found.tokenizer.to_json() == tokenizer.to_json()
    for name, tensor in given.items():
        exact = name.endswith(("_start", "_bias", "_modification", "_passage"))
        assert found.weights[name].dtype is (torch.float32 if exact else torch.bfloat16)
        torch.testing.assert_close(
            found.weights[name], tensor if exact else tensor.bfloat16(), rtol=0, atol=0
        )


def test_the_fingerprint_tells_models_apart(saved):
    before = read_native(saved).fingerprint
    assert read_native(saved).fingerprint == before

    about = json.loads((saved / "config.json").read_text())
    about["hope"]["memory"]["rule"]["chunk"] = 8
    (saved / "config.json").write_text(json.dumps(about))

    assert read_native(saved).fingerprint != before


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("blocks", 3, "'blocks.2.memory_norm' is missing"),
        ("width", 0, "width must be at least 1, not 0"),
        ("mixers", ["memory", "dream"], "'dream' is not a valid Mixer"),
        ("surprise", 1, "not a model's configuration"),
        ("memory", None, "need the memory's configuration"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_with_its_value(saved, part, value, sentence):
    about = json.loads((saved / "config.json").read_text())
    about["hope"][part] = value
    if part == "blocks":
        about["hope"]["mixers"].append("memory")
    (saved / "config.json").write_text(json.dumps(about))

    with pytest.raises(CheckpointError) as refused:
        weights.read(saved)

    assert sentence in str(refused.value)


def test_a_rule_that_is_not_safe_is_refused_when_the_model_is_read(saved):
    about = json.loads((saved / "config.json").read_text())
    about["hope"]["memory"]["rule"]["anchored"] = True
    (saved / "config.json").write_text(json.dumps(about))

    with pytest.raises(CheckpointError, match="blows up under adversarial input"):
        weights.read(saved)


def test_weights_that_are_not_finite_are_refused(saved, tokenizer):
    config = tiny_native(vocabulary=tokenizer.vocabulary)
    broken = dict(random_checkpoint(config).weights)
    broken["blocks.1.memory_passage"] = torch.full((2,), torch.nan)
    write_native(saved, config, broken, context=64)

    with pytest.raises(CheckpointError, match=r"'blocks\.1\.memory_passage' is not finite"):
        weights.read(saved)


def test_weights_that_are_cut_short_are_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        weights.read(saved)


@pytest.mark.parametrize("config", [tiny_config(), tiny_native()], ids=["attention", "memory"])
def test_a_configuration_survives_json(config):
    assert HopeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"anchored": True}, "the gradient at the anchor"),
        ({"decay_to_zero": True}, "decay to zero kills the projections"),
        ({"normalise_value": False}, "values that are not normalised"),
        ({"rate_max": 0.95}, "rate_max 0.95 with 2 erasures and retain_min 0.9"),
        ({"retain_max": 1.0}, "without retain_max < 1"),
        ({"memory_norm": None}, "nothing bounds the memory"),
        ({"target_norm": None}, "nothing bounds the memory"),
    ],
)
def test_a_rule_that_could_blow_up_or_die_is_a_reference_only(changes, why):
    with pytest.raises(ConfigError) as refused:
        Rule(**changes)
    assert why in str(refused.value)
    assert "reference=True" in str(refused.value)

    assert Rule(**changes, reference=True).unsafe is not None


def test_a_reference_rule_is_never_served():
    config = tiny_native(memory=MemoryConfig(2, 16, rule=Rule(anchored=True, reference=True)))

    assert config.unserved is not None
    assert "blows up" in config.unserved
    assert tiny_native().unserved is None
    assert tiny_config().unserved is None
