"""Everything a session is to the model: context and memory, as immutable values.

Axes: L attention blocks, K key heads, n tokens of a piece, N head width.

The fast memory is what the memory blocks hold after the last token. The context is a row of
`Piece`s, one a turn, that reach back as far as attention or a pending chunk can still
look; extending it shares the old pieces, so that the state before a turn stays
whole (rollback is forgetting the new one) and a turn stores only its own tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import dropwhile, islice, pairwise, takewhile
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from hope_runtime.blobs import StateError, read, take
from hope_runtime.cadence import Due, horizon, marked
from hope_runtime.config import HopeConfig, LevelConfig
from hope_runtime.layers import memory
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories
from hope_runtime.levels import LevelState, facts_of, restored


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
class Mark:
    """What the memories of the blocks that learn held at a position, for a chunk's gradient."""

    position: int
    memories: Memories


@dataclass(frozen=True, slots=True)
class State:
    """A session between two tokens."""

    position: int = 0  # tokens read so far
    sinks: Piece | None = None  # the session's first tokens, kept for ever
    pieces: tuple[Piece, ...] = ()
    carry: tuple[tuple[int, float], ...] = ()  # said but not yet read: (token, loss weight)
    due: tuple[Due, ...] = ()  # chunks complete but not yet consolidated, in order
    levels: Mapping[str, LevelState] = field(default_factory=dict)
    memories: Memories | None = None  # of the memory blocks, [blocks, ...]; None: nothing read
    marks: tuple[Mark, ...] = ()  # where chunks that are begun or due start, in order
    own: tuple[LevelConfig, ...] | None = None  # the session's levels; None: the model's

    def under(self, config: HopeConfig) -> HopeConfig:
        """Return the model's configuration with this session's levels.

        Which block learns first stays the model's, since what enters it is what is kept of tokens.
        """
        return config if self.own is None else replace(config, levels=self.own)

    @property
    def deltas(self) -> Deltas:
        """All levels' deltas by tensor name."""
        return {name: d for level in self.levels.values() for name, d in level.delta.items()}

    @property
    def memory_bytes(self) -> int:
        """The size of what the memory blocks hold, marks included."""
        held = [self.memories, *(mark.memories for mark in self.marks)]
        return sum(int(tensor.nbytes) for memories in held for tensor in memories or ())

    @property
    def bytes(self) -> int:
        pieces = [*self.pieces, self.sinks] if self.sinks else self.pieces
        held: list[Tensor] = []
        for piece in pieces:
            held += [piece.keys, piece.values, piece.inputs, piece.tokens, piece.weights]
        levels = sum(level.bytes for level in self.levels.values())
        return self.memory_bytes + levels + sum(int(tensor.nbytes) for tensor in held)


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


