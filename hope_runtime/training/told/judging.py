"""How far a memory layer is: copying of held-out facts, and where it should say it does not know.

Judged with the answer's words given, so that it is quick; `hope eval memory` lets it speak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.layers import recall
from hope_runtime.training.told.drawing import Drawn, Pool, Stage
from hope_runtime.training.told.learn import losses, remember

INVENTED = 0.1  # share of what was never told that may be answered
BATCHES, SESSIONS = 4, 12
_STAGE = Stage(facts=(4, 4), filler=(4, 4), renamed=0.0, near=0.1)  # as people would ask


@dataclass(frozen=True, slots=True)
class Judged:
    """What a layer does with facts it was not trained on."""

    copied: float  # share of values, every token of them the best of all
    loss: float  # nats a token of an answer, among those of the batch
    apart: float  # chance that something told looks better known than something untold (AUC)


@torch.no_grad()
def judge(
    config: RecallConfig,
    weights: recall.Weights,
    pool: Pool,
    embedding: Tensor,
    near: Tensor,
    seed: int = 0,
) -> Judged:
    """Judge a layer on a pool."""
    rng = np.random.default_rng(seed)
    copied, loss = [], []
    told: list[Tensor] = []
    untold: list[Tensor] = []
    for _ in range(BATCHES):
        batch = pool.draw(rng, SESSIONS, _STAGE)
        found = losses(config, weights, batch, embedding, near, torch.Generator().manual_seed(seed))
        copied.append(found.copied)
        loss.append(float(found.answers))
        known = _known(config, weights, batch, embedding)
        told.append(known[batch.known])
        untold.append(known[~batch.known])
    ours, theirs = torch.cat(told), torch.cat(untold)
    apart = (ours[:, None] > theirs[None]).float().mean()
    return Judged(float(np.mean(copied)), float(np.mean(loss)), float(apart))


@torch.no_grad()
def calibrated(
    config: RecallConfig, weights: recall.Weights, pool: Pool, embedding: Tensor, seed: int = 0
) -> RecallConfig:
    """Return the configuration that answers one in ten of what was never told (`INVENTED`)."""
    rng = np.random.default_rng(seed)
    untold = []
    for _ in range(2 * BATCHES):
        batch = pool.draw(rng, SESSIONS, _STAGE)
        untold.append(_known(config, weights, batch, embedding)[~batch.known])
    seen = torch.cat(untold)
    if not len(seen):
        return config
    knows = float(seen.quantile(1.0 - INVENTED))
    return replace(config, knows=round(knows, 4))


def _known(
    config: RecallConfig, weights: recall.Weights, batch: Drawn, embedding: Tensor
) -> Tensor:
    matrix, _, _ = remember(config, weights, batch, embedding)
    context = config.behind + config.ahead
    found = recall.read(
        weights,
        matrix[batch.session],
        batch.around[:, context - 1 :],
        F.linear(batch.around, weights.context),
        batch.around_valid,
    )
    return recall.likeness(weights, found.read[:, 0], embedding, embedding)
