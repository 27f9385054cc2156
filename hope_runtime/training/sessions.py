"""Rows of tokens to train on: facts told amid real chat and asked for later, of exact length.

A row never ends within an answer; what is cut to make it fit is chat, at one of its ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training import personas
from hope_runtime.training.corpora import Chat
from hope_runtime.training.personas import Fact, Line, Part
from hope_runtime.training.vocabulary import END_ID, ROLE_IDS, require_layout

__all__ = ["STAGES", "Material", "Probe", "Session", "Stage", "build", "probe", "rows"]

MARKUP_WEIGHT = 0.2
END_WEIGHT = 1.0  # of the token that ends a reply: the model has to know when to stop


class Session(NamedTuple):
    """A row; `weights[i]` is how much predicting `tokens[i]` counts."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]


class Probe(NamedTuple):
    """What to tell a model, what to say next, and what to ask it then."""

    told: list[Line]
    filler: list[Line]
    questions: list[tuple[str, Fact]]
    changed: frozenset[str]  # names of the kinds whose fact was told anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How hard rows are. A row has `length` + 1 tokens, the first of which is never predicted.

    `near` facts are asked for as soon as they are told; `late` rows ask for the others only when
    all is said. `filler` is the least share of a row that is chat. The others are shares of
    facts: changed later, asked for before they are told, told two in a line, asked for again.
    """

    length: int
    facts: tuple[int, int]
    near: float
    late: float = 0.3
    filler: float = 0.3
    updates: float = 0.25
    unknown: float = 0.1
    together: float = 0.15
    again: float = 0.3


STAGES = (
    Stage(length=96, facts=(1, 2), near=1.0, late=0.0, filler=0.0, updates=0.1),
    Stage(length=192, facts=(1, 4), near=0.6, late=0.1, filler=0.1, updates=0.2),
    Stage(length=384, facts=(2, 6), near=0.35),
    Stage(length=512, facts=(2, 10), near=0.25, filler=0.2),
    Stage(length=512, facts=(6, 14), near=0.15, late=0.4, filler=0.05),
    Stage(length=2048, facts=(6, 12), near=0.05, late=0.9, filler=0.7),
)


class Material:
    """The chats that rows are filled with, and every encoding that was needed before."""

    def __init__(self, tokenizer: Tokenizer, chats: Sequence[Chat]) -> None:
        if not chats:
            raise ValueError("no chats to fill rows with; give at least one")
        require_layout(tokenizer)
        self._tokenizer = tokenizer
        self._chats = chats
        self._encoded: dict[tuple[int, int], Row] = {}
        self._pieces: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._anchor = len(tokenizer.encode(_ANCHOR))

    def row(self, lines: Sequence[Line]) -> Row:
        """Encode lines as the chat template has them, each token with its part's weight."""
        row = Row(array("H"), array("f"))
        for line in lines:
            row.tokens.append(ROLE_IDS[line.role])
            row.weights.append(MARKUP_WEIGHT)
            for text, joined, weight in _joints(line.parts):
                ids = self._piece(text, joined)
                row.tokens.extend(ids)
                row.weights.extend([weight] * len(ids))
            row.tokens.append(END_ID)
            row.weights.append(END_WEIGHT if line.role == "assistant" else MARKUP_WEIGHT)
        return row

    def excerpt(self, rng: Generator) -> Row:
        """Draw some neighbouring lines of a chat, the user's first."""
        chosen, first, pairs = _excerpt(rng, self._chats)
        whole = Row(array("H"), array("f"))
        for index in range(first, first + 2 * pairs):
            key = (chosen, index)
            if key not in self._encoded:
                self._encoded[key] = self.row([self._chats[chosen][index]])
            whole.tokens.extend(self._encoded[key].tokens)
            whole.weights.extend(self._encoded[key].weights)
        return whole

    def excerpt_lines(self, rng: Generator) -> list[Line]:
        chosen, first, pairs = _excerpt(rng, self._chats)
        return self._chats[chosen][first : first + 2 * pairs]

    def _piece(self, text: str, joined: bool) -> tuple[int, ...]:
        """Encode a part of a line; one joined to the part before has no space in front."""
        key = (text, joined)
        ids = self._pieces.get(key)
        if ids is None:
            if joined:
                ids = tuple(self._tokenizer.encode(_ANCHOR + text)[self._anchor :])
            else:
                ids = tuple(self._tokenizer.encode(text))
            if len(text) <= _LONGEST_KEPT:
                self._pieces[key] = ids
        return ids


class Row(NamedTuple):
    """Tokens and their weights, to be put together."""

    tokens: array[int]
    weights: array[float]


class _Event(NamedTuple):
    """Something that happens in a row; the order of the times is the order of the row."""

    time: float
    row: Row


def build(rng: Generator, material: Material, stage: Stage, *, held_out: bool = False) -> Session:
    """Build one row of `stage.length` + 1 tokens."""
    length = stage.length + 1
    events: list[_Event] = []
    while not events:
        events = _events(rng, material, stage, held_out)
    events += _filling(rng, material, length - _tokens(events))
    tokens, weights = array("H"), array("f")
    for event in sorted(events, key=lambda event: event.time):
        tokens.extend(event.row.tokens)
        weights.extend(event.row.weights)
    return Session(np.array(tokens, np.int64), np.array(weights, np.float32))


