"""How far two states of a session are apart, level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_runtime.state import State


@dataclass(frozen=True, slots=True)
class Apart:
    """Frobenius norms over all tensors of one part of two states."""

    name: str  # of a level; "memory" for the fast memory, "facts" for a memory layer's
    before: float
    after: float
    distance: float


def differences(before: State, after: State) -> list[Apart]:
    """Compare every level that either state has, and the fast memory where there is one.

    What a state does not have is zero there: a level that never consolidated, a memory that has
    read nothing.
    """
    names = sorted(before.levels.keys() | after.levels.keys())
    parts = [(name, _level(before, name), _level(after, name)) for name in names]
    if before.memories is not None or after.memories is not None:
        parts.append(("memory", _memory(before), _memory(after)))
    if before.facts is not None or after.facts is not None:
        parts.append(("facts", _facts(before), _facts(after)))
    return [
        Apart(name, _norm(one), _norm(other), _norm(_minus(other, one)))
        for name, one, other in parts
    ]


def _level(state: State, name: str) -> dict[str, Tensor]:
    """Return a level's delta as whole matrices, whatever form it is kept in."""
    level = state.levels.get(name)
    held = {} if level is None else level.delta
    whole: dict[str, Tensor] = {}
    for key, tensor in held.items():
        stem, _, side = key.rpartition(".")
        if side == "left":
            whole[stem] = tensor @ held[f"{stem}.right"]
        elif side != "right":
            whole[key] = tensor
    return whole


def _memory(state: State) -> dict[str, Tensor]:
    return {} if state.memories is None else dict(state.memories._asdict())


def _facts(state: State) -> dict[str, Tensor]:
    return {} if state.facts is None else {"matrix": state.facts.matrix}


def _minus(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shared = {key: tensor - other[key] for key, tensor in one.items() if key in other}
    alone = {key: tensor for held in (one, other) for key, tensor in held.items()}
    return {**alone, **shared}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.float())) for t in tensors.values()))
