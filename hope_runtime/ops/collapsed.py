"""Self-modifying memory in the form that serves: one matrix per head (paper eq. 83-88, 90, 93).

All five memories of a head share key, rate and retain, and each writes the target that it makes
itself. Being linear, they stay products with their learned starts: M_box = W_box (I + G), with
one G for all of them (`naive.py` holds the five; a test holds the two equal). G is the state.

Axes: B sessions, H heads, T tokens, N head width, C tokens of a chunk.

Within a chunk, keys, values, rates and targets come from the memory at the chunk's start (the
anchor); the memory itself is read and written token by token, with the gradient at the live
matrix. Chunks lie on an absolute grid: `phase` says how far into its chunk each session is, and
however a stream is cut into calls, its state is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hope_runtime.config import Rule
from hope_runtime.ops import delta, grid


class Weights(NamedTuple):
    """What training learned of one layer, shared by all sessions."""

    start: Tensor  # [H, 3N + 2, N]: rows for key, value, memory, rate, retain; 4N + 2 with query
    rate_bias: Tensor  # [H]
    retain_bias: Tensor  # [H]
    modification: Tensor  # [H], how far the projections follow the memory; paper: 1
    passage: Tensor  # [H], how much of the query itself is read; paper: 1


class Memory(NamedTuple):
    """The state of one layer: G now, and G at the start of the chunk. Both [B, H, N, N]."""

    live: Tensor
    anchor: Tensor


class Projected(NamedTuple):
    """What the anchor makes of some tokens: all [B, H, T, N] but the gates, [B, H, T]."""

    keys: Tensor
    targets: Tensor
    queries: Tensor
    rate: Tensor
    retain: Tensor


def empty(sessions: int, weights: Weights) -> Memory:
    """Return the memory of sessions that have read nothing."""
    heads, _, width = weights.start.shape
    nothing = weights.start.new_zeros(sessions, heads, width, width)
    return Memory(nothing, nothing)


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last axis.

    >>> unit(torch.tensor([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


def clipped(x: Tensor, limit: float | None) -> Tensor:
    """Scale vectors of the last axis down to norm `limit`."""
    if limit is None:
        return x
    return x * (limit * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)).clamp(max=1.0)


def by_head(x: Tensor, weights: Tensor) -> Tensor:
    """Apply each head's shared weights [H, R, N] to all sessions at once: [B, H, T, R]."""
    return torch.einsum("bhtn,hrn->bhtr", x, weights)


def project(anchor: Tensor, weights: Weights, x: Tensor, q: Tensor, rule: Rule) -> Projected:
    """Generate keys, values, rates, retains and targets from the anchor (eq. 83, 84, 86, 87).

    z = (I + lam G) x stands for what the memories are applied to, v_hat = (I + lam G) v for the
    target: both in the coordinates before the learned starts. With a fourth block of rows in
    `start`, the query is adaptive too; else it is `q`.
    """
    width = x.shape[-1]
    gain = weights.modification[:, None, None]

    def modified(u: Tensor) -> Tensor:
        return u + gain * (u @ anchor.mT) if rule.modifies else u

    rows = by_head(modified(x), weights.start)  # [B, H, T, 3N + 2]
    keys, values = unit(rows[..., :width]), rows[..., width : 2 * width]
    if rule.normalise_value:
        values = unit(values)
    gates = rows[..., 3 * width : 3 * width + 2]
    rate = rule.rate_max * torch.sigmoid(gates[..., 0] + weights.rate_bias[:, None])
    forget = torch.sigmoid(gates[..., 1] + weights.retain_bias[:, None])
    retain = (1.0 - (1.0 - rule.retain_min) * forget).clamp(max=rule.retain_max)
    queries = unit(rows[..., 3 * width + 2 :]) if rows.shape[-1] > 3 * width + 2 else q
    return Projected(keys, clipped(modified(values), rule.target_norm), queries, rate, retain)


