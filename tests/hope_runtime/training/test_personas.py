from __future__ import annotations

import numpy as np
import pytest
from numpy.random import Generator

from hope_runtime.training import personas
from hope_runtime.training.facts import CITIES, NAMES
from hope_runtime.training.personas import HELD_OUT_VALUES, KINDS, Fact, Kind, answered
from hope_runtime.training.small_talk import SMALL_TALK

EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@EVERY_KIND
def test_every_template_holds_the_value_once(kind: Kind):
    for template in (*kind.statements, *kind.answers, *kind.echoes):
        assert template.count("{}") == 1, template
    for asked in kind.questions:
        assert "{" not in asked


@EVERY_KIND
def test_a_kind_can_be_told_asked_and_answered_in_many_ways(kind: Kind):
    assert len(set(kind.statements)) >= 4
    assert len(set(kind.questions)) >= 4
    assert len(set(kind.answers)) >= 3


@EVERY_KIND
def test_a_value_is_hard_to_guess(kind: Kind):
    values = set(kind.values)

    assert len(values) == len(kind.values)
    assert len(values - HELD_OUT_VALUES) >= 20
    assert values & HELD_OUT_VALUES


@EVERY_KIND
def test_every_answer_is_recognised_and_no_other_value_is(kind: Kind, rng: Generator):
    for value in kind.values[:40]:
        other = personas.draw_value(rng, kind, other=value)
        for template in (*kind.answers, *kind.echoes):
            assert answered(template.format(value), Fact(kind, value)), template.format(value)
            assert not answered(template.format(other), Fact(kind, value))


@EVERY_KIND
def test_no_question_gives_its_answer_away(kind: Kind):
    for asked in kind.questions:
        assert not any(answered(asked, Fact(kind, value)) for value in kind.values[:200])


def test_two_answers_at_once_are_none():
    dog = Fact(KINDS["dog"], "Rex")

    assert answered("Your dog is Rex, and Rex it stays.", dog)
    assert not answered("Your dog's name is Rex or Max.", dog)
    assert not answered("I don't know that yet.", dog)
    assert not answered("Rexford", dog)


def test_a_longer_value_is_not_the_shorter_one_in_it():
    assert answered("You live in New York.", Fact(KINDS["home town"], "New York"))
    assert not answered("You live in New York.", Fact(KINDS["home town"], "York"))


def test_there_are_many_kinds_names_cities_and_much_to_chat_about():
    assert len(KINDS) >= 60
    assert len(NAMES) >= 150
    assert len(CITIES) >= 100
    assert len(SMALL_TALK) >= 60


def test_a_told_fact_is_in_the_users_line_and_an_asked_one_in_the_reply_alone(rng: Generator):
    for fact in personas.draw_facts(rng, len(KINDS)):
        said, _ = personas.tell(rng, fact)
        changed, _ = personas.update(rng, fact)
        asked, reply = personas.ask(rng, fact)

        assert (said.role, reply.role) == ("user", "assistant")
        assert fact.value in said.text
        assert fact.value in changed.text
        assert not answered(asked.text, fact)
        assert answered(reply.text, fact)


def test_half_of_the_acknowledgements_repeat_the_value(rng: Generator):
    facts = [fact for _ in range(10) for fact in personas.draw_facts(rng, len(KINDS))]
    repeated = [answered(personas.tell(rng, fact)[1].text, fact) for fact in facts]

    assert 0.4 < np.mean(repeated) < 0.6


def test_the_value_of_a_reply_weighs_most(rng: Generator):
    fact = Fact(KINDS["home town"], "New York")
    _, reply = personas.ask(rng, fact)

    assert [part.text for part in reply.parts if part.weight == 4.0] == ["New York"]
    assert {part.weight for part in reply.parts if part.text != "New York"} <= {1.0}


def test_an_article_fits_its_value(rng: Generator):
    fact = Fact(KINDS["car"], "Audi")
    texts = {line.text for _ in range(50) for line in personas.ask(rng, fact)}

    assert "You drive an Audi." in texts
    assert not any(" a Audi" in text for text in texts)


def test_what_is_held_out_is_drawn_only_on_demand(rng: Generator):
    for _ in range(20):
        known = personas.draw_facts(rng, 20)
        fresh = personas.draw_facts(rng, 20, held_out=True)

        assert not {fact.value for fact in known} & HELD_OUT_VALUES
        assert {fact.value for fact in fresh} <= HELD_OUT_VALUES


def test_facts_of_one_draw_are_of_different_kinds(rng: Generator):
    facts = personas.draw_facts(rng, 30)

    assert len({fact.kind.name for fact in facts}) == 30


def test_equal_seeds_give_equal_dialogues():
    def dialogue(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        facts = personas.draw_facts(rng, 5)
        return [line.text for fact in facts for line in personas.tell(rng, fact)]

    assert dialogue(3) == dialogue(3)
    assert dialogue(3) != dialogue(4)


def test_an_unknown_fact_is_not_made_up(rng: Generator):
    kind = KINDS["dog"]
    replies = {personas.ask_unknown(rng, kind)[1].text for _ in range(100)}

    assert "I don't know that yet." in replies
    assert not any(answered(reply, Fact(kind, v)) for reply in replies for v in kind.values)
