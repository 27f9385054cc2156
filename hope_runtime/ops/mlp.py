"""Self-modifying memories that are two-layer residual MLPs (paper eq. 89, 91), for comparison.

M(z) = z + W1 act(W2 z) for key, value and memory, W1 act(W2 z) for the gates. Each weight matrix
follows delta gradient descent (eq. 57) with its own input: W2 is addressed by the key k, W1 by
h = act(W2 k), which is no unit vector and so erases at rate' = rate / (1 + rate |h|^2):

    W2 <- W2 (retain I - rate  k k^T) - rate ((W1^T e) * act'(W2 k)) k^T
    W1 <- W1 (retain I - rate' h h^T) - rate  e h^T           e = M(k) - M(v)

h, e and all that is made of the token are of the chunk's start (eq. 90); reads are live. Five such
memories do not collapse into one: a session's state is all five.

Axes: B sessions, H heads, T tokens, N head width, M hidden width, C tokens of a chunk, five
memories in the order key, value, memory, rate, retain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.ops import delta, grid
from hope_runtime.ops.collapsed import clipped, unit


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x) if self is Activation.SILU else F.gelu(x)

    def slope(self, x: Tensor) -> Tensor:
        """Return the derivative at x."""
        if self is Activation.SILU:
            gate = torch.sigmoid(x)
            return gate + gate * (1.0 - gate) * x
        density = torch.exp(-x.square() / 2) / math.sqrt(2.0 * math.pi)
        return (1.0 + torch.erf(x / math.sqrt(2.0))) / 2 + x * density


@dataclass(frozen=True, slots=True)
class Rule:
    """What is fixed of the update rule."""

    chunk: int = 32
    rate_max: float = 0.5
    softplus_rate: bool = False  # rate_max times a softplus, which bounds nothing; else a sigmoid
    retain_min: float = 0.9
    retain_max: float = 1.0 - 1e-5
    error_norm: float | None = 1.0  # errors e are clipped to it; None: not clipped
    memory_norm: float | None = 16.0  # each matrix's way from its start, at every chunk's end
    decay_to_zero: bool = False  # as printed; else decay goes to the learned start
    normalise_value: bool = True
    erases_outer: bool = True  # W1 has an erasure; off: W2 only
    proximal: bool = False  # W1's gradient goes at rate' too, as eq. 57 has it for any input
    gradient: float = 1.0  # times the gradient of |e|^2 / 2; 2: of |e|^2, as printed
    activation: Activation = Activation.SILU


NESTED_LEARNING = Rule(
    chunk=1,
    rate_max=1e-3,
    softplus_rate=True,
    retain_min=0.0,
    retain_max=1.0,
    error_norm=None,
    memory_norm=None,
    decay_to_zero=True,
    normalise_value=False,
    erases_outer=False,
    gradient=2.0,
    activation=Activation.GELU,
)
"""How the port `nested-learning` reads the paper (0.2.0, its gates without a skip)."""


class Layers(NamedTuple):
    """The matrices of a head's memories; of sessions, with a B axis in front."""

    inner: Tensor  # [H, 5, M, N], W2
    outer: Tensor  # [H, 3, N, M], W1 of key, value and memory
    gates: Tensor  # [H, 2, 1, M], W1 of rate and retain


class Weights(NamedTuple):
    """What training learned of one layer, shared by all sessions."""

    start: Layers
    rate_bias: Tensor  # [H]
    retain_bias: Tensor  # [H]


class Memory(NamedTuple):
    """The state of one layer: how far its matrices are from their starts."""

    live: Layers
    anchor: Layers


class Made(NamedTuple):
    """What the anchor makes of some tokens."""

    keys: Tensor  # [B, H, 1, C, N]
    rate: Tensor  # [B, H, 1, C]
    retain: Tensor  # [B, H, 1, C]
    hidden: Tensor  # [B, H, 5, C, M], h: what addresses W1
    slopes: Layers  # the loss's gradient at each matrix's output, [B, H, ., C, rows]


def empty(sessions: int, weights: Weights) -> Memory:
    """Return the memory of sessions that have read nothing."""
    nothing = Layers(*(w.new_zeros(sessions, *w.shape) for w in weights.start))
    return Memory(nothing, nothing)


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
    found = []
    for t in range(x.shape[-2]):
        here = slice(t, t + 1)
        made = project(memory.anchor, weights, x[:, :, here], rule)
        y, live = _advance(delta.naive, memory, weights, made, q[:, :, here], rule)
        memory = _turned(live, memory.anchor, phase + 1 == rule.chunk, rule)
        found.append(y)
        phase = (phase + 1) % rule.chunk
    return torch.cat(found, -2), memory


