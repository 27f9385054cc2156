"""Made-up dialogues about the user's own facts: told, changed, asked for, and never heard of.

Nothing here can be known beforehand, so a model learns to answer only by remembering. Every
random choice is the caller's generator's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from numpy.random import Generator

from hope_runtime.training.facts import HELD_OUT_VALUES, KINDS, Kind
from hope_runtime.training.small_talk import SMALL_TALK

__all__ = [
    "HELD_OUT_VALUES",
    "KINDS",
    "Fact",
    "Kind",
    "Line",
    "Part",
    "answered",
    "ask",
    "ask_unknown",
    "draw_facts",
    "question",
    "small_talk",
    "tell",
    "tell_together",
    "update",
]

VALUE_WEIGHT = 4.0
REPLY_WEIGHT = 1.0
USER_WEIGHT = 0.5


class Part(NamedTuple):
    """A stretch of a line, and how much its tokens count in the loss."""

    text: str
    weight: float


class Line(NamedTuple):
    """What one side says in a turn: "user", "assistant" or "system"."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


class Fact(NamedTuple):
    kind: Kind
    value: str


_TELLINGS = (
    "{}.",
    "{}.",
    "{}.",
    "By the way, {}.",
    "Please remember that {}.",
    "You should know that {}.",
    "Just so you know, {}.",
    "Remember this: {}.",
    "I want to tell you that {}.",
    "Well, {}.",
    "Listen, {}.",
)
_UPDATES = (
    "Actually, {} now.",
    "Actually, {}.",
    "I changed my mind, {}.",
    "Correction: {}.",
    "Sorry, I was wrong, {}.",
    "That is no longer right, {} now.",
    "Wait, that was wrong, {}.",
    "Things have changed, {} now.",
    "From now on, {}.",
    "Please change that, {}.",
)
_ASKINGS = (
    "{}",
    "{}",
    "{}",
    "Hey, {}",
    "So, {}",
    "By the way, {}",
    "I forgot. {}",
    "One question: {}",
)
_NOTED = (
    "Got it.",
    "Okay, I will remember that.",
    "Thanks for telling me.",
    "I will keep that in mind.",
    "Good to know.",
    "Noted.",
    "I see, thank you.",
    "All right, I will not forget it.",
)
_CHANGED = (
    "Okay, I changed it to {}.",
    "Thanks, so it is {} now.",
    "Noted, it is {} now.",
    "All right, {} it is.",
    "I see, {} then.",
)
_UNKNOWN = (
    "I don't know that yet.",
    "You have not told me that yet.",
    "I don't know your {} yet.",
    "Sorry, I don't know your {}.",
)
_SPELLINGS = (("favourite", "favorite"), ("colour", "color"))


def draw_facts(rng: Generator, n: int, *, held_out: bool = False) -> list[Fact]:
    """Draw facts of distinct kinds, with values of training or only with those held out of it."""
    kinds = list(KINDS.values())
    drawn = rng.permutation(len(kinds))[:n]
    return [Fact(kinds[i], draw_value(rng, kinds[i], held_out=held_out)) for i in drawn]


def draw_value(rng: Generator, kind: Kind, *, held_out: bool = False, other: str = "") -> str:
    """Draw one value, another than `other`."""
    while True:
        value = _pick(rng, kind.values)
        if (value in HELD_OUT_VALUES) == held_out and value != other:
            return value


def tell(rng: Generator, fact: Fact) -> list[Line]:
    """Let the user tell a fact; every other acknowledgement repeats it."""
    said = _pick(rng, _TELLINGS).format(_pick(rng, fact.kind.statements))
    return [_user(rng, said, fact.value), _acknowledge(rng, fact, fact.kind.echoes)]


def tell_together(rng: Generator, first: Fact, second: Fact) -> list[Line]:
    """Let the user tell two facts in one line."""
    one, other = _pick(rng, first.kind.statements), _pick(rng, second.kind.statements)
    opening = _split(one, first.value, USER_WEIGHT)
    closing = _split(f" and {other}.", second.value, USER_WEIGHT)
    said = _spelled(rng, _capital((*opening, *closing)))
    return [Line("user", said), _reply(_pick(rng, _NOTED), "")]


