"""Turns of a chat in which facts are told, changed and asked for, as tokens that are marked.

A base model reads the turns once, in conversations as they would be had; what its blocks make of
them is kept, and training draws sessions from the turns as often as it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hope_runtime.config import OPENING
from hope_runtime.tokenizer import Message, Role, Tokenizer
from hope_runtime.training.told import (
    Kind,
    held_out_kind,
    held_out_phrase,
    held_out_value,
)

__all__ = ["Conversation", "Plan", "Said", "Turn", "What", "conversations", "plan"]


class What(IntEnum):
    """What a user does in a turn."""

    TELL = 0
    CHANGE = 1
    ASK = 2
    TALK = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """A turn that will be had."""

    what: What
    text: str
    reply: str
    value: str = ""
    kind: str = ""  # its name
    held_out: bool = False  # its phrasing, its value or its kind is kept from training


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a turn lies among its conversation's tokens."""

    plan: Plan
    start: int
    asked: int  # the last token before the reply
    end: int
    first: int = -1  # of the value's tokens: in the reply of an ASK, else in what the user said
    last: int = -1  # the one after them


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation."""

    tokens: NDArray[np.int64]
    stated: NDArray[np.bool_]  # said by the user
    turns: tuple[Turn, ...]


Conversation = list[Plan]

_CHANGES = (
    "Actually, {}", "Sorry, I have to correct that: {}", "No, wait. {}", "I was wrong before: {}",
    "Correction: {}", "That is not true any more. {}", "Small update: {}", "News: {}",
    "Things have changed: {}", "Forget what I said before: {}", "I misspoke earlier. {}",
    "Please note a change: {}", "{} It used to be different.", "As of today, {}",
    "Scratch that. {}", "Hm, I mixed something up: {}", "{} What I told you before is outdated.",
    "I changed my mind about something. {}", "Update from my side: {}", "Oops, {}",
)  # fmt: skip
_OPENINGS = (
    "By the way, {}", "You know, {}", "Oh, and {}", "Hi! {}", "Hello. {}", "{} Just so you know.",
    "Let me tell you something. {}", "For the record: {}", "Remember this: {}", "Guess what? {}",
    "{} How about that?", "So, {}", "Well, {}", "Hey, {}", "Please remember that {}",
    "Fun fact: {}",
)  # fmt: skip
_QUESTIONS = (
    "Hi again! {}", "Hey, {}", "Quick question: {}", "By the way, {}", "Tell me, {}", "Hello. {}",
    "I am curious. {}", "One more thing: {}", "{} I can't recall.", "Ok. {}", "So, {}",
    "{} Thanks.",
    "Sorry to bother you. {}", "Let's see if you know this. {}",
)  # fmt: skip
_REPLIES = (
    "That is good to know.", "Thank you for telling me!", "I see.", "Got it.", "How nice!",
    "That sounds wonderful! Tell me more about it.", "Okay, I will remember that.", "Noted.",
    "Oh, interesting. How did that come about?", "I'm glad to hear that.", "That's great!",
    "Thanks for sharing that with me. Is there anything I can help you with?", "Understood.",
    "I understand. It must mean a lot to you.", "Sure, I'll keep that in mind.", "Really?",
    "That's a great choice! There are many reasons why people like it.", "Lovely.", "Alright.",
    "It's great to hear that you're doing well. What else is new?", "Good to know, thanks.",
    "I'm sorry to hear that. How are you feeling now?", "Fantastic!", "Okay.", "Makes sense.",
    "I'd be happy to help you with that. What would you like to know?", "Sounds good!",
)  # fmt: skip
_ECHOES = ("Got it. {}", "Okay. {}", "{}", "I see. {}", "Noted. {}", "Thank you. {}")


_ARTICLE = re.compile(r"\b(an? |the )(?=\{\})")
_TWICE = re.compile(r"(\d)\1")


def plan(rng: Generator, kinds: Sequence[Kind], fills: int) -> list[Plan]:
    """Return a turn for every way to tell, to change and to ask, each with `fills` values.

    An article before a value is part of it, told and asked for: that "a mug" is sometimes "a" and
    a value, sometimes a value that begins with "a", nobody could learn to tell apart.
    """
    found: list[Plan] = []
    for kind in kinds:
        ours, theirs = _values(rng, kind)
        articles = [articled(template, kind.values[0])[1] for template in kind.tells]
        for what, templates in (
            (What.TELL, kind.tells),
            (What.CHANGE, (*kind.updates, *kind.tells[:4])),
            (What.ASK, kind.asks),
        ):
            for template in templates:
                held = held_out_kind(kind.name) or held_out_phrase(template)
                pool = theirs if held else ours
                for value in _some(rng, pool, fills):
                    if what is What.ASK:
                        article = articles[int(rng.integers(len(articles)))]
                        wording = template
                    else:
                        wording, article = articled(template, value)
                    found.append(_turn(rng, what, kind, wording, article + value, held))
    return found


def articled(template: str, value: str) -> tuple[str, str]:
    """Return a way to tell without the article that belongs to the value, and the article.

    It belongs to what does not begin with a digit, nor to a name that only says which ("the Oak
    bridge").

    >>> articled("I broke a {} today.", "mug"), articled("We met on the {} bridge.", "Oak")
    (('I broke {} today.', 'a '), ('We met on the {} bridge.', ''))
    """
    found = _ARTICLE.search(template)
    if not found or value[0].isdigit():
        return template, ""
    if value[0].isupper() and re.match(r"[-'\w]| \w", template[found.end() + 2 :]):
        return template, ""
    return template[: found.start()] + template[found.end() :], found[1]


def _values(rng: Generator, kind: Kind) -> tuple[list[str], list[str]]:
    """Draw a few values to train on, and fewer that are kept from it.

    One of numbers has a digit twice in a row: what comes after the second is hardest.
    """
    ours = [value for value in kind.values if not held_out_value(value)]
    theirs = [value for value in kind.values if held_out_value(value)]
    twice = _some(rng, [value for value in ours if _TWICE.search(value)], 1)
    drawn = [value for value in _some(rng, ours, 3) if value not in twice]
    return [*twice, *drawn][:3], _some(rng, theirs or kind.values, 2)


def _some(rng: Generator, of: Sequence[str], count: int) -> list[str]:
    return [of[i] for i in rng.permutation(len(of))[:count]]


def _turn(rng: Generator, what: What, kind: Kind, template: str, value: str, held: bool) -> Plan:
    answer = kind.answers[min(int(rng.random() < 0.2), len(kind.answers) - 1)]
    if value.startswith(("a ", "an ", "the ")):
        answer = articled(answer, value)[0]
    if what is What.ASK:
        text = _framed(rng, _QUESTIONS, template, 0.25)
        return Plan(what, text, f"{OPENING} {value}.", value, kind.name, held)
    if what is What.CHANGE and template in kind.tells:
        text = _framed(rng, _CHANGES, template, 1.0)
    else:
        text = _framed(rng, _OPENINGS, template, 0.2)
    reply = _REPLIES[int(rng.integers(len(_REPLIES)))]
    if rng.random() < 0.2:
        reply = _ECHOES[int(rng.integers(len(_ECHOES)))].replace("{}", answer.replace("{}", value))
    return Plan(what, text.replace("{}", value), reply, value, kind.name, held)


def _framed(rng: Generator, frames: Sequence[str], text: str, share: float) -> str:
    """Put a sentence into a frame now and then; write it carelessly now and then."""
    if rng.random() < share:
        before, _, after = frames[int(rng.integers(len(frames)))].partition("{}")
        small = before.rstrip().endswith((",", ":", "that")) and not text.startswith(
            ("I ", "I'", "{")
        )
        text = before + (text[0].lower() + text[1:] if small else text) + after
    if rng.random() < 0.1:
        text = text.rstrip(".?!")
    if rng.random() < 0.08:
        text = text[0].lower() + text[1:]
    return text


def conversations(
    rng: Generator, plans: Sequence[Plan], tokenizer: Tokenizer, length: int
) -> Iterator[Said]:
    """Shuffle turns into conversations; one of more than `length` tokens is a single turn."""
    builder = _Builder(tokenizer)
    for i in rng.permutation(len(plans)):
        longer = builder.with_turn(plans[i])
        if len(longer) > length and len(builder):
            yield builder.said()
            longer = _Builder(tokenizer).with_turn(plans[i])
        builder = longer
    if len(builder):
        yield builder.said()


class _Builder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._stated: list[bool] = []
        self._turns: list[Turn] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def with_turn(self, plan: Plan) -> _Builder:
        """Return the conversation with one more turn; this one stays as it is."""
        longer = _Builder(self._tokenizer)
        longer._tokens, longer._stated = [*self._tokens], [*self._stated]
        longer._turns = [*self._turns]
        longer.add(plan)
        return longer

    def add(self, plan: Plan) -> None:
        tokenizer, start = self._tokenizer, len(self._tokens)
        render = tokenizer.following if self._tokens else tokenizer.opening
        first = last = -1
        for span in render([Message(Role.USER, plan.text)]):
            if span.role is Role.USER and plan.what is not What.ASK:
                first, last = self._value(span.ids, plan.text, plan.value)
            self._put(span.ids, said=span.role is Role.USER)
        asked = len(self._tokens) - 1
        reply = tokenizer.encode(plan.reply)
        if plan.what is What.ASK:
            first, last = self._value(reply, plan.reply, plan.value)
        self._put(reply)
        self._put(tokenizer.closing().ids)
        self._turns.append(Turn(plan, start, asked, len(self._tokens), first, last))

    def said(self) -> Said:
        return Said(
            np.array(self._tokens, dtype=np.int64),
            np.array(self._stated, dtype=np.bool_),
            tuple(self._turns),
        )

    def _put(self, ids: Sequence[int], *, said: bool = False) -> None:
        self._tokens.extend(ids)
        self._stated.extend([said] * len(ids))

    def _value(self, ids: Sequence[int], text: str, value: str) -> tuple[int, int]:
        """Return where the value's tokens will lie, once `ids` are put."""
        at = text.find(value) if value else -1
        if at < 0:
            return -1, -1
        end = 0
        inside = []
        for i, id in enumerate(ids):
            begin, end = end, end + len(self._tokenizer.decode([id]))
            if begin < at + len(value) and end > at and text[begin:end].strip():
                inside.append(i)
        start = len(self._tokens)
        return (start + inside[0], start + inside[-1] + 1) if inside else (-1, -1)
