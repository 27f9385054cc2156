"""Everything a session is to the model: context and memory, as immutable values.

Axes: L blocks, K key heads, n tokens of a piece, N head width.

The context is a row of `Piece`s, one a turn, that reach back as far as attention or a pending
chunk can still look; extending it shares the old pieces, so that the state before a turn stays
whole (rollback is forgetting the new one) and a turn stores only its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hope_runtime.cadence import Due, horizon
from hope_runtime.config import HopeConfig
from hope_runtime.layers.cms import Deltas


class StateError(ValueError):
    """A stored state that does not fit the model; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens as read: ids, loss weights, keys and values, inputs of the levels."""

    start: int
    tokens: Tensor  # [n] int64
    weights: Tensor  # [n] float32: how much the token counts as a target of learning
    keys: Tensor  # [L, K, n, N] before rotation
    values: Tensor  # [L, K, n, N]
    inputs: Tensor  # [n, width], what entered the first block that learns

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def cut(self, start: int, end: int) -> Piece:
        """Return the part of the piece in [start, end)."""
        part = slice(max(start - self.start, 0), max(end - self.start, 0))
        return Piece(
            max(start, self.start),
            self.tokens[part],
            self.weights[part],
            self.keys[:, :, part],
            self.values[:, :, part],
            self.inputs[part],
        )


@dataclass(frozen=True, slots=True)
class LevelState:
    """One level of a session's slow memory, and the facts of its last consolidation."""

    delta: Deltas = field(default_factory=dict)  # float32, by tensor name; empty: never moved
    updates: int = 0
    position: int | None = None  # end of the last chunk that was consolidated
    loss: float | None = None  # nats per learnable token of that chunk, before the update
    outcome: str | None = None
    movement: float = 0.0  # ||delta|| / ||base||


@dataclass(frozen=True, slots=True)
class State:
    """A session between two tokens."""

    position: int = 0  # tokens read so far
    sinks: Piece | None = None  # the session's first tokens, kept for ever
    pieces: tuple[Piece, ...] = ()
    carry: tuple[tuple[int, float], ...] = ()  # said but not yet read: (token, loss weight)
    due: tuple[Due, ...] = ()  # chunks complete but not yet consolidated, in order
    levels: Mapping[str, LevelState] = field(default_factory=dict)

    @property
    def deltas(self) -> Deltas:
        """All levels' deltas by tensor name."""
        return {name: d for level in self.levels.values() for name, d in level.delta.items()}

    @property
    def bytes(self) -> int:
        pieces = [*self.pieces, self.sinks] if self.sinks else self.pieces
        held = [*self.deltas.values()]
        for piece in pieces:
            held += [piece.keys, piece.values, piece.inputs, piece.tokens, piece.weights]
        return sum(int(tensor.nbytes) for tensor in held)


def join(pieces: Sequence[Piece]) -> Piece:
    """Return consecutive pieces as one."""
    return Piece(
        pieces[0].start,
        torch.cat([p.tokens for p in pieces]),
        torch.cat([p.weights for p in pieces]),
        torch.cat([p.keys for p in pieces], 2),
        torch.cat([p.values for p in pieces], 2),
        torch.cat([p.inputs for p in pieces]),
    )


def between(pieces: Iterable[Piece], start: int, end: int) -> list[Piece]:
    """Return the parts of `pieces` that lie in [start, end)."""
    return [p.cut(start, end) for p in pieces if p.start < end and p.end > start]


def extend(state: State, piece: Piece, config: HopeConfig) -> State:
    """Return the state after reading `piece`; `trim` it once its due chunks are known."""
    if piece.start != state.position:
        raise ValueError(f"piece starts at {piece.start}, the session is at {state.position}")
    sinks = state.sinks
    if piece.start < config.sinks:
        first = between([piece], 0, config.sinks)
        sinks = join([sinks, *first] if sinks else first)
    return replace(state, position=piece.end, sinks=sinks, pieces=(*state.pieces, piece))


def trim(state: State, config: HopeConfig) -> State:
    """Drop the pieces that neither the window nor a pending chunk can reach."""
    oldest = horizon(state.position, state.due, config)
    return replace(state, pieces=tuple(p for p in state.pieces if p.end > oldest))


def compact(state: State, since: int, config: HopeConfig) -> State:
    """Join the pieces read since position `since` into one: a turn is stored as one piece."""
    oldest = horizon(state.position, state.due, config)
    old = tuple(p for p in state.pieces if p.start < since)
    new = between([p for p in state.pieces if p.start >= since], oldest, state.position)
    return replace(state, pieces=(*old, join(new)) if new else old)


# --- at rest ----------------------------------------------------------------------------------

FORMAT = 1


def piece_name(piece: Piece) -> str:
    return f"window/{piece.start:012d}-{piece.end:012d}"


