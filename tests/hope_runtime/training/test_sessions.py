from __future__ import annotations

import re
from itertools import groupby, pairwise

import numpy as np
import pytest
from numpy.random import Generator

from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training import personas
from hope_runtime.training.corpora import Chat
from hope_runtime.training.facts import CITIES, NAMES
from hope_runtime.training.personas import HELD_OUT_VALUES, KINDS, Fact
from hope_runtime.training.sessions import STAGES, Material, Session, Stage, build, probe, rows

EVERY_STAGE = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: str(stage.length))
ASKED = re.compile(
    "|".join(
        re.escape(question[1:].rstrip("?."))
        for kind in KINDS.values()
        for question in kind.questions
    )
)
VALUES = {value for kind in KINDS.values() for value in kind.values}


@pytest.fixture(scope="module")
def material(tokenizer: Tokenizer, chats: list[Chat]) -> Material:
    return Material(tokenizer, chats)


def weighty(tokenizer: Tokenizer, session: Session) -> list[str]:
    """Decode every run of tokens that weigh most."""
    found = []
    for weight, run in groupby(range(len(session.tokens)), lambda i: session.weights[i]):
        if weight == personas.VALUE_WEIGHT:
            found.append(tokenizer.decode(session.tokens[list(run)].tolist()))
    return found


def turns(tokenizer: Tokenizer, session: Session) -> list[tuple[int, str]]:
    """Return who said what, by the id of the role; a turn that was cut in front has none."""
    parts = re.split(r"(?<=\x00)", "".join(chr(id) for id in session.tokens))
    said = [[ord(character) for character in part.rstrip("\x00")] for part in parts if part]
    return [
        (ids[0], tokenizer.decode(ids[1:])) if ids and ids[0] in (1, 2) else (0, "") for ids in said
    ]


@EVERY_STAGE
def test_every_row_has_the_exact_length(material: Material, rng: Generator, stage: Stage):
    tokens, weights = rows(rng, material, stage, 8)

    assert tokens.shape == weights.shape == (8, stage.length + 1)
    assert tokens.dtype == np.int64
    assert weights.dtype == np.float32


@EVERY_STAGE
def test_the_weightiest_tokens_are_values(
    tokenizer: Tokenizer, material: Material, rng: Generator, stage: Stage
):
    for _ in range(30):
        found = weighty(tokenizer, build(rng, material, stage))

        assert found
        assert set(found) <= VALUES


def questions(said: list[tuple[int, str]]) -> list[int]:
    """Return where facts are asked for."""
    texts = [re.sub("favorite", "favourite", text) for _, text in said]
    return [
        i
        for i, text in enumerate(re.sub(r"\bcolor\b", "colour", text) for text in texts)
        if said[i][0] == 1 and ASKED.search(text)
    ]


@EVERY_STAGE
def test_every_question_is_answered_at_once(
    tokenizer: Tokenizer, material: Material, rng: Generator, stage: Stage
):
    for _ in range(30):
        said = turns(tokenizer, build(rng, material, stage))
        asked = questions(said)

        assert asked
        assert all(said[i + 1][0] == 2 and said[i + 1][1] for i in asked)


@pytest.mark.parametrize("near", [0.0, 1.0])
def test_every_fact_told_is_asked_for(
    tokenizer: Tokenizer, material: Material, rng: Generator, near: float
):
    stage = Stage(length=512, facts=(3, 3), near=near, updates=0, unknown=0, again=0)
    for _ in range(30):
        assert len(questions(turns(tokenizer, build(rng, material, stage)))) == 3


def test_a_changed_fact_is_asked_for_by_its_new_value(
    tokenizer: Tokenizer, material: Material, rng: Generator
):
    stage = Stage(
        length=192, facts=(1, 1), near=0.0, late=1.0, updates=1, unknown=0, together=0, again=0
    )
    for _ in range(30):
        session = build(rng, material, stage)
        said = turns(tokenizer, session)
        newest = weighty(tokenizer, session)[-1]
        told = [i for i, (role, text) in enumerate(said) if role == 1 and newest in text]

        assert told
        assert told[0] < questions(said)[-1]


def test_user_and_assistant_take_turns(tokenizer: Tokenizer, material: Material, rng: Generator):
    for _ in range(50):
        roles = [role for role, _ in turns(tokenizer, build(rng, material, STAGES[2]))]
        inner = [role for role in roles[2:-1] if role]

        assert all(a != b for a, b in pairwise(inner))


def test_a_row_is_what_the_chat_template_writes(
    tokenizer: Tokenizer, material: Material, rng: Generator
):
    for fact in personas.draw_facts(rng, len(KINDS)):
        for line in (
            *personas.tell(rng, fact),
            *personas.update(rng, fact),
            *personas.ask(rng, fact),
        ):
            role = {"user": 1, "assistant": 2}[line.role]
            assert list(material.row([line]).tokens) == [role, *tokenizer.encode(line.text), 0]


def test_the_weights_of_a_line_align_with_its_tokens(tokenizer: Tokenizer, material: Material):
    fact = Fact(KINDS["car"], "Audi")
    [reply] = [
        line
        for line in (personas.ask(np.random.default_rng(seed), fact)[1] for seed in range(100))
        if line.text == "Your car is an Audi."
    ][:1]
    row = material.row([reply])
    n = len(tokenizer.encode("Audi"))
    before = len(tokenizer.encode("Your car is an"))

    expected = [0.2, *[1.0] * before, *[4.0] * n, 1.0, 1.0]
    np.testing.assert_allclose(np.array(row.weights), np.array(expected, np.float32))


def test_what_is_held_out_is_in_no_row(tokenizer: Tokenizer, material: Material, rng: Generator):
    secret = {value for value in (*NAMES, *CITIES) if value in HELD_OUT_VALUES}
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(secret))) + r")\b")
    for _ in range(200):
        text = tokenizer.decode(build(rng, material, STAGES[3]).tokens.tolist())
        assert not pattern.search(text)


def test_equal_seeds_give_equal_rows(material: Material):
    one, _ = rows(np.random.default_rng(5), material, STAGES[1], 4)
    two, _ = rows(np.random.default_rng(5), material, STAGES[1], 4)

    np.testing.assert_array_equal(one, two)


def test_a_probe_asks_for_the_newest_values(material: Material, rng: Generator):
    found = probe(rng, material, facts=6, filler_tokens=300, overwritten=2, held_out=True)
    values = {fact.kind.name: fact.value for _, fact in found.questions}
    told = " ".join(line.text for line in found.told)

    assert len(values) == 6
    assert set(values.values()) <= HELD_OUT_VALUES
    assert len(found.told) == 16
    assert all(value in told for value in values.values())
    assert sum(len(material.row([line]).tokens) for line in found.filler) >= 300


def test_rows_need_chats(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="no chats"):
        Material(tokenizer, [])
