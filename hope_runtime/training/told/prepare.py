"""From kinds of facts, chats and a base model to features, in shards that are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hope_runtime.config import HopeConfig, RecallConfig
from hope_runtime.layers import recall
from hope_runtime.model import Hope
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.training.corpora import Chat
from hope_runtime.training.told import Kind
from hope_runtime.training.told.features import Features, gather, lower, tapped
from hope_runtime.training.told.learn import initial
from hope_runtime.training.told.turns import Plan, Said, What, conversations, plan

LENGTH = 480  # tokens of a conversation
SAMPLE = 100  # conversations to whiten by
# share of what is said that opens a conversation and is all of it
ASKS_ALONE, TELLS_ALONE, TALK_ALONE = 0.6, 0.2, 0.5
CHATS = 900  # turns of a shard that other people had


def config_for(base: HopeConfig) -> RecallConfig:
    """Return the configuration that suits a base: it sees the last block below every level.

    And one two thirds of the way up to it. The later a block, the nearer is what it makes of a
    question to what it makes of the answer (docs/decisions/0024-what-the-memory-layer-sees.md).
    A base that is narrower than the layer's usual width gets a narrower layer.

    >>> from hope_runtime.weights.random import tiny_config
    >>> config = config_for(tiny_config())
    >>> config.taps, config.whitened, config.keys
    ((0, 1), 96, 96)
    """
    levels = base if base.levels else base.stacked()
    upper = max(levels.first_level_block - 1, 1)
    own = min(128, base.width)
    whitened = own + min(512, 2 * base.width)
    return RecallConfig(
        taps=(min(round(upper * 2 / 3), upper - 1), upper),
        whitened=whitened,
        own=own,
        attention=min(512, 8 * base.width),
        keys=min(512, whitened),
        values=min(256, base.width),
    )


def talk() -> list[str]:
    """Return what people say to an assistant that is no fact of theirs and asks for none."""
    lines = (Path(__file__).parent / "talk.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def shard(
    index: int, kinds: Sequence[Kind], chats: Sequence[Chat], tokenizer: Tokenizer, seed: int
) -> list[Said]:
    """Return the conversations of one shard: every way to say everything, with other values."""
    rng = np.random.default_rng([seed, index])
    plans = plan(rng, kinds, 1)
    idle = [Plan(What.TALK, text, "Sure, let me think about that.") for text in talk()]
    asks = [one for one in plans if one.what is What.ASK]
    tells = [one for one in plans if one.what is not What.ASK]
    found = []
    for some, alone in ((asks, ASKS_ALONE), (tells, TELLS_ALONE), (idle, TALK_ALONE)):
        cut = round(alone * len(some))
        order = [some[i] for i in rng.permutation(len(some))]
        found += list(conversations(rng, order[:cut], tokenizer, 0))
        found += list(conversations(rng, order[cut:], tokenizer, LENGTH))
    for one in _excerpts(rng, chats):
        found += conversations(rng, one, tokenizer, LENGTH)
    return found


def _excerpts(rng: np.random.Generator, chats: Sequence[Chat]) -> Iterator[list[Plan]]:
    left = CHATS
    while left > 0:
        chat = chats[int(rng.integers(len(chats)))]
        plans = [
            Plan(What.TALK, said.text, heard.text)
            for said, heard in zip(chat[::2], chat[1::2], strict=False)
        ][:8]
        if plans:
            yield plans
            left -= len(plans)


def first_layer(
    model: Hope, config: RecallConfig, said: Sequence[Said], tokenizer: Tokenizer, seed: int
) -> recall.Weights:
    """Return a layer that was not trained, whitened by some conversations."""
    rng = np.random.default_rng(seed)
    some = [said[i] for i in rng.permutation(len(said))[:SAMPLE]]
    below = lower(model, config)
    rows: list[Tensor] = [tapped(below, [one])[0] for one in some]
    decoded = [tokenizer.decode([id]) for id in range(model.config.vocabulary)]
    sample = torch.cat(rows).float().cpu()
    return initial(config, sample, model.embedding.float().cpu(), decoded, seed)


def gathered(
    model: Hope,
    layer: recall.Weights,
    said: Sequence[Said],
    file: Path,
    progress: Callable[[int], None],
) -> Features:
    """Return a shard's features: those of the file, or new ones that are written there."""
    if file.exists():
        return Features.load(file)
    assert model.config.recall is not None
    found = gather(model, layer, said, progress)
    draft = file.with_suffix(".draft")
    found.save(draft)
    draft.replace(file)
    return found


def seen_by(model: Hope, config: RecallConfig) -> Hope:
    """Return the base so that it tells what the layer sees."""
    twin = copy(model)
    twin.config = replace(model.config, recall=config)
    return twin
