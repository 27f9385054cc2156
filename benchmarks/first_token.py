"""Time to first token through the server, as a client sees it: new, warm, and after kill -9."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from benchmarks.common import console, where
from clients import Hope

ROUNDS = 5


def main() -> None:
    """Print medians over sessions, and how long the server takes to start."""
    with tempfile.TemporaryDirectory() as folder:
        server, url, start = _start(Path(folder))
        try:
            new = [_first(url, f"s{i}", "Hello! Who are you?") for i in range(ROUNDS)]
            warm = [_first(url, f"s{i}", "And what can you do?") for i in range(ROUNDS)]
            server.send_signal(signal.SIGKILL)
            server.wait()
            server, url, restart = _start(Path(folder))
            cold = [_first(url, f"s{i}", "Do you remember me?") for i in range(ROUNDS)]
        finally:
            server.terminate()
            server.wait()
    table = Table("what", "seconds", title=f"medians of {ROUNDS} sessions", caption=where())
    for name, value in {
        "server start": start,
        "server start after kill -9": restart,
        "first token, new session": statistics.median(new),
        "first token, session in RAM": statistics.median(warm),
        "first token, session from the store": statistics.median(cold),
    }.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)


def _start(folder: Path) -> tuple[subprocess.Popen[str], str, float]:
    began = time.perf_counter()
    hope = Path(sys.executable).with_name("hope")
    server = subprocess.Popen(
        [hope, "serve", "--port", "0", "--data-dir", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"on (http://\S+)", line):
            return server, found[1], time.perf_counter() - began
    raise RuntimeError("the server did not start; its messages are above")


def _first(url: str, session: str, text: str) -> float:
    with Hope(url) as hope:
        began = time.perf_counter()
        reply = hope.session(session).say(text, max_output_tokens=16)
        for _piece in reply:
            took = time.perf_counter() - began
            break
        for _piece in reply:
            pass
    time.sleep(0.5)  # what the reply left due is consolidated meanwhile
    return took
