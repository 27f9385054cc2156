"""Matrices kept as two thin factors. O outputs, I inputs, r rank."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left [O, r] and right [r, I], whose product is the nearest of that rank to `matrix`.

    The truncated singular value decomposition, by the eigenvectors of the smaller Gram matrix in
    float64. The factor on the smaller side has orthonormal columns (or rows), the other holds the
    scale.

    >>> left, right = truncated(torch.diag(torch.tensor([3.0, -2.0, 0.1])), 2)
    >>> (left @ right).round(decimals=4).diag()
    tensor([ 3., -2.,  0.])
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.mT if tall else matrix).double()
    basis = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:]
    left, right = basis.to(matrix.dtype).contiguous(), (basis.mT @ wide).to(matrix.dtype)
    return (right.mT.contiguous(), left.mT.contiguous()) if tall else (left, right)
