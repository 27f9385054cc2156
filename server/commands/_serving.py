"""A server of our own as a process, for the commands that talk to one as a user would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from server.commands.terminal import Refusal

_PATIENCE = 120.0  # seconds until a server that was started has to be there


class Server:
    """`hope serve` on a free port, with its data in a folder; killed when the block is left."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self._folder = folder
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it can be talked to.

        Raises:
            Refusal: it ended, or is not there in two minutes; with what it said.
        """
        said = self._folder / "server.log"
        command = [sys.executable, "-m", "server", "serve", "--port", "0"]
        command += ["--data-dir", str(self._folder / "data"), *self._arguments]
        with said.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "COLUMNS": "200"},
                start_new_session=True,  # Ctrl-C is for this command, which then stops the server
            )
        deadline = time.monotonic() + _PATIENCE
        while True:
            text = said.read_text(errors="replace")
            if found := re.search(r" on (http://\S+:\d+)\n.*to start", text, re.DOTALL):
                self.url = found[1]
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Refusal(f"the server did not start: {text.strip()[-500:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill it as a power cut would: nothing is said, nothing is written any more."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Let it end in order; kill it if it takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
