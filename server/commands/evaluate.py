"""`hope eval`: how well models learn, and what it costs them.

`native` is here whole; what the other commands do is in modules of their names.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.commands.terminal import Refusal, err, out, refusals

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.evaluation.runner import Run, Stand
    from hope_runtime.evaluation.table import Row
    from hope_runtime.evaluation.tasks import Task

evaluate = typer.Typer(help="Judge how well models learn.", no_args_is_help=True)

Model = Annotated[str, typer.Option("--model", help="as `hope serve` takes it")]
Data = Annotated[
    Path | None, typer.Option("--data", envvar="HOPE_EVAL_DATA", help="folder of the data")
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all cores")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="of all that is drawn")]
Out = Annotated[Path | None, typer.Option("--out", help="file for every figure (JSON)")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="draw the results into this file (.png, .svg)")
]


@evaluate.callback()
def _evaluate() -> None:
    """Judge how well models learn."""


@evaluate.command()
def native(
    task: Annotated[
        list[str] | None,
        typer.Option(help="a task: facts, associations, parity, ...; again for more; default: all"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="hope, delta, titans, transformer, frozen; again for more; default: these"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each, from seed 0 on")] = 1,
    full: Annotated[
        bool, typer.Option("--full/--short", help="five times the training of the short form")
    ] = False,
    to: Annotated[
        Path, typer.Option("--out", help="folder of the results; what it holds is not run again")
    ] = Path("evaluation"),
    data: Annotated[
        Path | None,
        typer.Option(help="folder with tinyshakespeare.txt and wikitext2.tar.xz; none: no text"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw the results into this file (.png, .svg)")
    ] = None,
) -> None:
    """Train small memories and their rivals on tasks, and compare them; Ctrl-C keeps what is done.

    Takes minutes: about a quarter of an hour for everything once, in the short form.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        try:
            _native(task, contender, seeds, full, to, data, plot)
        except ValueError as error:  # all errors of evaluation that a person can mend
            raise Refusal(str(error)) from error


@evaluate.command()
def adapt(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="plain text to read; none: chats")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="HOPE_EVAL_DATA", help="chats; none: a hundred come with hope-nano"),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(min=16, help="tokens of attention; again for more; default: 256, 1024"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="tokens to read of each")] = 3072,
    skip: Annotated[int, typer.Option(min=0, help="characters of each file to skip first")] = 0,
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="a setting of every level: rank=32; again for more"
        ),
    ] = None,
    model: Model = "smollm2",
    threads: Threads = 0,
    to: Out = None,
) -> None:
    """Perplexity while reading documents and going on with chats, without and with learning.

    Every token is scored before it is learned. An unrelated chat, scored before and after from an
    empty window, must not get worse.
    """
    from server.commands.adapt import adapt as run

    with _asked():
        run(files or [], data, window or [256, 1024], tokens, skip, level or [], model, threads, to)


@evaluate.command()
def forget(
    data: Data = None,
    sessions: Annotated[
        list[int] | None,
        typer.Option(min=1, help="judge after so many; again for more; default: 1, 5, 20"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="tokens of a session, half of them chat")] = (
        1024
    ),
    text: Annotated[int, typer.Option(min=2, help="tokens of WikiText-2 to score")] = 2048,
    passages: Annotated[int, typer.Option(min=1, help="passages of LAMBADA")] = 100,
    seed: Seed = 0,
    model: Model = "smollm2",
    threads: Threads = 0,
    to: Out = None,
    plot: Plot = None,
) -> None:
    """What a session loses of what its model could do, after 1, 5 and 20 sessions of learning.

    Judged with what its levels learned and an empty window: WikiText-2, last words of LAMBADA,
    and common knowledge.
    """
    from server.commands.forget import forget as run

    with _asked():
        points = sorted(set(sessions or (1, 5, 20)))
        run(data, points, tokens, text, passages, seed, model, threads, to, plot)


@evaluate.command()
def memory(
    data: Data = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="what is kept from training: phrasings, types, 'value first', fresh, roundabout; "
            "again for more; default: phrasings"
        ),
    ] = None,
    facts: Annotated[
        list[int] | None, typer.Option(min=1, help="facts of each person; again; default: 4")
    ] = None,
    filler: Annotated[
        list[int] | None,
        typer.Option(min=0, help="tokens of chat before the questions; again; default: 2,000"),
    ] = None,
    changing: Annotated[bool, typer.Option("--changing", help="half of the facts change")] = False,
    common: Annotated[
        bool,
        typer.Option("--common", help="ask for common knowledge instead, as the base is asked"),
    ] = False,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="memory, nothing, context, retrieval; again; default: all"),
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="people of each row")] = 13,
    seed: Seed = 0,
    kinds: Annotated[
        Path | None, typer.Option(help="kinds of facts in place of those that come with it")
    ] = None,
    model: Model = "smollm2",
    layer: Annotated[str, typer.Option("--memory-layer", help="as `hope serve` takes it")] = "auto",
    serve: Annotated[
        list[str] | None, typer.Option("--serve", help="one more argument of hope serve; again")
    ] = None,
    to: Out = None,
    show: Annotated[int, typer.Option(help="answers of each row to print")] = 0,
) -> None:
    """Is what people tell still known later, after a kill, from memory alone?

    Everything goes through a server that is started for it, as a user's would: told over the API,
    killed, started again, asked in a fresh window.
    """
    from server.commands.memory import CONTENDERS
    from server.commands.memory import memory as run

    with _asked():
        run(
            data,
            part or ["phrasings"],
            facts or [4],
            filler or [2000],
            changing,
            common,
            contender or (("memory", "nothing") if common else CONTENDERS),
            users,
            seed,
            kinds,
            model,
            layer,
            serve or [],
            to,
            show,
        )


