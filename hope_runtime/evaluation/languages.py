"""Formal languages (the paper's table 5): after each symbol of a string, what may come next?

A model is trained on strings as on any text. It is right about a string if, after each prefix of
it, the symbols that it gives more than `LEAST` are exactly those that may come next there, the
string's end being one of the symbols. In training, whatever is legal has a chance of at least
twice `LEAST`, however long the string already is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hope_runtime.evaluation.drawn import Drawn

LEAST = 0.05
SYMBOLS = "abcd"
END, START = len(SYMBOLS), len(SYMBOLS) + 1
VOCABULARY = len(SYMBOLS) + 2

State = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Language:
    """A language as a walk: from a state, what may come with which weight, and where it leads.

    `string` draws a word whose length is within bounds (both meant), for judging.
    """

    name: str
    start: State
    moves: Callable[[State], Mapping[int, float]]
    after: Callable[[State, int], State]
    string: Callable[[np.random.Generator, int, int], list[int]]


def training(chance: np.random.Generator, rows: int, *, language: Language, length: int) -> Drawn:
    """Draw strings by the walk; one that goes on after `length` symbols is cut there."""
    words = []
    for draws in chance.random((rows, length + 1)):
        state, word = language.start, list[int]()
        for draw in draws.tolist():
            moves = language.moves(state)
            left = draw * sum(moves.values())
            for symbol, weight in moves.items():  # noqa: B007 - the last one, if rounding says so
                left -= weight
                if left < 0:
                    break
            word.append(symbol)
            if symbol == END:
                break
            state = language.after(state, symbol)
        words.append(word)
    return laid_out(language, words)


def judging(
    chance: np.random.Generator, rows: int, *, language: Language, shortest: int, longest: int
) -> Drawn:
    """Draw whole words whose lengths are spread evenly between bounds."""
    words = [[*language.string(chance, shortest, longest), END] for _ in range(rows)]
    return laid_out(language, words)


def laid_out(language: Language, words: list[list[int]]) -> Drawn:
    """Write words as rows, each after START, and what is legal at each of their places."""
    longest = max(len(word) for word in words)
    tokens = np.full((len(words), longest + 1), END, np.int64)
    scored = np.zeros(tokens.shape, bool)
    legal = np.zeros((*tokens.shape, VOCABULARY), bool)
    tokens[:, 0] = START
    for row, word in enumerate(words):
        tokens[row, 1 : len(word) + 1] = word
        scored[row, 1 : len(word) + 1] = True
        state = language.start
        for place, symbol in enumerate(word, 1):
            legal[row, place, list(language.moves(state))] = True
            if symbol != END:
                state = language.after(state, symbol)
    return Drawn(tokens, scored, legal)


# --- the languages ----------------------------------------------------------------------------


def parity() -> Language:
    """Return the strings of a and b with an even number of b."""

    def string(chance: np.random.Generator, shortest: int, longest: int) -> list[int]:
        word = chance.integers(0, 2, int(chance.integers(shortest, longest + 1))).tolist()
        word[-1] = sum(word[:-1]) % 2
        return [int(symbol) for symbol in word]

    def moves(state: State) -> Mapping[int, float]:
        return {0: 0.45, 1: 0.45} | ({} if state[0] else {END: 0.1})

    return Language("parity", (0,), moves, lambda state, symbol: ((state[0] + symbol) % 2,), string)


def repeated(unit: str, name: str, ending: float) -> Language:
    """Return the strings that repeat a unit."""
    word = [SYMBOLS.index(symbol) for symbol in unit]

    def string(chance: np.random.Generator, shortest: int, longest: int) -> list[int]:
        times = chance.integers(-(-shortest // len(word)), longest // len(word) + 1)
        return word * int(times)

    def moves(state: State) -> Mapping[int, float]:
        going_on = {word[state[0]]: 1.0 - ending}
        return going_on if state[0] else going_on | {END: ending}

    return Language(name, (0,), moves, lambda state, _: ((state[0] + 1) % len(word),), string)


def counted(letters: int, name: str, turning: float) -> Language:
    """Return a^n b^n (two letters) or a^n b^n c^n (three), n >= 1."""

    def string(chance: np.random.Generator, shortest: int, longest: int) -> list[int]:
        n = int(chance.integers(max(1, -(-shortest // letters)), longest // letters + 1))
        return [symbol for symbol in range(letters) for _ in range(n)]

    def moves(state: State) -> Mapping[int, float]:
        letter, n, here = state
        if letter == 0:
            return {0: 1.0 - turning, 1: turning} if n else {0: 1.0}
        if here < n:
            return {letter: 1.0}
        return {letter + 1: 1.0} if letter + 1 < letters else {END: 1.0}

    def after(state: State, symbol: int) -> State:
        letter, n, here = state
        if symbol == 0:
            return (0, n + 1, n + 1)
        return (symbol, n, here + 1 if symbol == letter else 1)

    return Language(name, (0, 0, 0), moves, after, string)


def shuffled() -> Language:
    """Return shuffle-2: two kinds of brackets, a with b and c with d, each balanced by itself."""

    def moves(state: State) -> Mapping[int, float]:
        closing = {2 * kind + 1: 0.3 for kind in (0, 1) if state[kind]}
        return {0: 0.2, 2: 0.2} | (closing or {END: 0.2})

    def after(state: State, symbol: int) -> State:
        change = 1 if symbol % 2 == 0 else -1
        ab, cd = state
        return (ab + change, cd) if symbol < 2 else (ab, cd + change)

    def string(chance: np.random.Generator, shortest: int, longest: int) -> list[int]:
        pairs = int(chance.integers(-(-shortest // 2), longest // 2 + 1))
        state, word = (0, 0), list[int]()
        for left in range(2 * pairs, 0, -1):
            opening = [0, 2] if sum(state) < left else []
            closing = [2 * kind + 1 for kind in (0, 1) if state[kind]]
            word.append(int(chance.choice(opening + closing)))
            state = (after(state, word[-1])[0], after(state, word[-1])[1])
        return word

    return Language("shuffle-2", (0, 0), moves, after, string)


LANGUAGES = (
    parity(),
    repeated("aa", "(aa)*", 0.15),
    repeated("abab", "(abab)*", 0.25),
    counted(2, "a^n b^n", 0.12),
    counted(3, "a^n b^n c^n", 0.15),
    shuffled(),
)