def rows(
    rng: Generator, material: Material, stage: Stage, batch: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Build a batch: tokens [B, T+1] and weights [B, T+1]."""
    sessions = [build(rng, material, stage) for _ in range(batch)]
    return np.stack([s.tokens for s in sessions]), np.stack([s.weights for s in sessions])


def probe(
    rng: Generator,
    material: Material,
    *,
    facts: int = 8,
    filler_tokens: int = 2000,
    overwritten: int = 0,
    held_out: bool = False,
) -> Probe:
    """Draw an evaluation: facts, `overwritten` of them told anew, enough chat, and questions.

    Give it the chats kept for validation, and `held_out` to ask for values never trained on.
    """
    drawn = personas.draw_facts(rng, facts, held_out=held_out)
    told = [line for fact in drawn for line in personas.tell(rng, fact)]
    for i, fact in enumerate(drawn[:overwritten]):
        drawn[i] = _changed(rng, fact, held_out)
        told += personas.update(rng, drawn[i])
    filler: list[Line] = []
    tokens = 0
    while tokens < filler_tokens:
        lines = material.excerpt_lines(rng)
        tokens += len(material.row(lines).tokens)
        filler += lines
    changed = frozenset(fact.kind.name for fact in drawn[:overwritten])
    order = [drawn[i] for i in rng.permutation(facts)]
    questions = [(personas.question(rng, fact.kind), fact) for fact in order]
    return Probe(told, filler, questions, changed)


_ANCHOR = "a"
_LONGEST_KEPT = 60  # characters; the parts of templates and values are shorter, most chat is longer
_SOON = 1e-6


def _joints(parts: Sequence[Part]) -> Iterator[tuple[str, bool, float]]:
    """Give a space between two parts to the second, and say which parts have none in front."""
    space = True
    for part in parts:
        text = part.text.rstrip(" ")
        if text:
            yield text, not (space or text.startswith(" ")), part.weight
        space = len(text) < len(part.text)


def _excerpt(rng: Generator, chats: Sequence[Chat]) -> tuple[int, int, int]:
    chosen = int(rng.integers(len(chats)))
    pairs = len(chats[chosen]) // 2
    wanted = min(pairs, int(rng.integers(1, 5)))
    return chosen, 2 * int(rng.integers(pairs - wanted + 1)), wanted


def _changed(rng: Generator, fact: Fact, held_out: bool) -> Fact:
    value = personas.draw_value(rng, fact.kind, held_out=held_out, other=fact.value)
    return Fact(fact.kind, value)


def _tokens(events: Sequence[_Event]) -> int:
    return sum(len(event.row.tokens) for event in events)


def _events(rng: Generator, material: Material, stage: Stage, held_out: bool) -> list[_Event]:
    """Tell as many facts as drawn, or as many as leave room for chat; none if not one fits."""
    lo, hi = stage.facts
    facts = personas.draw_facts(rng, int(rng.integers(lo, hi + 1)) + 1, held_out=held_out)
    never = facts.pop()
    room = int((stage.length + 1) * (1 - stage.filler))
    last = rng.random() < stage.late
    events: list[_Event] = []
    while facts:
        together = len(facts) > 1 and rng.random() < stage.together
        group = [facts.pop() for _ in range(1 + together)]
        time = 0.7 * rng.random()
        lines = personas.tell_together(rng, *group) if together else personas.tell(rng, *group)
        new = [_Event(time, material.row(lines))]
        for fact in group:
            new += _later(rng, material, stage, fact, time, last, held_out)
        if _tokens(events) + _tokens(new) <= room:
            events += new
    if events and rng.random() < 2 * stage.unknown:
        asked = material.row(personas.ask_unknown(rng, never.kind))
        if _tokens(events) + len(asked.tokens) <= room:
            events.append(_Event((1 + last) * rng.random(), asked))
    return events


def _later(
    rng: Generator,
    material: Material,
    stage: Stage,
    fact: Fact,
    time: float,
    last: bool,
    held_out: bool,
) -> Iterator[_Event]:
    """Ask for a fact told at `time`, perhaps after a change, perhaps twice."""
    if rng.random() < stage.unknown:
        yield _Event(time * rng.random(), material.row(personas.ask_unknown(rng, fact.kind)))
    if rng.random() < stage.updates:
        if rng.random() < 0.3:
            yield _Event(time + _SOON, material.row(personas.ask(rng, fact)))
        fact = _changed(rng, fact, held_out)
        time += 2 * _SOON + (0.9 - time) * rng.random() * (rng.random() > stage.near)
        yield _Event(time, material.row(personas.update(rng, fact)))
    near = rng.random() < stage.near
    if near:
        yield _Event(time + _SOON, material.row(personas.ask(rng, fact)))
    if not near or rng.random() < stage.again:
        when = 1 + rng.random() if last else time + (1 - time) * rng.random()
        yield _Event(when, material.row(personas.ask(rng, fact)))


def _filling(rng: Generator, material: Material, room: int) -> Iterator[_Event]:
    """Fill the room with chat; the last piece is cut, in front of the row or at its end."""
    while room > 0:
        chat = rng.random() < 0.8
        piece = material.excerpt(rng) if chat else material.row(personas.small_talk(rng))
        if len(piece.tokens) >= room:
            yield _cut(rng, piece, room)
            return
        room -= len(piece.tokens)
        yield _Event(rng.random(), piece)


def _cut(rng: Generator, piece: Row, room: int) -> _Event:
    if rng.random() < 0.5:
        return _Event(-1.0, Row(piece.tokens[-room:], piece.weights[-room:]))
    return _Event(3.0, Row(piece.tokens[:room], piece.weights[:room]))
