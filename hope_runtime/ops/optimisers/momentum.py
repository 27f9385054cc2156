"""Momentum as a memory of gradients: by dot product, preconditioned, by L2, and deep (eq. 33-50).

Axes: O outputs and I inputs of a weight matrix, H width of a deep memory. A vector counts as a
matrix of one row; axes before the last two are a batch of matrices.
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
    rows,
    wide,
)


@dataclass(frozen=True, slots=True)
class Momentum:
    """m <- retain m - rate G; W <- W + m  (paper eq. 33).

    One step of gradient descent on <m, G>, by which m stores gradients as linear attention stores
    values. The rate is inside m, as printed: what was stored keeps the rate of its own time.
    """

    retain: float = 0.9

    def __post_init__(self) -> None:
        check_shares(retain=self.retain)

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
        momentum = {
            name: self.retain * past[name] - rate * gradient
            for name, gradient in dense(gradients, state).items()
        }
        return momentum, following(state, momentum=momentum)


@dataclass(frozen=True, slots=True)
class PreconditionedMomentum:
    """m <- retain m - rate P G; W <- W + m  (paper eq. 46-47): the key is G, the value P.

    The paper leaves P open. Here it is diagonal, 1 / (sqrt(v) + epsilon) with v the running mean of
    G^2: RMSprop with momentum.
    """

    retain: float = 0.9
    square_retain: float = 0.99
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_shares(retain=self.retain, square_retain=self.square_retain)
        check_positive(epsilon=self.epsilon)

    def init(self, params: Params) -> OptimiserState:
        return fresh(params, "momentum", "square")

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        past, squares = state.memories["momentum"], state.memories["square"]
        momentum, square = {}, {}
        for name, gradient in dense(gradients, state).items():
            square[name] = squares[name].lerp(gradient.square(), 1.0 - self.square_retain)
            preconditioned = gradient / (square[name].sqrt() + self.epsilon)
            momentum[name] = self.retain * past[name] - rate * preconditioned
        return momentum, following(state, momentum=momentum, square=square)


@dataclass(frozen=True, slots=True)
class DeltaMomentum:
    """m <- m (retain I - rate G^T G) - rate G; W <- W + m  (paper eq. 48-49, made consistent).

    One step of gradient descent on ||m G^T + I||^2 / 2: what m says of this gradient is erased
    before it is stored. Printed without a rate on the erase, and with the sign of a value of -I.
    The step is explicit: it overshoots once rate times the squared spectral norm of G passes
    1 + retain, so clip the gradients.
    """

    retain: float = 0.9

    def __post_init__(self) -> None:
        check_shares(retain=self.retain)

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
        momentum = {}
        for name, gradient in dense(gradients, state).items():
            matrix, before = rows(gradient), rows(past[name])
            error = before @ matrix.mT @ matrix + matrix  # [..., O, I]
            momentum[name] = (self.retain * before - rate * error).reshape(gradient.shape)
        return momentum, following(state, momentum=momentum)


@dataclass(frozen=True, slots=True)
class DeepMomentum:
    """Momentum kept by an MLP that is trained as it is used: W <- W + m(u)  (paper eq. 50).

    The shapes are ours. A matrix G [O, I] has its own memory m(u) = outer tanh(inner u), from R^I
    to R^I over a width H, which reads each row of G as a key u, scaled so that rows have length one
    on average:

    m <- retain m - learning grad mean_rows ||m(u) + u||^2 / 2;  W <- W + rate ||G|| / sqrt(O) m(u)

    The value 1 of the paper's L2(m; u, 1) is read as "minus one times the key": with the number 1
    itself, m is the same for G and -G and cannot descend. The memory begins with outer = 0, so the
    first updates are small; it hands a gradient on the more fully the more often its rows have come
    before, and at most H directions at a time.
    """

    retain: float = 0.9999
    learning: float = 0.5  # the memory's own rate: at 1 a new key is written at once, 2 diverges
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(retain=self.retain)
        check_positive(learning=self.learning, width=self.width)

    def init(self, params: Params) -> OptimiserState:
        step = torch.zeros((), dtype=torch.int64)
        inner = {name: self._inner(p) for name, p in params.items()}
        outer = {name: torch.zeros_like(first.mT.contiguous()) for name, first in inner.items()}
        return OptimiserState(step, {"inner": inner, "outer": outer})

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        updates, inner, outer = {}, {}, {}
        for name, gradient in dense(gradients, state).items():
            keys, size = _keys(rows(gradient))
            before = DeepMemory(state.memories["inner"][name], state.memories["outer"][name])
            memory = before.write(keys, self.learning, self.retain)
            inner[name], outer[name] = memory
            updates[name] = (rate * size * memory.read(keys)).reshape(gradient.shape)
        return updates, following(state, inner=inner, outer=outer)

    def _inner(self, param: Tensor) -> Tensor:
        """Return the first layer, the same for the same shape whatever else is learned."""
        matrix = rows(wide(param))
        shape = (*matrix.shape[:-2], self.width, matrix.shape[-1])
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (start / math.sqrt(self.width)).to(matrix)


class DeepMemory(NamedTuple):
    """An MLP m(u) = outer tanh(inner u) over the rows of a matrix."""

    inner: Tensor  # [..., H, I]
    outer: Tensor  # [..., I, H]

    def read(self, keys: Tensor) -> Tensor:
        """Return m(u) for each row u of `keys` [..., O, I]."""
        return torch.tanh(keys @ self.inner.mT) @ self.outer.mT

    def write(self, keys: Tensor, rate: float, retain: float) -> DeepMemory:
        """Return the memory after one step on the mean over rows of ||m(u) + u||^2 / 2."""
        hidden = torch.tanh(keys @ self.inner.mT)  # [..., O, H]
        error = (hidden @ self.outer.mT + keys) / keys.shape[-2]  # [..., O, I]
        back = (error @ self.outer) * (1.0 - hidden.square())  # [..., O, H]
        return DeepMemory(
            retain * self.inner - rate * back.mT @ keys,
            retain * self.outer - rate * error.mT @ hidden,
        )


def _keys(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix whose rows have length one in the root mean square, and its length before."""
    norm: Tensor = torch.linalg.matrix_norm(matrix, keepdim=True)
    size = norm / math.sqrt(matrix.shape[-2])
    return matrix / size.clamp_min(1e-30), size
