"""What storing a session in fewer bits costs it: `python -m benchmarks.storage [FILE]`.

After every turn a session goes on from what was stored, as a served one does. hope-nano is told
facts, hears other people's chat, and is asked; its fast memory is rounded at every turn's end. The
default model reads a document, a turn a chunk: its levels are rounded after every consolidation,
and every token is scored before it is learned. What thousands of roundings do is shown on a matrix
that made-up steps move, some of each step in a direction that all share.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import checkpoint, console, end, engine, run, turn, where
from hope_runtime import weights
from hope_runtime.engine import Engine
from hope_runtime.report import Finished, Learned, Said
from hope_runtime.state import State, dump, settle
from hope_runtime.storage import EXACT, Form, Storage, rounded
from hope_runtime.training.corpora import read_chats
from hope_runtime.training.personas import Line, Part, answered
from hope_runtime.training.sessions import Material, Probe, probe
from hope_runtime.weights.checkpoint import Checkpoint
from memory_store.codec import pack
from server.loading import shipped

Given = list[tuple[int, float]]

STORAGES = {
    "all fp32": EXACT,
    "memory bf16": Storage(memory=Form.BF16),
    "memory int8": Storage(memory=Form.INT8),
    "all bf16": Storage(memory=Form.BF16, every=Form.BF16),
    "all int8": Storage(memory=Form.INT8, every=Form.INT8),
}
LONGEST_ANSWER = 32  # tokens


def main() -> None:
    """Print what is recalled, and how well a document is read, for every form."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="plain text to read; none: only recall")
    parser.add_argument("--users", type=int, default=20, help="who tell 8 facts each; 0: none")
    parser.add_argument("--filler", type=int, default=500, help="tokens of chat before questions")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of the file")
    parser.add_argument("--skip", type=int, default=0, help="characters to skip first")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rank", type=int, nargs="*", default=[], help="of deltas, for more rows")
    parser.add_argument("--steps", type=int, default=2000, help="on a made-up matrix; 0: none")
    options = parser.parse_args()
    if options.users:
        console.print(_recall(options.users, options.filler))
    if options.file is not None:
        found = checkpoint()
        text = options.file.read_text()[options.skip :]
        ids = found.tokenizer.encode(text)[: options.tokens]
        title = f"{len(ids)} tokens of {options.file.name}, window {options.window}"
        console.print(_reading(found, ids, title, options.window, options.rank))
    if options.steps:
        console.print(_drifting(options.steps))


# --- what is recalled ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Column:
    """What became of all users under one storage."""

    said: list[tuple[str, bool]] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)
    off: list[float] = field(default_factory=list)  # of the memory, from where fp32 got to


def _recall(users: int, filler: int, facts: int = 8) -> Table:
    path = shipped("hope-nano")
    found = weights.read(path)
    material = Material(found.tokenizer, read_chats(path / "chats.jsonl").valid)
    mind = engine(found, torch.float32, lanes=facts)
    columns = {name: _Column() for name in [*STORAGES, "memory emptied"]}
    turns = 0
    for user in range(users):
        rng = np.random.default_rng([1000, user])
        drawn = probe(rng, material, facts=facts, filler_tokens=filler)
        exact = State()
        for name, storage in STORAGES.items():
            told = list(_turns(drawn, material))
            turns += len(told) * (storage is EXACT)
            state = _told(mind, told, storage)
            exact = state if storage is EXACT else exact
            columns[name].said += _asked(mind, material, drawn, state)
            columns[name].sizes += _sizes(state, storage)
            columns[name].off.append(_apart(_live(state), _live(exact)))
        empty = replace(exact, memories=None)
        columns["memory emptied"].said += _asked(mind, material, drawn, empty)
    table = Table(
        "stored in",
        "recalled",
        "n",
        "same words as fp32",
        "memory off by",
        "memory kB",
        "and marks kB",
        "levels kB",
        title=f"hope-nano: {facts} facts, then {filler} tokens of chat: "
        f"{turns / users:.0f} turns a user, stored after each; kB as written, and after zstd",
        caption=where(),
    )
    usual = columns["all fp32"].said
    for name, column in columns.items():
        right = sum(good for _, good in column.said)
        same = sum(one == other for one, other in zip(column.said, usual, strict=True))
        off = f"{sum(column.off) / users:.2%}" if column.off else "-"
        sizes = [_kilobytes(column.sizes, part, users) for part in ("memory", "mark", "level")]
        n = len(column.said)
        table.add_row(name, f"{right / n:.1%}", str(n), f"{same / n:.0%}", off, *sizes)
    return table


