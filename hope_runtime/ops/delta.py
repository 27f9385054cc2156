"""The gated delta recurrence over one chunk: token by token, and all tokens at once.

    S_t = retain_t S_{t-1} - rate_t (S_{t-1} k_t) k_t^T + u_t k_t^T        y_t = S_{t-1} q_t

Reads come before writes. Every linear memory of this package is this recurrence with its own
`rate` and `u`. Axes: ... batch, C tokens of the chunk, R rows of the memory, N width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive(
    memory: Tensor, keys: Tensor, queries: Tensor, retain: Tensor, rate: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as it is written; the definition of `chunk`.

    Args:
        memory: S before the chunk, [..., R, N].
        keys: [..., C, N].
        queries: [..., C, N].
        retain: what is kept of the memory, in (0, 1], [..., C].
        rate: how much of what a key recalls is erased, [..., C].
        writes: u, [..., C, R].

    Returns:
        y [..., C, R], and S after the chunk.

    >>> S, k = torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> one, u = torch.ones(2), torch.tensor([[3.0], [5.0]])
    >>> y, S = naive(S, k, k, one, one, u)
    >>> y.tolist(), S.tolist()
    ([[0.0], [3.0]], [[5.0, 0.0]])
    """
    found = []
    for t in range(keys.shape[-2]):
        key = keys[..., t : t + 1, :]  # a row times S^T: ten times as fast as S times a column
        found.append(queries[..., t : t + 1, :] @ memory.mT)
        change = writes[..., t : t + 1, :] - rate[..., t, None, None] * (key @ memory.mT)
        memory = torch.addcmul(retain[..., t, None, None] * memory, change.mT, key)
    return torch.cat(found, -2), memory


def chunk(
    memory: Tensor, keys: Tensor, queries: Tensor, retain: Tensor, rate: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `naive` returns, with products of whole matrices.

    The change that token t makes to the memory is w_t k_t^T; all w solve one triangular system
    (as in arXiv 2412.06464). Ratios of retention are exponentials of differences of sums of
    logarithms, all of them at most one; raw products are never divided.
    """
    tokens = keys.shape[-2]
    logs = retain.log().cumsum(-1)  # of g_t, what is left after t tokens
    before = logs - retain.log()  # of g_{t-1}
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device).tril(-1)
    left = (before[..., :, None] - logs[..., None, :]).masked_fill(~later, -torch.inf).exp()
    start = before.exp()[..., None]  # [..., C, 1]
    recalled = start * (keys @ memory.mT)  # [..., C, R]
    overlap = rate[..., None] * left * (keys @ keys.mT)  # later keys see earlier writes
    eye = torch.eye(tokens, dtype=keys.dtype, device=keys.device)
    changes = torch.linalg.solve_triangular(
        eye + overlap, writes - rate[..., None] * recalled, upper=False, unitriangular=True
    )
    found = start * (queries @ memory.mT) + (left * (queries @ keys.mT)) @ changes
    kept = (logs[..., -1:] - logs).exp()[..., None]
    after = logs[..., -1].exp()[..., None, None] * memory + (kept * changes).mT @ keys
    return found, after
