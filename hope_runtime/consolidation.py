"""Consolidation: one update of a slow level from the tokens of its chunk (paper eq. 71).

`delta <- retain * delta - rate * ||base|| * clip(g)`, g the true gradient of the chunk's
next-token loss with respect to the level's weights, under the weights and the attention window
that the tokens were read with. A pure function of the state; whatever is refused leaves the level
as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.cadence import Due
from hope_runtime.config import LevelConfig
from hope_runtime.layers import attention
from hope_runtime.layers.attention import Past
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories
from hope_runtime.model import Hope
from hope_runtime.state import LevelState, Piece, State, between, join, level_shapes, trim


class Outcome(StrEnum):
    APPLIED = "applied"
    CLIPPED = "clipped"  # applied, with the gradient's norm cut to the level's clip
    REJECTED = "rejected"  # not finite, or past the level's bound: the level stayed as it was


@dataclass(frozen=True, slots=True)
class Consolidated:
    """What one consolidation did."""

    level: str
    start: int
    end: int
    outcome: Outcome
    loss: float  # nats per learnable token, under the weights before the update
    tokens: int  # learnable tokens in the chunk
    step: float  # ||new - old|| / ||base||
    movement: float  # ||new|| / ||base||


def learnable(state: State, due: Due) -> bool:
    """Tell whether the chunk holds a token that counts: otherwise there is nothing to do."""
    parts = between(state.pieces, max(due.start, 1), due.end)
    return any(bool((part.weights > 0).any()) for part in parts)


def consolidate(model: Hope, state: State) -> tuple[State, Consolidated]:
    """Apply the first due chunk and return the state without it, and what happened."""
    due = state.due[0]
    level = next(each for each in model.config.levels if each.name == due.level)
    before = state.levels.get(level.name, LevelState())
    delta = before.delta or _zeros(model, level)  # at rest in host memory, like the state
    loss, tokens, gradient = _gradient(model, state, due, delta)
    base = _base_norm(model, level)
    size = _norm(gradient.values())
    scale = level.rate * base * min(1.0, level.clip / max(size, 1e-12))
    after: Deltas = {name: level.retain * d - scale * gradient[name] for name, d in delta.items()}
    movement = _norm(after.values()) / base
    if not (math.isfinite(loss) and math.isfinite(size) and movement <= level.bound):
        outcome, after, movement, step = Outcome.REJECTED, before.delta, before.movement, 0.0
    else:
        outcome = Outcome.CLIPPED if size > level.clip else Outcome.APPLIED
        step = _norm(after[name] - d for name, d in delta.items()) / base
    moved = LevelState(
        delta=after,
        updates=before.updates + (outcome is not Outcome.REJECTED),
        position=due.end,
        loss=loss if math.isfinite(loss) else None,
        outcome=str(outcome),
        movement=movement,
    )
    done = replace(state, due=state.due[1:], levels={**state.levels, level.name: moved})
    report = Consolidated(level.name, due.start, due.end, outcome, loss, tokens, step, movement)
    return trim(done, model.config), report


def _gradient(
    model: Hope, state: State, due: Due, delta: Deltas
) -> tuple[float, int, dict[str, Tensor]]:
    """Return the loss per learnable token, their number, and the gradient of the mean over C.

    The targets are the chunk's tokens; each is predicted from the token before it, which for
    the first one lies in the chunk before. The mean is over the chunk length, so that a chunk
    with few learnable tokens moves the level little.
    """
    config = model.config
    lo = max(due.start - 1, 0)
    chunk = join(between(state.pieces, lo, due.end))
    targets = chunk.tokens[1:].to(model.device)
    weights = chunk.weights[1:].to(model.device)
    counted = weights > 0
    own = {name: d.detach().to(model.device).requires_grad_() for name, d in delta.items()}
    others = {n: d.to(model.device, model.dtype) for n, d in state.deltas.items() if n not in own}
    with torch.enable_grad():
        deltas = others | {name: d.to(model.dtype) for name, d in own.items()}
        read = model.run(
            chunk.inputs[None, :-1].to(model.device, model.dtype),
            torch.tensor([lo], device=model.device),
            _past(model, state, lo),
            [deltas],
            first=config.first_level_block,
        )
        logits = model.logits(read.hidden[0, counted])
        losses = F.cross_entropy(logits, targets[counted], reduction="none")
        loss = (losses * weights[counted]).sum() / (due.end - due.start)
        gradients = torch.autograd.grad(loss, list(own.values()))
    mean = float(losses.detach().mean())
    found = {name: g.cpu() for name, g in zip(own, gradients, strict=True)}
    return mean, int(counted.sum()), found


def _past(model: Hope, state: State, end: int) -> Past:
    """Lay out what tokens from position `end` on can attend to, for the blocks that learn."""
    config = model.config
    first = config.first_level_block
    below = sum(i < first for i in config.attention_blocks)
    memories = _memories(model, state, end)
    parts = between(state.pieces, max(end - config.window, config.sinks), end)
    if state.sinks is not None and end > 0:
        parts = [state.sinks.cut(0, end), *parts]
    if not parts or not config.attention_blocks:
        return model.nothing(1, first)._replace(memories=memories)

    def lay(part: Piece) -> Tensor:
        where = torch.arange(part.start, part.end, device=model.device)
        turn = attention.rotation(where[None], model.frequency, model.dtype)
        keys = part.keys[below:].to(model.device, model.dtype)
        return attention.rotate(keys.transpose(1, 2), turn).transpose(1, 2)[:, None]

    positions = [torch.arange(part.start, part.end, device=model.device) for part in parts]
    rotated = torch.cat([lay(part) for part in parts], 3)
    values = torch.cat([part.values[below:][:, None].to(rotated) for part in parts], 3)
    return Past(rotated, values, torch.cat(positions)[None], memories)


def _memories(model: Hope, state: State, at: int) -> Memories | None:
    """Return what the memories of the blocks that learn held at a position."""
    if not model.config.memory_blocks or at == 0:
        return model.nothing(1, model.config.first_level_block).memories
    mark = next(mark for mark in state.marks if mark.position == at)
    return Memories(*(t.to(model.device) for t in mark.memories.expand(1)))


def _zeros(model: Hope, level: LevelConfig) -> dict[str, Tensor]:
    shapes = level_shapes(model.config, level.name)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _norm(tensors: Iterable[Tensor]) -> float:
    def size(t: Tensor) -> float:
        exact = torch.promote_types(t.dtype, torch.float32)
        return float(torch.linalg.vector_norm(t, dtype=exact))

    return math.hypot(*map(size, tensors))


def _base_norm(model: Hope, level: LevelConfig) -> float:
    mlps = [model.blocks[i].mlps[level.mlp] for i in level.blocks]
    return _norm(weight for mlp in mlps for weight in (mlp.gate_up, mlp.down))
