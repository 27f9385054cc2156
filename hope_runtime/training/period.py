"""How often a level should learn, learned by gradient: the chunk lengths of eq. 71, relaxed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def relaxed(
    loss: Callable[[Weights, int], Tensor],
    start: Weights,
    pieces: int,
    periods: Sequence[int],
    scores: Tensor,
    *,
    rate: float,
    retain: float = 1.0,
) -> Tensor:
    """Return the mean loss over a stream of a level that learns every so many pieces, in shares.

    The level may learn at the end of every piece. It does so by `gate`, the shares (softmax of
    `scores`) of all periods that have an end there; what it has not used stays for the next end:

    `sum <- sum + g; count <- count + 1`
    `delta <- delta + gate * (retain * delta - rate * sum / count - delta)`
    `sum <- (1 - gate) * sum; count <- (1 - gate) * count`

    With all of the shares on one period these are its chunks and the mean gradients over them, as
    they are served. The result can be differentiated with respect to `scores`, `start` and all that
    `loss` depends on, to second order through the level's own gradients: keep the unroll short.
    Then descend on `scores`, and take the period with the largest.

    Args:
        loss: the loss of piece i under given weights; it is scored before it is learned.
        start: the level's weights before the first piece.
        pieces: how many there are.
        periods: the candidates, in pieces.
        scores: [periods].
        rate: of the level's steps, absolute.
        retain: what the level keeps of its weights at a step.

    >>> def far(weights, i):
    ...     return (weights["w"] - 1.0).square().sum() / 2
    >>> scores = torch.tensor([9.0, -9.0])  # every piece; every second
    >>> round(relaxed(far, {"w": torch.zeros(1)}, 2, (1, 2), scores, rate=0.5).item(), 3)
    0.312
    """
    shares = torch.softmax(scores, 0)
    delta: dict[str, Tensor] = {
        name: w if w.requires_grad else w.detach().requires_grad_() for name, w in start.items()
    }
    held = {name: torch.zeros_like(w) for name, w in start.items()}
    count = scores.new_zeros(())
    found: list[Tensor] = []
    for piece in range(pieces):
        found.append(loss(delta, piece))
        gradients = torch.autograd.grad(found[-1], list(delta.values()), create_graph=True)
        held = {name: held[name] + g for name, g in zip(delta, gradients, strict=True)}
        count = count + 1.0
        ends = torch.tensor([(piece + 1) % period == 0 for period in periods])
        gate = (shares * ends.to(shares)).sum()
        delta = {
            name: w + gate * ((retain - 1.0) * w - rate * held[name] / count)
            for name, w in delta.items()
        }
        held = {name: (1.0 - gate) * s for name, s in held.items()}
        count = (1.0 - gate) * count
    return torch.stack(found).mean()
