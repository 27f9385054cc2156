"""How far a memory layer is: copying of held-out facts, and where it should say it does not know.

Judged with the answer's words given, so that it is quick; `hope eval memory` lets it speak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.layers import recall
from hope_runtime.layers.recall import NOTHING
from hope_runtime.training.told.drawing import VALUE, Drawn, Pool, Stage
from hope_runtime.training.told.learn import losses, meet, remember

INVENTED = 0.08  # share of what was never told that may be answered
FLOOR = 0.25  # of rates, once nothing is learned: less would only wear down what was told
BATCHES, SESSIONS = 4, 12
_STAGE = Stage(
    facts=(4, 4), filler=(4, 4), renamed=0.0, near=0.1, borrowed=0.0
)  # as people would ask
_MORE = replace(_STAGE, facts=(2, 16))


@dataclass(frozen=True, slots=True)
class Judged:
    """What a layer does with facts it was not trained on."""

    met: float  # share of questions that are more like their own fact than like any of many
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
    pairs = pool.pairs(rng, len(pool.kinds))
    chance = torch.Generator(embedding.device).manual_seed(seed)
    met = meet(config, weights, pairs, chance).found
    copied, loss = [], []
    told: list[Tensor] = []
    untold: list[Tensor] = []
    for _ in range(BATCHES):
        batch = pool.draw(rng, SESSIONS, _STAGE)
        found = losses(config, weights, batch, embedding, near, chance)
        copied.append(found.copied)
        loss.append(float(found.answers))
        _, known = _alike(config, weights, batch, embedding)
        told.append(known[batch.known])
        untold.append(known[~batch.known])
    ours, theirs = torch.cat(told), torch.cat(untold)
    apart = (ours[:, None] > theirs[None]).float().mean()
    return Judged(met, float(np.mean(copied)), float(np.mean(loss)), float(apart))


@torch.no_grad()
def calibrated(
    config: RecallConfig,
    weights: recall.Weights,
    pool: Pool,
    embedding: Tensor,
    decoded: Sequence[str],
    seed: int = 0,
) -> RecallConfig:
    """Return the configuration whose thresholds suit what a layer does with held-out facts.

    It answers eight of a hundred of what was never told (`INVENTED`). The answers that it does give
    end where the fewest end too soon or too late: by how much the likeliest token leads before a
    full stop; after a digit by how much more. `decoded` is the text of every token.
    """
    config = replace(config, floor=FLOOR)
    stop = decoded.index(".")
    number = torch.tensor([text[-1:].isdigit() for text in decoded], device=embedding.device)
    rng = np.random.default_rng(seed)
    untold: list[Tensor] = []
    places: list[Tensor] = []  # after a value's first token: lead, known, digit before, goes on
    for _ in range(6 * BATCHES):
        batch = pool.draw(rng, SESSIONS, _MORE)
        alike, known = _alike(config, weights, batch, embedding)
        untold.append(known[~batch.known])
        begun = torch.arange(batch.look.shape[1], device=known.device) > batch.first[:, None]
        here = begun & (batch.look != NOTHING) & batch.known[:, None]
        said = batch.target.roll(1, 1)[here]
        digit = number[said]
        ours, rows = alike[here], torch.arange(len(said), device=known.device)
        ours[rows[~digit], said[~digit]] = -1.0  # as when it is served: none is said twice
        logits = batch.hidden[here] @ embedding.T
        lead = recall.recalled(weights, logits, ours).amax(-1) - logits[:, stop]
        of = known[:, None].expand_as(here)[here]
        places.append(torch.stack([lead, of, digit, batch.look[here] == VALUE], 1))
    seen = torch.cat(untold)
    if not len(seen):
        return config
    knows = round(float(seen.quantile(1.0 - INVENTED)), 4)
    lead, known, digits, goes_on = torch.cat(places).unbind(1)
    words, numbers = (
        round(_between(lead[of & (goes_on == 0)], lead[of & (goes_on == 1)]), 4)
        for of in ((known > knows) & (digits == digit) for digit in (0, 1))
    )
    return replace(config, knows=knows, ends=words, digits=numbers)


def _between(low: Tensor, high: Tensor) -> float:
    """Return the threshold on whose wrong side the fewest lie, in the middle of where that is."""
    every = torch.cat([low, high]).sort().values
    if not len(every):
        return 0.0
    wrong = (low[None] >= every[:, None]).sum(1) + (high[None] < every[:, None]).sum(1)
    return float(every[wrong == wrong.min()].mean())


def _alike(
    config: RecallConfig, weights: recall.Weights, batch: Drawn, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how like every token's value what is read is, [Q, P, V], where it is looked at.

    And how `familiar` it is where replies begin, [Q].
    """
    matrix, _ = remember(config, weights, batch, embedding)
    matrix = matrix[batch.session]
    context = config.behind + config.ahead
    found = recall.read(
        weights,
        matrix,
        batch.around[:, context - 1 :],
        F.linear(batch.around, weights.context),
        batch.around_valid,
    )
    looked = batch.look != NOTHING
    codes = recall.values(weights, embedding)
    alike = found.read.new_full((*looked.shape, len(embedding)), torch.nan)
    alike[looked] = recall.likeness(found.read[looked], codes)
    return alike, recall.familiar(alike[:, 0], matrix, codes)
