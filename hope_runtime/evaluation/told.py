"""What people tell, and what is asked later: drawn, judged, and looked up by a rival.

A person tells some facts; later every fact is asked for, and as many of kinds that were never
told. An answer to the first is right that names the exact value and nothing else that was told; to
the second, one that says it does not know and names nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.random import Generator

from hope_runtime.training.corpora import Chat
from hope_runtime.training.told import (
    Kind,
    held_out_kind,
    held_out_phrase,
    held_out_value,
    read,
)

PIECE = 8  # lines of other people's chat that are read in one turn
CHANGE_SHARE = 0.5  # of the facts, where some are changed


class Part(StrEnum):
    """What is kept from training that a row asks with."""

    PHRASES = "phrasings"  # held-out ways to tell and to ask, held-out values
    TYPES = "types"  # kinds of facts that were never trained on
    FIRST = "value first"  # held-out ways to tell that name the value before what it is
    FRESH = "fresh"  # phrasings by people who had seen nothing of training's
    ROUNDABOUT = "roundabout"  # the same, by others, who were asked to go round the subject


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact of one person, and how it is told and asked for."""

    kind: str
    value: str  # the newest
    told: tuple[str, ...]  # once, or twice where it changes
    asked: str
    before: str = ""  # the value that is true no more

    @property
    def changed(self) -> bool:
        return len(self.told) > 1


@dataclass(frozen=True, slots=True)
class Person:
    """Someone to be remembered."""

    facts: tuple[Fact, ...]
    untold: tuple[tuple[str, str], ...]  # kind and question of what is never told


BLIND = (Part.FRESH, Part.ROUNDABOUT)


def blind_kinds(part: Part) -> tuple[Kind, ...]:
    """Return kinds in words that their writers chose without having seen those of training."""
    return read([Path(__file__).with_name(f"{part}.toml")])


class Verdict(StrEnum):
    """What an answer is."""

    RIGHT = "right"
    WRONG = "wrong"  # something was named, and it is not so
    UNKNOWN = "unknown"  # the model says that it does not know


def usable(kinds: Sequence[Kind], part: Part) -> list[Kind]:
    """Return the kinds with what `part` asks with only; those with nothing are left out.

    Raises:
        ValueError: nothing is left.
    """
    found = []
    for kind in kinds:
        new = held_out_kind(kind.name)
        kept: Kind | None
        match part:
            case Part.FRESH | Part.ROUNDABOUT:
                kept = kind
            case Part.TYPES:
                kept = kind if new else None
            case Part.PHRASES | Part.FIRST:
                kept = None if new else _held_out(kind, first=part is Part.FIRST)
        if kept is not None and kept.tells and kept.asks and len(kept.values) > 1:
            found.append(kept)
    if not found:
        raise ValueError(f"no kind of fact has anything for the row {part!r}")
    return found


def _held_out(kind: Kind, *, first: bool) -> Kind:
    values = tuple(value for value in kind.values if held_out_value(value))
    tells = tuple(text for text in kind.tells if held_out_phrase(text))
    if first:
        tells = tuple(text for text in tells if named_first(text))
    return Kind(
        kind.name,
        values if len(values) > 1 else kind.values,
        tells,
        kind.updates,
        tuple(text for text in kind.asks if held_out_phrase(text)),
        kind.answers,
    )


def named_first(template: str) -> bool:
    """Tell whether a way to tell names the value before it says what it is.

    >>> named_first("{} is what we call our dog."), named_first("Our dog is called {}.")
    (True, False)
    """
    before = template.partition("{}")[0]
    return len(before.split()) <= 2


def draw(rng: Generator, kinds: Sequence[Kind], facts: int, *, changing: bool = False) -> Person:
    """Draw a person with so many facts, of different kinds and with different values."""
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    told: list[Fact] = []
    used: set[str] = set()
    for kind in order:
        if len(told) == facts:
            break
        free = [value for value in kind.values if value.lower() not in used]
        if len(free) < 2:
            continue
        value, other = (free[i] for i in rng.permutation(len(free))[:2])
        used |= {value.lower(), other.lower()}
        change = changing and kind.updates and rng.random() < CHANGE_SHARE
        first = _one(rng, kind.tells).replace("{}", other if change else value)
        then = (_one(rng, kind.updates).replace("{}", value),) if change else ()
        told.append(
            Fact(kind.name, value, (first, *then), _one(rng, kind.asks), other if change else "")
        )
    if len(told) < facts:
        raise ValueError(f"{facts} facts cannot be drawn of {len(kinds)} kinds; ask for fewer")
    names = {fact.kind for fact in told}
    others = [kind for kind in order if kind.name not in names][:facts]
    return Person(tuple(told), tuple((kind.name, _one(rng, kind.asks)) for kind in others))


