"""What recall asks for was said, and no other answer is right: each session is read once more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_runtime.evaluation import synthetic
from hope_runtime.evaluation.synthetic import Word


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(0, 1000))
def test_each_key_is_asked_once_and_its_value_was_told(pairs, seed):
    drawn = synthetic.associations(np.random.default_rng(seed), 3, pairs=pairs)

    for row, scored in zip(drawn.tokens.tolist(), drawn.scored, strict=True):
        mark = row.index(0)
        told = dict(zip(row[:mark:2], row[1:mark:2], strict=True))
        asked = list(zip(row[mark + 1 :: 2], row[mark + 2 :: 2], strict=True))
        assert len(told) == pairs
        assert sorted(asked) == sorted(told.items())
        assert np.flatnonzero(scored).tolist() == list(range(mark + 2, len(row), 2))


def listened(row):
    """Read a session as a person would; return what is asked, how often told, and the answers."""
    known, told, answers = {}, {}, {}
    for place in range(len(row)):
        match row[place : place + 5]:
            case [Word.SET, entity, Word.IS, value, Word.DOT]:
                known[entity] = value
                told[entity] = told.get(entity, 0) + 1
            case [Word.ASK, entity, Word.WHAT, value, Word.DOT]:
                answers[place + 3] = (entity, value)
    return known, told, answers


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(120, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_newest_value_is_the_answer(most, length, again, within, only_changed, seed):
    drawn = synthetic.facts(
        np.random.default_rng(seed),
        3,
        length=length,
        count=(1, most),
        again=again,
        within=within,
        only_changed=only_changed,
    )

    for row, scored in zip(drawn.tokens.tolist(), drawn.scored, strict=True):
        known, told, answers = listened(row)
        assert 1 <= len(known) <= most
        assert dict(answers.values()) == known
        assert len(answers) == len(known)
        counted = [at for at, (who, _) in answers.items() if told[who] > 1 or not only_changed]
        assert np.flatnonzero(scored).tolist() == sorted(counted)


def test_what_is_told_again_is_another_value():
    drawn = synthetic.facts(
        np.random.default_rng(0), 50, length=256, count=(8, 8), again=1.0, only_changed=True
    )

    for row in drawn.tokens.tolist():
        said = [(row[at + 1], row[at + 3]) for at in range(len(row)) if row[at] == Word.SET]
        assert len(said) == 16
        assert len(set(said)) == 16
    assert drawn.scored.sum() == 8 * 50


def test_facts_are_told_within_the_share_of_the_session_that_was_named():
    drawn = synthetic.facts(
        np.random.default_rng(0), 20, length=2048, count=(8, 8), again=0.25, within=0.025
    )

    places = np.argwhere(drawn.tokens == Word.SET)[:, 1]
    assert places.max() < 100


@pytest.mark.parametrize("length", [1, 2, 7, 500])
def test_talk_holds_no_facts(length):
    found = synthetic.talk(np.random.default_rng(1), length)

    assert len(found) == length
    assert not {Word.SET, Word.ASK} & set(found.tolist())
    assert found[0] in {Word.USER, Word.BOT}
