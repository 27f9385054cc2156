"""The paper's equations on optimisers as they read, for one matrix: what the rules must equal.

Axes: n tokens, O outputs and I inputs of a weight matrix. Where print and derivation part, the
printed form is here under a name that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hope_runtime.ops.optimisers.orthogonal import newton_schulz


def write(
    memory: Tensor, objective: Callable[[Tensor], Tensor], rate: float, retain: float = 1.0
) -> Tensor:
    """Return the memory after one step: retain memory - rate grad objective(memory).

    Every optimiser's memory is written so; they differ by objective.

    >>> write(torch.tensor([4.0]), lambda m: (m * m).sum(), rate=0.25)
    tensor([2.])
    """
    with torch.enable_grad():
        at = memory.detach().requires_grad_()
        gradient: Tensor = torch.autograd.grad(objective(at), at)[0]
    return retain * memory - rate * gradient


def proximal_objective(new: Tensor, old: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """<G, W'> + ||W' - W||^2 / (2 rate); gradient descent is its minimum (eq. 2)."""
    return (gradient * new).sum() + (new - old).square().sum() / (2.0 * rate)


def factored_descent(old: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """W'_ij = W_ij - rate G_ij / sqrt(r_i c_j / mean(G^2)), entry by entry."""
    new, mean = old.clone(), (gradient * gradient).mean()
    for i, row in enumerate(gradient):
        for j, column in enumerate(gradient.T):
            spread = (row * row).mean() * (column * column).mean() / mean
            new[i, j] = old[i, j] - rate * gradient[i, j] / torch.sqrt(spread)
    return new


def delta_objective(
    new: Tensor, old: Tensor, inputs: Tensor, targets: Tensor, rate: float
) -> Tensor:
    """||W' x - u||^2 / 2 + ||W' - W||^2 / (2 rate), summed over tokens (eq. 54-56)."""
    recalled = inputs @ new.mT
    return (recalled - targets).square().sum() / 2.0 + (new - old).square().sum() / (2.0 * rate)


def delta_descent(old: Tensor, inputs: Tensor, targets: Tensor, rate: float) -> Tensor:
    """Return where `delta_objective` is least: (W + rate u x^T) (I + rate x x^T)^-1."""
    eye = torch.eye(old.shape[-1], dtype=old.dtype)
    inverse: Tensor = torch.linalg.inv(eye + rate * inputs.mT @ inputs)
    return (old + rate * targets.mT @ inputs) @ inverse


def printed_delta_descent(old: Tensor, x: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Return W (I - rate' x x^T) - rate' dL/dy x^T, rate' = rate / (1 + rate) (eq. 57).

    This is `delta_descent` for an input of length one, and for no other.
    """
    rate = rate / (1.0 + rate)
    eye = torch.eye(len(x), dtype=old.dtype)
    return old @ (eye - rate * torch.outer(x, x)) - rate * torch.outer(gradient, x)


def momentum_objective(momentum: Tensor, gradient: Tensor) -> Tensor:
    """<m, G> (eq. 33)."""
    return (momentum * gradient).sum()


def preconditioned_objective(momentum: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """<m G^T, P>: keys G, values P (eq. 46-47)."""
    return (momentum @ gradient.mT * value).sum()


def delta_momentum_objective(momentum: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """||m G^T + P||^2 / 2 (eq. 48): the sign of P that makes W + m descend."""
    return (momentum @ gradient.mT + value).square().sum() / 2.0


def printed_delta_momentum(
    momentum: Tensor, gradient: Tensor, value: Tensor, rate: float, retain: float
) -> Tensor:
    """Return m (retain I - G^T G) - rate P G (eq. 49): no rate on the erase."""
    eye = torch.eye(gradient.shape[-1], dtype=gradient.dtype)
    return momentum @ (retain * eye - gradient.mT @ gradient) - rate * value @ gradient


def deep_objective(inner: Tensor, outer: Tensor, keys: Tensor) -> Tensor:
    """The mean over rows u of ||m(u) + u||^2 / 2 (eq. 50, our reading)."""
    recalled = torch.tanh(keys @ inner.mT) @ outer.mT
    return (recalled + keys).square().sum(-1).mean() / 2.0


def printed_deep_objective(inner: Tensor, outer: Tensor, keys: Tensor) -> Tensor:
    """<m(u), 1> (eq. 50): a memory trained on it is the same for u and -u, if it starts at zero."""
    return (torch.tanh(keys @ inner.mT) @ outer.mT).sum()


def orthogonal_objective(matrix: Tensor) -> Tensor:
    """||X X^T - I||^2 / 8 (eq. 43-44), whose descent at rate 1 is the cubic Newton-Schulz step."""
    eye = torch.eye(matrix.shape[-2], dtype=matrix.dtype)
    return (matrix @ matrix.mT - eye).square().sum() / 8.0


def printed_m3(
    gradients: Sequence[Tensor],
    rate: float,
    writes: tuple[float, float, float],
    *,
    weight: float,
    chunk: int,
    epsilon: float = 1e-8,
) -> list[Tensor]:
    """Return the updates of Algorithm 1, its two loops as they stand; `writes` are beta 1 to 3."""
    fast_write, square_write, slow_write = writes
    fast = square = slow = torch.zeros_like(gradients[0])
    updates = []
    for k in range(-(-len(gradients) // chunk)):
        for gradient in gradients[max(k - 1, 0) * chunk : k * chunk]:
            slow = slow + slow_write * gradient
        for gradient in gradients[k * chunk : (k + 1) * chunk]:
            fast = fast + fast_write * gradient
            square = square + square_write * gradient * gradient
            orthogonal = newton_schulz(fast) + weight * newton_schulz(slow)
            updates.append(-rate * orthogonal / (square.sqrt() + epsilon))
    return updates


def diagonal_objective(
    memory: Tensor, gradients: Tensor, shares: Tensor, value: Tensor, ridge: float
) -> Tensor:
    """sum_i w_i (m g_i - P)^2 + lambda m^2, entry by entry (eq. 101); gradients [t, ...]."""
    misses = (memory * gradients - value).square()
    return _mix(shares, misses) + ridge * memory.square()


def diagonal_memory(gradients: Tensor, shares: Tensor, value: Tensor, ridge: float) -> Tensor:
    """Return where `diagonal_objective` is least (eq. 102-104)."""
    mean = _mix(shares, gradients)
    square = _mix(shares, gradients.square())
    return value * mean / (square + ridge)


def window(steps: int, retain: float) -> Tensor:
    """Return the shares of steps 1 to t in a running mean that weighs the past by `retain`.

    >>> window(3, 0.5)
    tensor([0.1429, 0.2857, 0.5714], dtype=torch.float64)
    """
    weights: Tensor = retain ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return weights / weights.sum()


def adam(gradients: Tensor, rate: float, retain: float, square_retain: float) -> Tensor:
    """Return Adam's update after gradients [t, ...], without epsilon (eq. 105).

    The memory of eq. 102 at lambda = 0 that recalls P = sqrt(mean(G^2)), the mean of G in its own
    window.
    """
    steps = len(gradients)
    mean = _mix(window(steps, retain), gradients)
    square = _mix(window(steps, square_retain), gradients.square())
    return -rate * square.sqrt() * mean / square


def _mix(shares: Tensor, gradients: Tensor) -> Tensor:
    """Return sum_i w_i g_i."""
    mixed: Tensor = torch.tensordot(shares.to(gradients), gradients, 1)
    return mixed
