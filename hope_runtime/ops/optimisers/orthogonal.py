"""Momentum with a nonlinear output, W <- W + sigma(m): Newton-Schulz makes it Muon and M3.

Axes: O outputs and I inputs of a weight matrix; axes before the last two are a batch of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hope_runtime.ops.optimisers.interface import (
    Gradients,
    OptimiserState,
    Params,
    check_positive,
    check_shares,
    dense,
    following,
    fresh,
    matrices,
)

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; takes singular values to about [0.7, 1.2]
_SMALLEST = 1e-7  # of a norm to divide by


def newton_schulz(matrix: Tensor, steps: int = 5, precision: torch.dtype | None = None) -> Tensor:
    """Return U V^T of the matrix [..., O, I] = U S V^T, roughly, without decomposing it (eq. 44).

    Each step applies an odd polynomial to all singular values. The paper's step is one of gradient
    descent on ||X X^T - I||^2, a cubic one; the quintic gets near 1 in five steps, not exactly. A
    tall matrix is transposed first, so that the smaller Gram matrix is made. `precision` is what to
    compute in: bfloat16 will do; None is the matrix's own.

    >>> newton_schulz(torch.diag(torch.tensor([5.0, -2.0]))).round(decimals=1)
    tensor([[ 0.7000,  0.0000],
            [ 0.0000, -1.0000]])
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if tall else matrix).to(precision or matrix.dtype)
    flat = wide.reshape(-1, *wide.shape[-2:])
    flat = flat / torch.linalg.matrix_norm(flat, keepdim=True).clamp_min(_SMALLEST)
    for _ in range(steps):
        gram = flat @ flat.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        flat = torch.baddbmm(flat, change, flat, beta=a)
    found = flat.reshape(wide.shape).to(matrix.dtype)
    return found.mT.contiguous() if tall else found


@dataclass(frozen=True, slots=True)
class Muon:
    """m <- retain m + (1 - retain) G; W <- W - rate s NS(m)  (paper eq. 42-44, 52).

    As `torch.optim.Muon`: s = sqrt(max(1, O / I)) and, with `nesterov`, m looks one step ahead. The
    paper has the rate inside m, where Newton-Schulz, which knows no scale, would undo it.
    """

    retain: float = 0.95
    nesterov: bool = True
    steps: int = 5
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_shares(retain=self.retain)
        check_positive(steps=self.steps)

    def init(self, params: Params) -> OptimiserState:
        return fresh(params, "momentum")

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        past = state.memories["momentum"]
        plain = dense(gradients, state)
        matrices(plain, "Muon")
        updates, momentum = {}, {}
        for name, gradient in plain.items():
            momentum[name] = past[name].lerp(gradient, 1.0 - self.retain)
            ahead = gradient.lerp(momentum[name], self.retain) if self.nesterov else momentum[name]
            scale = math.sqrt(max(1.0, gradient.shape[-2] / gradient.shape[-1]))
            updates[name] = -rate * scale * newton_schulz(ahead, self.steps, self.precision)
        return updates, following(state, momentum=momentum)


@dataclass(frozen=True, slots=True)
class M3:
    """Multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised (paper Alg. 1).

    fast <- retain fast + (1 - retain) G;  square likewise of G^2
    slow <- likewise of the sum of a chunk's G, at the chunk's end
    W <- W - rate (NS(fast) + slow_weight NS(slow)) / (sqrt(square) + epsilon)

    Departs from print: running means for sums without forgetting (`PrintedM3`), and `square`
    corrected for its start at zero. In both forms the update has the inverse of the gradient's
    scale: the numerator has none and the denominator has it. Halve the loss and the steps double.
    """

    fast_retain: float = 0.9
    square_retain: float = 0.999
    slow_retain: float = 0.9
    slow_weight: float = 1.0
    chunk: int = 100
    steps: int = 5
    epsilon: float = 1e-8
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_shares(
            fast_retain=self.fast_retain,
            square_retain=self.square_retain,
            slow_retain=self.slow_retain,
        )
        check_positive(chunk=self.chunk, steps=self.steps, epsilon=self.epsilon)

    def init(self, params: Params) -> OptimiserState:
        return fresh(params, *_MULTISCALE)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        blends = _Blends(*map(_mean, (self.fast_retain, self.square_retain, self.slow_retain)))
        return _multiscale(self, blends, gradients, state, rate)


@dataclass(frozen=True, slots=True)
class PrintedM3:
    """M3 as Algorithm 1 prints it, for tests: nothing is ever forgotten.

    fast <- fast + fast_write G, and so on. `square` grows with every gradient, as in Adagrad, so
    the steps shrink as one over the square root of their number. The sum of f + 1 gradients that
    is printed for the slow momentum is read as that of the f gradients of a chunk.
    """

    fast_write: float = 0.9
    square_write: float = 0.999
    slow_write: float = 0.9
    slow_weight: float = 1.0
    chunk: int = 100
    steps: int = 5
    epsilon: float = 1e-8
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_positive(
            fast_write=self.fast_write,
            square_write=self.square_write,
            slow_write=self.slow_write,
            chunk=self.chunk,
            steps=self.steps,
            epsilon=self.epsilon,
        )

    def init(self, params: Params) -> OptimiserState:
        return fresh(params, *_MULTISCALE)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        blends = _Blends(*map(_sum, (self.fast_write, self.square_write, self.slow_write)))
        return _multiscale(self, blends, gradients, state, rate)


# pending: the sum of the chunk's gradients so far; direction: NS(slow), until slow next changes
_MULTISCALE = ("fast", "square", "slow", "pending", "direction")


class _Blend(NamedTuple):
    """memory <- keep memory + add new."""

    keep: float
    add: float

    def into(self, memory: Tensor, new: Tensor) -> Tensor:
        return self.keep * memory + self.add * new

    def start(self, step: int) -> float:
        """Return what a mean that began at zero lacks after so many steps; a sum lacks nothing."""
        return 1.0 - self.keep**step if self.keep < 1.0 else 1.0


class _Blends(NamedTuple):
    fast: _Blend
    square: _Blend
    slow: _Blend


def _mean(retain: float) -> _Blend:
    return _Blend(retain, 1.0 - retain)


def _sum(write: float) -> _Blend:
    return _Blend(1.0, write)


def _multiscale(
    rule: M3 | PrintedM3,
    blends: _Blends,
    gradients: Gradients,
    state: OptimiserState,
    rate: float,
) -> tuple[dict[str, Tensor], OptimiserState]:
    plain = dense(gradients, state)
    matrices(plain, "M3")
    step = int(state.step) + 1
    past = state.memories
    updates: dict[str, Tensor] = {}
    memories: dict[str, dict[str, Tensor]] = {kind: {} for kind in _MULTISCALE}
    for name, gradient in plain.items():
        fast = blends.fast.into(past["fast"][name], gradient)
        square = blends.square.into(past["square"][name], gradient.square())
        slow, direction = past["slow"][name], past["direction"][name]
        pending = past["pending"][name] + gradient

        near = newton_schulz(fast, rule.steps, rule.precision)
        spread = (square / blends.square.start(step)).sqrt() + rule.epsilon
        updates[name] = -rate * (near + rule.slow_weight * direction) / spread

        if step % rule.chunk == 0:
            slow = blends.slow.into(slow, pending)
            direction = newton_schulz(slow, rule.steps, rule.precision)
            pending = torch.zeros_like(pending)
        new = zip(_MULTISCALE, (fast, square, slow, pending, direction), strict=True)
        for kind, tensor in new:
            memories[kind][name] = tensor
    return updates, following(state, **memories)