def dump(state: State, stored: State | None) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """Return small facts, new blobs, and the names of blobs already `stored` and still in use."""
    held: dict[str, object] = {}
    if stored is not None:
        held = {piece_name(p): p for p in stored.pieces}
        held |= {"sinks": stored.sinks}
        held |= {f"level/{name}": level.delta for name, level in stored.levels.items()}
    put: dict[str, bytes] = {}
    keep: set[str] = set()

    def place(name: str, value: object, tensors: Mapping[str, Tensor]) -> None:
        if name in held and held[name] is value:
            keep.add(name)
        else:
            put[name] = save_tensors({k: t.contiguous().cpu() for k, t in tensors.items()})

    if state.sinks is not None:
        place("sinks", state.sinks, _tensors(state.sinks))
    for piece in state.pieces:
        place(piece_name(piece), piece, _tensors(piece))
    for name, level in state.levels.items():
        if level.delta:
            place(f"level/{name}", level.delta, level.delta)
    facts = {
        "format": FORMAT,
        "position": state.position,
        "pieces": [piece.start for piece in state.pieces],
        "carry": [list(item) for item in state.carry],
        "due": [[d.level, d.start, d.end] for d in state.due],
        "levels": {
            name: {
                "updates": level.updates,
                "position": level.position,
                "loss": level.loss,
                "outcome": level.outcome,
                "movement": level.movement,
            }
            for name, level in state.levels.items()
        },
    }
    return facts, put, keep


def restore(
    facts: Mapping[str, Any], blobs: Mapping[str, bytes], config: HopeConfig, dtype: torch.dtype
) -> State:
    """Return the state that `dump` wrote, checked against the model's shape.

    Raises:
        StateError: a blob is missing, unreadable, of the wrong shape, or not finite.
    """
    if facts.get("format") != FORMAT:
        raise StateError(f"state format {facts.get('format')!r} is not {FORMAT}")
    windows = {n: b for n, b in sorted(blobs.items()) if n.startswith("window/")}
    pieces = tuple(_piece(n, blob, config, dtype) for n, blob in windows.items())
    sinks = _piece("sinks", blobs["sinks"], config, dtype) if "sinks" in blobs else None
    position = int(facts["position"])
    due = tuple(Due(str(name), int(start), int(end)) for name, start, end in facts["due"])
    _check_row(pieces, sinks, [int(start) for start in facts["pieces"]], position, config)
    return State(
        position=position,
        sinks=sinks,
        pieces=pieces,
        carry=tuple((int(token), float(weight)) for token, weight in facts["carry"]),
        due=due,
        levels={
            name: LevelState(delta=_delta(name, blobs, config), **kept)
            for name, kept in facts["levels"].items()
        },
    )


def _tensors(piece: Piece) -> dict[str, Tensor]:
    return {
        "start": torch.tensor([piece.start]),
        "tokens": piece.tokens,
        "weights": piece.weights,
        "keys": piece.keys,
        "values": piece.values,
        "inputs": piece.inputs,
    }


def _load(name: str, blob: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(blob)
    except SafetensorError as error:
        raise StateError(f"blob {name!r} is not safetensors: {error}") from error


def _piece(name: str, blob: bytes, config: HopeConfig, dtype: torch.dtype) -> Piece:
    tensors = _load(name, blob)
    n = len(tensors["tokens"]) if "tokens" in tensors else 0
    kv = (config.blocks, config.key_heads, n, config.head_width)
    shapes = {
        "start": (1,),
        "tokens": (n,),
        "weights": (n,),
        "keys": kv,
        "values": kv,
        "inputs": (n, config.width),
    }
    for key, shape in shapes.items():
        if key not in tensors or tuple(tensors[key].shape) != shape:
            found = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise StateError(f"blob {name!r}: {key} should be {shape}, found {found}")
        if tensors[key].is_floating_point() and not bool(tensors[key].isfinite().all()):
            raise StateError(f"blob {name!r}: {key} is not finite")
    return Piece(
        start=int(tensors["start"]),
        tokens=tensors["tokens"].to(torch.int64),
        weights=tensors["weights"].float(),
        # a server in another precision reads the same session, in its own
        keys=tensors["keys"].to(dtype),
        values=tensors["values"].to(dtype),
        inputs=tensors["inputs"].to(dtype),
    )


def _delta(level: str, blobs: Mapping[str, bytes], config: HopeConfig) -> Deltas:
    name = f"level/{level}"
    known = {each.name: each for each in config.levels}
    if level not in known:
        raise StateError(f"the model has no level {level!r}; it has {sorted(known)}")
    if name not in blobs:
        return {}
    delta = _load(name, blobs[name])
    for key, shape in level_shapes(config, level).items():
        if key not in delta or tuple(delta[key].shape) != shape:
            raise StateError(f"blob {name!r}: {key} should be {shape}")
        if not bool(delta[key].isfinite().all()):
            raise StateError(f"blob {name!r}: {key} is not finite")
    return delta


def level_shapes(config: HopeConfig, level: str) -> dict[str, tuple[int, int]]:
    """Return the tensors of a level's delta by name."""
    blocks = next(each.blocks for each in config.levels if each.name == level)
    shapes: dict[str, tuple[int, int]] = {}
    for i in blocks:
        shapes[f"blocks.{i}.gate_up"] = (2 * config.hidden, config.width)
        shapes[f"blocks.{i}.down"] = (config.width, config.hidden)
    return shapes


def _check_row(
    pieces: Sequence[Piece],
    sinks: Piece | None,
    starts: list[int],
    position: int,
    config: HopeConfig,
) -> None:
    if [piece.start for piece in pieces] != starts:
        raise StateError(f"window pieces start at {[p.start for p in pieces]}, not at {starts}")
    ends = [piece.end for piece in pieces]
    if ends != [*starts[1:], position][: len(ends)] or (position and not pieces):
        raise StateError(f"window pieces end at {ends} and do not reach position {position}")
    if (0 if sinks is None else len(sinks.tokens)) != min(position, config.sinks):
        raise StateError("the session's first tokens (sinks) are missing")
