"""Linear Titans memory (arXiv 2501.00663, eq. 8 to 18): what HOPE is without self-modification.

Keys, values and gates come from static projections; only the memory learns, with momentum:

    S_t = momentum_t S_{t-1} - rate_t (M_anchor k_t - v_t) k_t^T        M_t = retain_t M_{t-1} + S_t

Two words differ from the print: `rate` is its theta, and `retain` is 1 - alpha. The gradient is of
|M k - v|^2 / 2 (the paper prints no half), at the memory of the chunk's start, t' = t - mod(t, b).
Reads come before writes, as everywhere in this package: y_t = M_{t-1} q_t.

Axes: B sessions, H heads, T tokens, N head width, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hope_runtime.ops import grid
from hope_runtime.ops.collapsed import clipped, unit


@dataclass(frozen=True, slots=True)
class Rule:
    """What is fixed of the update rule."""

    chunk: int = 32
    rate_max: float = 0.5
    retain_min: float = 0.9
    retain_max: float = 1.0 - 1e-5
    momentum_max: float = 0.9
    error_norm: float | None = 1.0  # errors M k - v are clipped to it; None: not clipped
    memory_norm: float | None = 16.0  # M is scaled back to it at every chunk's end; None: never
    normalise_value: bool = True


class Weights(NamedTuple):
    """What training learned of one layer, shared by all sessions."""

    start: Tensor  # [H, N, N], M_0
    projection: Tensor  # [H, 2N + 3, N]: rows for key, value, rate, retain, momentum
    rate_bias: Tensor  # [H]
    retain_bias: Tensor  # [H]
    momentum_bias: Tensor  # [H]


class Memory(NamedTuple):
    """The state of one layer: M now, M at the start of the chunk, and S. All [B, H, N, N]."""

    live: Tensor
    anchor: Tensor
    velocity: Tensor


class Projected(NamedTuple):
    """What is made of some tokens: [B, H, T, N], and the gates [B, H, T]."""

    keys: Tensor
    values: Tensor
    rate: Tensor
    retain: Tensor
    momentum: Tensor


def empty(sessions: int, weights: Weights) -> Memory:
    """Return the memory of sessions that have read nothing."""
    start = weights.start.expand(sessions, *weights.start.shape)
    return Memory(start, start, torch.zeros_like(start))


def project(weights: Weights, x: Tensor, rule: Rule) -> Projected:
    """Make keys, values and gates of x [B, H, T, N] (eq. 11); no state is asked."""
    width = x.shape[-1]
    rows = x @ weights.projection.mT
    values, gates = rows[..., width : 2 * width], rows[..., 2 * width :]
    forget = torch.sigmoid(gates[..., 1] + weights.retain_bias[:, None])
    return Projected(
        keys=unit(rows[..., :width]),
        values=unit(values) if rule.normalise_value else values,
        rate=rule.rate_max * torch.sigmoid(gates[..., 0] + weights.rate_bias[:, None]),
        retain=(1.0 - (1.0 - rule.retain_min) * forget).clamp(max=rule.retain_max),
        momentum=rule.momentum_max * torch.sigmoid(gates[..., 2] + weights.momentum_bias[:, None]),
    )


def naive(
    memory: Memory, weights: Weights, x: Tensor, q: Tensor, phase: Tensor, rule: Rule
) -> tuple[Tensor, Memory]:
    """Read and write token by token; the definition of `scan`.

    Args:
        memory: the sessions' memories.
        weights: what is shared.
        x: what keys, values and gates are made of, [B, H, T, N].
        q: queries, [B, H, T, N].
        phase: tokens that each session is into its chunk, [B], 0 <= phase < rule.chunk.
        rule: the update rule.

    Returns:
        y [B, H, T, N], and the memory after the last token.
    """
    made = project(weights, x, rule)
    found = []
    for t in range(x.shape[-2]):
        key = made.keys[:, :, t, :, None]
        rate, retain, momentum = (gate[:, :, t, None, None] for gate in made[2:])
        found.append((memory.live @ q[:, :, t, :, None])[..., 0])
        error = (memory.anchor @ key)[..., 0] - made.values[:, :, t]
        error = clipped(error, rule.error_norm)[..., None]
        velocity = momentum * memory.velocity - rate * error @ key.mT
        live = retain * memory.live + velocity
        memory = _turned(Memory(live, memory.anchor, velocity), phase + 1 == rule.chunk, rule)
        phase = (phase + 1) % rule.chunk
    return torch.stack(found, -2), memory


def scan(
    memory: Memory,
    weights: Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    rule: Rule,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Return what `naive` returns, a chunk at a time (eq. 16 to 18).

    With `lengths` [B], only so many of the T tokens are each session's own; what follows them is
    filler, which writes nothing and reads nothing of use.
    """

    def part(
        memory: Memory, x: Tensor, q: Tensor, valid: Tensor, ended: Tensor
    ) -> tuple[Tensor, Memory]:
        y, memory = _chunk(memory, project(weights, x, rule), q, valid, rule)
        return y, _turned(memory, ended, rule)

    return grid.walk(part, memory, x, q, phase, rule.chunk, lengths)


