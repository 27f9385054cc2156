"""`hope eval recall`: does a chat model recall what it was told, and from its memory alone?"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.commands.terminal import Refusal, err, out, refusals

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from hope_runtime.evaluation.recall import Answer


def recall(
    model: Annotated[
        str, typer.Option(help="hope-nano, or one that hope train made")
    ] = "hope-nano",
    data: Annotated[
        Path | None, typer.Option(help="chats to be said in between; none: a hundred come with it")
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="made-up users of each row")] = 25,
    facts: Annotated[int, typer.Option(min=1, help="facts that each of them tells")] = 8,
    filler: Annotated[
        list[int] | None,
        typer.Option(help="tokens of chat before the questions; again for more rows"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of users, facts and phrasings")] = 1000,
    to: Annotated[Path | None, typer.Option("--out", help="file for every answer (JSON)")] = None,
    show: Annotated[int, typer.Option(help="answers of each row to print")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores")] = 0,
) -> None:
    """Tell a model facts, let chat pass, store and read its session, and ask for each fact.

    Answers are drawn greedily; one counts if it says the exact value and no other of its kind.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        try:
            fillers = filler or [0, 500, 2000, 8000]
            _recall(data, model, users, facts, fillers, seed, to, show, threads)
        except ValueError as error:
            raise Refusal(str(error)) from error


def _recall(
    data: Path | None,
    name: str,
    users: int,
    facts: int,
    fillers: Sequence[int],
    seed: int,
    to: Path | None,
    show: int,
    threads: int,
) -> None:
    from hope_runtime.evaluation.recall import Setting, recall
    from hope_runtime.training.corpora import read_chats
    from hope_runtime.training.sessions import Material
    from server.loading import load, shipped
    from server.settings import Settings

    asked: dict[str, Any] = {"model": name, "threads": threads}
    with err.status("reading"):
        _, model, tokenizer, _ = load(Settings(**asked), lambda said: None)
        material = Material(
            tokenizer, read_chats(data or shipped("hope-nano") / "chats.jsonl").valid
        )
    base = Setting(users=users, facts=facts, seed=seed)
    rows = [(f"{n:,} tokens later", replace(base, filler=n), model) for n in fillers]
    middle = replace(base, filler=2000)
    rows += [
        ("values never trained on", replace(middle, held_out=True), model),
        (f"{facts // 2} facts told anew", replace(middle, overwritten=facts // 2), model),
        ("slow levels at rest", replace(middle, learning=False), model),
    ]
    if model.config.memory_blocks:
        rows.append(("frozen memory", middle, model.frozen()))
    table = Table("row", "exact", "of them told anew", "n")
    kept = []
    with _bar(len(rows) * users) as bar:
        for about, setting, which in rows:
            bar.update(bar.task_ids[0], description=about)
            answers = recall(
                which, tokenizer, material, setting, lambda done: bar.advance(bar.task_ids[0])
            )
            table.add_row(about, *_figures(answers))
            kept.append({"row": about, **asdict(setting), "answers": [asdict(a) for a in answers]})
            for answer in answers[:show]:
                out.print(f"[dim]{answer.question}[/dim] {answer.said} [dim]({answer.value})[/dim]")
    out.print(table)
    if to is not None:
        to.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def _figures(answers: Sequence[Answer]) -> tuple[str, str, str]:
    right = Counter(answer.changed for answer in answers if answer.right)
    changed = sum(answer.changed for answer in answers)
    share = f"{right.total() / len(answers):.1%}"
    return share, f"{right[True] / changed:.1%}" if changed else "-", str(len(answers))


def _bar(total: int) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total} users"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    bar.add_task("", total=total)
    return bar
