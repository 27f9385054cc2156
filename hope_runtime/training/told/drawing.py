"""Sessions to learn from, put together anew at every step from turns that were read once.

Axes: B sessions, T tokens of the longest, Q questions of all sessions, P tokens of a reply.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.layers.recall import NOTHING
from hope_runtime.training.told import Kind
from hope_runtime.training.told.features import Features
from hope_runtime.training.told.turns import Turn, What

T = TypeVar("T")
ASKED = 8  # of a session's facts; more are told than asked for where there are many
CONTRASTS = 4  # questions of a session for what was never told
VALUE, NONE = 1, 0  # what should be read at a place of a reply: part of what was told, or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """How hard sessions are."""

    facts: tuple[int, int]
    filler: tuple[int, int]  # turns in between
    changes: float = 0.25  # share of facts that are told anew
    near: float = 0.6  # share of what was never told that has the values of what was
    renamed: float = 0.7  # share of facts whose value's tokens are replaced by any others
    borrowed: float = 0.5  # share that is asked for as if for another value; its begin is learned


STAGES = (
    Stage(facts=(1, 3), filler=(0, 2), changes=0.1),
    Stage(facts=(2, 6), filler=(1, 6)),
    Stage(facts=(2, 10), filler=(1, 8)),
    Stage(facts=(2, 16), filler=(1, 8)),
)  # no more filler than that: what is not written at all makes no distance (`RecallConfig.floor`)


class Drawn(NamedTuple):
    """A batch of sessions."""

    seen: Tensor  # [B, T, Z]
    tokens: Tensor  # [B, T]: what is written of each
    valid: Tensor  # [B, T]
    heard: Tensor  # [B, T]: valid, and seen by the tokens around
    stated: Tensor  # [B, T]
    told: Tensor  # [B, T]: part of the value of a fact
    session: Tensor  # [Q]: which one a question belongs to
    around: Tensor  # [Q, W - 1 + P, Z]
    around_valid: Tensor  # [Q, W - 1 + P]
    hidden: Tensor  # [Q, P, width]
    rivals: Tensor  # [Q, P, k]: what the base would rather say there
    target: Tensor  # [Q, P]: the next token of a value; NOTHING where there is none
    look: Tensor  # [Q, P]: VALUE or NONE; NOTHING where it does not matter
    first: Tensor  # [Q]: the place whose next token is the value's first: a number's is one later
    known: Tensor  # [Q]: whether it was told


class Pairs(NamedTuple):
    """Facts as they are told and as they are asked for, each alone, and what is neither.

    Most pairs are of different kinds; two of one fact are of different tokens of its value.
    """

    told: Tensor  # [N, W + 1, Z] float16: what is said around a token of a value
    told_valid: Tensor  # [N, W + 1]
    asked: Tensor  # [N, W, Z]: up to the place of a reply where that token comes next
    asked_valid: Tensor  # [N, W]
    begins: Tensor  # [N] bool: where it is the reply's first place, and memory is asked if it knows
    other: Tensor  # [M, W + 1, Z]: around tokens of the user's that are part of no fact
    other_valid: Tensor  # [M, W + 1]
    silent: Tensor  # [S, W, Z]: up to a place of a reply where nothing comes next that was told
    silent_valid: Tensor  # [S, W]
    starts: Tensor  # [S] bool: where that is the start of a reply to no question; else a value ends


class Pool:
    """Turns by kind and value; sessions are drawn from it."""

    def __init__(
        self,
        features: Features,
        kinds: Sequence[Kind],
        written: Tensor,
        config: RecallConfig,
        rivals: Tensor,
        *,
        held_out: bool,
    ) -> None:
        self.features = features
        self.config = config
        self.rivals = rivals  # [r, k], of the rows of `features.hidden`
        self.written = written  # [n]: what each token is written as
        self._vocabulary = int(features.tokens.max())
        self._tells: dict[tuple[str, str], list[Turn]] = defaultdict(list)
        self._changes: dict[tuple[str, str], list[Turn]] = defaultdict(list)
        self._asks: dict[tuple[str, str], list[Turn]] = defaultdict(list)
        self._talk: list[Turn] = []
        self._all_asks: list[Turn] = []
        self._kind_asks: dict[str, list[Turn]] = defaultdict(list)
        self._kind_tells: dict[str, list[Turn]] = defaultdict(list)
        for turn in features.turns:
            if turn.plan.what is What.TALK:
                self._talk.append(turn)
                continue
            if turn.plan.held_out is not held_out or turn.first < 0:
                continue
            key = turn.plan.kind, turn.plan.value
            found = {
                What.TELL: self._tells,
                What.CHANGE: self._changes,
                What.ASK: self._asks,
            }[turn.plan.what]
            found[key].append(turn)
            if turn.plan.what is What.ASK:
                self._all_asks.append(turn)
                self._kind_asks[turn.plan.kind].append(turn)
            else:
                self._kind_tells[turn.plan.kind].append(turn)
        places = [turn.first - 1 - turn.asked for turn in self._all_asks]
        self._opening = min(places, default=0)  # tokens that stand before every answer
        self._values: dict[str, list[str]] = defaultdict(list)
        self._told: dict[str, list[str]] = defaultdict(list)
        for kind, value in self._tells:
            self._told[kind].append(value)
            if (kind, value) in self._asks:
                self._values[kind].append(value)
        self.kinds = sorted(self._values)
        self._family: dict[str, list[str]] = {}
        by_values: dict[tuple[str, ...], list[str]] = defaultdict(list)
        named = {kind.name: kind for kind in kinds}
        for kind in self.kinds:
            by_values[named[kind].values].append(kind)
        for kind in self.kinds:
            self._family[kind] = by_values[named[kind].values]

    def draw(self, rng: Generator, sessions: int, stage: Stage) -> Drawn:
        """Draw sessions with the same number of facts and of turns between."""
        count = int(rng.integers(stage.facts[0], stage.facts[1] + 1))
        filler = int(rng.integers(stage.filler[0], stage.filler[1] + 1))
        return self.collate(
            rng, [self._session(rng, count, filler, stage) for _ in range(sessions)]
        )

    def _session(self, rng: Generator, count: int, filler: int, stage: Stage) -> _Session:
        chosen = self._kinds(rng, count)
        first: list[Turn] = []
        then: list[Turn] = []
        asked: list[tuple[Turn, Turn]] = []
        renamed: dict[int, dict[int, int]] = {}
        for kind in chosen:
            borrowed = rng.random() < stage.borrowed
            values = (self._told if borrowed else self._values)[kind]
            value = _one(rng, values)
            told = _one(rng, self._tells[kind, value])
            if rng.random() < stage.changes:
                first.append(told)
                later = [v for v in values if v != value and (kind, v) in self._changes]
                if later:
                    value = _one(rng, later)
                    told = _one(rng, self._changes[kind, value])
                    then.append(told)
            else:
                (first if rng.random() < 0.7 else then).append(told)
            ask = _one(rng, self._kind_asks[kind] if borrowed else self._asks[kind, value])
            if ask.plan.value != told.plan.value or self._same(told, ask):
                asked.append((told, ask))
        idle = [_one(rng, self._talk) for _ in range(filler) if self._talk]
        idle += [_one(rng, self._all_asks) for _ in range(1 + filler // 6)]
        stream = _mixed(rng, first, idle[: len(idle) // 2])
        stream += _mixed(rng, then, idle[len(idle) // 2 :])
        for told, _ in asked:
            if rng.random() < stage.renamed:
                ids = self.written[told.first : told.last].tolist()
                renamed[told.start] = {
                    id: int(rng.integers(self._vocabulary // 20, self._vocabulary))
                    for id in set(ids)
                }
        if len(asked) > ASKED:
            asked = [asked[i] for i in rng.permutation(len(asked))[:ASKED]]
        unknown = [
            _one(rng, self._asks[kind, _one(rng, self._values[kind])])
            for kind in self._strangers(rng, chosen, min(CONTRASTS, 1 + count), stage.near)
        ]
        return _Session(stream, asked, unknown, renamed)

    def _kinds(self, rng: Generator, count: int) -> list[str]:
        """Draw kinds; now and then some of one family, which are easily confused."""
        chosen: dict[str, None] = {}
        while len(chosen) < min(count, len(self.kinds)):
            kind = _one(rng, self.kinds)
            chosen[kind] = None
            if rng.random() < 0.3 and len(chosen) < count:
                chosen[_one(rng, self._family[kind])] = None
        return list(chosen)

    def _strangers(
        self, rng: Generator, chosen: Sequence[str], count: int, share: float
    ) -> list[str]:
        """Draw kinds that are not among the chosen, a share of them from their families."""
        found = []
        for _ in range(count):
            near = self._family[_one(rng, chosen)] if rng.random() < share else self.kinds
            free = [kind for kind in near if kind not in chosen]
            if free:
                found.append(_one(rng, free))
        return found

    def _same(self, told: Turn, ask: Turn) -> bool:
        """Tell whether a value is written with the tokens that the answer needs."""
        ours = self.written[told.first : told.last]
        theirs = self.features.tokens[ask.first : ask.last]
        return len(ours) == len(theirs) and bool((ours == theirs).all())

    def collate(self, rng: Generator, sessions: Sequence[_Session]) -> Drawn:
        """Lay sessions out; what they are made of is gathered where the features are."""
        data, config = self.features, self.config
        rows = [np.concatenate([np.arange(t.start, t.end) for t in s.stream]) for s in sessions]
        shape = len(sessions), max(map(len, rows)) + config.ahead
        places = torch.zeros(shape, dtype=torch.int64)
        valid, told = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
        for b, row in enumerate(rows):
            places[b, : len(row)] = torch.from_numpy(row)
            valid[b, : len(row)] = True
        tokens = torch.where(valid, self.written[places], 0)
        told_at: dict[tuple[int, int], int] = {}
        for b, session in enumerate(sessions):
            at = 0
            for turn in session.stream:
                if turn.plan.what in {What.TELL, What.CHANGE}:
                    first, last = at + turn.first - turn.start, at + turn.last - turn.start
                    told[b, first:last] = True
                    told_at[b, turn.start] = first
                    for id, other in session.renamed.get(turn.start, {}).items():
                        part = tokens[b, first:last]
                        tokens[b, first:last] = torch.where(
                            self.written[turn.first : turn.last] == id, other, part
                        )
                at += turn.end - turn.start
        asks = [
            (b, turn, tell)
            for b, session in enumerate(sessions)
            for tell, turn in (*session.asked, *((None, turn) for turn in session.unknown))
        ]
        asked = torch.tensor([turn.asked for _, turn, _ in asks])[:, None]
        # the last token of a reply says that it ends
        ends = torch.tensor([turn.end - 2 for _, turn, _ in asks])[:, None]
        most = int((ends - asked).max())
        context = config.behind + config.ahead
        around, around_valid = self._places(asked, 1 - context, most)
        around_valid &= around < ends
        answers = asked + torch.arange(most)
        inside = answers < ends
        replies = torch.where(inside, data.replies[answers.clamp(max=len(data.tokens) - 1)], 0)
        target = np.full((len(asks), most), NOTHING)
        look = np.full((len(asks), most), NOTHING)
        begins = []
        for q, (b, turn, tell) in enumerate(asks):
            first, last = turn.first - 1 - turn.asked, turn.last - 1 - turn.asked
            begins.append(first)
            look[q, 0] = look[q, self._opening : first + 1] = NONE if tell is None else VALUE
            if tell is None:
                continue
            at = told_at[b, tell.start]
            ids = tokens[b, at : at + tell.last - tell.first].numpy()
            target[q, 0] = target[q, self._opening : first + 1] = ids[0]  # also a number's space
            if tell.plan.value != turn.plan.value:
                continue
            target[q, first:last] = ids
            look[q, first:last] = VALUE
            if last < turn.end - 2 - turn.asked:
                look[q, last] = NONE  # the value ends
        said = inside & (torch.arange(most) > 0)  # memory alone is asked at first
        return Drawn(
            seen=_held(data.seen, places, valid),
            around=_held(data.seen, around, around_valid),
            hidden=_held(data.hidden, replies, said),
            **{
                name: tensor.to(data.seen.device)
                for name, tensor in {
                    "tokens": tokens,
                    "valid": valid,
                    "heard": valid,
                    "stated": data.stated[places] & valid,
                    "told": told,
                    "session": torch.tensor([b for b, _, _ in asks]),
                    "around_valid": around_valid,
                    "rivals": torch.where(inside[..., None], self.rivals[replies], 0),
                    "target": torch.from_numpy(target),
                    "look": torch.from_numpy(look),
                    "first": torch.tensor(begins),
                    "known": torch.tensor([tell is not None for _, _, tell in asks]),
                }.items()
            },
        )

    def pairs(self, rng: Generator, count: int) -> Pairs:
        """Draw facts of `count` kinds, or of all there are, and half as much else.

        Half of the kinds are those most easily confused with the others.
        """
        told: list[int] = []
        asked: list[int] = []
        begins: list[bool] = []
        others: list[int] = []
        silent: list[int] = []
        for kind in self._neighbours(rng, count):
            tell = _one(rng, self._kind_tells[kind])
            ask = _one(rng, self._kind_asks[kind])
            places = (ask.asked, ask.asked + self._opening, ask.first - 1)
            place = places[int(rng.integers(len(places)))]
            told.append(tell.first)
            asked.append(place)
            begins.append(place == ask.asked)
            value = _one(rng, self._values[kind])
            tell, ask = _one(rng, self._tells[kind, value]), _one(rng, self._asks[kind, value])
            if not self._same(tell, ask):
                continue
            later = int(rng.integers(1, tell.last - tell.first + 1))
            if tell.first + later == tell.last:
                silent.append(ask.last - 1)
            else:
                told.append(tell.first + later)
                asked.append(ask.first - 1 + later)
                begins.append(False)
        ends = len(silent)
        tells = list(self._tells.values())
        for _ in range(max(count // 2, 1)):
            of = self._talk if self._talk and rng.random() < 0.6 else _one(rng, tells)
            turn = _one(rng, of)
            silent.append(turn.asked)
            free = self.features.stated[turn.start : turn.asked].clone()
            if turn.first >= 0:
                free[turn.first - turn.start : turn.last - turn.start] = False
            if free.any():
                others.append(turn.start + _one(rng, free.nonzero()[:, 0].tolist()))
        behind, ahead = self.config.behind, self.config.ahead
        device = self.features.seen.device
        return Pairs(
            *self._windows(told, behind, ahead),
            *self._windows(asked, behind + ahead - 1, 0),
            torch.tensor(begins, device=device),
            *self._windows(others, behind, ahead),
            *self._windows(silent, behind + ahead - 1, 0),
            torch.arange(len(silent), device=device) >= ends,
        )

    def _neighbours(self, rng: Generator, count: int) -> list[str]:
        """Draw kinds, with each one another that has the same values, where there is one."""
        chosen: dict[str, None] = {}
        for number in rng.permutation(len(self.kinds)):
            if len(chosen) >= count:
                break
            kind = self.kinds[number]
            chosen[kind] = None
            chosen[_one(rng, self._family[kind])] = None
        return list(chosen)[:count]

    def _windows(self, at: Sequence[int], behind: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Return the tokens around each place, and which of them there are."""
        middle = torch.tensor(at, dtype=torch.int64)[:, None]
        places, valid = self._places(middle, -behind, ahead + 1)
        seen = self.features.seen
        return seen[places.to(seen.device)], valid.to(seen.device)

    def _places(self, at: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the places around each of some, and which lie in the same conversation."""
        data = self.features
        around = at + torch.arange(begin, end)
        inside = around.clamp(0, len(data.tokens) - 1)
        # a conversation's tokens are those that started where this one did
        return inside, (around == inside) & (data.since[inside] == data.since[at])


@dataclass(frozen=True, slots=True)
class _Session:
    stream: list[Turn]
    asked: list[tuple[Turn, Turn]]  # where it was told, and the question
    unknown: list[Turn]
    renamed: dict[int, dict[int, int]]  # by a turn's start: tokens, and what they become


def _one(rng: Generator, of: Sequence[T]) -> T:
    return of[int(rng.integers(len(of)))]


def _mixed(rng: Generator, some: list[Turn], others: list[Turn]) -> list[Turn]:
    both = [*some, *others]
    return [both[i] for i in rng.permutation(len(both))]


def _held(rows: Tensor, places: Tensor, valid: Tensor) -> Tensor:
    """Return the rows at some places, where they lie; zeros where there are none."""
    found = rows[places.to(rows.device)].float()
    return found.masked_fill_(~valid.to(rows.device)[..., None], 0.0)
