"""Rows of the batch: where sessions are laid out for the device while a turn runs.

A lane holds what the mixers read at every token. For attention these are rotated keys, values
and positions in a ring of fixed size: the first S places are the sinks, place S + (p - S) mod W
holds position p. For memories it is what they hold now, which a turn reads back when it ends. All
else in a lane can be rebuilt from the session's `State`; a lost lane loses no more than its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from hope_runtime.layers import attention
from hope_runtime.layers.attention import Past
from hope_runtime.layers.memory import Memories
from hope_runtime.layers.recall import Facts
from hope_runtime.model import Hope, Read
from hope_runtime.state import Piece, State

_ROUND = 64  # places are looked at in steps, so that shapes do not change at every token


class Lanes:
    """`count` rings on the model's device; lanes [0, n) can be read as one batch."""

    def __init__(self, model: Hope, count: int) -> None:
        config = model.config
        self.count = count
        self._model = model
        self._places = config.sinks + config.window
        shape = (
            len(config.attention_blocks),
            count,
            config.key_heads,
            self._places,
            config.head_width,
        )
        self._rotated = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self._values = torch.zeros_like(self._rotated)
        self._positions = torch.full((count, self._places), -1, device=model.device)
        nothing = model.nothing(count).memories
        self._memories = nothing and Memories(*(t.clone() for t in nothing))
        self._facts = model.no_facts(count)

    @property
    def bytes(self) -> int:
        held = (*(self._memories or ()), *(self._facts or ()))
        return 2 * int(self._rotated.nbytes) + sum(int(t.nbytes) for t in held)

    def view(self, first: int, end: int, longest: int) -> Past:
        """Return lanes [first, end) as the past of a batch, without copying.

        `longest` is the largest position of their sessions: places fill in order, so the ones
        beyond it hold nothing yet and need not be looked at.
        """
        used = min(-(-longest // _ROUND) * _ROUND, self._places)
        rows = slice(first, end)
        return Past(
            self._rotated[:, rows, :, :used],
            self._values[:, rows, :, :used],
            self._positions[rows, :used],
            self._memories and Memories(*(t[:, rows] for t in self._memories)),
        )

    def memories(self, lane: int) -> Memories | None:
        """Return what a session's memories hold now, in host memory."""
        if self._memories is None:
            return None
        return Memories(*(t.cpu() for t in self._memories.session(lane)))

    def facts(self, first: int, end: int) -> Facts | None:
        """Return what lanes [first, end) hold of the memory layer, without copying."""
        return self._facts and Facts(*(t[first:end] for t in self._facts))

    def keep_facts(self, first: int, facts: Facts) -> None:
        """Write what lanes from `first` on now hold of the memory layer."""
        assert self._facts is not None
        rows = slice(first, first + len(facts.tokens))
        for held, now in zip(self._facts, facts, strict=True):
            if held[rows].data_ptr() != now.data_ptr():
                held[rows] = now

    def load(self, lane: int, state: State) -> None:
        """Lay a session out on a lane."""
        if self._model.config.attention_blocks:
            self._attend(lane, state)
        for held, kept in zip(self._memories or (), state.memories or repeat(None), strict=False):
            held[:, lane] = 0.0 if kept is None else kept.to(held)
        if self._facts is not None:
            self.keep_facts(lane, self._model.laid_out(state.facts))

    def _attend(self, lane: int, state: State) -> None:
        """Lay out what attention can see."""
        self._positions[lane] = -1
        # a place that attention may not see weighs nothing, but nothing times NaN is NaN
        self._rotated[:, lane] = 0.0
        self._values[:, lane] = 0.0
        window = self._model.config.window
        if state.sinks is not None:
            self._lay(lane, state.sinks)
        for piece in state.pieces:
            if piece.end > state.position - window:
                self._lay(lane, piece.cut(state.position - window, piece.end))

    def _lay(self, lane: int, piece: Piece) -> None:
        positions = torch.arange(piece.start, piece.end, device=self._model.device)
        model = self._model
        turn = attention.rotation(positions[None], model.frequency, model.dtype)
        keys = piece.keys.to(model.device, model.dtype)
        # blocks take the place of sessions: [L, n, K, N] rotates like [B, T, heads, N]
        rotated = attention.rotate(keys.transpose(1, 2), turn).transpose(1, 2)
        places = self._place(positions)
        self._rotated[:, lane, :, places] = rotated
        self._values[:, lane, :, places] = piece.values.to(rotated)
        self._positions[lane, places] = positions

    def append(
        self, first: int, start: Tensor, read: Read, lengths: Sequence[int] | None = None
    ) -> None:
        """Write what a pass over lanes [first, first + B) found.

        `start` is [B]; of session b only the first `lengths[b]` tokens of the pass are its own
        (all of them where no lengths are given).
        """
        if self._model.config.attention_blocks:
            self._append(first, start, read, lengths)
        rows = slice(first, first + len(start))
        for block, remembered in enumerate(read.remembered):
            for held, after in zip(self._memories or (), remembered, strict=True):
                own = held[block, rows]
                if own.data_ptr() != after.data_ptr():  # else what it was: an anchor that stayed
                    own.copy_(after)

    def _append(self, first: int, start: Tensor, read: Read, lengths: Sequence[int] | None) -> None:
        sessions, tokens = read.hidden.shape[:2]
        own = torch.tensor(lengths or [tokens] * sessions, device=start.device)[:, None]
        session, token = (torch.arange(tokens, device=start.device) < own).nonzero().T
        positions = start[session] + token
        rows, places = first + session, self._place(positions)
        # n tokens in all; the indices on axes 1 and 3 come out in front: [n, L, K, N]
        self._rotated[:, rows, :, places] = read.rotated[:, session, :, token]
        self._values[:, rows, :, places] = read.values[:, session, :, token]
        self._positions[rows, places] = positions

    def _place(self, positions: Tensor) -> Tensor:
        config = self._model.config
        ring = config.sinks + (positions - config.sinks) % config.window
        return torch.where(positions < config.sinks, positions, ring)

    def move(self, source: int, target: int) -> None:
        """Copy a lane onto another."""
        if source != target:
            for held in (self._rotated, self._values, *(self._memories or ())):
                held[:, target] = held[:, source]
            for held in (self._positions, *(self._facts or ())):
                held[target] = held[source]

    def swap(self, one: int, other: int) -> None:
        """Exchange two lanes."""
        if one != other:
            pair, turned = [one, other], [other, one]
            for held in (self._rotated, self._values, *(self._memories or ())):
                held[:, pair] = held[:, turned]
            for held in (self._positions, *(self._facts or ())):
                held[pair] = held[turned]
