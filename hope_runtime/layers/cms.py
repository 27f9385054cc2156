"""The Continuum Memory System: MLPs whose weights are `base + delta[session]` (paper eq. 70).

Base weights are shared by the batch and never change; a session that never consolidated has no
delta and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

Deltas = Mapping[str, Tensor]


def mlp_name(block: int, place: int) -> str:
    """Name an MLP of a block by its place in the chain; its tensors and deltas begin with it.

    >>> mlp_name(3, 0), mlp_name(3, 1)
    ('blocks.3', 'blocks.3.mlps.1')
    """
    return f"blocks.{block}.mlps.{place}" if place else f"blocks.{block}"


def linear(x: Tensor, weight: Tensor, own: Sequence[Tensor | None]) -> Tensor:
    """Return x (W + delta_b)^T: one shared product, and one more per session that has learned.

    Args:
        x: [B, T, in].
        weight: [out, in], shared.
        own: for each session its delta [out, in], or None.

    Returns:
        [B, T, out]; for a session without delta the very bits of the shared product.
    """
    y = F.linear(x, weight)
    for row, delta in enumerate(own):
        if delta is not None:
            y[row] += F.linear(x[row], delta)
    return y


def gated_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, name: str, deltas: Sequence[Deltas]
) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) with each session's own weights, [B, T, width].

    `gate_up` is [2 * hidden, width] (gate above up), `down` [width, hidden]; the deltas of
    session b are `deltas[b][name + ".gate_up"]` and `deltas[b][name + ".down"]`.
    """
    both = linear(x, gate_up, [own.get(f"{name}.gate_up") for own in deltas])
    gate, up = both.chunk(2, -1)
    return linear(F.silu(gate) * up, down, [own.get(f"{name}.down") for own in deltas])
