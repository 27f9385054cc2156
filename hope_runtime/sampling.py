"""From logits to the next token: a pure function of logits, history, settings and a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CANDIDATES = 1024  # a nucleus is looked for here first; the whole vocabulary is sorted if it must
_COLDEST = 1e-6  # temperatures below it differ in nothing but overflow
_LARGEST = 1e30  # of a penalised logit


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn. `temperature` 0 is greedy, and then only the penalty matters."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


def generator(settings: Sampling) -> torch.Generator:
    """Return the reply's own source of randomness."""
    return torch.Generator().manual_seed(settings.seed)


def sample(
    logits: Tensor, history: Sequence[int], settings: Sampling, source: torch.Generator
) -> tuple[int, float]:
    """Draw a token; return it with its surprise in nats under the unmodified distribution.

    Args:
        logits: [vocabulary], float32.
        history: tokens that the repetition penalty looks at.
        settings: see `Sampling`.
        source: from `generator`; advanced by one draw.

    >>> sample(torch.tensor([0.0, 3.0, 1.0]), [], Sampling(temperature=0), torch.Generator())[0]
    1
    """
    logits = logits.float().cpu()
    scores = _penalise(logits, history, settings.repetition_penalty)
    token = int(scores.argmax()) if settings.temperature == 0 else _draw(scores, settings, source)
    return token, surprise(logits, token)


def surprise(logits: Tensor, token: int) -> float:
    """Return the nats that a token costs under logits [vocabulary].

    >>> round(surprise(torch.zeros(4), 2), 4)
    1.3863
    """
    return float(logits.logsumexp(-1) - logits[token])


def _penalise(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen (CTRL, arXiv 1909.05858)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(list(set(history)))
    found = logits[seen].double()
    changed = torch.where(found > 0, found / penalty, found * penalty).float()
    changed = changed.clamp(-_LARGEST, _LARGEST)  # of two infinities no difference can be taken
    return logits.index_copy(0, seen, changed)


def _draw(scores: Tensor, settings: Sampling, source: torch.Generator) -> int:
    scores = (scores - scores.max()) / max(settings.temperature, _COLDEST)
    total = scores.logsumexp(-1)
    for count in (max(_CANDIDATES, settings.top_k), len(scores)):
        values, tokens = scores.topk(min(count, len(scores)))
        shares = (values - total).exp()
        if settings.top_k:
            shares[settings.top_k :] = 0.0
            shares /= shares.sum()
            break
        if float(shares.sum()) >= settings.top_p:
            break
    before = shares.cumsum(0) - shares  # a token stays while those before it fall short of top_p
    keep = (before < settings.top_p) & (shares >= settings.min_p * shares[0])
    keep[0] = True
    return int(tokens[torch.multinomial(shares * keep, 1, generator=source)])
