"""Gradient descent as a memory of (input, error) pairs: by dot product, and by L2 (paper 4.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hope_runtime.ops.optimisers.interface import (
    Factors,
    Gradients,
    OptimiserState,
    Params,
    dense,
    following,
    fresh,
    needed,
    wide,
)


@dataclass(frozen=True, slots=True)
class GradientDescent:
    """W <- W - rate G, the minimum of <G, W'> + ||W' - W||^2 / (2 rate) over W' (paper eq. 2).

    >>> rule = GradientDescent()
    >>> updates, _ = rule.update({"w": torch.tensor([2.0])}, rule.init({}), rate=0.5)
    >>> updates
    {'w': tensor([-1.])}
    """

    def init(self, params: Params) -> OptimiserState:
        return fresh(params)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        updates = {name: -rate * gradient for name, gradient in dense(gradients, state).items()}
        return updates, following(state)


@dataclass(frozen=True, slots=True)
class FactoredDescent:
    """W <- W - rate G / sqrt(V), V_ij = r_i c_j / mean(G^2) (`naive.factored_descent`).

    r_i and c_j are the means of G^2 in row i and in column j: V is the matrix of rank one with
    the same means, which Adafactor (arXiv 1804.04235, section 3) remembers in place of Adam's. Here
    it is that of the gradient itself, so that every entry moves about as far as every other, as
    under Adam, and nothing is remembered. What has no second axis moves by its own mean.

    >>> rule = FactoredDescent()
    >>> gradient = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    >>> updates, _ = rule.update({"w": gradient}, rule.init({}), rate=0.5)
    >>> updates["w"]
    tensor([[-0.5385, -0.4817],
            [-0.0000,  0.6021]])
    """

    floor: float = 1e-3  # of the root of V, as a share of the root of the mean of G^2

    def init(self, params: Params) -> OptimiserState:
        return fresh(params)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        updates = {}
        for name, gradient in dense(gradients, state).items():
            square = gradient.square()
            rows = square.mean(-1, keepdim=True)
            if gradient.dim() > 1:
                mean = rows.mean(-2, keepdim=True)
                spread = rows * square.mean(-2, keepdim=True) / (mean + 1e-30)
            else:
                mean = spread = rows
            spread = torch.maximum(spread, self.floor**2 * mean) + 1e-30
            updates[name] = -rate * gradient / spread.sqrt()
        return updates, following(state)


@dataclass(frozen=True, slots=True)
class DeltaGradientDescent:
    """Delta gradient descent: what W says of the input is erased as the gradient is written.

    W <- W (I - rate' x x^T) - rate' dL/dy x^T, with rate' = rate / (1 + rate ||x||^2)  (paper
    eq. 54-57). This is the minimum over W' of sum_i ||W' x_i - u_i||^2 / 2 + ||W' - W||^2 / (2
    rate), where u_i = -dL/dy_i; with many tokens it is found by one solve of the size of the
    smaller of tokens and inputs. Every gradient must be `Factors`: the rule looks at the inputs.
    Where the loss curves by at most one in y, as L2 / 2 and cross-entropy do, no rate makes it
    diverge. The paper prints rate / (1 + rate), which holds for inputs of length one only.
    """

    def init(self, params: Params) -> OptimiserState:
        return fresh(params)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        weights = needed(params, "delta gradient descent")
        updates = {}
        for name, gradient in gradients.items():
            if not isinstance(gradient, Factors):
                raise ValueError(
                    f"delta gradient descent needs the inputs of {name!r}: give Factors"
                )
            updates[name] = _delta_step(wide(weights[name]), gradient, rate)
        return updates, following(state)


def _delta_step(weights: Tensor, gradient: Factors, rate: float) -> Tensor:
    outputs, inputs = wide(gradient.outputs), wide(gradient.inputs)
    error = outputs + inputs @ weights.mT  # [..., n, O] what W' x_i should lose, W x_i - u_i
    if inputs.shape[-2] <= inputs.shape[-1]:
        return -rate * _solve(inputs @ inputs.mT, error, rate).mT @ inputs
    return -rate * _solve(inputs.mT @ inputs, inputs.mT @ error, rate).mT


def _solve(gram: Tensor, right: Tensor, rate: float) -> Tensor:
    """Return (I + rate gram)^-1 right."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(eye + rate * gram))
