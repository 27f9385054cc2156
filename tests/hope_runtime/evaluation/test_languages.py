"""What may come next is what some word of the language has next, found by trying all words."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
import torch

from hope_runtime.evaluation import languages
from hope_runtime.evaluation.judging import strings
from hope_runtime.evaluation.languages import END, LANGUAGES, START, SYMBOLS, VOCABULARY


def shuffle_2(word):
    def balanced(opening, closing):
        depth = 0
        for symbol in word:
            depth += (symbol == opening) - (symbol == closing)
            if depth < 0:
                return False
        return depth == 0

    return balanced("a", "b") and balanced("c", "d")


CHECKS = {
    "parity": ("ab", lambda word: word.count("b") % 2 == 0),
    "(aa)*": ("a", lambda word: len(word) % 2 == 0),
    "(abab)*": ("ab", lambda word: re.fullmatch("(abab)*", word) is not None),
    "a^n b^n": ("ab", lambda word: word == "a" * (n := len(word) // 2) + "b" * n != ""),
    "a^n b^n c^n": (
        "abc",
        lambda word: word == "a" * (n := len(word) // 3) + "b" * n + "c" * n != "",
    ),
    "shuffle-2": ("abcd", shuffle_2),
}
LONGEST = {"a": 12, "ab": 10, "abc": 9, "abcd": 6}
TRIED = {"a": 6, "ab": 4, "abc": 2, "abcd": 2}  # prefixes so long have all their ways on in there


def all_words(name):
    alphabet, holds = CHECKS[name]
    for length in range(LONGEST[alphabet] + 1):
        for word in product(alphabet, repeat=length):
            if holds("".join(word)):
                yield "".join(word)


def spelt(symbols):
    return "".join(SYMBOLS[symbol] for symbol in symbols)


@pytest.fixture(params=LANGUAGES, ids=lambda each: each.name)
def language(request):
    return request.param


def test_every_language_has_a_check():
    assert [each.name for each in LANGUAGES] == list(CHECKS)


def test_what_is_legal_is_what_some_word_goes_on_with(language):
    words = list(all_words(language.name))
    wanted = {}
    for word in words:
        for cut in range(len(word) + 1):
            following = SYMBOLS.index(word[cut]) if cut < len(word) else END
            wanted.setdefault(word[:cut], set()).add(following)
    longest = TRIED[CHECKS[language.name][0]]
    assert any(len(prefix) == longest for prefix in wanted)

    for prefix, legal in wanted.items():
        if len(prefix) <= longest:
            state = language.start
            for symbol in prefix:
                state = language.after(state, SYMBOLS.index(symbol))
            assert set(language.moves(state)) == legal, prefix


def test_words_to_judge_by_are_words_of_the_lengths_asked_for(language):
    drawn = languages.judging(
        np.random.default_rng(0), 200, language=language, shortest=5, longest=40
    )

    _, holds = CHECKS[language.name]
    lengths = set()
    for tokens, scored in zip(drawn.tokens, drawn.scored, strict=True):
        word = tokens[scored]
        assert tokens[0] == START
        assert word[-1] == END
        assert holds(spelt(word[:-1]))
        assert 5 <= len(word) - 1 <= 40
        lengths.add(len(word))
    assert len(lengths) >= 8


def test_training_gives_everything_legal_twice_the_least_chance(language):
    drawn = languages.training(np.random.default_rng(0), 300, language=language, length=40)

    assert drawn.tokens.shape[1] <= 42
    chance, state = np.random.default_rng(0), language.start
    for _ in range(300):
        moves = language.moves(state)
        assert min(moves.values()) / sum(moves.values()) >= 2 * languages.LEAST
        symbol = int(chance.choice(list(moves)))
        state = language.start if symbol == END else language.after(state, symbol)
    rows, places = np.nonzero(drawn.scored)
    assert drawn.legal[rows, places, drawn.tokens[rows, places]].all()
    assert not drawn.scored[:, 0].any()


def test_a_string_is_right_if_every_set_of_it_is(language):
    drawn = languages.judging(
        np.random.default_rng(1), 4, language=language, shortest=8, longest=12
    )
    logits = torch.where(torch.from_numpy(drawn.legal[:, 1:]), 0.0, -9.0)
    assert strings(logits, drawn) == (1.0, 4)

    last = np.flatnonzero(drawn.scored[2])[-1]
    logits[2, last - 1] = torch.zeros(VOCABULARY)
    assert strings(logits, drawn) == (0.75, 4)
