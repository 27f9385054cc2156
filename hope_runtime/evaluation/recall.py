"""Does a chat model recall what it was told? Facts, chat of some length, then questions.

Each made-up user tells some facts, the session goes on with chat that other people had, and then
each fact is asked for, every question from the same state: one answer cannot help another. An
answer counts if it says the exact value and no other value of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from hope_runtime.engine import Engine, Turn
from hope_runtime.model import Hope
from hope_runtime.report import Fact, Failed, Finished, Said
from hope_runtime.sampling import Sampling
from hope_runtime.state import State, dump, restore
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training.personas import Line, Part, answered
from hope_runtime.training.sessions import Material, Probe, probe

_LONGEST_ANSWER = 32  # tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and what the model said to it."""

    kind: str
    question: str
    said: str
    value: str
    right: bool
    changed: bool  # the fact was told anew before it was asked for


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of the model."""

    users: int = 25
    facts: int = 8
    filler: int = 2000  # tokens of chat between telling and asking
    overwritten: int = 0  # facts that are told anew
    held_out: bool = False  # ask for values that no training row ever had
    stored: bool = True  # the session is stored and read again before it is asked
    learning: bool = True  # slow levels are consolidated from what the user says, as when served
    seed: int = 1000


def recall(
    model: Hope,
    tokenizer: Tokenizer,
    material: Material,
    setting: Setting,
    progress: Callable[[int], None] = lambda users: None,
) -> list[Answer]:
    """Ask every user's questions, greedily; `progress` hears how many users were asked.

    Args:
        model: with memories for mixers, or of any other kind.
        tokenizer: of the model.
        material: chats that were not trained on.
        setting: what to tell and to ask.
        progress: see above.
    """
    ticks = count()
    engine = Engine(model, tokenizer, lanes=setting.facts, clock=lambda: float(next(ticks)))
    answers: list[Answer] = []
    for user in range(setting.users):
        drawn = probe(
            np.random.default_rng([setting.seed, user]),
            material,
            facts=setting.facts,
            filler_tokens=setting.filler,
            overwritten=setting.overwritten,
            held_out=setting.held_out,
        )
        answers += _user(engine, model, material, drawn, setting)
        progress(user + 1)
    return answers


def _user(
    engine: Engine, model: Hope, material: Material, drawn: Probe, setting: Setting
) -> Iterator[Answer]:
    told = [
        (token, float(line.role == "user"))
        for line in [*drawn.told, *drawn.filler]
        for token in material.row([line]).tokens
    ]
    reading = _turn("told", State(), told, learn=setting.learning)
    [finished] = (fact for fact in _run(engine, reading) if isinstance(fact, Finished))
    state = finished.state
    if setting.stored:
        facts, blobs, _ = dump(state, None)
        state = restore(facts, blobs, model.config, model.dtype)
    turns = [
        _turn(str(i), state, _question(material, question), most=_LONGEST_ANSWER)
        for i, (question, _) in enumerate(drawn.questions)
    ]
    said = [""] * len(turns)
    for fact in _run(engine, *turns):
        if isinstance(fact, (Said, Finished)):
            said[int(fact.job)] += fact.text
    for reply, (question, asked) in zip(said, drawn.questions, strict=True):
        yield Answer(
            kind=asked.kind.name,
            question=question,
            said=reply,
            value=asked.value,
            right=answered(reply, asked),
            changed=asked.kind.name in drawn.changed,
        )


def _question(material: Material, question: str) -> list[tuple[int, float]]:
    row = material.row([Line("user", (Part(question, 0.0),)), Line("assistant", ())]).tokens
    return [(token, 0.0) for token in row[:-1]]  # without the mark that ends the reply


def _turn(
    id: str,
    state: State,
    given: Iterable[tuple[int, float]],
    *,
    most: int = 0,
    learn: bool = False,
) -> Turn:
    return Turn(
        id=id,
        state=state,
        given=tuple(given),
        closing=(),
        most=most,
        said_weight=0.0,
        sampling=Sampling(temperature=0.0),
        stops=(),
        learn=learn,
    )


def _run(engine: Engine, *turns: Turn) -> list[Fact]:
    """Run turns to their end; the order of their facts is that of what was said."""
    for turn in turns:
        engine.submit(turn)
    facts: list[Fact] = []
    while not engine.idle:
        facts += engine.step()
    for fact in facts:
        if isinstance(fact, Failed):
            raise fact.error
    return facts
