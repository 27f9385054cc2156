"""Inputs that try to blow a memory up, and how far they get.

Some sessions get one kind of input for ever; the others follow a greedy adversary, who after every
chunk goes on, head by head, from whichever of its inputs made the memory largest. It is a search,
not a proof of the worst case.

Axes: B sessions, H heads, C tokens of a chunk, N head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HEADS, WIDTH = 2, 32
STEADY = ("random", "loud", "repeated", "alternating", "near-parallel", "top direction")
GREEDY = 16
SESSIONS = len(STEADY) + GREEDY


@dataclass(frozen=True, slots=True)
class Subject:
    """A memory under attack; sizes and directions are [B, H] and [B, H, N]."""

    name: str
    chunk: int
    empty: Callable[[int], Any]
    scan: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Any]]  # of state, x, q, phase
    matrix: Callable[[Any], Tensor]  # [B, H, ., N], whose Frobenius norm is the memory's size
    spectrum: Callable[[Any], Tensor] | None = None  # [B, H, N], of what projections look through
    bound: float | None = None  # on the size at any token, proven


@dataclass(slots=True)
class Outcome:
    """The largest size at any chunk's end or just before it, for each kind of input."""

    peaks: dict[str, float] = field(default_factory=dict)
    blown: int | None = None  # tokens until a memory was past 10^9 or not finite
    median: float | None = None  # singular values at the end, of the worst session: nought is dead
    largest: float | None = None


def endure(subject: Subject, tokens: int, seed: int = 0) -> Outcome:
    """Feed a memory `tokens` tokens a session, or as many as it bears."""
    source = torch.Generator().manual_seed(seed)
    kinds = (*STEADY, "greedy")
    state, outcome = subject.empty(SESSIONS), Outcome(dict.fromkeys(kinds, 0.0))
    chunk, phase = subject.chunk, torch.zeros(SESSIONS, dtype=torch.int64)
    held = torch.randn(SESSIONS, HEADS, 1, WIDTH, generator=source)
    top = torch.randn(SESSIONS, HEADS, WIDTH, 1, generator=source)
    for done in range(chunk, tokens + 1, chunk):
        matrix = subject.matrix(state)
        top = torch.nn.functional.normalize(matrix.mT @ (matrix @ top) + 1e-6 * top, dim=-2)
        x = _inputs(held, top.mT, chunk, source)
        q = torch.nn.functional.normalize(x, dim=-1)
        before = state
        if chunk > 1:  # the last token of a chunk also scales the memory back
            _, before = subject.scan(state, x[:, :, :-1], q[:, :, :-1], phase)
        _, state = subject.scan(before, x[:, :, -1:], q[:, :, -1:], phase + chunk - 1)
        sizes = torch.maximum(_size(subject.matrix(before)), _size(subject.matrix(state)))
        for name, size in zip(kinds, _by_kind(sizes), strict=True):
            outcome.peaks[name] = max(outcome.peaks[name], size)
        if not max(outcome.peaks.values()) < 1e9:
            outcome.blown = done
            return outcome
        worst = _size(subject.matrix(state))[len(STEADY) :].argmax(0) + len(STEADY)
        state, top = _followed(state, worst), _followed(top, worst)
    if subject.spectrum is not None:
        values = subject.spectrum(state)
        outcome.median = float(values.median(-1).values.min())
        outcome.largest = float(values.amax(-1).min())
    return outcome


def _inputs(held: Tensor, top: Tensor, chunk: int, source: torch.Generator) -> Tensor:
    """Draw a chunk for every session; `held` is what each repeats, `top` its memory's direction."""
    x = torch.randn(SESSIONS, HEADS, chunk, WIDTH, generator=source)
    sign = torch.tensor([1.0, -1.0]).repeat(chunk)[:chunk, None]
    x[1] *= 100.0
    x[2] = held[2]
    x[3] = held[3] * sign
    x[4] = held[4] + 0.05 * x[4]
    x[5] = 3.0 * top[5] + 0.3 * x[5]
    g = len(STEADY)  # of the greedy ones, the first is random
    x[g + 1 : g + 4] = x[g + 1 : g + 4, :, :1]
    x[g + 4 : g + 7] = x[g + 4 : g + 7, :, :1] * sign
    x[g + 7 : g + 11] = 3.0 * top[g + 7 : g + 11] + 0.3 * x[g + 7 : g + 11]
    x[g + 11 : g + 13] = 3.0 * top[g + 11 : g + 13] * x[g + 11 : g + 13, :, :, :1].sign()
    x[g + 13 : g + 15] = x[g + 13 : g + 15, :, :1] + 0.05 * x[g + 13 : g + 15]
    x[g + 15] = held[g + 15]
    return x


def _size(matrix: Tensor) -> Tensor:
    """Return Frobenius norms [B, H], infinite where the matrix is not finite."""
    size: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return size.nan_to_num(torch.inf, posinf=torch.inf)


def _by_kind(sizes: Tensor) -> list[float]:
    steady = sizes[: len(STEADY)].amax(1).tolist()
    return [*steady, float(sizes[len(STEADY) :].max())]


def _followed(tree: Any, worst: Tensor) -> Any:
    """Give the greedy sessions, head by head, the state of the `worst` of them."""
    if not isinstance(tree, Tensor):
        return type(tree)(*(_followed(part, worst) for part in tree))
    chosen = tree[worst, torch.arange(HEADS)]
    return torch.cat([tree[: len(STEADY)], chosen.expand(GREEDY, *chosen.shape)])
