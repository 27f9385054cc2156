"""The terminal chat: its command line, its words, and itself as a process."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clients import chat
from server import wire

ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "clients.chat", "--session", "nora"]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(home), "XDG_STATE_HOME": str(home), "NO_COLOR": "1"}


def piped(url: str, home: Path, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, "--url", url],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(home),
        timeout=20,
    )


def test_the_command_line_is_read():
    line = (
        "--url http://there:1 --session nora --api-key k --system Hush "
        "--temperature 0 --top-p 0.9 --seed 7 --max-tokens 5"
    )

    settings = chat.parse(shlex.split(line))

    assert (settings.url, settings.session, settings.api_key) == ("http://there:1", "nora", "k")
    assert settings.options == {
        "instructions": "Hush",
        "temperature": 0.0,
        "top_p": 0.9,
        "seed": 7,
        "max_output_tokens": 5,
    }


def test_what_is_not_said_is_left_to_the_environment_and_the_server(monkeypatch):
    monkeypatch.setenv("HOPE_API_KEY", "from-the-environment")
    monkeypatch.setenv("LOGNAME", "ada")

    settings = chat.parse([])

    assert (settings.session, settings.api_key) == ("ada", "from-the-environment")
    assert settings.options == {}


def test_levels_are_told_in_words():
    never = wire.LevelStatus(
        name="slow",
        chunk=4096,
        blocks=[0],
        updates=0,
        last_position=None,
        last_at=None,
        last_loss=None,
        last_outcome=None,
        movement=0.0,
        due=0,
    )
    once = never.model_copy(
        update={"last_position": 4096, "last_at": 90.0, "last_loss": 2.5, "movement": 0.01}
    )

    table = chat.levels_table([never, once], now=100.0)

    assert list(table.columns[3].cells) == ["not yet", "10 s ago, at token 4,096"]
    assert list(table.columns[4].cells) == ["-", "2.50"]
    assert list(table.columns[5].cells) == ["0.000%", "1.000%"]


def test_piped_lines_are_answered_in_plain_text(stand_in, tmp_path):
    done = piped(stand_in.url, tmp_path, "one two\n\n[red]three :smile:\n")

    assert done.stdout == "one two \n[red]three :smile: \n"
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_work_in_a_pipe(stand_in, tmp_path):
    commands = ["/memory", "/sessions", "/nonsense", "/new ada", "/new gone", "/new nora"]
    script = "\n".join(["hello", *commands, "/delete", "/help", "/quit", "no"])

    done = piped(stand_in.url, tmp_path, script)

    for words in (
        "nora: version 1, 1,234 tokens, 1 turns, surprise of the last reply 2.25",
        "64 tokens",
        "12 s ago, at token 64",
        "1.250%",
        "ada · a new session",
        "nora · version 1 · 1,234 tokens in memory · tiny",
        "nora is forgotten (1,000 bytes). Go on with /new NAME.",
        "Older copies: backups until they age out.",
        "/memory       what the session has learned",
    ):
        assert words in done.stdout
    assert done.stderr == (
        "There is no command /nonsense; /help lists them.\n"
        "The session was deleted. Go on as another with /new NAME.\n"
    )
    assert done.returncode == 0


def test_versions_are_gone_back_to_copied_frozen_and_written(stand_in, tmp_path):
    script = [
        "one",
        "two",
        "/versions",
        "/rollback 1",
        "/rollback",
        "/fork",
        "/fork twin",
        "/freeze",
        "/unfreeze",
        "/export",
        f"/export {tmp_path}/nowhere/nora",
        f"/export {tmp_path}/nora",
    ]

    done = piped(stand_in.url, tmp_path, "\n".join(script))

    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["2", "1", "0", "s", "ago", "2,468", "2"] in rows
    assert ["1", "-", "1", "min", "ago", "1,234", "1"] in rows
    size = (tmp_path / "nora").stat().st_size
    for words in (
        "nora is as it was at version 1, which is version 3 now.",
        "twin is a copy of nora. Talk to it: /new twin",
        "nora is frozen at version 3; it is read, not changed.",
        "nora learns again, from version 3 on.",
        f"Version 3 is in {tmp_path}/nora ({size:,} bytes).",
    ):
        assert words in done.stdout
    assert done.stderr == (
        "Name the version: /rollback N; /versions lists them\n"
        "Name the new session: /fork NAME\n"
        "Name the file: /export FILE\n"
        f"{tmp_path}/nowhere/nora cannot be written: No such file or directory.\n"
    )
    assert stand_in.sessions["twin"] == [("one", "one ")]


def test_a_memory_that_had_to_be_recovered_is_told(stand_in, tmp_path):
    stand_in.recovered = "version 3 is damaged; version 2 stands in"

    done = piped(stand_in.url, tmp_path, "hello\n")

    assert done.stdout == "hello \n"
    assert done.stderr == "memory recovered: version 3 is damaged; version 2 stands in\n"


def test_a_server_that_is_not_there_is_told_in_one_sentence(tmp_path):
    done = piped("http://127.0.0.1:9", tmp_path, "hello\n")

    assert done.stderr == (
        "No HOPE Server answers at http://127.0.0.1:9. Is `make serve` running?\n"
    )
    assert done.returncode == 1


def test_a_refusal_is_told_and_ends_a_pipe(stand_in, tmp_path):
    done = piped(stand_in.url, tmp_path, "refuse me\n")

    assert (done.returncode, done.stderr) == (1, "Refused: version_conflict.\n")


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, url: str, home: Path) -> None:
        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*CHAT, "--url", url],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
            env=environment(home) | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(terminal)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 10
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.seen += os.read(self._screen, 4096).decode()
        self.seen = self.seen.partition(words)[2]

    def press_control_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Press Ctrl-C at the prompt; again if it fell between the prompt and its waiting."""
        self.press_control_c()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.press_control_c()
        return self.close()

    def close(self) -> int:
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            os.close(self._screen)


