"""`hope demo`: tell a model something, pull the plug, and ask; with and without its memory."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from server.commands._serving import Server
from server.commands.terminal import err, out, refusals

if TYPE_CHECKING:
    from clients.sync import Hope

SESSION = "nora"
TOLD = (
    "My dog is called Biscuit.",
    "I work for a company called Zolfield Instruments.",
    "My sister's name is Ingrid.",
    "We spend our summers in a cottage in Trieste.",
)
ASKED = (
    "What is the name of my dog?",
    "Which company do I work for?",
    "What is my sister called?",
    "Where do we spend our summers?",
    "What is my shoe size?",
    "What is the capital of France?",
)
_ANSWER = 32  # tokens


def demo(
    model: Annotated[str, typer.Option(help="as `hope serve` takes it")] = "smollm2",
    layer: Annotated[str, typer.Option("--memory-layer", help="as `hope serve` takes it")] = "auto",
) -> None:
    """Tell, read, kill, restart, ask: in under two minutes, and in your terminal."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with refusals():
        _demo(model, layer)


def _demo(model: str, layer: str) -> None:
    from clients.sync import Hope

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hope-demo-") as folder:
        place = Path(folder)
        _step("start", "a server with an embedded store")
        with Server(place, ["--model", model, "--memory-layer", layer]) as server:
            with Hope(server.url) as hope:
                _tell(hope)
                _read(hope)
                version = hope.session(SESSION).status().version
            _step("kill", f"kill -9, with session {SESSION!r} at version {version}")
            server.kill()
            _step("restart", "the same store, an empty window, none of what was said re-sent")
            server.start()
            with Hope(server.url) as hope:
                _ask(hope)
    out.print(f"[dim]{time.monotonic() - began:.0f} s in all[/dim]")


def _tell(hope: Hope) -> None:
    for text in TOLD:
        _step("tell", text)
        hope.session(SESSION).ask(text, max_output_tokens=12)


def _read(hope: Hope) -> None:
    """Hand it something to read, so that the window holds nothing of what was told."""
    from server.wire import InputMessage

    text = (Path(__file__).parent / "demo.txt").read_text(encoding="utf-8")
    _step("read", f"a document of {len(text.split()):,} words, to have something in between")
    said = [InputMessage(role="document", content=text)]
    hope.session(SESSION).ask(said, max_output_tokens=1)


def _ask(hope: Hope) -> None:
    from server.wire import Mode

    shown = Table("asked", "with its memory", "without", box=None, pad_edge=False)
    with err.status("asking"):
        for question in ASKED:
            session = hope.session(SESSION)
            ours = session.ask(
                question, mode=Mode.READ_ONLY, window="fresh", max_output_tokens=_ANSWER
            )
            base = session.ask(question, mode=Mode.OFF, max_output_tokens=_ANSWER)
            shown.add_row(escape(question), escape(ours.text.strip()), escape(base.text.strip()))
    out.print(shown)


def _step(what: str, about: str) -> None:
    out.print(f"[bold]{what:>8}[/bold]  {escape(about)}")
