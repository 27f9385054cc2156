"""The paper's equations, one small function each: what the forms that serve are held against.

Nested Learning (arXiv 2512.24695), sections 4.5, 8.1 and 8.2, for memories that are one matrix
each. Nothing here is fast, and nothing here is clipped, capped or collapsed.

Two words differ from the print: `rate` is its eta and `retain` its alpha, the share of a memory
that is kept (in Titans alpha is the share that is forgotten).

Axes: B sessions, H heads, T tokens, N head width, R rows of a memory. Functions of one token take
memories [..., R, N], vectors [..., N], and rates [...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hope_runtime.config import Rule
from hope_runtime.ops.collapsed import Weights, unit


class Memories(NamedTuple):
    """One matrix for each of a head's memories: [B, H, R, N], of a learned start [H, R, N]."""

    key: Tensor  # R = N, as of value and memory
    value: Tensor
    memory: Tensor
    rate: Tensor  # R = 1
    retain: Tensor  # R = 1
    query: Tensor  # R = N where queries are adaptive, R = 0 where they are static


class State(NamedTuple):
    """The memories now, at the start of the chunk, and their momentum (zero without)."""

    live: Memories
    anchor: Memories
    velocity: Memories


class Generated(NamedTuple):
    """What the memories make of one token."""

    key: Tensor  # [B, H, N]
    value: Tensor
    query: Tensor
    rate: Tensor  # [B, H]
    retain: Tensor


def recall(memory: Tensor, x: Tensor) -> Tensor:
    """Return M x, [..., R]."""
    return (memory @ x[..., None])[..., 0]


def descended(weight: Tensor, x: Tensor, slope: Tensor, rate: Tensor) -> Tensor:
    """Return W (I - rate' x x^T) - rate' slope x^T: a step of delta gradient descent (eq. 57).

    It is the W that minimises |W x + slope|^2 / 2 + |W - weight|^2 / (2 rate) (eq. 54 to 56), with
    `slope` the loss's gradient at the output. That needs rate' = rate / (1 + rate |x|^2); the
    paper prints rate / (1 + rate), which is the same for unit x only.

    >>> weight, x = torch.zeros(1, 2), torch.tensor([2.0, 0.0])
    >>> descended(weight, x, slope=torch.tensor([-5.0]), rate=torch.tensor(1.0))
    tensor([[2., 0.]])
    """
    rate = rate / (1.0 + rate * x.square().sum(-1))
    return weight - rate[..., None, None] * (recall(weight, x) + slope)[..., None] * x[..., None, :]


def generated(memories: Memories, x: Tensor, q: Tensor, weights: Weights, rule: Rule) -> Generated:
    """Let the memories make key, value, rate and retain of a token (eq. 83, 86).

    The paper prints the gates as raw outputs; here they are squashed into the rule's bounds, and
    keys are normalised as section 8.3 says. The query is the token's own `q`, projected outside,
    unless there is a sixth memory for it: the paper's text says static, eq. 85 lists it.
    """
    rate = recall(memories.rate, x)[..., 0] + weights.rate_bias
    forget = recall(memories.retain, x)[..., 0] + weights.retain_bias
    value = recall(memories.value, x)
    return Generated(
        key=unit(recall(memories.key, x)),
        value=unit(value) if rule.normalise_value else value,
        query=unit(recall(memories.query, x)) if memories.query.shape[-2] else q,
        rate=rule.rate_max * torch.sigmoid(rate),
        retain=(1.0 - (1.0 - rule.retain_min) * torch.sigmoid(forget)).clamp(max=rule.retain_max),
    )


def target(memory: Tensor, value: Tensor) -> Tensor:
    """Return what a memory wants to recall: its own view of the value (eq. 84, 87)."""
    return recall(memory, value)


def loss(memory: Tensor, key: Tensor, target: Tensor) -> Tensor:
    """Return |M k - v|^2 / 2 (eq. 85).

    The paper prints no half, but the gradient that it gives for it (eq. 93) is this one's.
    """
    return (recall(memory, key) - target).square().sum(-1) / 2


