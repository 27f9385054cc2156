"""Levels of the operator's own, in place of the model's."""

import json

import pytest

from hope_runtime.config import ConfigError, LevelConfig
from server.loading import load
from server.settings import Settings

LEVEL = {
    "name": "deep", "chunk": 32, "blocks": [0, 1], "optimiser": "adam", "rate": 1e-3, "retain": 0.9,
}  # fmt: skip


def served(file):
    _, model, _, _ = load(
        Settings(model="random", device="cpu", threads=1, levels=file), lambda said: None
    )
    return model.config.levels


def test_levels_are_those_of_the_file(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps([LEVEL]))
    assert served(file) == (LevelConfig.from_json(LEVEL),)


def test_sessions_of_other_levels_belong_to_another_model(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps([LEVEL]))
    cards = [
        load(Settings(model="random", device="cpu", levels=levels), lambda said: None)[0]
        for levels in (None, file)
    ]
    assert cards[0].fingerprint != cards[1].fingerprint


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSON|Expecting"),
        ("[1]", "not a list of levels"),
        ("[]", "empty"),
        (json.dumps([{**LEVEL, "blocks": [77]}]), "77"),
        (json.dumps([{**LEVEL, "speed": 3}]), "speed"),
        (json.dumps([{**LEVEL, "optimiser": "magic"}]), "magic"),
        (json.dumps([{k: v for k, v in LEVEL.items() if k != "rate"}]), "rate"),
    ],
)
def test_a_file_that_holds_none_is_refused_with_the_reason(tmp_path, text, why):
    file = tmp_path / "levels.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as refused:
        served(file)
    assert str(file) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        served(tmp_path / "nowhere.json")