def update(rng: Generator, fact: Fact) -> list[Line]:
    """Let the user give a fact its new value."""
    said = _pick(rng, _UPDATES).format(_pick(rng, fact.kind.statements))
    return [_user(rng, said, fact.value), _acknowledge(rng, fact, _CHANGED + fact.kind.echoes)]


def ask(rng: Generator, fact: Fact) -> list[Line]:
    """Let the user ask for a fact that the assistant knows."""
    asked = _user(rng, question(rng, fact.kind), "")
    return [asked, _reply(_pick(rng, fact.kind.answers), fact.value)]


def ask_unknown(rng: Generator, kind: Kind) -> list[Line]:
    """Let the user ask for what was never told."""
    asked = _user(rng, question(rng, kind), "")
    return [asked, _reply(_pick(rng, _UNKNOWN).format(kind.subject), "")]


def question(rng: Generator, kind: Kind) -> str:
    asking, asked = _pick(rng, _ASKINGS), _pick(rng, kind.questions)
    alone = asking == "{}" or asking.startswith("I forgot")
    return asking.format(asked if alone else asked[0].lower() + asked[1:])


def small_talk(rng: Generator) -> list[Line]:
    asked, replies = SMALL_TALK[int(rng.integers(len(SMALL_TALK)))]
    return [_user(rng, _pick(rng, asked), ""), _reply(_pick(rng, replies), "")]


def answered(reply: str, fact: Fact) -> bool:
    """Tell whether a reply names the fact's value, as whole words, and no other of its kind.

    >>> dog = Fact(KINDS["dog"], "Rex")
    >>> [answered(reply, dog) for reply in ("It's Rex.", "It's Rexy.", "It's Rex or Max.")]
    [True, False, False]
    """
    words = _WORD.findall(reply.replace("'s", ""))
    values = set(fact.kind.values)
    found = set()
    start = 0
    while start < len(words):
        for n in range(_LONGEST, 0, -1):
            if (phrase := " ".join(words[start : start + n])) in values:
                found.add(phrase)
                start += n - 1
                break
        start += 1
    return found == {fact.value}


_WORD = re.compile(r"\w+(?:[:'-]\w+)*")
_LONGEST = max(len(value.split()) for kind in KINDS.values() for value in kind.values)


def _acknowledge(rng: Generator, fact: Fact, echoes: Sequence[str]) -> Line:
    if rng.random() < 0.5:
        return _reply(_pick(rng, _NOTED), "")
    return _reply(_pick(rng, echoes), fact.value)


def _reply(template: str, value: str) -> Line:
    return Line("assistant", _capital(_split(template, value, REPLY_WEIGHT, VALUE_WEIGHT)))


def _user(rng: Generator, template: str, value: str) -> Line:
    """Say it as a person would: sometimes in American spelling, sometimes carelessly typed."""
    parts = _spelled(rng, _split(template, value, USER_WEIGHT))
    if rng.random() < 0.15:
        return Line("user", _careless(parts))
    return Line("user", _capital(parts))


def _split(template: str, value: str, weight: float, important: float = 0.0) -> tuple[Part, ...]:
    before, found, after = template.partition("{}")
    if not found:
        return (Part(before, weight),)
    if value[0] in "aeiouAEIOU" and re.search(r"\b[aA] $", before):
        before = before[:-1] + "n "
    parts = Part(before, weight), Part(value, important or weight), Part(after, weight)
    return tuple(part for part in parts if part.text)


def _capital(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Start with a capital; values are never changed, and none with a small letter comes first."""
    first, *rest = parts
    return (Part(first.text[0].upper() + first.text[1:], first.weight), *rest)


def _careless(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    first, *rest = parts
    if len(parts) != 2 and not first.text.startswith("I "):
        first = Part(first.text[0].lower() + first.text[1:], first.weight)
    *most, last = (first, *rest)
    text = last.text.rstrip(".?")
    return (*most, Part(text, last.weight)) if text else tuple(most)


def _spelled(rng: Generator, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if rng.random() < 0.5:
        return parts
    return tuple(Part(_american(part.text), part.weight) for part in parts)


def _american(text: str) -> str:
    for british, american in _SPELLINGS:
        text = text.replace(british, american)
    return text


def _pick(rng: Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]