def _turns(drawn: Probe, material: Material) -> Iterator[Given]:
    """Yield what is said: a turn begins with the user's line."""
    given: Given = []
    for line in [*drawn.told, *drawn.filler]:
        if line.role == "user" and given:
            yield given
            given = []
        given += [(t, float(line.role == "user")) for t in material.row([line]).tokens]
    yield given


def _told(mind: Engine, turns: Sequence[Given], storage: Storage) -> State:
    state = State()
    for given in turns:
        after = end(run(mind, turn("told", state, given, 0, learn=True))).state
        state = settle(after, state, storage)
    return state


def _asked(
    mind: Engine, material: Material, drawn: Probe, state: State
) -> Iterator[tuple[str, bool]]:
    """Ask all questions from the same state; yield what was said, and whether it is right."""
    jobs = []
    for i, (question, _) in enumerate(drawn.questions):
        row = material.row([Line("user", (Part(question, 0.0),)), Line("assistant", ())]).tokens
        given = [(token, 0.0) for token in row[:-1]]  # without the mark that ends the reply
        jobs.append(turn(str(i), state, given, LONGEST_ANSWER))
    said = [""] * len(jobs)
    for fact in run(mind, *jobs):
        if isinstance(fact, (Said, Finished)):
            said[int(fact.job)] += fact.text
    for words, (_, fact_asked) in zip(said, drawn.questions, strict=True):
        yield words, answered(words, fact_asked)


def _live(state: State) -> list[Tensor]:
    return [] if state.memories is None else [state.memories.live]


# --- how a document is read ---------------------------------------------------------------------


