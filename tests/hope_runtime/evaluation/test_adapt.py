"""Reading helps with what is read, and what reading costs elsewhere is seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hope_runtime.config import ConfigError
from hope_runtime.evaluation.adapt import (
    Adaptation,
    adapt,
    changed,
    sources,
    unrelated,
    windowed,
)
from hope_runtime.evaluation.reading import Loss
from hope_runtime.model import Hope
from hope_runtime.training.corpora import clean_chat
from hope_runtime.weights.random import random_checkpoint, tiny_config

CHATS = [clean_chat([f"Hello, {name}", "Hi, how are you?", "All well.", "Good."]) for name in "ABC"]


@pytest.fixture(scope="module")
def tiny():
    found = random_checkpoint(tiny_config())
    return Hope(found.config, found.weights), found.tokenizer


def test_a_text_that_repeats_itself_is_learned_at_every_window(tiny):
    model, tokenizer = tiny
    read = sources(tokenizer, [("verse", "so it goes, " * 40)], CHATS, 200)
    heard = []

    found = list(
        adapt(
            model,
            tokenizer,
            read,
            unrelated(tokenizer, CHATS, 60),
            [16, 32],
            lambda text, at: heard.append((text, at)),
        )
    )

    assert [(row.source, row.window) for row in found] == [
        ("verse", 16),
        ("chats", 16),
        ("verse", 32),
        ("chats", 32),
    ]
    for row in found:
        assert row.static.tokens == row.learning.tokens
        assert row.moved.keys() == {"fast", "slow"}
    assert found[0].change < -0.02
    assert found[0].static.perplexity != found[2].static.perplexity
    assert ("verse, window 16, learning", 200) in heard


def test_levels_that_do_not_move_change_nothing(tiny):
    model, tokenizer = tiny
    still = windowed(model, 32)
    still.config = changed(still.config, {"rate": 0.0})
    read = sources(tokenizer, [("verse", "so it goes, " * 40)], [], 100)

    [row] = adapt(still, tokenizer, read, unrelated(tokenizer, CHATS, 60), [32])

    assert row.change == pytest.approx(0.0, abs=1e-6)
    assert row.other_change == 0.0
    assert not row.worse


def test_an_unrelated_chat_that_got_worse_is_told():
    one = Loss(100 * math.log(8.0), 100)
    row = Adaptation("a", 32, one, one, one, Loss(100 * math.log(8.1), 100), 0.006, {})

    assert row.worse
    assert row.to_json()["other_change"] == pytest.approx(0.0125)
    assert not replace(row, other_error=0.007).worse  # it may be chance
    assert not replace(row, other_after=Loss(100 * math.log(7.9), 100)).worse


def test_the_unrelated_chat_is_another_one(tiny):
    _, tokenizer = tiny
    [read] = sources(tokenizer, [], CHATS[:2], 80)
    other = unrelated(tokenizer, CHATS, 80)

    assert b"Hello, A" in bytes(t.id for t in read.tokens if t.counted)
    assert b"Hello, C" in bytes(t.id for t in other if t.counted)


def test_a_window_shorter_than_a_chunk_is_refused(tiny):
    with pytest.raises(ConfigError, match="longer than the window"):
        windowed(tiny[0], 8)