@evaluate.command()
def classes(
    data: Data = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="frozen, in-context, consolidated, fine-tuned; again for more; default: all"
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="of each intent")] = 5,
    queries: Annotated[
        int, typer.Option(min=1, help="of each intent at the end; one after earlier tasks")
    ] = 2,
    window: Annotated[
        int | None, typer.Option(min=128, help="tokens of attention; default: as served")
    ] = None,
    seed: Seed = 0,
    model: Model = "smollm2",
    threads: Threads = 0,
    to: Out = None,
    plot: Plot = None,
) -> None:
    """CLINC150, ten tasks of fifteen intents one after the other, learned in four ways."""
    from server.commands.classes import classes as run

    with _asked():
        asked = (examples, queries, window, seed, model, threads)
        run(data, contender or [], *asked, to, plot)


@contextmanager
def _asked() -> Iterator[None]:
    """Stop as Ctrl-C does when told to end, and tell in a sentence what a person can mend."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        try:
            yield
        except (ValueError, OSError) as error:
            raise Refusal(str(error)) from error


def _native(
    names: list[str] | None,
    contenders: list[str] | None,
    seeds: int,
    full: bool,
    to: Path,
    data: Path | None,
    plot: Path | None,
) -> None:
    import torch

    from hope_runtime.evaluation import contenders as known
    from hope_runtime.evaluation import runner
    from hope_runtime.evaluation.plot import PlotError, draw
    from hope_runtime.evaluation.table import markdown, rows

    rivals = _chosen("contender", contenders, known.ABOUT, known.USUAL)
    tasks = _tasks(names, data)
    torch.set_num_threads(1)  # the models are too small for more
    runs = runner.plan(tasks, rivals, seeds, full=full)
    kept = to / "results.jsonl"
    with _progress(runs) as report:
        try:
            results = runner.evaluate(runs, kept, report, time.process_time)
        except KeyboardInterrupt:
            err.print(f"stopped; the same command goes on with what {kept} does not hold yet")
            raise typer.Exit(130) from None
    found = rows(tasks, results)
    (to / "table.md").write_text("\n".join(markdown(found, rivals)) + "\n", encoding="utf-8")
    _show(found, rivals)
    for result in results:
        if result.failed:
            what = f"{result.task}, {result.contender}, seed {result.seed}"
            err.print(f"{escape(what)}: {result.failed}")
    if plot is not None:
        try:
            draw(found, rivals, plot)
        except PlotError as error:
            raise Refusal(str(error)) from error
    out.print(f"kept in {kept}; the table is in {to / 'table.md'}")


def _tasks(names: list[str] | None, data: Path | None) -> list[Task]:
    from hope_runtime.evaluation import tasks, text

    made = tasks.named(data)
    for name in names or ():
        if name in text.TEXTS and data is None:
            raise Refusal(f"--task {name!r} needs its text; name its folder with --data")
    return [made[name]() for name in _chosen("task", names, made, made)]


def _chosen(
    kind: str, names: list[str] | None, known: Collection[str], usual: Iterable[str]
) -> list[str]:
    for name in names or ():
        if name not in known:
            raise Refusal(f"--{kind} {name!r} is none; known are {', '.join(known)}")
    return list(dict.fromkeys(names or usual))


@contextmanager
def _progress(runs: Sequence[Run]) -> Iterator[Callable[[Stand], None]]:
    """Show each run's steps on a bar of all runs; where nobody watches, a line for each run."""
    total = sum(run.steps for run in runs)
    before = {run.key: sum(each.steps for each in runs[:i]) for i, run in enumerate(runs)}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )

    def report(stand: Stand) -> None:
        run = stand.run
        score = "" if stand.score is None else f", {run.task.probes[0].name} {stand.score:.2f}"
        text = (
            f"{run.task.name}, {run.contender}, seed {run.seed}: step {stand.step}/{run.steps}, "
            f"loss {stand.loss:.3f}{score}, {stand.pace:,.0f} tokens/s"
        )
        bar.update(shown, description=escape(text), completed=before[run.key] + stand.step)
        if not err.is_terminal and stand.step == run.steps:
            err.print(escape(text))

    with bar:
        shown = bar.add_task("starting", total=total)
        yield report


def _show(rows: Sequence[Row], contenders: Sequence[str]) -> None:
    from hope_runtime.evaluation.table import written

    table = Table("task", "probe", "chance", *contenders, box=None, pad_edge=False)
    for row in rows:
        cells = (written(row.cells.get(name), row.measure) for name in contenders)
        table.add_row(escape(row.task), row.probe, f"{row.chance:.1f}", *cells)
    out.print(table)
