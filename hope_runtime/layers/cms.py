"""The Continuum Memory System: MLPs whose weights are `base + delta[session]` (paper eq. 70).

Base weights are shared by the batch and never change; a session that never consolidated has no
delta and costs nothing. A delta is a matrix `name`, or two thin ones, `name.left` [out, rank] and
`name.right` [rank, in], whose product it is and which are never multiplied out.
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


def linear(x: Tensor, weight: Tensor, name: str, deltas: Sequence[Deltas]) -> Tensor:
    """Return x (W + delta_b)^T: one shared product, and one or two more per session with a delta.

    Args:
        x: [B, T, in].
        weight: [out, in], shared.
        name: what the deltas of this matrix are called.
        deltas: each session's own, of all matrices.

    Returns:
        [B, T, out]; for a session without delta the very bits of the shared product.
    """
    y = F.linear(x, weight)
    for row, own in enumerate(deltas):
        if (whole := own.get(name)) is not None:
            y[row] += F.linear(x[row], whole)
        elif (left := own.get(f"{name}.left")) is not None:
            y[row] += F.linear(F.linear(x[row], own[f"{name}.right"]), left)
    return y


def gated_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, name: str, deltas: Sequence[Deltas]
) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) with each session's own weights, [B, T, width].

    `gate_up` is [2 * hidden, width] (gate above up), `down` [width, hidden]; the deltas of
    session b are `deltas[b][name + ".gate_up"]` and `deltas[b][name + ".down"]`.
    """
    gate, up = linear(x, gate_up, f"{name}.gate_up", deltas).chunk(2, -1)
    return linear(F.silu(gate) * up, down, f"{name}.down", deltas)