def people(
    kinds: Sequence[Kind], facts: int, count: int, seed: int, *, changing: bool = False
) -> list[Person]:
    """Draw people, each from a seed of his own."""
    return [
        draw(np.random.default_rng([seed, person]), kinds, facts, changing=changing)
        for person in range(count)
    ]


def filler(chats: Sequence[Chat], tokens: int, seed: int, person: int) -> list[Chat]:
    """Draw chats that other people had: about so many tokens, at four characters each."""
    rng = np.random.default_rng([seed, person, 1])
    found: list[Chat] = []
    left = 4 * tokens
    while left > 0:
        chat = chats[int(rng.integers(len(chats)))]
        for start in range(0, len(chat) - len(chat) % 2, PIECE):
            piece = chat[start : start + PIECE]
            found.append(piece)
            left -= sum(len(line.text) + 28 for line in piece)  # with the markup around each
            if left <= 0:
                break
    return found


_UNSURE = re.compile(
    r"\b(?:don't|do not|didn't|did not|haven't|have not|never|can't|cannot|not sure|unable)\b",
    re.IGNORECASE,
)


def judge(answer: str, person: Person, fact: Fact | None) -> Verdict:
    """Judge an answer to the question for a fact, or for something never told (None).

    >>> rex = Fact("dog", "Rex", ("My dog is Rex.",), "My dog?")
    >>> ada = Fact("sister", "Ada", ("My sister is Ada.",), "My sister?")
    >>> person = Person((rex, ada), ())
    >>> said = ("Your dog is Rex.", "Rex or Ada.", "I don't know that yet.", "A dog.")
    >>> [str(judge(each, person, rex)) for each in said]
    ['right', 'wrong', 'unknown', 'wrong']
    >>> [str(judge(each, person, None)) for each in said]
    ['wrong', 'wrong', 'unknown', 'wrong']
    """
    stored = {other.value for other in person.facts} | {other.before for other in person.facts}
    named = {value for value in stored - {""} if says(answer, value)}
    if fact is not None and says(answer, fact.value):
        others = {value for value in named if value not in fact.value}
        return Verdict.RIGHT if not others else Verdict.WRONG
    if not named and _UNSURE.search(answer):
        return Verdict.UNKNOWN
    return Verdict.WRONG


def says(answer: str, value: str) -> bool:
    """Tell whether a text names a value, as whole words, whatever the case.

    >>> says("It's 16:30.", "6:30"), says("Your dog is REX!", "Rex")
    (False, True)
    """
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def retrieve(question: str, sentences: Sequence[str], count: int) -> list[str]:
    """Return the sentences that share most with a question, by BM25, in the order they were said.

    >>> retrieve("What is my dog called?", ["It rains.", "My dog is Rex."], 1)
    ['My dog is Rex.']
    """
    texts = [_words(sentence) for sentence in sentences]
    mean = sum(map(len, texts)) / max(len(texts), 1)
    seen = Counter(word for text in texts for word in set(text))

    def score(text: Sequence[str]) -> float:
        counts = Counter(text)
        return sum(
            math.log(1 + (len(texts) - seen[word] + 0.5) / (seen[word] + 0.5))
            * (counts[word] * 2.2 / (counts[word] + 1.2 * (0.25 + 0.75 * len(text) / mean)))
            for word in set(_words(question))
            if word in counts
        )

    best = sorted(range(len(texts)), key=lambda i: -score(texts[i]))[:count]
    return [sentences[i] for i in sorted(best)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def interval(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's).

    >>> tuple(round(end, 3) for end in interval(8, 10))
    (0.49, 0.943)
    """
    if not of:
        return 0.0, 1.0
    z, share = 1.96, right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return middle - half, middle + half


def _one(rng: Generator, of: Sequence[str]) -> str:
    return of[int(rng.integers(len(of)))]
