"""Does a model get better at what it reads while it reads it, and worse at nothing else?

The same tokens are read twice, without and with learning, and each is scored before it is
learned. An unrelated chat is scored before and after, from an empty window: what the levels
learned must not cost it anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hope_runtime.config import HopeConfig
from hope_runtime.evaluation.reading import (
    NO_LOSS,
    Loss,
    Reader,
    Token,
    conversation,
    document,
)
from hope_runtime.model import Hope
from hope_runtime.state import State
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training.corpora import Chat

WORSE = 2.0  # standard errors by which an unrelated chat's loss may rise


@dataclass(frozen=True, slots=True)
class Source:
    """Something to read."""

    name: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Adaptation:
    """One source at one window."""

    source: str
    window: int
    static: Loss
    learning: Loss
    other_before: Loss  # an unrelated chat
    other_after: Loss
    other_error: float  # standard error of the mean change of its tokens' losses, in nats
    moved: dict[str, float]  # of each level: how far from its base, as a share of its norm

    @property
    def change(self) -> float:
        """The change of perplexity by learning, -0.1 for a tenth less."""
        return self.learning.perplexity / self.static.perplexity - 1.0

    @property
    def other_change(self) -> float:
        return self.other_after.perplexity / self.other_before.perplexity - 1.0

    @property
    def worse(self) -> bool:
        """Whether reading has cost the unrelated chat more than chance would."""
        return math.log1p(self.other_change) > WORSE * self.other_error

    def to_json(self) -> dict[str, Any]:
        """Return the figures, and what they are made of."""
        return {
            "source": self.source,
            "window": self.window,
            "tokens": self.static.tokens,
            "static": self.static.perplexity,
            "learning": self.learning.perplexity,
            "change": self.change,
            "other_tokens": self.other_before.tokens,
            "other_before": self.other_before.perplexity,
            "other_after": self.other_after.perplexity,
            "other_change": self.other_change,
            "other_error": self.other_error,
            "worse": self.worse,
            "moved": self.moved,
        }


def sources(
    tokenizer: Tokenizer,
    documents: Sequence[tuple[str, str]],
    chats: Sequence[Chat],
    tokens: int,
) -> list[Source]:
    """Return documents, given as name and text, and the first chats as one that goes on."""
    found = [Source(name, tuple(document(tokenizer, text, tokens))) for name, text in documents]
    if chats:
        said = tuple(islice(conversation(tokenizer, chats), tokens))
        found.append(Source("chats", said))
    return found


def unrelated(tokenizer: Tokenizer, chats: Sequence[Chat], tokens: int) -> list[Token]:
    """Return the last chats: nothing that `sources` reads of a corpus much longer than that."""
    return list(islice(conversation(tokenizer, reversed(chats)), tokens))


def adapt(
    model: Hope,
    tokenizer: Tokenizer,
    read: Sequence[Source],
    other: Sequence[Token],
    windows: Sequence[int],
    progress: Callable[[str, int], None] = lambda text, tokens: None,
) -> Iterator[Adaptation]:
    """Yield every source at every window; `progress` hears of what was read, and how much."""
    for window in windows:
        reader = Reader(windowed(model, window), tokenizer)
        before = _losses(reader, State(), other)
        for source in read:
            about = f"{source.name}, window {window}"
            progress(f"{about}, static", 0)
            # what learns nothing is scored at once as it is piece by piece
            static = _sum(_losses(reader, State(), source.tokens))
            progress(f"{about}, static", len(source.tokens))
            state, learning = State(), NO_LOSS
            for then, loss in reader.score(state, source.tokens, learn=True):
                state, learning = then, learning + loss
                progress(f"{about}, learning", state.position)
            after = _losses(reader, state.cleared(reader.model.config), other)
            error = float((after - before).std()) / math.sqrt(len(before))
            moved = {name: level.movement for name, level in state.levels.items()}
            sums = (static, learning, _sum(before), _sum(after))
            yield Adaptation(source.name, window, *sums, error, moved)


def windowed(model: Hope, window: int) -> Hope:
    """Return the same model, with the same weights and levels, at another window."""
    twin = copy(model)
    twin.config = replace(model.config, window=window)
    return twin


def changed(config: HopeConfig, changes: dict[str, Any]) -> HopeConfig:
    """Return a shape of which every level has these settings instead of its own."""
    return replace(config, levels=tuple(replace(level, **changes) for level in config.levels))


def _losses(reader: Reader, state: State, tokens: Sequence[Token]) -> Tensor:
    """Return the losses of the tokens that count."""
    judged = reader.judge(state, [token.id for token in tokens])
    return judged.losses[torch.tensor([token.counted for token in tokens[1:]])]


def _sum(losses: Tensor) -> Loss:
    return Loss(float(losses.sum(dtype=torch.float64)), len(losses))
