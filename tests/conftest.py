"""Real server processes, for the tests that need the whole of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

# a shell's background jobs ignore Ctrl-C, and so would all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

HOPE = Path(sys.executable).with_name("hope")
TINY = ("--model", "random", "--device", "cpu", "--dtype", "float32", "--threads", "1")


def environment(**changes):
    """Return this process's environment without settings of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOPE_")}
    return kept | changes


class Server:
    """`hope serve` as a process of its own."""

    def __init__(self, folder, *args, **env):
        folder.mkdir(parents=True, exist_ok=True)
        self._said, self._complained = folder / "out", folder / "err"
        with self._said.open("wb") as out, self._complained.open("wb") as err:
            self.process = subprocess.Popen(
                [HOPE, "serve", *TINY, "--port", "0", *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(**env),
            )

    @property
    def output(self):
        return self._said.read_text()

    @property
    def errors(self):
        return self._complained.read_text()

    @property
    def pid(self):
        return self.process.pid

    def greeted(self, seconds=30.0):
        """Wait for the greeting and take the address from it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(r" on (http://\S+:\d+)\n.*to start", self.output, re.S)):
            assert self.process.poll() is None, f"it ended: {self.errors}"
            assert time.monotonic() < deadline, f"no greeting: {self.output}{self.errors}"
            time.sleep(0.02)
        self.url = found[1]
        return self

    def ended(self, seconds=15.0):
        """Wait for the end; return the exit code."""
        return self.process.wait(seconds)

    def stop(self, number=signal.SIGTERM, seconds=15.0):
        self.process.send_signal(number)
        return self.ended(seconds)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def hope():
    """Run a `hope` command to its end."""

    def run(*args, seconds=60, **env):
        return subprocess.run(
            [HOPE, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment(**env),
        )

    return run


@pytest.fixture
def serve(tmp_path):
    """Start servers that end with the test: `serve("--store", "memory")`."""
    servers = []

    def start(*args, **env):
        servers.append(Server(tmp_path / f"server-{len(servers)}", *args, **env))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for whoever needs no other; it draws the likeliest token unless asked not to."""
    folder = tmp_path_factory.mktemp("server")
    habits = {"HOPE_TEMPERATURE": "0", "HOPE_DEFAULT_OUTPUT_TOKENS": "4096"}
    server = Server(folder, "--store", "memory", **habits).greeted()
    yield server
    server.kill()
    assert "Traceback" not in server.errors


@pytest.fixture(scope="session")
def endless(server):
    """Return words that the tiny model, without memory, has no end of answers to."""
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        for number in range(64):
            words = f"tell me more {number}"
            asked = {"input": words, "max_output_tokens": 500, "memory": {"mode": "off"}}
            if http.post("/v1/responses", json=asked).json()["status"] == "incomplete":
                return words
    pytest.fail("the tiny model ends all of its replies")
