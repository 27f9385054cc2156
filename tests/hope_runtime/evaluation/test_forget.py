"""What was right and what still is are counted, and a session lives through its days."""

from __future__ import annotations

from itertools import islice

import pytest

from hope_runtime.evaluation.forget import (
    CAPITAL_OF_FRANCE,
    Probes,
    Question,
    common_knowledge,
    compared,
    days,
    forget,
    probes,
)
from hope_runtime.evaluation.reading import Reader
from hope_runtime.model import Hope
from hope_runtime.training.corpora import clean_chat
from hope_runtime.weights.random import random_checkpoint, tiny_config

CHATS = [clean_chat([f"Hello, {name}", "Hi, how are you?", "All well.", "Good."]) for name in "ABC"]
PLAY = "\n\n".join(f"{name}:\nSpeak, speak.{number}" for number, name in enumerate("KLMNOPQ"))


@pytest.fixture(scope="module")
def tiny():
    found = random_checkpoint(tiny_config())
    return Reader(Hope(found.config, found.weights), found.tokenizer, lanes=4)


def test_the_questions_are_many_and_the_capital_of_france_is_among_them():
    questions = common_knowledge()

    assert len(questions) >= 60
    assert len({question.text for question in questions}) == len(questions)
    assert all(question.accepted for question in questions)
    assert Question(CAPITAL_OF_FRANCE, ("Paris",)) in questions


@pytest.mark.parametrize(
    ("accepted", "answer", "right"),
    [
        (("seven", "7"), "There are 7 days.", True),
        (("seven", "7"), "There are 17 days.", False),
        (("0", "zero"), "At -18.0 degrees", False),
        (("0", "zero"), "0°C", True),
        (("New York",), "in new york, of course", True),
        (("H₂O", "H2O"), "It is H2O.", True),
    ],
)
def test_an_answer_is_right_if_it_says_what_is_accepted(accepted, answer, right):
    assert Question("?", accepted).right(answer) is right


def test_what_is_gained_does_not_hide_what_is_lost():
    assert compared([False, True, True], [True, True, False]) == (2, 1, 1, 1)


def test_a_passage_ends_in_the_word_that_is_to_be_found(tiny):
    found = probes(tiny.tokenizer, "some text", 5, ["a b cde", "x yz"], 9, seed=0)

    assert len(found.text) == 5
    assert [(bytes(ids).decode(), n) for ids, n in found.passages] == [("a b cde", 4), ("x yz", 3)]


def test_the_passages_are_the_same_for_the_same_seed(tiny):
    words = [f"word {n}" for n in range(50)]
    draw = [probes(tiny.tokenizer, "t", 1, words, 5, seed).passages for seed in (0, 0, 1)]

    assert draw[0] == draw[1] != draw[2]


def test_a_day_is_chat_and_reading_and_no_two_are_the_same(tiny):
    one, two = islice(days(tiny.tokenizer, CHATS, PLAY, 160, seed=3), 2)

    said, read = (bytes(t.id for t in day if t.weight).decode() for day in (one, two))
    assert "All well." in said
    assert "Speak, speak." in said
    assert said != read
    assert 160 <= len(one) < 160 + 2 * 80
    assert one == next(days(tiny.tokenizer, CHATS, PLAY, 160, seed=3))


def test_the_base_and_every_checkpoint_are_judged(tiny):
    asked = Probes(
        text=tuple(b"it was the best of times"),
        passages=((tuple(b"so it goes"), 5),),
        questions=(Question("?", ("a",)), Question("!", ("b",))),
    )
    heard = []
    found = list(
        forget(
            tiny,
            asked,
            days(tiny.tokenizer, CHATS, PLAY, 64, seed=0),
            (1, 2),
            lambda text, at: heard.append((text, at)),
        )
    )

    assert [standing.sessions for standing in found] == [0, 1, 2]
    assert found[0].moved == {}
    assert found[0].tokens == 0 < found[1].tokens < found[2].tokens
    assert found[2].moved.keys() == {"fast", "slow"}
    assert found[0].text.perplexity != found[1].text.perplexity
    assert len(found[1].answers) == 2
    assert heard[-1] == ("judging after 2", 2)
    json = found[1].to_json(found[0])
    assert json["questions"]["base"] == sum(found[0].right)
    assert json["last_words"].keys() == {"base", "kept", "lost", "gained"}
