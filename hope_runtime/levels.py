"""One level of a session: what it holds, by which names, and how that is kept at rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hope_runtime import blobs
from hope_runtime.blobs import StateError
from hope_runtime.config import HopeConfig, LevelConfig
from hope_runtime.layers.cms import Deltas, mlp_name
from hope_runtime.ops import optimisers
from hope_runtime.ops.optimisers import OptimiserState
from hope_runtime.storage import Form, packed, rounded


@dataclass(frozen=True, slots=True)
class LevelState:
    """One level of a session's slow memory, and the facts of its last consolidation."""

    delta: Deltas = field(default_factory=dict)  # float32, by tensor name; empty: at the base
    updates: int = 0
    position: int | None = None  # end of the last chunk that was consolidated
    loss: float | None = None  # nats per learnable token of that chunk, before the update
    outcome: str | None = None
    movement: float = 0.0  # ||delta|| / ||base||
    start: Deltas = field(default_factory=dict)  # what a nested level begins again from
    moments: OptimiserState | None = None  # of rules that remember; None: at their own start
    usual: float | None = None  # the running mean of `loss`, where a gate looks at it
    since: int = -1  # chunks that begin at or before it were not seen whole and are not learned

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a level holds, by name: its delta's tensors, then `start/...`, `moments/...`."""
        held = {f"start/{name}": t for name, t in self.start.items()}
        if self.delta is not self.start:  # else it has just begun again
            held |= self.delta
        if self.moments is not None:
            flat = optimisers.flatten(self.moments)
            held |= {f"moments/{name}": t for name, t in flat.items()}
        return held

    def at_base(self) -> LevelState:
        """Return the level without what it learned; that it did, and when, stays known."""
        return replace(self, delta={}, start={}, moments=None, movement=0.0, usual=None)

    @property
    def bytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())


def level_of(config: HopeConfig, name: str) -> LevelConfig:
    """Return the level of that name."""
    return next(each for each in config.levels if each.name == name)


def matrices(config: HopeConfig, level: LevelConfig) -> dict[str, tuple[int, int]]:
    """Return the weights that a level learns, by the names of their deltas."""
    found: dict[str, tuple[int, int]] = {}
    for i in level.blocks:
        name = mlp_name(i, level.mlp)
        found[f"{name}.gate_up"] = (2 * config.hidden, config.width)
        found[f"{name}.down"] = (config.width, config.hidden)
    return found


def level_shapes(config: HopeConfig, level: str) -> dict[str, tuple[int, int]]:
    """Return the tensors of a level's delta by name: matrices, or two factors for each."""
    found = level_of(config, level)
    whole = matrices(config, found)
    if found.rank is None:
        return whole
    shapes: dict[str, tuple[int, int]] = {}
    for name, (out, into) in whole.items():
        rank = min(found.rank, out, into)
        shapes[f"{name}.left"] = (out, rank)
        shapes[f"{name}.right"] = (rank, into)
    return shapes


# --- at rest ----------------------------------------------------------------------------------


def settled(level: LevelState, form: Form) -> LevelState:
    """Return a level as it is once it was written with its delta in this form and read back.

    What a nested level begins again from is written as it is, and so is a delta that is just that.
    """
    if form is Form.FP32 or level.delta is level.start or not level.delta:
        return level
    return replace(level, delta={name: rounded(d, form) for name, d in level.delta.items()})


def written(level: LevelState, form: Form) -> dict[str, Tensor]:
    """Return a level's tensors as they are written, its delta in this form."""
    held = level.tensors
    if level.delta is not level.start:
        for name, delta in level.delta.items():
            held |= packed(name, delta, form)
    return held


def facts_of(level: LevelState) -> dict[str, Any]:
    """Return a level without its tensors; what few levels have is there only where it is."""
    facts: dict[str, Any] = {
        "updates": level.updates,
        "position": level.position,
        "loss": level.loss,
        "outcome": level.outcome,
        "movement": level.movement,
    }
    delta = None if level.delta is level.start else level.delta
    parts = {"delta": delta, "start": level.start, "moments": level.moments}
    if (held := [name for name, part in parts.items() if part]) != _usual_parts(level.updates):
        facts["parts"] = held
    if level.usual is not None:
        facts["usual"] = level.usual
    if level.since >= 0:
        facts["since"] = level.since
    return facts


def _usual_parts(updates: int) -> list[str]:
    return ["delta"] if updates else []


def restored(
    name: str,
    stored: Mapping[str, bytes],
    config: HopeConfig,
    parts: Sequence[str] | None = None,
    **kept: Any,
) -> LevelState:
    """Return a level from its facts and its blob."""
    known = sorted(each.name for each in config.levels)
    if name not in known:
        raise StateError(f"the model has no level {name!r}; it has {known}")
    held = _usual_parts(kept["updates"]) if parts is None else parts
    if not held:
        return LevelState(**kept)
    blob = f"level/{name}"
    tensors = blobs.read(blob, stored)
    shapes = level_shapes(config, name)

    def take(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        each = ((key, blobs.unpack(blob, tensors, prefix + key, s)) for key, s in shapes.items())
        return {key: tensor.float() for key, tensor in each}

    moments = None
    if "moments" in held:
        rule = optimisers.named(level_of(config, name).optimiser)
        like = rule.init({key: torch.zeros(shape) for key, shape in shapes.items()})
        flat = {key: tuple(t.shape) for key, t in optimisers.flatten(like).items() if key != "step"}
        step = blobs.take(blob, tensors, "moments/step", ()).to(torch.int64)
        moments = optimisers.restore({"step": step, **take("moments/", flat)})
    start = take("start/", shapes) if "start" in held else {}
    return LevelState(
        delta=take("", shapes) if "delta" in held else start,
        start=start,
        moments=moments,
        **kept,
    )
