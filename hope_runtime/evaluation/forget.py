"""What does a session that goes on learning lose of what its model could do?

A session lives through days of chat and reading. After some of them the model is judged with what
the session's levels have learned and an empty window: text that has nothing to do with it, the
last word of passages, and common knowledge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hope_runtime.evaluation.reading import (
    Loss,
    Reader,
    Token,
    conversation,
    handed,
)
from hope_runtime.state import State
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training.corpora import Chat

CAPITAL_OF_FRANCE = "What is the capital of France?"
LONGEST_ANSWER = 24  # tokens
LANES = 16


class Question(NamedTuple):
    """Common knowledge, and what an answer has to contain."""

    text: str
    accepted: tuple[str, ...]

    def right(self, answer: str) -> bool:
        """Tell whether an answer contains what is accepted, as whole words in any case.

        >>> sun = Question("What star does the Earth go around?", ("Sun",))
        >>> [sun.right(answer) for answer in ("The sun.", "On Sunday.")]
        [True, False]
        """
        words = "|".join(map(re.escape, self.accepted))
        return bool(re.search(rf"(?<![\w.,])(?:{words})(?!\w)", answer, re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class Probes:
    """What the model is judged by."""

    text: tuple[int, ...]  # tokens of WikiText-2
    passages: tuple[tuple[tuple[int, ...], int], ...]  # tokens, and how many make the last word
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the model could do after so many sessions."""

    sessions: int
    text: Loss
    passages: tuple[bool, ...]  # whether each last word was found
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    moved: dict[str, float]  # of each level: how far from its base, as a share of its norm
    tokens: int  # that the session has read

    def to_json(self, base: Standing) -> dict[str, Any]:
        """Return the figures beside those of the base."""
        words, questions = compared(self.passages, base.passages), compared(self.right, base.right)
        return {
            "sessions": self.sessions,
            "tokens": self.tokens,
            "moved": self.moved,
            "text_tokens": self.text.tokens,
            "perplexity": self.text.perplexity,
            "passages": len(self.passages),
            "last_words": words._asdict(),
            "questions": questions._asdict(),
            "answers": self.answers,
            "right": self.right,
        }


class Compared(NamedTuple):
    """What is left of what the base got right, and what came beside it."""

    base: int
    kept: int
    lost: int
    gained: int


def compared(now: Sequence[bool], base: Sequence[bool]) -> Compared:
    """Count what is right now against what the base got right.

    >>> compared([True, False, True, False], [True, True, False, False])
    Compared(base=2, kept=1, lost=1, gained=1)
    """
    kept = sum(map(bool.__and__, now, base))
    return Compared(sum(base), kept, sum(base) - kept, sum(now) - kept)


def common_knowledge() -> tuple[Question, ...]:
    """Return the questions that come with the package."""
    file = Path(__file__).with_name("common_knowledge.jsonl")
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return tuple(Question(row["question"], tuple(row["accepted"])) for row in rows)


def probes(
    tokenizer: Tokenizer, text: str, tokens: int, passages: Sequence[str], count: int, seed: int
) -> Probes:
    """Return the first tokens of a text, some passages, and all questions."""
    chance = np.random.default_rng([seed, 1])
    chosen = chance.choice(len(passages), min(count, len(passages)), replace=False)
    return Probes(
        text=tuple(tokenizer.encode(text)[:tokens]),
        passages=tuple(_passage(tokenizer, passages[i]) for i in sorted(chosen)),
        questions=common_knowledge(),
    )


def _passage(tokenizer: Tokenizer, passage: str) -> tuple[tuple[int, ...], int]:
    before, _, word = passage.rpartition(" ")
    target = tokenizer.encode(f" {word}")
    return (*tokenizer.encode(before), *target), len(target)


def days(
    tokenizer: Tokenizer, chats: Sequence[Chat], text: str, tokens: int, seed: int
) -> Iterator[list[Token]]:
    """Yield sessions' worth of tokens without end: half a day of chat, then half of reading.

    Chats follow one another in an order of their own, and start again once all were had; the text
    is read on from a place of its own.
    """
    chance = np.random.default_rng([seed, 0])
    order = chance.permutation(len(chats))
    said = conversation(tokenizer, (chats[i] for i in cycle(order)))
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    place = int(chance.integers(len(paragraphs)))
    while True:
        day = list(islice(said, tokens // 2))
        while not _closed(day, tokenizer):  # up to the end of a reply
            day.append(next(said))
        read: list[str] = []
        while len(day) + len(tokenizer.encode("\n\n".join(read))) < tokens:
            read.append(paragraphs[place % len(paragraphs)])
            place += 1
        yield [*day, *handed(tokenizer, "\n\n".join(read))]


def _closed(day: Sequence[Token], tokenizer: Tokenizer) -> bool:
    """Tell whether tokens end as a reply does: in its closing markup, after what is not learned."""
    closing = tokenizer.closing().ids
    n = len(closing)
    if tuple(token.id for token in day[-n:]) != closing:
        return False
    said = [token for token in day[:-n] if token.counted]
    return bool(said) and said[-1].weight == 0.0


def forget(
    reader: Reader,
    probes: Probes,
    days: Iterator[list[Token]],
    checkpoints: Sequence[int],
    progress: Callable[[str, float], None] = lambda text, sessions: None,
) -> Iterator[Standing]:
    """Yield what the model can do before the first session and after those of the checkpoints.

    `progress` hears what is done, and how many sessions are over. The engine of the reader
    answers as many questions at once as it has lanes.
    """
    state = State()
    progress("judging the base", 0)
    yield judged(reader, probes, state, 0)
    for session in range(1, max(checkpoints, default=0) + 1):
        progress(f"session {session}", session - 1)
        state = reader.read(state, next(days), learn=True)
        if session in checkpoints:
            progress(f"judging after {session}", session)
            yield judged(reader, probes, state, session)


def judged(reader: Reader, probes: Probes, state: State, sessions: int) -> Standing:
    """Judge what a session's levels have made of the model."""
    levels = state.cleared(reader.model.config)
    text = reader.judge(levels, probes.text)
    words = [
        bool(reader.judge(levels, tokens).likeliest[-n:].all()) for tokens, n in probes.passages
    ]
    answers = reader.reply(levels, [q.text for q in probes.questions], most=LONGEST_ANSWER)
    right = [q.right(a) for q, a in zip(probes.questions, answers, strict=True)]
    return Standing(
        sessions=sessions,
        text=text.loss([True] * len(text.losses)),
        passages=tuple(words),
        answers=tuple(answers),
        right=tuple(right),
        moved={name: level.movement for name, level in state.levels.items()},
        tokens=state.position,
    )
