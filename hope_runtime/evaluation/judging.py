"""What a trained model makes of a probe, read from the first token on as a session would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.evaluation.drawn import Drawn
from hope_runtime.evaluation.languages import LEAST
from hope_runtime.evaluation.tasks import Measure, Probe
from hope_runtime.layers.attention import Past
from hope_runtime.model import Hope, Read

_PIECE = 512  # tokens of one pass


class Found(NamedTuple):
    """What a probe gave: a share or bits, and of how many answers, strings or bytes."""

    value: float
    counted: int


@torch.no_grad()
def judge(model: Hope, probe: Probe, measure: Measure, chance: np.random.Generator) -> Found:
    """Put a probe to a model."""
    drawn = probe.draw(chance, probe.rows)
    right, total = 0.0, 0
    for start, logits in _passes(model, torch.from_numpy(drawn.tokens[:, :-1])):
        here = slice(start + 1, start + 1 + logits.shape[1])
        targets = torch.from_numpy(drawn.tokens[:, here])
        scored = torch.from_numpy(drawn.scored[:, here])
        match measure:
            case Measure.ANSWERS:
                right += int(((logits.argmax(-1) == targets) & scored).sum())
                total += int(scored.sum())
            case Measure.BITS:
                nats = F.cross_entropy(logits.mT, targets, reduction="none")
                right += float(nats[scored].sum()) / np.log(2.0)
                total += int(scored.sum())
            case Measure.STRINGS:
                assert start == 0, "strings are read in one pass"
                return strings(logits, drawn)
    return Found(right / total, total)


def strings(logits: Tensor, drawn: Drawn) -> Found:
    """Return the share of strings with the right set of symbols at every place."""
    assert drawn.legal is not None
    likely = logits.softmax(-1).numpy() > LEAST
    same = (likely == drawn.legal[:, 1:]).all(-1) | ~drawn.scored[:, 1:]
    return Found(float(same.all(-1).mean()), len(same))


def _passes(model: Hope, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the start of each piece of the rows, and the logits after each of its tokens."""
    past, rows = model.nothing(len(tokens)), len(tokens)
    none = [dict[str, Tensor]()] * rows
    for start in range(0, tokens.shape[1], _PIECE):
        piece = tokens[:, start : start + _PIECE]
        at = torch.full((rows,), start)
        read = model.run(model.embed(piece), at, past, none)
        past = _joined(past, read, at)
        yield start, model.logits(read.hidden)


def _joined(past: Past, read: Read, start: Tensor) -> Past:
    positions = start[:, None] + torch.arange(read.hidden.shape[1])
    return Past(
        torch.cat([past.rotated, read.rotated], 3),
        torch.cat([past.values, read.values], 3),
        torch.cat([past.positions, positions], 1),
        read.memories,
    )