def scan(
    memory: Memory,
    weights: Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    rule: Rule,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Return what `naive` returns, a chunk at a time.

    With `lengths` [B], only so many of the T tokens are each session's own; what follows them is
    filler, which writes nothing and reads nothing of use.
    """

    def part(
        memory: Memory, x: Tensor, q: Tensor, valid: Tensor, ended: Tensor
    ) -> tuple[Tensor, Memory]:
        made = project(memory.anchor, weights, x, rule)
        valid = valid[:, None]
        made = made._replace(rate=made.rate * valid, retain=torch.where(valid, made.retain, 1.0))
        y, live = _advance(delta.chunk, memory, weights, made, q, rule)
        return y, _turned(live, memory.anchor, ended, rule)

    return grid.walk(part, memory, x, q, phase, rule.chunk, lengths)


def project(anchor: Layers, weights: Weights, x: Tensor, rule: Rule) -> Made:
    """Generate keys, gates and slopes from the anchor (eq. 83, 84, 90), each memory's own target.

    Targets are constants of the loss: nothing flows back through M(v).
    """
    layers = Layers(*(way + start for way, start in zip(anchor, weights.start, strict=True)))
    _, outer, gates = applied(layers, x[:, :, None], rule)
    keys, values = unit(outer[:, :, :1]), outer[:, :, 1:2]
    if rule.normalise_value:
        values = unit(values)
    forget = torch.sigmoid(gates[:, :, 1:, :, 0] + weights.retain_bias[:, None, None])
    rate = gates[:, :, :1, :, 0] + weights.rate_bias[:, None, None]
    before, *recalled = applied(layers, keys, rule)
    _, *wanted = applied(layers, values, rule)
    errors, gate_errors = (
        rule.gradient * clipped(is_ - want, rule.error_norm)
        for is_, want in zip(recalled, wanted, strict=True)
    )
    back = torch.cat([errors @ layers.outer, gate_errors @ layers.gates], 2)
    return Made(
        keys=keys,
        rate=rule.rate_max * (F.softplus(rate) if rule.softplus_rate else torch.sigmoid(rate)),
        retain=(1.0 - (1.0 - rule.retain_min) * forget).clamp(max=rule.retain_max),
        hidden=rule.activation(before),
        slopes=Layers(back * rule.activation.slope(before), errors, gate_errors),
    )


def applied(layers: Layers, z: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Apply all memories to z [B, H, 1, C, N] (eq. 91).

    Returns:
        W2 z [B, H, 5, C, M], M(z) of key, value and memory [B, H, 3, C, N], and of the gates
        [B, H, 2, C, 1], whose output is too narrow for a skip.
    """
    before = z @ layers.inner.mT
    hidden = rule.activation(before)
    return before, z + hidden[:, :, :3] @ layers.outer.mT, hidden[:, :, 3:] @ layers.gates.mT


Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _advance(
    run: Run, memory: Memory, weights: Weights, made: Made, q: Tensor, rule: Rule
) -> tuple[Tensor, Layers]:
    """Run some tokens of one chunk through both layers; return y and the live matrices."""
    live, start = memory.live, weights.start
    rate = made.rate.expand(made.hidden.shape[:-1])  # [B, H, 5, C]
    slowed = rate / (1.0 + rate * made.hidden.square().sum(-1))  # rate'
    pace = slowed if rule.proximal else rate
    erase = slowed if rule.erases_outer else torch.zeros_like(slowed)

    def layer(
        live: Tensor, start: Tensor, keys: Tensor, queries: Tensor, erase: Tensor, writes: Tensor
    ) -> tuple[Tensor, Tensor]:
        if rule.decay_to_zero:
            found, whole = run(live + start, keys, queries, made.retain, erase, writes)
            return found, whole - start
        writes = writes - erase[..., None] * (keys @ start.mT)
        found, live = run(live, keys, queries, made.retain, erase, writes)
        return found + queries @ start.mT, live

    def above(boxes: slice, live: Tensor, start: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        writes = -pace[:, :, boxes, :, None] * slopes
        keys = made.hidden[:, :, boxes]
        return layer(live, start, keys, asked[:, :, boxes], erase[:, :, boxes], writes)

    writes = -made.rate[..., None] * made.slopes.inner
    asked, inner = layer(live.inner, start.inner, made.keys, q[:, :, None], made.rate, writes)
    asked = rule.activation(asked)
    found, outer = above(slice(3), live.outer, start.outer, made.slopes.outer)
    _, gates = above(slice(3, 5), live.gates, start.gates, made.slopes.gates)
    return q + found[:, :, 2], Layers(inner, outer, gates)


def _turned(live: Layers, anchor: Layers, ended: Tensor, rule: Rule) -> Memory:
    """Bound the matrices and move the anchor where a chunk has `ended`, [B]."""
    here = ended[:, None, None, None, None]
    live = Layers(*(torch.where(here, _bounded(w, rule), w) for w in live))
    return Memory(
        live, Layers(*(torch.where(here, *pair) for pair in zip(live, anchor, strict=True)))
    )


def _bounded(way: Tensor, rule: Rule) -> Tensor:
    if rule.memory_norm is None:
        return way
    size = torch.linalg.vector_norm(way, dim=(-2, -1), keepdim=True)
    scale: Tensor = rule.memory_norm / size.clamp(min=rule.memory_norm)
    return way * scale
