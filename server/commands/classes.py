"""`hope eval classes`: intents that come task after task, learned in four ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.terminal import Refusal, out, progress, stopped, table
from server.commands.trials import folder, keep, loaded, writable

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.evaluation.classes import Score


def classes(
    data: Path | None,
    contenders: Sequence[str],
    examples: int,
    queries: int,
    window: int | None,
    seed: int,
    model_name: str,
    threads: int,
    to: Path | None,
    plot: Path | None,
) -> None:
    """Let every contender learn all tasks, show and keep."""
    from hope_runtime.evaluation import classes as trial
    from hope_runtime.evaluation.reading import Reader

    for name in contenders:
        if name not in trial.CONTENDERS:
            raise Refusal(f"--contender {name!r} is none; known are {', '.join(trial.CONTENDERS)}")
    chosen = list(dict.fromkeys(contenders)) or list(trial.CONTENDERS)
    here = folder(data)
    writable(to, plot)
    setting = trial.Setting(examples=examples, queries=queries, seed=seed)
    intents = trial.read_intents(here, setting)
    model, tokenizer = loaded(model_name, threads, window=window)
    study = trial.Study(Reader(model, tokenizer), intents, setting)
    found: list[Score] = []
    with progress(len(chosen) * trial.TASKS) as report:
        try:
            for number, contender in enumerate(chosen):
                before = number * trial.TASKS

                def advance(text: str, tasks: float, before: int = before) -> None:
                    report(text, before + tasks)

                for score in study.run(contender, advance):
                    found.append(score)
                    keep(to, [each.to_json() for each in found])
        except KeyboardInterrupt:
            _show(found, chosen)
            raise stopped() from None
    _show(found, chosen)
    if plot is not None:
        _draw(found, chosen, plot)


def _show(found: Sequence[Score], contenders: Sequence[str]) -> None:
    tasks = sorted({score.task for score in found})
    rows = []
    for name in contenders:
        mine = [score for score in found if score.contender == name]
        if mine:
            last = mine[-1]
            shares = [f"{score.accuracy:.1%}" for score in mine]
            blank = [""] * (len(tasks) - len(mine))
            mean = sum(score.accuracy for score in mine) / len(mine)
            ends = (f"{mean:.1%}", f"{last.first:.1%}", f"{last.newest:.1%}", str(last.asked))
            rows.append((name, *shares, *blank, *ends))
    heads = ["contender", *map(str, tasks), "mean", "first task", "newest", "n"]
    out.print(table(heads, rows, "right after each task, of all intents seen; the rest at the end"))


def _draw(found: Sequence[Score], contenders: Sequence[str], file: Path) -> None:
    from hope_runtime.evaluation.plot import Panel, PlotError, curves

    def lines(figure: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(s.task, 100 * getattr(s, figure)) for s in found if s.contender == name]
            for name in contenders
        }

    panels = [
        Panel("all intents seen", "tasks learned", "% right", lines("accuracy")),
        Panel("the newest task", "tasks learned", "% right", lines("newest")),
        Panel("the first task", "tasks learned", "% right", lines("first")),
    ]
    try:
        curves(panels, file)
    except PlotError as error:
        raise Refusal(str(error)) from error
