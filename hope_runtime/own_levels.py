"""Levels that a session has beyond the model's, or lacks: added and removed while it lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig, LevelConfig
from hope_runtime.layers.cms import Deltas
from hope_runtime.levels import LevelState, level_shapes
from hope_runtime.state import State, trim


def add_level(state: State, level: LevelConfig, config: HopeConfig) -> State:
    """Return the session with one level more, which is zero and changes no output bit.

    It learns from its first whole chunk on. It may take MLPs that are in no level of the session,
    in the blocks from the model's first that learns on: what enters lower ones is not kept.

    Raises:
        ConfigError: the session has such a level, or the model does not allow it.
    """
    if (lowest := min(level.blocks)) < config.first_level_block:
        raise ConfigError(
            f"level {level.name!r}: block {lowest} is below {config.first_level_block}, the first "
            "of this model whose inputs are kept to be learned from"
        )
    own = (*state.under(config).levels, level)
    replace(config, levels=own)  # looks at them together
    # what memories held was not marked at this position for a chunk that begins at the next
    new = LevelState(since=state.position + 1 if state.position else -1)
    return replace(state, own=own, levels={**state.levels, level.name: new})


def remove_level(state: State, name: str, config: HopeConfig, *, into: str | None = None) -> State:
    """Return the session without a level; what it learned is freed, or goes on in another level.

    `into` takes over the MLPs as they are, so that no output bit changes: they then move with its
    chunk, rate and retain. What its rule remembers begins anew, and its movement is told
    right after its next consolidation.

    Raises:
        ConfigError: there is no such level, or the two do not have MLPs of one kind.
    """
    levels = {level.name: level for level in state.under(config).levels}
    for known in (name, into):
        if known is not None and known not in levels:
            raise ConfigError(f"the session has no level {known!r}; it has {sorted(levels)}")
    gone = levels.pop(name)
    held = {other: kept for other, kept in state.levels.items() if other != name}
    if into is not None:
        if into == name or (gone.mlp, gone.rank) != (levels[into].mlp, levels[into].rank):
            raise ConfigError(
                f"level {into!r} cannot take over {name!r}: both need MLPs of the same place in "
                "the chain, and deltas of the same rank"
            )
        blocks = tuple(sorted((*levels[into].blocks, *gone.blocks)))
        levels[into] = replace(levels[into], blocks=blocks)
        ours = replace(config, levels=tuple(levels.values()))
        both = state.levels.get(name, LevelState()), state.levels.get(into, LevelState())
        shapes = level_shapes(ours, into)
        delta = _together(both[0].delta, both[1].delta, shapes)
        start = _together(both[0].start, both[1].start, shapes)
        held[into] = replace(both[1], delta=delta, start=start, moments=None)
    replace(config, levels=tuple(levels.values()))
    due = tuple(each for each in state.due if each.level != name)
    return trim(replace(state, own=tuple(levels.values()), levels=held, due=due), config)


def _together(one: Deltas, other: Deltas, shapes: Mapping[str, tuple[int, ...]]) -> Deltas:
    """Return the tensors of two levels as one's; what neither has moved is zero."""
    if not one and not other:
        return {}
    both: dict[str, Tensor] = {**one, **other}
    return {key: both[key] if key in both else torch.zeros(s) for key, s in shapes.items()}
