"""A session reads, and every token is scored before it is learned.

Reading is the engine's, as when served. Scores are taken beside it, from the state as it then is:
they change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.engine import Engine, Turn
from hope_runtime.lanes import Lanes
from hope_runtime.model import Hope
from hope_runtime.report import Fact, Failed, Finished, Said
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role, Span, Tokenizer
from hope_runtime.training.corpora import Chat

PIECE = 256  # tokens of one pass


class Token(NamedTuple):
    """A token that is given to a session, how much it is learned, and whether its loss counts."""

    id: int
    weight: float
    counted: bool


class Loss(NamedTuple):
    """Nats, summed over tokens.

    >>> loss = Loss(math.log(8.0), 1) + Loss(math.log(2.0), 1)
    >>> round(loss.perplexity, 3)
    4.0
    """

    nats: float
    tokens: int

    def __add__(self, other: object) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan


NO_LOSS = Loss(0.0, 0)


class Judged(NamedTuple):
    """Of each token but the first: its loss, and whether it was the likeliest."""

    losses: Tensor
    likeliest: Tensor

    def loss(self, counted: Sequence[bool]) -> Loss:
        """Sum the losses of the tokens that count; there is a flag for each but the first."""
        chosen = self.losses[torch.tensor(counted, dtype=torch.bool)]
        return Loss(float(chosen.sum(dtype=torch.float64)), len(chosen))


def document(tokenizer: Tokenizer, text: str, most: int) -> list[Token]:
    """Return the first tokens of a text that is read as it stands, and learned."""
    return [Token(id, 1.0, True) for id in tokenizer.encode(text)[:most]]


def conversation(
    tokenizer: Tokenizer, chats: Iterable[Chat], *, begun: bool = False
) -> Iterator[Token]:
    """Yield chats as a session has them, one after the other, the replies as they were given.

    What the user says is learned; what either says counts, the markup does not. `begun`: the
    session has said something before.
    """
    for chat in chats:
        for asked, replied in zip(chat[::2], chat[1::2], strict=False):
            message = [Message(Role.USER, asked.text)]
            spans = tokenizer.following(message) if begun else tokenizer.opening(message)
            yield from _tokens(spans)
            yield from _tokens([tokenizer.plain(replied.text, Role.ASSISTANT), tokenizer.closing()])
            begun = True


def handed(tokenizer: Tokenizer, text: str) -> list[Token]:
    """Return a document that is handed over in a chat that has begun, and gets an empty reply."""
    spans = tokenizer.following([Message(Role.DOCUMENT, text)])
    return list(_tokens([*spans, tokenizer.closing()]))


def _tokens(spans: Iterable[Span]) -> Iterator[Token]:
    for span in spans:
        weight = float(span.role in {Role.USER, Role.DOCUMENT})
        said = span.role is not Role.MARKUP
        yield from (Token(id, weight, said) for id in span.ids)


class Reader:
    """One session's way through tokens; the model, and the engine that it is served by."""

    def __init__(self, model: Hope, tokenizer: Tokenizer, *, lanes: int = 1) -> None:
        ticks = count()
        self.model, self.tokenizer = model, tokenizer
        self._lanes = Lanes(model, 1)
        self._engine = Engine(model, tokenizer, lanes=lanes, clock=lambda: float(next(ticks)))

    @torch.no_grad()
    def judge(self, state: State, tokens: Sequence[int]) -> Judged:
        """Score tokens that would come after what a session has read; the first is given."""
        assert not state.carry, "something said was not read yet"
        model, lanes = self.model, self._lanes
        lanes.load(0, state)
        deltas = {name: d.to(model.device, model.dtype) for name, d in state.deltas.items()}
        attends = bool(model.config.attention_blocks)
        most = min(PIECE, model.config.window) if attends else PIECE
        losses, likeliest = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
        for at in range(0, len(tokens) - 1, most):
            targets = torch.tensor(tokens[at + 1 : at + most + 1], device=model.device)
            ids = torch.tensor([tokens[at : at + len(targets)]], device=model.device)
            start = torch.tensor([state.position + at], device=model.device)
            past = lanes.view(0, 1, state.position + at)
            read = model.run(model.embed(ids), start, past, [deltas])
            lanes.append(0, start, read)
            logits = model.logits(read.hidden[0])
            losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
            likeliest.append((logits.argmax(-1) == targets).cpu())
        return Judged(torch.cat(losses), torch.cat(likeliest))

    def read(self, state: State, tokens: Sequence[Token], *, learn: bool) -> State:
        """Return the session after it has read, and learned where it is to."""
        given = [(token.id, token.weight) for token in tokens]
        turn = _turn("read", state, given, most=0, learn=learn)
        return next(fact.state for fact in self._run(turn) if isinstance(fact, Finished))

    def score(
        self, state: State, tokens: Sequence[Token], *, learn: bool
    ) -> Iterator[tuple[State, Loss]]:
        """Yield the session and the loss piece by piece, each scored before it is learned.

        The session's first token has nothing before it and no loss.
        """
        step = min((level.chunk for level in self.model.config.levels), default=PIECE)
        for at in range(0, len(tokens), step):
            piece = tokens[at : at + step + 1]  # with the next one's first, under these weights
            judged = self.judge(state, [token.id for token in piece])
            state = self.read(state, tokens[at : at + step], learn=learn)
            yield state, judged.loss([token.counted for token in piece[1:]])

    def reply(self, state: State, questions: Sequence[str], *, most: int) -> list[str]:
        """Return greedy replies to questions, each asked first thing in a chat of its own."""
        turns = []
        for i, question in enumerate(questions):
            spans = self.tokenizer.opening([Message(Role.USER, question)])
            given = [(id, 0.0) for span in spans for id in span.ids]
            turns.append(_turn(str(i), state, given, most=most, learn=False))
        said = [""] * len(turns)
        for fact in self._run(*turns):
            if isinstance(fact, (Said, Finished)):
                said[int(fact.job)] += fact.text
        return said

    def _run(self, *turns: Turn) -> list[Fact]:
        for turn in turns:
            self._engine.submit(turn)
        facts: list[Fact] = []
        while not self._engine.idle:
            facts += self._engine.step()
        for fact in facts:
            if isinstance(fact, Failed):
                raise fact.error
        return facts


def _turn(
    id: str, state: State, given: Sequence[tuple[int, float]], *, most: int, learn: bool
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
