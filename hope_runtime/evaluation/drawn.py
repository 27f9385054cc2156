"""What tasks are drawn as; it fits the rows of training.

Axes: B rows, T + 1 tokens of which the first is never a target, V symbols of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Bits = NDArray[np.bool_]


class Drawn(NamedTuple):
    """Some rows, which of their tokens count, and what may stand there where that is asked."""

    tokens: Ids  # [B, T + 1]
    scored: Bits  # [B, T + 1]; never the first
    legal: Bits | None = None  # [B, T + 1, V], of languages


Draw = Callable[[np.random.Generator, int], Drawn]  # (chance, rows)


def distinct(chance: np.random.Generator, rows: int, size: int, of: int) -> Ids:
    """Return `size` different numbers below `of` in each row."""
    return chance.random((rows, of)).argsort(1)[:, :size]
