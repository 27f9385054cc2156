"""Sessions in which what a word means is itself told, and may change: for self-modification.

Each task draws tokens and says which of them are answers; nothing else knows its rules. A
statement is three tokens, a verb and two words, so that with a chunk of three tokens a memory
makes each statement's keys and targets from all statements before it.

Axes: B sessions, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from hope_runtime.evaluation.drawn import Drawn, Ids

WORDS = 12  # of each kind
STATEMENT = 3  # tokens


class Verb(IntEnum):
    """The first token of a statement; the values are token ids."""

    REST = 0  # says nothing, and takes the place of a word where a verb has no use for it
    SET = 1  # SET name value
    SAME = 2  # SAME name name: both are names of one thing from now on
    LINK = 3  # LINK name name: asked for the first, follow to the second
    COPY = 4  # COPY name name: what the second holds now, the first holds too
    SWAP = 5  # SWAP name name: each holds what the other held
    HOLD = 6  # HOLD REST REST: nothing that is set counts, until
    FREE = 7  # FREE REST REST
    SEEN = 8  # SEEN name value: an observation, perhaps a wrong one
    ASK = 9  # ASK name value: the value is the answer


NAME = len(Verb)  # the first name
CODE = NAME + WORDS  # the first of another kind of names
VALUE = CODE + WORDS
VOCABULARY = VALUE + WORDS

Task = Callable[[np.random.Generator, int, int], Drawn]  # (chance, sessions, tokens)


def codebook(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Tell a code, then facts in code; ask for half of them in clear.

    First all SAME code name, then SET code value, then ASK name value: who writes a fact without
    minding the code has nowhere to find it by its name.
    """
    pairs = max(1, length * 2 // (5 * STATEMENT))
    names = NAME + _some(chance, batch, pairs)
    codes = CODE + _some(chance, batch, pairs)
    values = VALUE + chance.integers(WORDS, size=(batch, pairs))
    told, said = _orders(chance, batch, pairs), _orders(chance, batch, pairs)
    asked = _some(chance, batch, max(1, pairs // 2), pairs)
    return _session(
        length,
        _statements(Verb.SAME, _at(codes, told), _at(names, told)),
        _statements(Verb.SET, _at(codes, said), _at(values, said)),
        _statements(Verb.ASK, _at(names, asked), _at(values, asked)),
    )


def aliases(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Tell pairs of names for one thing; set things, some twice, and ask, each by either name."""
    statements = length // STATEMENT
    pairs = max(1, statements * 3 // 10)
    both = NAME + _some(chance, batch, 2 * pairs).reshape(batch, pairs, 2)
    again = chance.integers(pairs, size=(batch, statements - 3 * pairs))
    said = chance.permuted(np.concatenate([_orders(chance, batch, pairs), again], 1), axis=1)
    values = chance.integers(WORDS, size=said.shape)
    held = np.zeros((batch, pairs), np.int64)
    for i in range(said.shape[1]):
        np.put_along_axis(held, said[:, i : i + 1], values[:, i : i + 1], 1)
    asked = _orders(chance, batch, pairs)

    def named(things: Ids) -> Ids:
        either = chance.integers(2, size=things.shape)
        return both[np.arange(batch)[:, None], things, either]

    return _session(
        length,
        _statements(Verb.SAME, both[..., 0], both[..., 1]),
        _statements(Verb.SET, named(said), VALUE + values),
        _statements(Verb.ASK, named(asked), VALUE + _at(held, asked)),
    )


def hops(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Tell links from names to others and what these hold, in any order; ask for the first."""
    pairs = max(1, length // (3 * STATEMENT))
    names = NAME + _some(chance, batch, pairs)
    ends = CODE + _some(chance, batch, pairs)
    values = VALUE + chance.integers(WORDS, size=(batch, pairs))
    linked = _statements(Verb.LINK, names, ends)
    told = np.concatenate([linked, _statements(Verb.SET, ends, values)], 1)
    order = _orders(chance, batch, 2 * pairs)[..., None]
    asked = _orders(chance, batch, pairs)
    return _session(
        length,
        np.take_along_axis(told, order, 1),
        _statements(Verb.ASK, _at(names, asked), _at(values, asked)),
    )


def copies(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Set variables, copy some to others, ask for all: a program of assignments."""
    return _moved(chance, batch, length, Verb.COPY)


def swaps(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Set variables, swap pairs of them, ask for all: permutations, to be tracked."""
    return _moved(chance, batch, length, Verb.SWAP)


def hold(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Set variables again and again; between HOLD and FREE it does not count."""
    variables, later = _sizes(length)
    row = np.arange(batch)
    held = chance.integers(WORDS, size=(batch, variables))
    names = NAME + _some(chance, batch, variables)
    told = [_statements(Verb.SET, names, VALUE + held)]
    held = held.copy()
    holding = np.zeros(batch, np.bool_)
    for _ in range(later):
        turned = chance.random(batch) < 1 / 3
        variable = chance.integers(variables, size=batch)
        value = chance.integers(WORDS, size=batch)
        counts = ~turned & ~holding
        held[row[counts], variable[counts]] = value[counts]
        holding = holding ^ turned
        verb = np.where(turned, np.where(holding, Verb.HOLD, Verb.FREE), Verb.SET)
        words = np.stack([names[row, variable], VALUE + value], 1)
        words = np.where(turned[:, None], Verb.REST, words)
        told.append(np.concatenate([verb[:, None], words], 1)[:, None])
    return _asked(chance, length, told, names, VALUE + held)


def first(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Set variables again and again; what each was set to first is the answer."""
    variables, later = _sizes(length)
    names = NAME + _some(chance, batch, variables)
    again = chance.integers(variables, size=(batch, later))
    said = chance.permuted(np.concatenate([_orders(chance, batch, variables), again], 1), axis=1)
    values = VALUE + chance.integers(WORDS, size=said.shape)
    held = np.zeros((batch, variables), np.int64)
    for i in reversed(range(said.shape[1])):
        np.put_along_axis(held, said[:, i : i + 1], values[:, i : i + 1], 1)
    return _asked(chance, length, [_statements(Verb.SET, _at(names, said), values)], names, held)


def noisy(chance: np.random.Generator, batch: int, length: int) -> Drawn:
    """Observe things that stay through noise, or things that change without; ask what they are.

    In half of the sessions four of ten observations are wrong, so that the most frequent is to
    be believed; in the others all are right, but before four of ten the thing has changed, so
    that the last is. Which kind of session it is must be seen from what was observed.
    """
    statements = length // STATEMENT
    things = max(1, statements // 6)
    names = NAME + _some(chance, batch, things)
    changing = chance.random(batch) < 0.5
    seen = chance.integers(things, size=(batch, statements - things))
    other = chance.integers(WORDS, size=seen.shape)
    struck = chance.random(seen.shape) < 0.4
    held = chance.integers(WORDS, size=(batch, things))
    shown = np.zeros_like(seen)
    row = np.arange(batch)
    for i in range(seen.shape[1]):
        thing = seen[:, i]
        held[row, thing] = np.where(struck[:, i] & changing, other[:, i], held[row, thing])
        shown[:, i] = np.where(struck[:, i] & ~changing, other[:, i], held[row, thing])
    told = _statements(Verb.SEEN, _at(names, seen), VALUE + shown)
    return _asked(chance, length, [told], names, VALUE + held)


TASKS: dict[str, Task] = {
    task.__name__: task for task in (codebook, aliases, hops, copies, swaps, hold, first, noisy)
}


def _moved(chance: np.random.Generator, batch: int, length: int, verb: Verb) -> Drawn:
    variables, moves = _sizes(length)
    names = NAME + _some(chance, batch, variables)
    held = VALUE + _some(chance, batch, variables)
    told = [_statements(Verb.SET, names, held)]
    held = held.copy()
    row = np.arange(batch)
    for _ in range(moves):
        pair = _some(chance, batch, 2, variables)
        to, source = pair.T
        before = held[row, to]
        held[row, to] = held[row, source]
        if verb is Verb.SWAP:
            held[row, source] = before
        moved = _at(names, pair)
        told.append(_statements(verb, moved[:, :1], moved[:, 1:]))
    return _asked(chance, length, told, names, held)


def _sizes(length: int) -> tuple[int, int]:
    """Return how many variables a session has, and how many statements but the first and asking."""
    statements = length // STATEMENT
    variables = min(WORDS, max(2, statements // 3))
    return variables, statements - 2 * variables


def _some(chance: np.random.Generator, batch: int, count: int, of: int = WORDS) -> Ids:
    """Return `count` different numbers below `of` for each session, [B, count]."""
    return _orders(chance, batch, of)[:, :count]


def _orders(chance: np.random.Generator, batch: int, count: int) -> Ids:
    return chance.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)


def _at(rows: Ids, places: Ids) -> Ids:
    return np.take_along_axis(rows, places, 1)


def _statements(verb: Verb, first: Ids, second: Ids) -> Ids:
    """Return statements as tokens, [B, statements, 3]."""
    return np.stack([np.full_like(first, verb), first, second], -1)


def _asked(
    chance: np.random.Generator, length: int, told: list[Ids], names: Ids, held: Ids
) -> Drawn:
    """Ask for what all the names hold after what was told."""
    order = _orders(chance, *names.shape)
    return _session(length, *told, _statements(Verb.ASK, _at(names, order), _at(held, order)))


def _session(length: int, *parts: Ids) -> Drawn:
    """Put statements one after the other, and rest until `length`; answers are scored."""
    said = np.concatenate(parts, 1)
    tokens = np.full((len(said), length), int(Verb.REST), np.int64)
    tokens[:, : said.shape[1] * STATEMENT] = said.reshape(len(said), -1)
    scored = np.zeros(tokens.shape, np.bool_)
    scored[:, 2:] = tokens[:, :-2] == Verb.ASK
    return Drawn(tokens, scored)
