"""Adam, as the best diagonal memory from gradients to their size (paper eq. 101-105)."""

from __future__ import annotations

from dataclasses import dataclass

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
)


@dataclass(frozen=True, slots=True)
class Adam:
    """W <- W - rate m / (sqrt(v) + epsilon), m and v the running means of G and G^2 (eq. 105).

    Why, entry by entry: of all memories that recall P from each past gradient g_i by m g_i, the one
    with the least sum_i w_i (m g_i - P)^2 + lambda m^2 (eq. 101) is

    m = P sum_i w_i g_i / (sum_i w_i g_i^2 + lambda)  (eq. 102-104).

    Let P be the size of a gradient, sqrt(sum_i w_i g_i^2), and lambda vanish: m = mean(g) /
    sqrt(mean(g^2)), with w_i = (1 - retain) retain^(t - i) / (1 - retain^t), whose denominator is
    the bias correction of `torch.optim.Adam`. One memory has one window; Adam's two, `retain` for
    the mean of G and `square_retain` for that of G^2, are each the best constant of their kind. The
    paper prints sums without forgetting, by which steps would grow as sqrt(t).

    The first step has the rate's size, whatever the gradient's:

    >>> gradients = {"w": Tensor([50.0, -0.1])}
    >>> Adam().update(gradients, Adam().init(gradients), rate=0.5)[0]
    {'w': tensor([-0.5000,  0.5000])}
    """

    retain: float = 0.9
    square_retain: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_shares(retain=self.retain, square_retain=self.square_retain)
        check_positive(epsilon=self.epsilon)

    def init(self, params: Params) -> OptimiserState:
        return fresh(params, "mean", "square")

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        step = int(state.step) + 1
        means, squares = state.memories["mean"], state.memories["square"]
        updates, mean, square = {}, {}, {}
        for name, gradient in dense(gradients, state).items():
            mean[name] = means[name].lerp(gradient, 1.0 - self.retain)
            square[name] = squares[name].lerp(gradient.square(), 1.0 - self.square_retain)
            spread = (square[name] / (1.0 - self.square_retain**step)).sqrt() + self.epsilon
            updates[name] = -rate / (1.0 - self.retain**step) * mean[name] / spread
        return updates, following(state, mean=mean, square=square)
