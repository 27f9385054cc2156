"""Train each contender on each task with each seed, ask it the probes, and keep what came out.

A run is determined by its task, contender, seed and steps; what is already kept is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from hope_runtime.evaluation.contenders import contender, weights
from hope_runtime.evaluation.judging import Found, judge
from hope_runtime.evaluation.tasks import Task
from hope_runtime.model import Hope
from hope_runtime.training import loop
from hope_runtime.training.loop import Recipe

FULL = 5  # times the steps of the short form
OPTIMISER, RATE, VECTOR_RATE = "muon", 2e-2, 6e-3  # of all contenders: see docs/evaluation.md
_LOOK_EVERY = 50  # steps between two looks at the first probe
_CPU = torch.device("cpu")
_JUDGED_WITH = 1_000_003  # the probes' chance is not the training's

Clock = Callable[[], float]  # seconds


class ResultError(ValueError):
    """A file of results that cannot be read; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Run:
    """One contender's training on one task."""

    task: Task
    contender: str
    seed: int
    steps: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task.name, self.contender, self.seed, self.steps


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run. `found` maps each probe to its value and what it was counted over."""

    task: str
    contender: str
    seed: int
    steps: int
    tokens: int
    weights: int
    loss: float  # nats per target, mean over the last tenth of the steps
    seconds: float
    found: dict[str, Found]
    failed: str | None = None  # why the training could not be finished

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task, self.contender, self.seed, self.steps


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a run is."""

    run: Run
    step: int
    loss: float
    score: float | None  # of the first probe, when it was last looked at
    pace: float  # tokens a second


def plan(
    tasks: Sequence[Task], contenders: Sequence[str], seeds: int, *, full: bool = False
) -> list[Run]:
    """Return all runs, seed by seed, so that what is stopped early is even."""
    times = FULL if full else 1
    return [
        Run(task, name, seed, task.steps * times)
        for seed in range(seeds)
        for task in tasks
        for name in contenders
    ]


def evaluate(
    runs: Iterable[Run], kept: Path, report: Callable[[Stand], None], clock: Clock
) -> list[Result]:
    """Do the runs that are not `kept` yet, adding each to the file when it is done.

    Returns:
        the results of all the runs, in their order.
    """
    done = {result.key: result for result in read(kept)}
    results = []
    for run in runs:
        if run.key not in done:
            done[run.key] = one(run, report, clock)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(done[run.key])) + "\n")
        results.append(done[run.key])
    return results


def one(run: Run, report: Callable[[Stand], None], clock: Clock) -> Result:
    """Train one contender on one task, and ask it."""
    began, task = clock(), run.task
    config = contender(run.contender, task.vocabulary)
    recipe = Recipe(
        run.steps,
        optimiser=OPTIMISER,
        rate=RATE,
        vector_rate=VECTOR_RATE,
        warmup=20,
        seed=run.seed,
    )
    progress, source = loop.begin(config, recipe), task.source()
    tokens, score, failed = 0, None, None
    losses: list[float] = []
    while progress.step < run.steps:
        try:
            progress, stepped = loop.advance(
                config, recipe, progress, source, device=_CPU, dtype=torch.float32
            )
        except loop.TrainingError as error:
            failed = str(error)
            break
        tokens += stepped.tokens
        losses.append(stepped.loss)
        if progress.step % _LOOK_EVERY == 0:
            score = _look(Hope(config, progress.params), task)
        report(Stand(run, progress.step, stepped.loss, score, tokens / (clock() - began + 1e-9)))
    model = Hope(config, progress.params)
    found = {
        probe.name: judge(model, probe, task.measure, np.random.default_rng([_JUDGED_WITH, place]))
        for place, probe in enumerate(task.probes)
    }
    last = losses[-max(1, run.steps // 10) :] or [float("nan")]
    return Result(
        task=task.name,
        contender=run.contender,
        seed=run.seed,
        steps=run.steps,
        tokens=tokens,
        weights=weights(config),
        loss=sum(last) / len(last),
        seconds=round(clock() - began, 1),
        found=found,
        failed=failed,
    )


def read(kept: Path) -> list[Result]:
    """Read a file of results; none where there is no file.

    Raises:
        ResultError: a line is no result.
    """
    if not kept.exists():
        return []
    results = []
    for number, line in enumerate(kept.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            found = {name: Found(*value) for name, value in fields.pop("found").items()}
            results.append(Result(**fields, found=found))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultError(
                f"{kept}, line {number} is no result ({error}); remove the line, or choose "
                "another --out"
            ) from error
    return results


def _look(model: Hope, task: Task) -> float:
    return judge(model, task.probes[0], task.measure, np.random.default_rng(0)).value
