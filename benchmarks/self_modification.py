"""Does it pay that a memory makes its own keys, values and rates? `docs/self-modification.md`.

`python -m benchmarks.self_modification --task codebook --seeds 5` trains all contenders of a task
and prints who answered what; with `--json FILE` it keeps each run, and runs none twice. A
contender's rate is the better of two on a seed that is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import console, where
from hope_runtime.config import HopeConfig, MemoryConfig, Mixer, Rule
from hope_runtime.evaluation import shift
from hope_runtime.evaluation.drawn import Drawn
from hope_runtime.model import Hope
from hope_runtime.training import loop
from hope_runtime.training.loop import Batch, Progress, Recipe
from hope_runtime.weights.shapes import shapes

WIDTH, HIDDEN = 64, 64
RATES = (3e-3, 6e-3)  # of what is no matrix, the gains and learned starts among it
CHOOSING = 1000  # the seed that rates are chosen on
SESSIONS = 512  # that are asked at the end
ASKED_WITH = 1_000_003
MODIFICATION, PASSAGE = "memory_modification", "memory_passage"
SERVED = Rule()
PLAIN = Rule(modifies=False, erases=1.0, rate_max=1.0)


@dataclass(frozen=True, slots=True)
class Contender:
    """A model and how it begins."""

    about: str
    rule: Rule | None = SERVED  # None: attention
    chunk: int | None = 0  # None: the whole session; 0: the task's
    blocks: int = 1
    modification: float = 1.0  # at the start
    passage: float = 0.0
    held: tuple[str, ...] = ()  # gains that training does not move
    shifted: bool = True  # see `shifted`
    patience: int = 1  # times the task's steps
    rated_as: str = ""  # whose rate it takes; its own if none is named


CONTENDERS = {
    "hope": Contender("self-modifying, gains learned from 1 and 0"),
    "paper": Contender(
        "self-modifying, both gains held at 1", passage=1.0, held=(MODIFICATION, PASSAGE)
    ),
    "unmodified": Contender(
        "the same rule, modification held at 0", chunk=None, modification=0.0, held=(MODIFICATION,)
    ),
    "delta": Contender("gated delta rule", PLAIN, chunk=None),
    "reflecting": Contender(
        "gated delta rule, negative eigenvalues",
        Rule(modifies=False, erases=2.0, rate_max=1.0, reference=True),
        chunk=None,
    ),
    "small gain": Contender("hope, gain learned from 0.1", modification=0.1, rated_as="hope"),
    "large gain": Contender("hope, gain learned from 4", modification=4.0, rated_as="hope"),
    "chunk 3": Contender("hope, chunks of 3", chunk=3, rated_as="hope"),
    "chunk 32": Contender("hope, chunks of 32, as served", chunk=32, rated_as="hope"),
    "one chunk": Contender("hope, the session one chunk", chunk=None, rated_as="hope"),
    "ordinary": Contender("hope from the ordinary start", shifted=False, rated_as="hope"),
    "delta, ordinary": Contender(
        "delta from the ordinary start", PLAIN, chunk=None, shifted=False, rated_as="delta"
    ),
    "delta, 2 blocks": Contender("two blocks of the delta rule", PLAIN, chunk=None, blocks=2),
    "delta, longer": Contender(
        "gated delta rule, five times the steps", PLAIN, chunk=None, patience=5, rated_as="delta"
    ),
    "attention": Contender("one block of attention", None),
    "attention, 2": Contender("two blocks of attention", None, blocks=2),
}
MAIN = ("hope", "unmodified", "delta", "reflecting")


@dataclass(frozen=True, slots=True)
class Setting:
    """How a task is set."""

    length: int
    chunk: int
    steps: int
    batch: int = 64
    contenders: tuple[str, ...] = MAIN


SETTINGS = {
    "codebook": Setting(45, 9, 150, contenders=tuple(n for n in CONTENDERS if n != "large gain")),
    "aliases": Setting(45, 3, 150),
    "hops": Setting(45, 3, 150, contenders=(*MAIN, "large gain")),
    "copies": Setting(45, 3, 150),
    "swaps": Setting(36, 3, 150),
    "hold": Setting(45, 3, 150, contenders=("hope", "delta")),
    "first": Setting(45, 3, 150, contenders=("hope", "delta")),
    "noisy": Setting(72, 3, 150, contenders=("hope", "delta")),
}

Record = dict[str, Any]


def main() -> None:
    """Train, ask, print a table for each task, and keep every run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.self_modification")
    parser.add_argument("--task", nargs="+", choices=SETTINGS, default=["codebook"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="some contenders")
    parser.add_argument("--json", type=Path, help="keep runs in this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Record] = []
    if options.json and options.json.exists():
        runs = json.loads(options.json.read_text())["runs"]
    for task in options.task:
        names = options.only or SETTINGS[task].contenders
        for name in names:
            for seed, rate in _due(runs, task, name, options.seeds):
                runs.append(run(task, name, seed, rate))
                if options.json:
                    options.json.write_text(_written(runs))
        console.print(table(task, names, runs))


def _due(runs: list[Record], task: str, name: str, seeds: int) -> Iterator[tuple[int, float]]:
    """Yield seed and rate of what is not kept yet; the rate is chosen between the first two."""

    def kept(seed: int, rate: float) -> bool:
        asked = (task, name, seed, rate)
        return any((r["task"], r["contender"], r["seed"], r["rate"]) == asked for r in runs)

    rated_as = CONTENDERS[name].rated_as
    if not rated_as:
        yield from ((CHOOSING, rate) for rate in RATES if not kept(CHOOSING, rate))
    rate = chosen(runs, task, rated_as or name)
    yield from ((seed, rate) for seed in range(seeds) if not kept(seed, rate))


def chosen(runs: Sequence[Record], task: str, name: str) -> float:
    """Return the rate with the lower loss on the seed that is not counted."""
    tried = [r for r in runs if (r["task"], r["contender"], r["seed"]) == (task, name, CHOOSING)]
    return float(min(tried, key=lambda r: float(r["nats"]))["rate"])


def run(task: str, name: str, seed: int, rate: float) -> Record:
    """Train one contender, ask it, and ask it again with its modification set to 0."""
    setting, who = SETTINGS[task], CONTENDERS[name]
    shape = configuration(who, setting)
    recipe = Recipe(
        steps=setting.steps * who.patience, vector_rate=rate, warmup=30, unroll=True, seed=seed
    )
    draw = shift.TASKS[task]

    def source(chance: np.random.Generator, _: float) -> Batch:
        drawn = draw(chance, setting.batch, setting.length)
        return Batch(torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.scored).float())

    began = time.process_time()
    progress = loop.begin(shape, recipe)
    progress = _with(progress, started(who, shape, progress.params, seed))
    held = {n: p for n, p in progress.params.items() if n.rpartition(".")[2] in who.held}
    curve = []
    for step in range(recipe.steps):
        progress, done = loop.advance(
            shape, recipe, progress, source, device=torch.device("cpu"), dtype=torch.float32
        )
        progress = _with(progress, held)
        if (step + 1) % 10 == 0:
            curve.append(round(done.loss, 4))
    spent = time.process_time() - began
    asked = draw(np.random.default_rng(ASKED_WITH), SESSIONS, setting.length)
    right, nats = answered(shape, progress.params, asked)
    found: Record = {
        "task": task,
        "contender": name,
        "seed": seed,
        "rate": rate,
        "right": round(right, 5),
        "nats": round(nats, 5),
        "weights": sum(math.prod(size) for _, size in shapes(shape)),
        "tokens": recipe.steps * setting.batch * setting.length,
        "cpu_seconds": round(spent, 1),
        "curve": curve,
    }
    if who.rule and who.rule.modifies and MODIFICATION not in who.held:
        still = {n: torch.zeros_like(p) for n, p in progress.params.items() if MODIFICATION in n}
        found["gains"] = _gains(progress.params, MODIFICATION)
        found["passages"] = _gains(progress.params, PASSAGE)
        found["right_unmodified"] = round(
            answered(shape, {**progress.params, **still}, asked)[0], 5
        )
    console.print(f"{task}, {name}, seed {seed}, rate {rate:g}: {right:.1%}, {spent:.0f} s")
    return found


def configuration(who: Contender, setting: Setting) -> HopeConfig:
    """Return a contender's shape; attention's MLPs are the wider by what its mixers are smaller."""
    attends = who.rule is None
    memory = None
    if who.rule is not None:
        chunk = setting.length if who.chunk is None else who.chunk or setting.chunk
        memory = MemoryConfig(1, WIDTH, rule=replace(who.rule, chunk=chunk))
    return HopeConfig(
        vocabulary=shift.VOCABULARY,
        width=WIDTH,
        blocks=who.blocks,
        heads=2 if attends else 0,
        key_heads=2 if attends else 0,
        head_width=WIDTH // 2 if attends else 0,
        hidden=HIDDEN + (_missing() if attends else 0),
        norm_eps=1e-5,
        rotary_base=10_000.0,
        mixers=(Mixer.ATTENTION if attends else Mixer.MEMORY,) * who.blocks,
        memory=memory,
        tied_head=False,
    )


def _missing() -> int:
    """Return how much wider an MLP makes up for attention in a memory's place."""
    memory = 4 * WIDTH * WIDTH + (3 * WIDTH + 2) * WIDTH + 10 * WIDTH
    return round((memory - 4 * WIDTH * WIDTH - WIDTH) / (3 * WIDTH))


def started(
    who: Contender, shape: HopeConfig, params: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return what a contender begins with in place of the ordinary start."""
    changed: dict[str, Tensor] = {}
    for block in shape.memory_blocks:
        name = f"blocks.{block}."
        changed[name + MODIFICATION] = torch.full((1,), who.modification)
        changed[name + PASSAGE] = torch.full((1,), who.passage)
        if who.shifted:
            changed |= shifted(name, params, seed)
    return changed


def shifted(name: str, params: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a memory's start that associates each token with the one before it.

    One half of a head's input is the token before, the other half this one, both in the same
    coordinates; the key is made of the former, the value of the latter, and the query of this
    token where the key has the one before. So what is recalled by a word is what followed it, and
    what is recalled can take a word's place.
    """
    half = WIDTH // 2
    eye = torch.eye(half)
    start = params[name + "memory_start"].clone()
    start[:, : 2 * WIDTH] *= 0.1
    start[:, :half, :half] += eye
    start[:, WIDTH : WIDTH + half, half:] += eye
    start[:, WIDTH + half : 2 * WIDTH, half:] += eye
    given = params[name + "memory_input"].clone()
    given[half:] = given[:half]
    query = params[name + "memory_query"].clone()
    query[half:] *= 0.1
    query[:half] = given[:half]
    noise = torch.randn(2 * WIDTH, 4, generator=torch.Generator().manual_seed(seed))
    taps = 0.1 * noise
    taps[:half, 2] += 1.0
    taps[half:, 3] += 1.0
    return {
        name + "memory_start": start,
        name + "memory_input": given,
        name + "memory_query": query,
        name + "memory_convolution": taps,
    }


@torch.no_grad()
def answered(shape: HopeConfig, params: Mapping[str, Tensor], asked: Drawn) -> tuple[float, float]:
    """Return the share of right answers, and nats per answer."""
    model = Hope(shape, params)
    tokens = torch.from_numpy(asked.tokens)
    count = len(tokens)
    start = torch.zeros(count, dtype=torch.int64)
    read = model.run(model.embed(tokens[:, :-1]), start, model.nothing(count), [{}] * count)
    scored = torch.from_numpy(asked.scored)[:, 1:]
    logits, answers = model.logits(read.hidden)[scored], tokens[:, 1:][scored]
    right = (logits.argmax(-1) == answers).float().mean()
    return float(right), float(torch.nn.functional.cross_entropy(logits, answers))


def guessed(asked: Drawn) -> float:
    """Return how often one is right who knows which values are left, and not whose they are.

    Only for tasks in which every value that is told is one thing's for good.
    """
    right: list[float] = []
    for session, scored in zip(asked.tokens, asked.scored, strict=True):
        told = session[: np.flatnonzero(scored)[0]]
        left = Counter(told[told >= shift.VALUE].tolist())
        for answer in session[scored].tolist():
            most = max(left.values())
            best = [value for value, count in left.items() if count == most]
            right.append((answer in best) / len(best))
            left[answer] -= 1
    return statistics.fmean(right)


def table(task: str, names: Sequence[str], runs: Sequence[Record]) -> Table:
    """Return who answered what: mean, deviation, every seed, and the odds against chance."""
    counted = {
        name: [r for r in runs if (r["task"], r["contender"]) == (task, name) and r["seed"] < 1000]
        for name in names
    }
    rows = Table(
        *("contender", "right", "each seed", "gain", "passage", "unmodified at test"),
        *("p, against delta", "CPU s", "weights"),
        title=f"{task}: right answers",
        caption=where(),
    )
    for name, each in counted.items():
        if not each:
            continue
        rights = [r["right"] for r in each]
        spread = statistics.stdev(rights) if len(rights) > 1 else 0.0
        against = [r["right"] for r in counted.get("delta", [])]
        gains = [r for r in each if "gains" in r]
        rows.add_row(
            CONTENDERS[name].about,
            f"{statistics.fmean(rights):.1%} ± {spread:.1%}",
            " ".join(f"{100 * right:.1f}" for right in rights),
            " ".join(f"{r['gains'][0]:.2f}" for r in gains),
            " ".join(f"{r['passages'][0]:.2f}" for r in gains),
            f"{statistics.fmean(r['right_unmodified'] for r in gains):.1%}" if gains else "",
            f"{odds(rights, against):.3f}" if against and name != "delta" else "",
            f"{statistics.fmean(r['cpu_seconds'] for r in each):.0f}",
            f"{each[0]['weights']:,}",
        )
    if task in {"codebook", "hops"}:
        asked = shift.TASKS[task](
            np.random.default_rng(ASKED_WITH), SESSIONS, SETTINGS[task].length
        )
        rows.add_row("a guess among the values that are left", f"{guessed(asked):.1%}")
    return rows


def odds(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the share of ways to part all results in two whose means differ as much, or more."""
    both = [*ours, *theirs]

    def apart(chosen: Sequence[int]) -> float:
        first = [both[i] for i in chosen]
        second = [value for i, value in enumerate(both) if i not in chosen]
        return abs(statistics.fmean(first) - statistics.fmean(second))

    found = apart(range(len(ours)))
    ways = [apart(way) for way in combinations(range(len(both)), len(ours))]
    return sum(way >= found - 1e-12 for way in ways) / len(ways)


def _gains(params: Mapping[str, Tensor], kind: str) -> list[float]:
    return [round(float(g), 4) for n, p in params.items() if kind in n for g in p]


def _with(progress: Progress, changed: Mapping[str, Tensor]) -> Progress:
    return progress._replace(params={**progress.params, **changed})


def _written(runs: Sequence[Record]) -> str:
    """Return the file's text: where it was run, and one run a line."""
    lines = ",\n".join(json.dumps(record) for record in runs)
    return f'{{"where": {json.dumps(where())},\n"runs": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