def between(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """Return the parts of `pieces`, which lie in order, that are in [start, end)."""
    first = bisect_right(pieces, start, key=lambda piece: piece.end)
    found = takewhile(lambda piece: piece.start < end, islice(pieces, first, None))
    return [piece.cut(start, end) for piece in found]


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
    """Drop the pieces that neither the window nor a pending chunk can reach, and idle marks."""
    config = state.under(config)
    oldest = horizon(state.position, state.due, config)
    pieces = dropwhile(lambda piece: piece.end <= oldest, state.pieces)  # they lie in order
    needed = marked(state.position, state.due, config)
    marks = tuple(mark for mark in state.marks if mark.position in needed)
    return replace(state, pieces=tuple(pieces), marks=marks)


def compact(state: State, since: int, config: HopeConfig) -> State:
    """Join the pieces read since position `since` into one: a turn is stored as one piece."""
    oldest = horizon(state.position, state.due, state.under(config))
    old = tuple(p for p in state.pieces if p.start < since)
    new = between([p for p in state.pieces if p.start >= since], oldest, state.position)
    return replace(state, pieces=(*old, join(new)) if new else old)


# --- at rest ----------------------------------------------------------------------------------

FORMAT = 1


def mark_name(position: int) -> str:
    return f"mark/{position:012d}"


def piece_name(start: int, end: int) -> str:
    return f"window/{start:012d}-{end:012d}"


def dump(state: State, stored: State | None) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """Return small facts, new blobs, and the names of blobs already `stored` and still in use."""
    held: dict[str, object] = {}
    if stored is not None:
        held = {piece_name(p.start, p.end): p for p in stored.pieces}
        held |= {"sinks": stored.sinks}
        held |= {f"level/{name}": level.delta for name, level in stored.levels.items()}
        held |= {"memory": stored.memories}
        held |= {mark_name(mark.position): mark for mark in stored.marks}
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
        place(piece_name(piece.start, piece.end), piece, _tensors(piece))
    for name, level in state.levels.items():
        if tensors := level.tensors:  # start and moments change with the delta only
            place(f"level/{name}", level.delta, tensors)
    if state.memories is not None:
        place("memory", state.memories, state.memories._asdict())
    for mark in state.marks:
        place(mark_name(mark.position), mark, mark.memories._asdict())
    facts = {
        "format": FORMAT,
        "position": state.position,
        "pieces": [piece.start for piece in state.pieces],
        "carry": [list(item) for item in state.carry],
        "due": [[d.level, d.start, d.end] for d in state.due],
        "marks": [mark.position for mark in state.marks],
        "levels": {name: facts_of(level) for name, level in state.levels.items()},
    }
    if state.own is not None:
        facts["own"] = [asdict(level) for level in state.own]
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
    position = int(facts["position"])
    ends = [*(int(start) for start in facts["pieces"]), position]
    if position and len(ends) == 1:
        raise StateError(f"a session at position {position} has no window")
    own = _own(facts["own"], config) if "own" in facts else None
    ours = config if own is None else replace(config, levels=own)
    first = min(position, config.sinks)
    due = tuple(Due(str(name), int(start), int(end)) for name, start, end in facts["due"])
    marks = [int(at) for at in facts.get("marks", ())]
    since = {name: int(kept.get("since", -1)) for name, kept in facts["levels"].items()}
    if missing := marked(position, due, ours, since).difference(marks):
        raise StateError(f"a session at position {position} has no {mark_name(min(missing))!r}")
    remembering = bool(config.memory_blocks) and position > 0
    learning = sum(i >= config.first_level_block for i in config.memory_blocks)
    return State(
        position=position,
        sinks=_piece("sinks", blobs, 0, first, config, dtype) if first else None,
        pieces=tuple(
            _piece(piece_name(start, end), blobs, start, end, config, dtype)
            for start, end in pairwise(ends)
        ),
        carry=tuple((int(token), float(weight)) for token, weight in facts["carry"]),
        due=due,
        levels={
            name: restored(name, blobs, ours, **kept) for name, kept in facts["levels"].items()
        },
        memories=(
            _memories("memory", blobs, len(config.memory_blocks), config, dtype)
            if remembering
            else None
        ),
        marks=tuple(
            Mark(at, _memories(mark_name(at), blobs, learning, config, dtype)) for at in marks
        ),
        own=own,
    )


def _own(levels: Sequence[Mapping[str, Any]], config: HopeConfig) -> tuple[LevelConfig, ...]:
    """Return the levels that a session has in place of the model's."""
    try:
        own = tuple(map(LevelConfig.from_json, levels))
        replace(config, levels=own)
    except (TypeError, KeyError, ValueError) as error:
        raise StateError(f"the session's own levels do not suit the model: {error}") from error
    return own


def _tensors(piece: Piece) -> dict[str, Tensor]:
    return {
        "start": torch.tensor([piece.start]),
        "tokens": piece.tokens,
        "weights": piece.weights,
        "keys": piece.keys,
        "values": piece.values,
        "inputs": piece.inputs,
    }


def _piece(
    name: str,
    blobs: Mapping[str, bytes],
    start: int,
    end: int,
    config: HopeConfig,
    dtype: torch.dtype,
) -> Piece:
    """Return the piece that holds positions [start, end)."""
    tensors = read(name, blobs)
    n = end - start
    kv = (len(config.attention_blocks), config.key_heads, n, config.head_width)
    if int(take(name, tensors, "start", (1,))) != start:
        raise StateError(f"blob {name!r} does not start at {start}")
    tokens = take(name, tensors, "tokens", (n,)).to(torch.int64)
    if bool(((tokens < 0) | (tokens >= config.vocabulary)).any()):
        raise StateError(f"blob {name!r}: tokens are not all of the vocabulary")
    return Piece(
        start=start,
        tokens=tokens,
        weights=take(name, tensors, "weights", (n,)).float(),
        # a server in another precision reads the same session, in its own
        keys=take(name, tensors, "keys", kv).to(dtype),
        values=take(name, tensors, "values", kv).to(dtype),
        inputs=take(name, tensors, "inputs", (n, config.width)).to(dtype),
    )


def _memories(
    name: str, blobs: Mapping[str, bytes], blocks: int, config: HopeConfig, dtype: torch.dtype
) -> Memories:
    """Return what `blocks` memory blocks held."""
    if config.memory is None:
        raise StateError(f"blob {name!r}: the model has no memories")
    tensors = read(name, blobs)
    empty = memory.empty(config.memory, blocks, torch.empty(0, dtype=dtype))
    return Memories(
        *(
            take(name, tensors, key, tuple(like.shape)).to(like.dtype)
            for key, like in empty._asdict().items()
        )
    )
