"""What is scored was not learned before, and scoring changes nothing."""

from __future__ import annotations

import pytest
import torch

from hope_runtime.evaluation.reading import NO_LOSS, Reader, conversation, document, handed
from hope_runtime.model import Hope
from hope_runtime.state import State
from hope_runtime.tokenizer import Role
from hope_runtime.training.corpora import clean_chat
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native

TEXT = "It was the best of times, it was the worst of times; the age of wisdom. " * 3
CHAT = clean_chat(["Hello there", "Hi, how are you?", "All well.", "Good to hear.", "And you?"])


def reader(config):
    found = random_checkpoint(config)
    return Reader(Hope(found.config, found.weights), found.tokenizer, lanes=4)


def total(losses):
    return sum((loss for _, loss in losses), NO_LOSS)


@pytest.fixture(params=[tiny_config(), tiny_native()], ids=["attention", "memory"])
def tiny(request):
    return reader(request.param)


def test_reading_piece_by_piece_without_learning_scores_as_at_once(tiny):
    tokens = document(tiny.tokenizer, TEXT, 100)

    found = total(tiny.score(State(), tokens, learn=False))

    at_once = tiny.judge(State(), [token.id for token in tokens])
    assert found.tokens == 99
    assert found.nats == pytest.approx(float(at_once.losses.sum()), rel=1e-5)


def test_the_loss_of_a_piece_does_not_depend_on_what_is_learned_from_it(tiny):
    """Up to the first consolidation learning changes nothing; after it, everything."""
    tokens = document(tiny.tokenizer, TEXT, 40)
    static = [loss.nats for _, loss in tiny.score(State(), tokens, learn=False)]
    learning = [loss.nats for _, loss in tiny.score(State(), tokens, learn=True)]

    assert learning[0] == static[0]  # tokens 1 to 8; the first chunk ends before the ninth is read
    assert all(a != b for a, b in zip(learning[1:], static[1:], strict=True))


def test_later_words_do_not_change_the_loss_of_earlier_ones(tiny):
    tokens = document(tiny.tokenizer, TEXT, 64)
    other = [*tokens[:40], *document(tiny.tokenizer, TEXT[::-1], 24)]
    one = [loss.nats for _, loss in tiny.score(State(), tokens, learn=True)]
    two = [loss.nats for _, loss in tiny.score(State(), other, learn=True)]

    assert one[:4] == two[:4]  # the fifth piece is scored on the forty-first token as well
    assert one[5] != two[5]


def test_judging_changes_nothing(tiny):
    tokens = document(tiny.tokenizer, TEXT, 50)
    state = tiny.read(State(), tokens, learn=True)
    ids = [token.id for token in tokens]

    first = tiny.judge(state, ids)
    tiny.judge(State(), ids[::-1])
    again = tiny.judge(state, ids)

    torch.testing.assert_close(again.losses, first.losses, rtol=0, atol=0)


def test_what_is_known_is_what_the_levels_learned(tiny):
    tokens = document(tiny.tokenizer, TEXT, 64)
    state = tiny.read(State(), tokens, learn=True)
    ids = [token.id for token in tokens]

    assert state.cleared(tiny.model.config).position == 0
    assert state.cleared(tiny.model.config).deltas.keys() == state.deltas.keys() != set()
    learned = tiny.judge(state.cleared(tiny.model.config), ids).losses.sum()
    assert learned < tiny.judge(State(), ids).losses.sum()


def test_a_conversation_is_what_the_server_would_read(tiny):
    tokenizer = tiny.tokenizer
    tokens = list(conversation(tokenizer, [CHAT, CHAT]))

    said = bytes(token.id for token in tokens if token.counted).decode()
    learned = bytes(token.id for token in tokens if token.weight).decode()
    assert said == "Hello thereHi, how are you?All well.Good to hear." * 2
    assert learned == "Hello thereAll well." * 2
    markup = [token for token in tokens if not token.counted]
    assert all(token.weight == 0.0 for token in markup)
    assert tuple(token.id for token in tokens[-1:]) == tokenizer.closing().ids[-1:]


def test_a_document_that_is_handed_over_is_learned(tiny):
    tokens = handed(tiny.tokenizer, "Read this.")

    assert bytes(token.id for token in tokens if token.weight).decode() == "Read this."
    assert tiny.tokenizer.closing().role is Role.MARKUP


def test_questions_are_answered_each_from_the_same_state(tiny):
    two = tiny.reply(State(), ["One?", "Two?"], most=6)

    assert tiny.reply(State(), ["Two?"], most=6) == two[1:]
    assert all(two)