@pytest.fixture
def terminal(stand_in, tmp_path, interruptible):
    terminal = Terminal(stand_in.url, tmp_path)
    yield terminal
    if terminal.process.poll() is None:
        terminal.close()


def test_control_c_stops_a_reply_and_then_leaves(terminal, stand_in):
    terminal.wait_for("nora · a new session")
    terminal.wait_for("nora> ")
    terminal.type("forever\n")
    terminal.wait_for("on and on and ")
    terminal.press_control_c()
    terminal.wait_for("stopped; what was said is kept")
    terminal.wait_for("version 1 committed · 3 + ")
    terminal.wait_for("surprise 2.25 · consolidated mid · consolidating slow")
    terminal.wait_for("nora> ")
    stand_in.faults = [stand_in.cut(10)]
    terminal.type("and on\n")
    terminal.wait_for("version 2 committed · answered before: not learned again")
    terminal.wait_for("nora> ")

    assert terminal.leave() == 0


def test_an_error_does_not_end_the_talk_and_control_d_does(terminal, tmp_path):
    terminal.wait_for("nora> ")
    terminal.type("refuse me\n")
    terminal.wait_for("Refused: version_conflict.")
    terminal.wait_for("nora> ")
    terminal.type("/delete\n")
    terminal.wait_for("[y/N] ")
    terminal.type("n\n")
    terminal.wait_for("nora> ")
    terminal.type("\x04")

    assert terminal.close() == 0
    assert "refuse me" in (tmp_path / "hope" / "chat_history").read_text()


def test_a_new_conversation_begins_with_the_next_message_alone(stand_in, tmp_path):
    done = piped(stand_in.url, tmp_path, "one\n/fresh\ntwo\nthree")

    assert "Your next message begins a new conversation; memory is kept." in done.stdout
    windows = [request.memory.window for request in stand_in.requests]
    assert windows == ["kept", "fresh", "kept"]
