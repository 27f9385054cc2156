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
from operator import is_
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from hope_runtime.blobs import StateError, read, take, unpack
from hope_runtime.cadence import Due, horizon, marked
from hope_runtime.config import HopeConfig, LevelConfig
from hope_runtime.layers import memory, recall
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories
from hope_runtime.layers.recall import Facts
from hope_runtime.levels import LevelState, facts_of, restored, settled, written
from hope_runtime.storage import EXACT, Form, Storage, packed, rounded


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
    facts: Facts | None = None  # of the memory layer, a batch of one; None: nothing read
    recall_digest: str = ""  # which layer wrote them

    def under(self, config: HopeConfig) -> HopeConfig:
        """Return the model's configuration with this session's levels.

        Which block learns first stays the model's, since what enters it is what is kept of tokens.
        """
        return config if self.own is None else replace(config, levels=self.own)

    def cleared(self, config: HopeConfig) -> State:
        """Return the session at the start of a new window: what memory holds, and nothing else.

        A chunk that was begun or waits to be learned goes with the window that it lies in, and so
        does what a level learned that does not last. Of models whose blocks remember there is
        nothing to clear that is not memory.
        """
        fleeting = {level.name for level in self.under(config).levels if not level.lasts}
        levels = {
            name: level.at_base() if name in fleeting else level
            for name, level in self.levels.items()
        }
        return State(
            levels=levels, own=self.own, facts=self.facts, recall_digest=self.recall_digest
        )

    @property
    def deltas(self) -> Deltas:
        """All levels' deltas by tensor name."""
        return {name: d for level in self.levels.values() for name, d in level.delta.items()}

    @property
    def memory_bytes(self) -> int:
        """The size of what the memory blocks, marks included, and the memory layer hold."""
        held = [self.memories, self.facts, *(mark.memories for mark in self.marks)]
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

FORMAT = 2
READABLE = (1, FORMAT)  # 1 wrote all numbers as they are; what it wrote reads as it did
MATRICES = ("live", "anchor", "velocity")  # of memories; the ring is context, and stays as it is


def mark_name(position: int) -> str:
    return f"mark/{position:012d}"


def piece_name(start: int, end: int) -> str:
    return f"window/{start:012d}-{end:012d}"


def level_name(name: str) -> str:
    return f"level/{name}"


def settle(state: State, since: State | None, storage: Storage) -> State:
    """Return the state as it is once stored: what `dump` will write anew is what will be read.

    Give `dump` the result, with the same `storage`, and let the session go on from it: then it
    makes no difference whether it stays or is read again. What did not change `since` the last
    commit stays the object it is, in whichever form it was written. Keys, values and all else
    that is no learned matrix is written as it is.
    """
    held, form = _named(since), storage.memory
    levels = {
        name: level
        if held.get(level_name(name)) is level.delta
        else settled(level, storage.level(name))
        for name, level in state.levels.items()
    }
    memories = state.memories
    if memories is not None and held.get("memory") is not memories:
        memories = _rounded(memories, form)
    facts = state.facts
    if facts is not None and held.get("facts") is not facts and form is not Form.FP32:
        facts = facts._replace(matrix=rounded(facts.matrix, form))
    # one at the end of what was read holds what the next token finds: both are rounded alike
    marks = tuple(
        mark if held.get(mark_name(mark.position)) is mark else _rounded_mark(mark, form)
        for mark in state.marks
    )
    before = (*state.levels.values(), state.memories, state.facts, *state.marks)
    if all(map(is_, before, (*levels.values(), memories, facts, *marks))):
        return state
    return replace(state, levels=levels, memories=memories, facts=facts, marks=marks)