def slope(memory: Tensor, key: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of `loss` at the memory's output, M k - v; times k^T, at the memory."""
    return recall(memory, key) - target


def dot_slope(target: Tensor) -> Tensor:
    """Return the same for the loss -<M k, v>: -v (eq. 92).

    The paper prints the gradient as +v k^T and subtracts it, which would unlearn the value.
    """
    return -target


def written(memory: Tensor, key: Tensor, slope: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """Return M (retain I - rate k k^T) - rate slope k^T (eq. 88, 90, 92, 93).

    Eq. 88 with `slope(memory, ...)`; eq. 93 with `slope(anchor, ...)`; eq. 92 with `dot_slope`.

    Written over and over, a pair (k, v) comes to be recalled as v / 2: what the key recalls is
    erased twice, by rate k k^T and by the gradient.

    >>> M, k, v = torch.zeros(1, 2), torch.tensor([1.0, 0.0]), torch.tensor([6.0])
    >>> for _ in range(50):
    ...     M = written(M, k, slope(M, k, v), torch.tensor(0.25), torch.tensor(1.0))
    >>> recall(M, k)
    tensor([3.])
    """
    change = recall(memory, key) + slope
    return retain[..., None, None] * memory - rate[..., None, None] * _outer(change, key)


def started(weights: Weights) -> Memories:
    """Cut the learned starts of a layer's memories apart."""
    width = weights.start.shape[-1]
    return Memories(
        key=weights.start[:, :width],
        value=weights.start[:, width : 2 * width],
        memory=weights.start[:, 2 * width : 3 * width],
        rate=weights.start[:, 3 * width : 3 * width + 1],
        retain=weights.start[:, 3 * width + 1 : 3 * width + 2],
        query=weights.start[:, 3 * width + 2 :],
    )


def empty(sessions: int, weights: Weights) -> State:
    """Return the state of sessions that have read nothing: the learned starts."""
    start = _each(lambda m: m.expand(sessions, *m.shape), started(weights))
    return State(start, start, _each(torch.zeros_like, start))


def step(
    state: State,
    weights: Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    rule: Rule,
    momentum: float = 0.0,
) -> tuple[Tensor, State]:
    """Read one token, then write it into every memory (eq. 83 to 88; in chunks, eq. 90 and 93).

    Reads come before writes: y = M_{t-1} q (eq. 83, 94). In a chunk, keys, values, gates and
    targets are of the memories as they were at its start, token C floor((t - 1) / C) of tokens
    counted from one; the paper prints a ceiling, the chunk's own end, which has not been read yet.
    The memory's own recall, and the gradient unless `rule.anchored`, are of the live memories.

    With `momentum` theta, the one that the paper ablates (table 6) in the form of Titans:
    S = theta S - rate grad, M = M (retain I - rate k k^T) + S.

    Args:
        state: the sessions' memories.
        weights: what is shared. The gains `modification` and `passage` are the paper's, one.
        x: what keys, values and gates are made of, [B, H, N].
        q: static queries, [B, H, N].
        phase: tokens that each session is into its chunk, [B].
        rule: the update rule; its `target_norm` and `memory_norm` are not applied.
        momentum: theta.
    """
    live, anchor, start = state.live, state.anchor, started(weights)
    made = generated(anchor, x, q, weights, rule)
    y = recall(live.memory, made.query)

    def accelerated(live: Tensor, anchor: Tensor, velocity: Tensor) -> Tensor:
        at = anchor if rule.anchored else live
        gradient = _outer(slope(at, made.key, target(anchor, made.value)), made.key)
        return momentum * velocity - made.rate[..., None, None] * gradient

    def moved(live: Tensor, velocity: Tensor, start: Tensor) -> Tensor:
        erase = (rule.erases - 1.0) * made.rate
        kept = written(live, made.key, torch.zeros_like(live[..., 0]), erase, made.retain)
        home = 0.0 if rule.decay_to_zero else (1.0 - made.retain[..., None, None]) * start
        return kept + velocity + home

    velocity = _each(accelerated, live, anchor, state.velocity)
    live = _each(moved, live, velocity, start)
    ended = (phase + 1 == rule.chunk)[:, None, None, None]
    anchor = _each(lambda new, old: torch.where(ended, new, old), live, anchor)
    return y, State(live, anchor, velocity)


def naive(
    state: State,
    weights: Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    rule: Rule,
    momentum: float = 0.0,
) -> tuple[Tensor, State]:
    """Take `step` for each of the T tokens of x and q, [B, H, T, N]; return y [B, H, T, N]."""
    found = []
    for t in range(x.shape[-2]):
        y, state = step(state, weights, x[:, :, t], q[:, :, t], phase, rule, momentum)
        found.append(y)
        phase = (phase + 1) % rule.chunk
    return torch.stack(found, -2), state


def _each(change: Callable[..., Tensor], *memories: Memories) -> Memories:
    """Do the same to every memory."""
    return Memories(*(change(*parts) for parts in zip(*memories, strict=True)))


def _outer(row: Tensor, key: Tensor) -> Tensor:
    """Return row key^T, [..., R, N]."""
    return row[..., :, None] * key[..., None, :]
