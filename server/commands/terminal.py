"""How all commands speak to the person who started them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

from memory_store import StoreError

out = Console(highlight=False, soft_wrap=True)
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
