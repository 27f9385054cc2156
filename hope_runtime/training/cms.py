"""The inner loop of the CMS: rows are read while their levels learn, as when they are served.

A level's update is the very `consolidate` that serves. For the outer loop the deltas that it leaves
are constants: the gradient of what is read under `W + delta` is taken for the gradient with respect
to W, the start of every session (first-order MAML, paper eq. 28).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.cadence import completed, marked, until_boundary
from hope_runtime.consolidation import consolidate, learnable
from hope_runtime.layers.attention import Past
from hope_runtime.layers.cms import Deltas
from hope_runtime.model import Hope, Read
from hope_runtime.state import Mark, Piece, State, extend, trim


def losses(model: Hope, tokens: Tensor) -> Tensor:
    """Return the loss in nats of each token but the first, [B, T], scored before it is learned."""
    return read(model, tokens)[0]


def read(model: Hope, tokens: Tensor) -> tuple[Tensor, list[State]]:
    """Return the losses [B, T] of rows [B, T + 1], each a session, and the states they end in.

    Every token counts as a target of the levels, since rows have no roles.
    """
    tokens = tokens.to(model.device)
    sessions, end = len(tokens), tokens.shape[1] - 1
    states, past = [State()] * sessions, model.nothing(sessions)
    found: list[Tensor] = []
    at = 0
    while at < end:
        to = min(at + (until_boundary(at, model.config) or end), end)
        start = torch.full((sessions,), at, device=model.device)
        x = model.embed(tokens[:, at:to])
        part = model.run(x, start, past, [_working(model, state) for state in states])
        logits = model.logits(part.hidden)
        found.append(F.cross_entropy(logits.mT, tokens[:, at + 1 : to + 1], reduction="none"))
        past = _after(past, part, start)
        with torch.no_grad():
            rows = zip(states, tokens[:, at:to].cpu(), range(sessions), strict=True)
            states = [_learn(model, state, part, row, b) for state, row, b in rows]
        at = to
    return torch.cat(found, 1), states


def _working(model: Hope, state: State) -> Deltas:
    return {name: d.to(model.device, model.dtype) for name, d in state.deltas.items()}


def _after(past: Past, read: Read, start: Tensor) -> Past:
    """Return what the next tokens can look at; the gradient goes on through it."""
    new = start[:, None] + torch.arange(read.hidden.shape[1], device=start.device)
    return Past(
        torch.cat([past.rotated, read.rotated], 3),
        torch.cat([past.values, read.values], 3),
        torch.cat([past.positions, new], 1),
        read.memories,
    )


def _learn(model: Hope, state: State, read: Read, tokens: Tensor, b: int) -> State:
    """Return a row's state after it read `tokens`, with the chunks consolidated that they end."""
    config = model.config
    kept: Sequence[Tensor] = (read.keys[:, b], read.values[:, b], read.inputs[b])
    keys, values, inputs = (tensor.detach().cpu() for tensor in kept)
    piece = Piece(state.position, tokens, torch.ones(len(tokens)), keys, values, inputs)
    state = extend(state, piece, config)
    if read.memories is not None and state.position in marked(state.position, (), config):
        below = sum(i < config.first_level_block for i in config.memory_blocks)
        held = read.memories.session(b).blocks(below)
        mark = Mark(state.position, type(held)(*(t.detach().cpu() for t in held)))
        state = replace(state, marks=(*state.marks, mark))
    due = completed(piece.start, piece.end, config)
    state = replace(state, due=tuple(each for each in due if learnable(state, each)))
    while state.due:
        state, _ = consolidate(model, state)
    return trim(state, config)