def carried(gate: Tensor) -> Tensor:
    """Return what is left at token t of what entered at token i: the product over (i, t].

    No product is divided and no logarithm taken, so that a gate may be zero.

    >>> carried(torch.tensor([0.5, 0.0, 0.2]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 1.0000, 0.0000],
            [0.0000, 0.2000, 1.0000]])
    """
    tokens = gate.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=gate.device).tril(-1)
    factors = torch.where(later, gate[..., :, None], 1.0)
    return factors.cumprod(-2).tril()


def _chunk(
    memory: Memory, made: Projected, q: Tensor, valid: Tensor, rule: Rule
) -> tuple[Tensor, Memory]:
    """Run some tokens of one chunk; those not `valid`, [B, 1, C], change nothing.

    With u_i = -rate_i e_i all known from the anchor, S_t is the sum over i <= t of P_ti u_i k_i^T
    and M_t the sum over s <= t of R_ts S_s, so that u_i reaches M_t by the product (R P)_ti.
    """
    errors = clipped(made.keys @ memory.anchor.mT - made.values, rule.error_norm)
    changes = -(made.rate * valid)[..., None] * errors  # [B, H, C, N]
    kept = carried(torch.where(valid, made.retain, 1.0))
    momentum = torch.where(valid, made.momentum, 1.0)
    pace = carried(momentum)
    moving = kept * valid[..., None, :]  # filler has a velocity, and does not move
    reach = moving @ pace
    first = torch.where(valid, made.retain, 1.0).cumprod(-1)
    drift = (moving @ momentum.cumprod(-1)[..., None])[..., 0]  # of S before the chunk, in M_t

    overlap = _before(reach, 0.0) * (q @ made.keys.mT)
    y = _before(first[..., None], 1.0) * (q @ memory.live.mT) + overlap @ changes
    y = y + _before(drift[..., None], 0.0) * (q @ memory.velocity.mT)

    live = first[..., -1, None, None] * memory.live + drift[..., -1, None, None] * memory.velocity
    live = live + (reach[..., -1, :, None] * changes).mT @ made.keys
    velocity = momentum.prod(-1)[..., None, None] * memory.velocity
    velocity = velocity + (pace[..., -1, :, None] * changes).mT @ made.keys
    return y, memory._replace(live=live, velocity=velocity)


def _before(rows: Tensor, start: float) -> Tensor:
    """Shift rows [..., C, .] by one token: what was true before each."""
    first = torch.full_like(rows[..., :1, :], start)
    return torch.cat([first, rows[..., :-1, :]], -2)


def _turned(memory: Memory, ended: Tensor, rule: Rule) -> Memory:
    """Bound the memory and move the anchor where a chunk has `ended`, [B]."""
    here, live = ended[:, None, None, None], memory.live
    if rule.memory_norm is not None:
        size = torch.linalg.vector_norm(live, dim=(-2, -1), keepdim=True)
        scale: Tensor = rule.memory_norm / size.clamp(min=rule.memory_norm)
        live = torch.where(here, live * scale, live)
    return Memory(live, torch.where(here, live, memory.anchor), memory.velocity)
