"""What a frozen base makes of conversations, computed once and kept for all of training.

Axes: n tokens of all conversations together, Z whitened features, r tokens that lie in replies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hope_runtime.config import RecallConfig
from hope_runtime.layers import recall
from hope_runtime.model import Hope, norm
from hope_runtime.training.told.turns import Plan, Said, Turn, What

# tokens of the conversations that are read together, the shorter ones filled up
BATCH = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Features:
    """Conversations, one after the other."""

    seen: Tensor  # [n, Z] float16; like `hidden` on the device of training, the rest on the CPU
    tokens: Tensor  # [n] int64
    stated: Tensor  # [n] bool
    since: Tensor  # [n] int64: where the token's conversation starts
    turns: tuple[Turn, ...]  # places in these arrays
    replies: Tensor  # [n] int64: row of `hidden`, or -1
    hidden: Tensor  # [r, width]: normed last hidden states, where replies to an ASK are said

    def save(self, file: Path) -> None:
        """Write everything to one file."""
        turns = [[asdict(t.plan), t.start, t.asked, t.end, t.first, t.last] for t in self.turns]
        names = ("seen", "tokens", "stated", "since", "replies", "hidden")
        save_file(
            {name: getattr(self, name).contiguous() for name in names},
            file,
            {"turns": json.dumps(turns)},
        )

    @classmethod
    def load(cls, file: Path) -> Features:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            rows = json.loads(opened.metadata()["turns"])
        turns = tuple(
            Turn(Plan(**{**plan, "what": What(plan["what"])}), *places) for plan, *places in rows
        )
        return cls(turns=turns, **load_file(file))

    def on(self, device: torch.device) -> Features:
        """Return them with what is large on a device."""
        return replace(self, seen=self.seen.to(device), hidden=self.hidden.to(device))

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Return several as one."""
        turns: list[Turn] = []
        since, replies = [], []
        tokens = rows = 0
        for part in parts:
            turns += [moved(turn, tokens) for turn in part.turns]
            since.append(part.since + tokens)
            replies.append(torch.where(part.replies >= 0, part.replies + rows, -1))
            tokens += len(part.tokens)
            rows += len(part.hidden)
        return cls(
            seen=torch.cat([part.seen for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
            stated=torch.cat([part.stated for part in parts]),
            since=torch.cat(since),
            turns=tuple(turns),
            replies=torch.cat(replies),
            hidden=torch.cat([part.hidden for part in parts]),
        )


def moved(turn: Turn, by: int) -> Turn:
    """Return a turn whose conversation starts later."""
    inside = turn.first >= 0
    return replace(
        turn,
        start=turn.start + by,
        asked=turn.asked + by,
        end=turn.end + by,
        first=turn.first + by if inside else -1,
        last=turn.last + by if inside else -1,
    )


def lower(model: Hope, config: RecallConfig) -> Hope:
    """Return the part of a model that a memory layer sees, which costs less than the whole."""
    part = copy(model)
    blocks = max(config.taps) + 1
    part.config = replace(model.config, blocks=blocks, levels=(), recall=config)
    part.blocks = model.blocks[:blocks]
    return part


@torch.no_grad()
def tapped(model: Hope, said: Sequence[Said]) -> tuple[Tensor, Tensor]:
    """Return what the seen blocks, and the last one, made of all conversations' tokens, [n, F]."""
    longest = max(len(one.tokens) for one in said)
    ids = torch.zeros(len(said), longest, dtype=torch.int64)
    there = torch.zeros(len(said), longest, dtype=torch.bool)
    for row, one in enumerate(said):
        ids[row, : len(one.tokens)] = torch.from_numpy(one.tokens)
        there[row, : len(one.tokens)] = True
    ids, there = ids.to(model.device), there.to(model.device)
    start = torch.zeros(len(said), dtype=torch.int64, device=model.device)
    read = model.run(model.embed(ids), start, model.nothing(len(said)), [{}] * len(said))
    assert read.tapped is not None
    return read.tapped[there], read.hidden[there]


def gather(
    model: Hope,
    weights: recall.Weights,
    said: Sequence[Said],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Features:
    """Let a model read conversations; those without a question are read by its lower part only."""
    config = model.config.recall
    assert config is not None
    below = lower(model, config)
    order = sorted(range(len(said)), key=lambda i: (_asks(said[i]), len(said[i].tokens)))
    parts = []
    most = BATCH.get(model.device.type, BATCH["cpu"])
    for batch in _batches([said[i] for i in order], most):
        asking = _asks(batch[0])
        seen, last = tapped(model if asking else below, batch)
        parts.append(_features(model, weights, batch, seen, last if asking else None))
        progress(sum(len(one.tokens) for one in batch))
    return Features.join(parts)


def _asks(said: Said) -> bool:
    return any(turn.plan.what is What.ASK for turn in said.turns)


def _batches(said: Sequence[Said], most: int) -> Iterable[list[Said]]:
    batch: list[Said] = []
    for one in said:
        full = (len(batch) + 1) * len(one.tokens) > most  # they come in the order of their lengths
        if batch and (full or _asks(one) != _asks(batch[0])):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _features(
    model: Hope, weights: recall.Weights, batch: Sequence[Said], seen: Tensor, last: Tensor | None
) -> Features:
    tokens = torch.from_numpy(np.concatenate([one.tokens for one in batch]))
    whitened = recall.whitened(weights, seen, model.embed(tokens.to(model.device)))
    lengths = torch.tensor([len(one.tokens) for one in batch])
    starts = lengths.cumsum(0) - lengths
    turns = tuple(
        moved(turn, start)
        for one, start in zip(batch, starts.tolist(), strict=True)
        for turn in one.turns
    )
    replies = torch.full((len(tokens),), -1)
    if last is None:
        hidden = torch.zeros(0, model.config.width, dtype=torch.bfloat16)
    else:
        asked = [turn for turn in turns if turn.plan.what is What.ASK]
        kept = torch.from_numpy(
            np.concatenate([np.arange(turn.asked, turn.end - 1) for turn in asked])
        )
        replies[kept] = torch.arange(len(kept))
        normed = norm(last[kept.to(last.device)], model.norm, model.config.norm_eps)
        hidden = normed.to("cpu", torch.bfloat16)
    return Features(
        seen=whitened.to("cpu", torch.float16),
        tokens=tokens,
        stated=torch.from_numpy(np.concatenate([one.stated for one in batch])),
        since=starts.repeat_interleave(lengths),
        turns=turns,
        replies=replies,
        hidden=hidden,
    )