def writes(made: Projected, anchor: Tensor, weights: Weights, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return rate and u of the delta recurrence (`delta.naive`) that the rule comes to.

    The memory that is written is s I + G: what the key recalls of the passage s is erased with
    the rest. With the gradient at the live matrix (eq. 88 with f = L2)
    G <- retain G - 2 rate ((s I + G) k) k^T + rate v_hat k^T; with the gradient at the anchor one
    of the two erasures is of what the anchor recalls (eq. 93).
    """
    keys, rate = made.keys, made.rate
    passed = weights.passage[:, None, None] * keys if rule.modifies else torch.zeros_like(keys)
    if rule.anchored:
        error = clipped(made.targets - passed - keys @ anchor.mT, rule.target_norm)
        erase = (rule.erases - 1.0) * rate
        return erase, rate[..., None] * error - erase[..., None] * passed
    return rule.erases * rate, rate[..., None] * (made.targets - rule.erases * passed)


def read_out(found: Tensor, queries: Tensor, weights: Weights) -> Tensor:
    """Return y = W_memory (s q + G q) for what G gave to the queries (eq. 94)."""
    width = queries.shape[-1]
    passed = weights.passage[:, None, None] * queries
    return by_head(passed + found, weights.start[:, 2 * width : 3 * width])


def bounded(memory: Tensor, rule: Rule) -> Tensor:
    """Scale each head's G down to the rule's norm."""
    if rule.memory_norm is None:
        return memory
    size = torch.linalg.vector_norm(memory, dim=(-2, -1), keepdim=True)
    scale: Tensor = rule.memory_norm / size.clamp(min=rule.memory_norm)
    return memory * scale


def naive(
    memory: Memory, weights: Weights, x: Tensor, q: Tensor, phase: Tensor, rule: Rule
) -> tuple[Tensor, Memory]:
    """Read and write token by token; the definition of `scan`.

    Args:
        memory: the sessions' memories.
        weights: what is shared.
        x: what keys, values and gates are made of, [B, H, T, N].
        q: static queries, [B, H, T, N].
        phase: tokens that each session is into its chunk, [B], 0 <= phase < rule.chunk.
        rule: the update rule.

    Returns:
        y [B, H, T, N], and the memory after the last token.
    """
    found = []
    for t in range(x.shape[-2]):
        here = slice(t, t + 1)
        y, memory = step(memory, weights, x[:, :, here], q[:, :, here], phase, rule)
        found.append(y)
        phase = (phase + 1) % rule.chunk
    return torch.cat(found, -2), memory


def step(
    memory: Memory, weights: Weights, x: Tensor, q: Tensor, phase: Tensor, rule: Rule
) -> tuple[Tensor, Memory]:
    """Read and write one token, [B, H, 1, N]: decoding, and the unit of `naive`."""
    made = project(memory.anchor, weights, x, q, rule)
    y, live = _advance(delta.naive, memory, weights, made, rule)
    return y, _turned(live, memory.anchor, phase + 1 == rule.chunk, rule)


def _advance(
    run: Callable[..., tuple[Tensor, Tensor]],
    memory: Memory,
    weights: Weights,
    made: Projected,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Run some tokens of one chunk through the delta recurrence; return y and the live G."""
    rate, u = writes(made, memory.anchor, weights, rule)
    if not rule.decay_to_zero:
        found, live = run(memory.live, made.keys, made.queries, made.retain, rate, u)
        return read_out(found, made.queries, weights), live
    # as printed: I + G decays, not G alone
    eye = torch.eye(made.keys.shape[-1], dtype=u.dtype, device=u.device)
    u = u + rate[..., None] * made.keys
    found, whole = run(memory.live + eye, made.keys, made.queries, made.retain, rate, u)
    return read_out(found - made.queries, made.queries, weights), whole - eye


def _turned(live: Tensor, anchor: Tensor, ended: Tensor, rule: Rule) -> Memory:
    """Bound the memory and move the anchor where a chunk has `ended`, [B]; else copy nothing."""
    if not bool(ended.any()):
        return Memory(live, anchor)
    rows = ended.nonzero()[:, 0]
    moved = bounded(live[rows], rule)
    return Memory(live.index_copy(0, rows, moved), anchor.index_copy(0, rows, moved))


def scan(
    memory: Memory,
    weights: Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    rule: Rule,
    lengths: Tensor | None = None,
    *,
    unroll: bool = True,
) -> tuple[Tensor, Memory]:
    """Return what `naive` returns, a chunk at a time.

    With `lengths` [B], only so many of the T tokens are each session's own; what follows them is
    filler, which writes nothing and reads nothing of use. Without `unroll`, gradients pass
    through the recurrence but not through what the memory did to its own projections (training
    to first order; the values are the same).
    """

    def part(
        memory: Memory, x: Tensor, q: Tensor, valid: Tensor, ended: Tensor
    ) -> tuple[Tensor, Memory]:
        anchor = memory.anchor if unroll else memory.anchor.detach()
        made = project(anchor, weights, x, q, rule)
        made = made._replace(rate=made.rate * valid, retain=torch.where(valid, made.retain, 1.0))
        y, live = _advance(delta.chunk, memory, weights, made, rule)
        return y, _turned(live, memory.anchor, ended, rule)

    return grid.walk(part, memory, x, q, phase, rule.chunk, lengths)