def _reading(
    found: Checkpoint, ids: list[int], title: str, window: int, ranks: Sequence[int]
) -> Table:
    table = Table(
        "deltas",
        "stored in",
        "perplexity",
        "against static",
        "last quarter",
        "moved",
        "deltas off by",
        "levels MB",
        title=f"{title}; levels stored after every consolidation; MB as written, and after zstd",
        caption=where(),
    )
    static, _ = _read(found, ids, window, None, EXACT, learn=False)
    usual = math.exp(_mean(static))
    late = math.exp(_mean(static[-len(static) // 4 :]))
    table.add_row("none", "-", f"{usual:.2f}", "", f"{late:.2f}", "", "", "")
    for rank in (None, *ranks):
        exact: list[Tensor] = []
        for form in Form:
            storage = Storage(every=form)
            losses, state = _read(found, ids, window, rank, storage, learn=True)
            deltas = _products(state)
            exact = exact or deltas
            ppl, last = math.exp(_mean(losses)), math.exp(_mean(losses[-len(losses) // 4 :]))
            sizes = {k: n / 1000 for k, n in _sizes(state, storage).items()}
            table.add_row(
                f"rank {rank}" if rank else "whole",
                str(form),
                f"{ppl:.3f}",
                f"{ppl / usual - 1:+.2%}",
                f"{last / late - 1:+.2%}",
                " ".join(f"{level.movement:.4%}" for level in state.levels.values()),
                f"{_apart(deltas, exact):.1%}",
                _kilobytes(Counter(sizes), "level", 1),
            )
    return table


def _read(
    found: Checkpoint,
    ids: list[int],
    window: int,
    rank: int | None,
    storage: Storage,
    *,
    learn: bool,
) -> tuple[list[tuple[float, int]], State]:
    """Return the loss and the tokens of every chunk of the fastest level, and the last state."""
    levels = found.config.stacked().levels
    size = min(level.chunk for level in levels)
    if not learn:
        levels = tuple(replace(level, rate=0.0) for level in levels)
    levels = tuple(replace(level, rank=rank) for level in levels)
    config = replace(found.config, window=window, levels=levels)
    mind = engine(replace(found, config=config), torch.bfloat16, lanes=1)
    state, losses = State(), []
    for start in range(0, len(ids), size):
        given = [(id, 1.0) for id in ids[start : start + size]]
        facts = run(mind, turn("read", state, given, 0, learn=True))
        state = settle(end(facts).state, state, storage)
        done = [fact.consolidated for fact in facts if isinstance(fact, Learned)]
        losses += [(c.loss, c.tokens) for c in done if c.end - c.start == size]
    return losses, state


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def _products(state: State) -> list[Tensor]:
    """Return the session's deltas as matrices."""
    held = state.deltas
    wholes = [d for name, d in held.items() if not name.endswith((".left", ".right"))]
    lefts = [name.removesuffix(".left") for name in held if name.endswith(".left")]
    return wholes + [held[f"{name}.left"] @ held[f"{name}.right"] for name in lefts]


# --- what very many roundings do ----------------------------------------------------------------


def _drifting(steps: int) -> Table:
    """Compare a delta that is rounded after every step with one that never is."""
    table = Table(
        "retain",
        "shared",
        *(f"{form}: {what}" for form in (Form.BF16, Form.INT8) for what in ("off by", "along")),
        title=f"{steps} steps of one length and rank 32, `shared` of each in the same direction; "
        "what was kept along it, as a share of fp32's",
        caption=where(),
    )
    generator = torch.Generator().manual_seed(0)

    def step(rank: int) -> Tensor:
        left = torch.randn(256, rank, generator=generator)
        whole = left @ torch.randn(rank, 576, generator=generator)
        return whole / float(torch.linalg.vector_norm(whole))

    for retain, shared in product((0.995, 0.999), (0.1, 0.5, 0.95)):
        always = step(256)
        held = dict.fromkeys(Form, torch.zeros(256, 576))
        for _ in range(steps):
            new = shared * always + math.sqrt(1 - shared**2) * step(32)
            held = {form: rounded(retain * d + new, form) for form, d in held.items()}
        along = {form: float((d * always).sum()) for form, d in held.items()}
        cells: list[str] = []
        for form in (Form.BF16, Form.INT8):
            cells.append(f"{_apart([held[form]], [held[Form.FP32]]):.1%}")
            cells.append(f"{along[form] / along[Form.FP32]:.1%}")
        table.add_row(f"{retain:g}", f"{shared:g}", *cells)
    return table


# --- both ---------------------------------------------------------------------------------------


def _sizes(state: State, storage: Storage) -> Counter[str]:
    """Return the bytes of each kind of blob, as written and (`zstd ...`) as the store packs it."""
    sizes: Counter[str] = Counter()
    for name, blob in dump(state, None, storage)[1].items():
        kind = name.partition("/")[0]
        sizes[kind] += len(blob)
        sizes[f"zstd {kind}"] += len(pack(blob).data)
    return sizes


def _kilobytes(sizes: Counter[str], kind: str, sessions: int) -> str:
    if not sizes[kind]:
        return "-"
    return ", ".join(f"{sizes[key] / 1000 / sessions:.0f}" for key in (kind, f"zstd {kind}"))


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return how far tensors are from others, as a share of those."""
    pairs = zip(some, others, strict=True)
    distance = math.hypot(*(float(torch.linalg.vector_norm(a - b)) for a, b in pairs))
    return distance / math.hypot(*(float(torch.linalg.vector_norm(b)) for b in others))


if __name__ == "__main__":
    main()
