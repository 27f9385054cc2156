"""Where batches come from: generated sessions on a curriculum, or plain text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hope_runtime.training.loop import Batch, Source, TrainingError
from hope_runtime.training.sessions import STAGES, Material, Stage, rows

SHARES = (0.03, 0.06, 0.15, 0.34, 0.21, 0.21)  # of the run, for each of `STAGES`


def curriculum(
    material: Material,
    tokens: int,
    stages: Sequence[Stage] = STAGES,
    shares: Sequence[float] = SHARES,
) -> Source:
    """Return batches of about `tokens` tokens, from short sessions with few facts to long ones.

    A fifth of the batches come from an earlier stage: what was learned there stays.
    """
    ends = np.cumsum(shares) / sum(shares)

    def draw(chance: np.random.Generator, done: float) -> Batch:
        stage = int(np.searchsorted(ends, min(done, 1.0 - 1e-9), side="right"))
        if stage and chance.random() < 0.2:
            stage = int(chance.integers(stage))
        chosen = stages[stage]
        found, weights = rows(chance, material, chosen, max(1, tokens // chosen.length))
        return Batch(torch.from_numpy(found), torch.from_numpy(weights))

    return draw


def text(ids: np.ndarray, length: int, batch: int) -> Source:
    """Return rows of `length` tokens from random places of a text."""
    if len(ids) <= length:
        raise TrainingError(
            f"the text has {len(ids)} tokens, a row takes {length + 1}; give more text or a "
            "shorter --length"
        )

    def draw(chance: np.random.Generator, done: float) -> Batch:
        starts = chance.integers(0, len(ids) - length, batch)
        rows = np.stack([ids[start : start + length + 1] for start in starts])
        return Batch(torch.from_numpy(rows.astype(np.int64)), torch.ones(batch, length + 1))

    return draw
