"""How all commands speak to the person who started them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from memory_store import StoreError
from server.settings import Settings

out = Console(highlight=False, soft_wrap=True)
_WIDEST = 1000  # columns of a table that goes into a file
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Refusal(Exception):
    """One sentence for the person who started the command."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn errors that a person can mend into one sentence and exit code 1."""
    from hope_runtime.config import ConfigError  # torch takes seconds to import; --help should not
    from hope_runtime.weights.checkpoint import CheckpointError

    try:
        yield
    except (Refusal, StoreError, ConfigError, CheckpointError) as error:
        err.print(f"[red]hope:[/red] {escape(str(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:  # while starting; a server that runs is told to stop in its loop
        raise typer.Exit(130) from None


def settings_from(**flags: Any) -> Settings:
    """Return the settings of flags (None: not given) and environment, or refuse by name."""
    flags = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise Refusal(message) from None
        name = str(first["loc"][0])
        where = f"--{name.replace('_', '-')}" if name in flags else f"HOPE_{name.upper()}"
        raise Refusal(f"{where} {first.get('input')!r}: {message}") from None


@contextlib.contextmanager
def progress(total: float) -> Iterator[Callable[[str, float], None]]:
    """Show on a bar what is being done, and how much is; where nobody watches, a line for each."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    last = ""

    def report(text: str, done: float) -> None:
        nonlocal last
        bar.update(shown, description=escape(text), completed=done)
        if not err.is_terminal and text != last:
            err.print(escape(text))
        last = text

    with bar:
        shown = bar.add_task("starting", total=total)
        yield report


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """Return rows of text below their columns; where nobody watches, as wide as they need."""
    made = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    if not out.is_terminal:
        made.width = out.measure(made, options=out.options.update(max_width=_WIDEST)).maximum
    return made


def stopped() -> typer.Exit:
    """Say that a person stopped the command, and return its end."""
    err.print("stopped; what was done is kept")
    return typer.Exit(130)
