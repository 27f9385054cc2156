"""Recall of symbols: what was said once is asked for later. Answers alone count."""

from __future__ import annotations

from enum import IntEnum
from itertools import compress

import numpy as np

from hope_runtime.evaluation.drawn import Drawn, Ids, distinct

KEYS = 64  # of associative recall, and as many values
PAIR_VOCABULARY = 1 + 2 * KEYS


def associations(chance: np.random.Generator, rows: int, *, pairs: int) -> Drawn:
    """Draw key-value pairs, a mark, and then every key again, in another order, with its value.

    Multi-query associative recall: `k1 v1 k2 v2 | k2 v2 k1 v1`, where the values after the mark
    count. Keys are different within a row; values need not be.

    >>> associations(np.random.default_rng(0), 1, pairs=2).scored.astype(int).tolist()
    [[0, 0, 0, 0, 0, 0, 1, 0, 1]]
    """
    keys = 1 + distinct(chance, rows, pairs, KEYS)
    values = 1 + KEYS + chance.integers(0, KEYS, (rows, pairs))
    order = chance.random((rows, pairs)).argsort(1)
    tokens = np.zeros((rows, 4 * pairs + 1), np.int64)
    scored = np.zeros(tokens.shape, bool)
    tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens[:, 2 * pairs + 1 :: 2] = np.take_along_axis(keys, order, 1)
    tokens[:, 2 * pairs + 2 :: 2] = np.take_along_axis(values, order, 1)
    scored[:, 2 * pairs + 2 :: 2] = True
    return Drawn(tokens, scored)


class Word(IntEnum):
    """The words of a session about facts that mean something."""

    USER = 0
    BOT = 1
    SET = 2
    IS = 3
    ASK = 4
    DOT = 5
    WHAT = 6


ENTITIES, VALUES, CHATTER = 32, 32, 64
ENTITY = len(Word)
VALUE = ENTITY + ENTITIES
TALK = VALUE + VALUES
FACT_VOCABULARY = TALK + CHATTER
SENTENCE = 5  # tokens: SET entity IS value DOT, and ASK entity WHAT value DOT


def facts(
    chance: np.random.Generator,
    rows: int,
    *,
    length: int,
    count: tuple[int, int],
    again: float,
    within: float = 0.5,
    only_changed: bool = False,
) -> Drawn:
    """Draw sessions in which facts are told among other talk, and all asked for at the end.

    Args:
        chance: where the sessions come from.
        rows: sessions.
        length: tokens of a session, its questions included; 15 a fact always suffice.
        count: fewest and most facts of a session.
        again: share of the facts that are told a second time, with a new value: that one counts.
        within: the share of the talk in which facts are told.
        only_changed: score no facts but those that were told twice.
    """
    tokens = np.empty((rows, length), np.int64)
    scored = np.zeros((rows, length), bool)
    for row in range(rows):
        n = int(chance.integers(count[0], count[1] + 1))
        entities = chance.permutation(ENTITIES)[:n] + ENTITY
        changed = chance.random(n) < again
        told = list(zip(entities, chance.integers(VALUE, VALUE + VALUES, n), strict=True))
        told += [(entity, _other(chance, value)) for entity, value in compress(told, changed)]
        body = length - SENTENCE * n
        tokens[row, :body] = talk(chance, body)
        free = max(int(within * body) - SENTENCE * len(told), 0)
        before = np.sort(chance.integers(0, free + 1, len(told)))
        for i, (entity, value) in enumerate(told):
            at = before[i] + SENTENCE * i
            tokens[row, at : at + SENTENCE] = (Word.SET, entity, Word.IS, value, Word.DOT)
        newest = dict(told)
        for i, fact in enumerate(chance.permutation(n)):
            at, entity = body + SENTENCE * i, entities[fact]
            answer = newest[entity]
            tokens[row, at : at + SENTENCE] = (Word.ASK, entity, Word.WHAT, answer, Word.DOT)
            scored[row, at + 3] = changed[fact] or not only_changed
    return Drawn(tokens, scored)


def talk(chance: np.random.Generator, length: int) -> Ids:
    """Draw turns of three to eight words and a full stop, by two who take turns at random."""
    found = chance.integers(TALK, TALK + CHATTER, length)
    starts = np.cumsum(chance.integers(5, 11, length // 5 + 1))
    starts = np.concatenate([[0], starts[starts < length]])
    found[starts[1:] - 1] = Word.DOT
    found[starts] = chance.integers(Word.USER, Word.BOT + 1, len(starts))
    return found


def _other(chance: np.random.Generator, value: np.int64) -> np.int64:
    """Return another value than this one."""
    return VALUE + (value - VALUE + chance.integers(1, VALUES)) % VALUES