def dump(
    state: State, stored: State | None, storage: Storage = EXACT
) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """Return small facts, new blobs, and the names of blobs already `stored` and still in use.

    What is in another form than fp32 should have been settled before.
    """
    held = _named(stored)
    put: dict[str, bytes] = {}
    keep: set[str] = set()

    def kept(name: str, value: object) -> bool:
        if held.get(name) is value:
            keep.add(name)
        return name in keep

    if state.sinks is not None and not kept("sinks", state.sinks):
        put["sinks"] = _blob(_tensors(state.sinks))
    for piece in state.pieces:
        if not kept(name := piece_name(piece.start, piece.end), piece):
            put[name] = _blob(_tensors(piece))
    for level, learned in state.levels.items():
        # start and moments change with the delta only
        if learned.tensors and not kept(name := level_name(level), learned.delta):
            put[name] = _blob(written(learned, storage.level(level)))
    if state.memories is not None and not kept("memory", state.memories):
        put["memory"] = _blob(_written(state.memories, storage.memory))
    if state.facts is not None and not kept("facts", state.facts):
        put["facts"] = _blob(_facts_written(state.facts, storage.memory))
    for mark in state.marks:
        if not kept(name := mark_name(mark.position), mark):
            put[name] = _blob(_written(mark.memories, storage.memory))
    facts = {
        "format": FORMAT,
        "position": state.position,
        "pieces": [piece.start for piece in state.pieces],
        "carry": [list(item) for item in state.carry],
        "due": [[d.level, d.start, d.end] for d in state.due],
        "marks": [mark.position for mark in state.marks],
        "levels": {name: facts_of(level) for name, level in state.levels.items()},
    }
    if state.facts is not None:
        facts["recall"] = state.recall_digest
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
    if facts.get("format") not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise StateError(f"state format {facts.get('format')!r} is not {known}")
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
        facts=_facts(blobs, facts["recall"], config) if "recall" in facts else None,
        recall_digest=facts.get("recall", ""),
    )


def _facts_written(facts: Facts, form: Form) -> dict[str, Tensor]:
    """Return what is written of a memory layer's state; the rest is made of it again."""
    tensors = {
        "recent": facts.recent,
        "tokens": facts.tokens,
        "stated": facts.stated.to(torch.uint8),
    }
    return tensors | packed("matrix", facts.matrix, form)


def _facts(blobs: Mapping[str, bytes], digest: str, config: HopeConfig) -> Facts:
    """Return what a memory layer holds, all but what a lane makes of it."""
    if config.recall is None:
        raise StateError(
            "the session holds facts of a memory layer, and this model has none; serve it with "
            "the layer that it was written by"
        )
    if digest not in (config.recall.digest, *config.recall.formerly):
        raise StateError(
            f"the session's facts were written by memory layer {digest!r}, and this model has "
            f"{config.recall.digest!r}; serve it with the layer that it was written by"
        )
    tensors = read("facts", blobs)
    like = recall.empty(1, config.recall, torch.empty(0))
    tokens = take("facts", tensors, "tokens", tuple(like.tokens.shape)).to(torch.int64)
    if bool(((tokens < recall.NOTHING) | (tokens >= config.vocabulary)).any()):
        raise StateError("blob 'facts': tokens are not all of the vocabulary")
    return like._replace(
        matrix=unpack("facts", tensors, "matrix", tuple(like.matrix.shape)).float(),
        recent=take("facts", tensors, "recent", tuple(like.recent.shape)).float(),
        tokens=tokens,
        stated=take("facts", tensors, "stated", tuple(like.stated.shape)).to(torch.bool),
    )


def _own(levels: Sequence[Mapping[str, Any]], config: HopeConfig) -> tuple[LevelConfig, ...]:
    """Return the levels that a session has in place of the model's."""
    try:
        own = tuple(map(LevelConfig.from_json, levels))
        replace(config, levels=own)
    except (TypeError, KeyError, ValueError) as error:
        raise StateError(f"the session's own levels do not suit the model: {error}") from error
    return own


def _named(state: State | None) -> dict[str, object]:
    """Return the parts of a stored state by the names of their blobs; a new object is a new one."""
    if state is None:
        return {}
    return {
        "sinks": state.sinks,
        "memory": state.memories,
        "facts": state.facts,
        **{piece_name(piece.start, piece.end): piece for piece in state.pieces},
        **{level_name(name): level.delta for name, level in state.levels.items()},
        **{mark_name(mark.position): mark for mark in state.marks},
    }


def _blob(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def _rounded(memories: Memories, form: Form) -> Memories:
    """Return what is read back of memories that are written in this form."""
    if form is Form.FP32:
        return memories
    return memories._replace(**{name: rounded(getattr(memories, name), form) for name in MATRICES})


def _rounded_mark(mark: Mark, form: Form) -> Mark:
    return mark if form is Form.FP32 else replace(mark, memories=_rounded(mark.memories, form))


def _written(memories: Memories, form: Form) -> dict[str, Tensor]:
    """Return the tensors of memories as they are written, their matrices in this form."""
    tensors = memories._asdict()
    for name in MATRICES:
        tensors |= packed(name, tensors[name], form)
    return tensors


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
            unpack(name, tensors, key, tuple(like.shape)).to(like.dtype)
            for key, like in empty._asdict().items()
        )
    )
