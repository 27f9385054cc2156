"""How all commands speak to the person who started them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from memory_store import StoreError
from server.settings import Settings

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
