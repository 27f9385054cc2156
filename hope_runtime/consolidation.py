"""Consolidation: one update of a slow level from the tokens of its chunk (paper eq. 71).

`delta <- retain * delta - rate * ||base|| * clip(g)`, g the true gradient of the chunk's
next-token loss with respect to the level's weights, under the weights and the attention window
that the tokens were read with; or the step of another optimiser in the gradient's place. A delta
of low rank is the nearest of its rank to what it would have become. A pure function of the state;
whatever is refused leaves the level as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.cadence import Due
from hope_runtime.config import HopeConfig, LevelConfig, Variant
from hope_runtime.layers import attention
from hope_runtime.layers.attention import Past
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories
from hope_runtime.levels import LevelState, level_of, matrices
from hope_runtime.model import Hope
from hope_runtime.ops import low_rank, optimisers
from hope_runtime.ops.optimisers import STATELESS, OptimiserState
from hope_runtime.state import Piece, State, between, join, trim

USUAL = 10  # consolidations that a level's usual surprise is the mean of, roughly


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
    """Tell whether the chunk was seen whole by its level and holds a token that counts."""
    if due.start <= state.levels.get(due.level, LevelState()).since:
        return False
    parts = between(state.pieces, max(due.start, 1), due.end)
    return any(bool((part.weights > 0).any()) for part in parts)


def consolidate(model: Hope, state: State) -> tuple[State, Consolidated]:
    """Apply the first due chunk and return the state without it, and what happened."""
    due, config = state.due[0], state.under(model.config)
    level = level_of(config, due.level)
    before = state.levels.get(level.name, LevelState())
    delta = _whole(before.delta, config, level)  # at rest in host memory, like the state
    loss, tokens, gradient = _gradient(model, state, due, level, delta)
    base = _base_norm(model, level)
    size = _norm(gradient.values())
    gate = 1.0
    if level.gate and before.usual is not None and loss < before.usual:
        gate = (loss / before.usual) ** level.gate
    longest = gate * level.rate * base
    update, moments = _update(level, gradient, size, delta, before.moments, longest)
    moved = {name: level.retain * d + update[name] for name, d in delta.items()}
    movement = _norm(moved.values()) / base
    if not (math.isfinite(loss) and math.isfinite(size) and movement <= level.bound):
        outcome, step = Outcome.REJECTED, 0.0
        after = replace(before, loss=loss if math.isfinite(loss) else None)
    else:
        outcome = Outcome.CLIPPED if size > level.clip else Outcome.APPLIED
        kept, moved = _kept(moved, level)
        step = _norm(moved[name] - d for name, d in delta.items()) / base
        after = replace(
            before,
            delta=kept,
            updates=before.updates + 1,
            loss=loss,
            movement=_norm(moved.values()) / base if level.rank else movement,
            moments=moments,
            usual=_usual(before.usual, loss) if level.gate else None,
        )
    after = replace(after, position=due.end, outcome=str(outcome))
    levels = {**state.levels, level.name: after}
    if config.variant is Variant.NESTED:
        levels |= _begin_again(model, config, level, levels)
    report = Consolidated(
        level.name, due.start, due.end, outcome, loss, tokens, step, after.movement
    )
    return trim(replace(state, due=state.due[1:], levels=levels), model.config), report


def _update(
    level: LevelConfig,
    gradient: dict[str, Tensor],
    size: float,
    delta: dict[str, Tensor],
    moments: OptimiserState | None,
    longest: float,
) -> tuple[dict[str, Tensor], OptimiserState | None]:
    """Return what is to be added, and what the level's rule remembers.

    The gradient is clipped by clipping the rate of a rule that is linear in it, and by itself
    for one that is not. `longest` is the step for a gradient of length one.
    """
    clipped = min(1.0, level.clip / max(size, 1e-12))
    if level.optimiser == "gradient_descent":
        return {name: -(longest * clipped) * g for name, g in gradient.items()}, None
    rule = optimisers.named(level.optimiser)
    short = {name: clipped * g for name, g in gradient.items()}
    update, after = rule.update(short, moments or rule.init(delta), delta, rate=longest)
    moments = None if level.optimiser in STATELESS else after
    share = min(1.0, longest * level.clip / max(_norm(update.values()), 1e-30))
    return {name: share * u for name, u in update.items()}, moments


def _usual(usual: float | None, loss: float) -> float:
    """Return the running mean of a level's losses."""
    return loss if usual is None else usual + (loss - usual) / USUAL


def _begin_again(
    model: Hope, config: HopeConfig, outer: LevelConfig, levels: Mapping[str, LevelState]
) -> dict[str, LevelState]:
    """Return the level that lives in `outer`, at the end of its context (paper eq. 72).

    Its start moves toward where it ended, then it goes back there.
    """
    inside = [each for each in config.levels if each.chunk < outer.chunk]
    inner = max(inside, key=lambda each: each.chunk, default=None)
    ended = levels.get(inner.name) if inner else None
    if inner is None or ended is None or not ended.delta:
        return {}
    start: Deltas = {}
    movement = 0.0
    if inner.start_rate:
        first = _whole(ended.start, config, inner)
        last = _whole(ended.delta, config, inner)
        nearer = {name: f.lerp(last[name], inner.start_rate) for name, f in first.items()}
        start, nearer = _kept(nearer, inner)
        movement = _norm(nearer.values()) / _base_norm(model, inner)
    again = replace(ended, delta=start, start=start, moments=None, movement=movement)
    return {inner.name: again}


def _whole(delta: Deltas, config: HopeConfig, level: LevelConfig) -> dict[str, Tensor]:
    """Return a level's delta as matrices, zero where it is at the base."""
    shapes = matrices(config, level)
    if not delta:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    if level.rank is None:
        return dict(delta)
    return {name: delta[f"{name}.left"] @ delta[f"{name}.right"] for name in shapes}


def _kept(
    whole: dict[str, Tensor], level: LevelConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a delta as it is kept, and the matrices that this stands for."""
    if level.rank is None:
        return whole, whole
    kept: dict[str, Tensor] = {}
    near: dict[str, Tensor] = {}
    for name, matrix in whole.items():
        left, right = low_rank.truncated(matrix, min(level.rank, *matrix.shape))
        kept |= {f"{name}.left": left, f"{name}.right": right}
        near[name] = left @ right
    return kept, near


def _gradient(
    model: Hope, state: State, due: Due, level: LevelConfig, delta: Deltas
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
    others = {
        n: d.to(model.device, model.dtype)
        for name, other in state.levels.items()
        if name != level.name
        for n, d in other.delta.items()
    }
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
        loss = (losses * weights[counted]).sum() / level.chunk
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


def _norm(tensors: Iterable[Tensor]) -> float:
    def size(t: Tensor) -> float:
        exact = torch.promote_types(t.dtype, torch.float32)
        return float(torch.linalg.vector_norm(t.detach(), dtype=exact))

    return math.hypot(*map(size, tensors))


def _base_norm(model: Hope, level: LevelConfig) -> float:
    mlps = [model.blocks[i].mlps[level.mlp] for i in level.blocks]
    return _norm(weight for mlp in mlps for weight in (mlp.gate_up, mlp.down))
