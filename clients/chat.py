"""Talk to a session from the terminal, and watch its memory learn."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clients.core import Options
from clients.errors import HopeError, Refused, Unreachable
from clients.sync import Hope, Reply
from server import wire

HELP = """\
/memory       what the session has learned, level by level
/versions     the versions of it that are kept
/rollback N   go back to one of them; that can be undone the same way
/fork NAME    copy it to a new session
/freeze       let it be read, and not changed; /unfreeze ends that
/export FILE  write all of it to a file
/delete       forget this session and everything it learned
/sessions     every session on the server
/fresh        begin a new conversation: what was said is reached by memory only
/new NAME     go on as another session, new or old
/quit         leave (Ctrl-D does too); Ctrl-C stops a reply and keeps what was said"""


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments)
    with Hope(settings.url, settings.api_key) as hope:
        chat = Chat(hope, settings, interactive=sys.stdin.isatty())
        try:
            return chat.run()
        except Unreachable as error:
            chat.complain(f"{error} Is `make serve` running?")
        except HopeError as error:
            chat.complain(str(error))
        except KeyboardInterrupt:
            return 130
        return 1


@dataclass(frozen=True, slots=True)
class Settings:
    url: str
    session: str
    api_key: str | None
    options: Options


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    >>> parse(["--session", "nora", "--temperature", "0.5"]).options
    {'temperature': 0.5}
    """
    given = _parser().parse_args(arguments)
    options = Options()
    if given.system is not None:
        options["instructions"] = given.system
    if given.temperature is not None:
        options["temperature"] = given.temperature
    if given.top_p is not None:
        options["top_p"] = given.top_p
    if given.seed is not None:
        options["seed"] = given.seed
    if given.max_tokens is not None:
        options["max_output_tokens"] = given.max_tokens
    return Settings(given.url, given.session, given.api_key or None, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hope-chat", description=__doc__)
    say = parser.add_argument
    say("--url", default=os.environ.get("HOPE_URL", "http://127.0.0.1:8000"), help="the server")
    say("--session", default=_user(), help="whose memory to talk to (default: your user name)")
    say("--api-key", default=os.environ.get("HOPE_API_KEY"), help="or HOPE_API_KEY")
    say("--system", metavar="TEXT", help="instructions to the model, learned like all else")
    say("--temperature", type=float, help="0 always takes the likeliest token")
    say("--top-p", type=float, help="the share of probability to choose from")
    say("--seed", type=int, help="makes the choices repeatable")
    say("--max-tokens", type=int, help="the longest reply")
    return parser


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "me"


class Chat:
    """The loop between one person and the server."""

    def __init__(self, hope: Hope, settings: Settings, *, interactive: bool) -> None:
        self._hope = hope
        self._session = hope.session(settings.session)
        self._options = settings.options
        self._interactive = interactive
        self._fresh = False  # the next message begins a new conversation
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._out.print(HELP),
            "/memory": lambda _: self._show_memory(),
            "/versions": lambda _: self._show_versions(),
            "/rollback": self._roll_back,
            "/fork": self._fork,
            "/freeze": lambda _: self._freeze(),
            "/unfreeze": lambda _: self._unfreeze(),
            "/export": self._export,
            "/delete": lambda _: self._delete(),
            "/sessions": lambda _: self._show_sessions(),
            "/fresh": lambda _: self._begin_afresh(),
            "/new": self._switch,
        }

    def run(self) -> int:
        """Talk until the end of the input; returns the exit status."""
        if not self._interactive:
            return self._read_all()
        with _history():
            self._greet()
            while (line := self._prompt()) is not None:
                with self._keeping_on():
                    self._handle(line)
        return 0

    def complain(self, sentence: str) -> None:
        self._err.print(sentence, style="red")

    def _read_all(self) -> int:
        for line in sys.stdin:
            if line.strip() == "/quit":
                break
            self._handle(line.strip())
        return 0

    def _prompt(self) -> str | None:
        """Return the next line, or None to leave."""
        try:
            line = input(f"{self._session.name}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        return None if line == "/quit" else line

    @contextlib.contextmanager
    def _keeping_on(self) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            self.complain(f"{error} Is `make serve` running?")
        except HopeError as error:
            self.complain(str(error))

    def _handle(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            self._say(line)
        elif command := self._commands.get(name):
            command(rest.strip())
        else:
            self.complain(f"There is no command {name}; /help lists them.")

    # --- talking ------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        options = self._options.copy()
        if self._fresh:
            options["window"] = "fresh"
        reply = self._session.say(line, **options)
        try:
            for piece in reply:
                self._out.print(printable(piece), end="")
        except KeyboardInterrupt:
            reply.cancel()
            self._tell_stopped(reply)
            if not self._interactive:
                raise
        else:
            self._out.print()
        if reply.memory is not None and reply.memory.committed_version is not None:
            self._fresh = False
        if self._interactive:
            self._out.print(summary(reply), style="dim")
        if reply.memory is not None and reply.memory.recovered is not None:
            self._warn(f"memory recovered: {reply.memory.recovered}")

    def _tell_stopped(self, reply: Reply) -> None:
        self._out.print()
        kept = reply.memory is not None and reply.memory.outcome is wire.Outcome.COMMITTED
        fate = "what was said is kept" if kept else "nothing of it was kept"
        self._warn(f"stopped; {fate}")

    def _warn(self, sentence: str) -> None:
        self._err.print(printable(sentence), style="yellow")

    def _greet(self) -> None:
        try:
            status = self._session.status()
        except Refused as error:
            if error.status == 404:
                self._out.print(
                    f"{self._session.name} · a new session; /help for help", style="dim"
                )
            elif error.status == 410:
                self.complain(f"{error} Go on as another with /new NAME.")
            else:
                raise
        else:
            self._out.print(
                f"{self._session.name} · version {status.version} · "
                f"{status.tokens:,} tokens in memory · "
                f"{'frozen · ' if status.frozen else ''}{status.model}; /help for help",
                style="dim",
            )

    # --- commands -----------------------------------------------------------------------------

    def _show_memory(self) -> None:
        status = self._session.status()
        surprise = "-" if status.surprise is None else f"{status.surprise:.2f}"
        self._out.print(
            f"{status.id}: version {status.version}, {status.tokens:,} tokens, "
            f"{status.turns} turns, surprise of the last reply {surprise}"
            f"{', frozen' if status.frozen else ''}"
        )
        self._out.print(levels_table(status.levels, time.time()))

    def _show_versions(self) -> None:
        self._out.print(versions_table(self._session.versions(), time.time()))

    def _roll_back(self, number: str) -> None:
        if not number.isdecimal():
            self.complain("Name the version: /rollback N; /versions lists them")
            return
        now = self._session.rollback(int(number))
        self._out.print(
            f"{now.id} is as it was at version {number}, which is version {now.version} now."
        )

    def _fork(self, name: str) -> None:
        if not name:
            self.complain("Name the new session: /fork NAME")
            return
        made = self._session.fork(name)
        self._out.print(f"{made.name} is a copy of {self._session.name}. Talk to it: /new {name}")

    def _freeze(self) -> None:
        now = self._session.freeze()
        self._out.print(f"{now.id} is frozen at version {now.version}; it is read, not changed.")

    def _unfreeze(self) -> None:
        now = self._session.unfreeze()
        self._out.print(f"{now.id} learns again, from version {now.version} on.")

    def _export(self, name: str) -> None:
        if not name:
            self.complain("Name the file: /export FILE")
            return
        try:
            written = self._session.export(Path(name).expanduser())
        except OSError as error:
            self.complain(f"{name} cannot be written: {error.strerror or error}.")
        else:
            self._out.print(f"Version {written.version} is in {name} ({written.bytes:,} bytes).")

    def _show_sessions(self) -> None:
        table = _table("session", "version", "tokens", "turns", "last changed")
        for session in self._hope.sessions():
            table.add_row(
                session.id,
                str(session.version),
                f"{session.tokens:,}",
                str(session.turns),
                ago(time.time() - session.updated_at),
            )
        self._out.print(table)

    def _begin_afresh(self) -> None:
        self._fresh = True
        self._out.print("Your next message begins a new conversation; memory is kept.")

    def _switch(self, name: str) -> None:
        if not name:
            self.complain("Name the session: /new NAME")
            return
        self._session = self._hope.session(name)
        self._greet()

    def _delete(self) -> None:
        if self._interactive and not self._sure():
            return
        gone = self._session.delete()
        self._out.print(f"{gone.id} is forgotten ({gone.bytes:,} bytes). Go on with /new NAME.")
        if gone.left:
            self._warn(f"{gone.left} keys of it are left in the store.")
        if gone.remains:
            self._out.print(f"Older copies: {gone.remains}.", style="dim")

    def _sure(self) -> bool:
        question = f"Forget {self._session.name} and everything it learned? [y/N] "
        try:
            return input(question).strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            print()
            return False


# --- in words ---------------------------------------------------------------------------------


def summary(reply: Reply) -> str:
    """Say in one line what became of a turn."""
    parts: list[str] = []
    if reply.memory is not None:
        version = reply.memory.committed_version
        outcome = reply.memory.outcome.replace("_", " ")
        parts.append(f"version {version} committed" if version is not None else outcome)
        if reply.memory.replayed:
            parts.append("answered before: not learned again")
    if reply.usage is not None:
        parts.append(f"{reply.usage.input_tokens} + {reply.usage.output_tokens} tokens")
    if reply.memory is not None and reply.memory.surprise is not None:
        parts.append(f"surprise {reply.memory.surprise:.2f}")
    if reply.memory is not None and reply.memory.consolidated_levels:
        parts.append(f"consolidated {', '.join(reply.memory.consolidated_levels)}")
    if reply.memory is not None and reply.memory.due_levels:
        parts.append(f"consolidating {', '.join(reply.memory.due_levels)}")
    if reply.cut_short_by == "max_output_tokens":
        parts.append("cut at the longest length")
    return " · ".join(parts)


def printable(text: str) -> str:
    r"""Leave out what would command the terminal instead of being read.

    >>> printable("one\n\x1b[2Jtwo")
    'one\n[2Jtwo'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def levels_table(levels: Sequence[wire.LevelStatus], now: float) -> Table:
    table = _table("level", "every", "updates", "last consolidated", "loss", "movement", "due")
    for level in levels:
        table.add_row(
            level.name,
            f"{level.chunk:,} tokens",
            str(level.updates),
            _last(level, now),
            "-" if level.last_loss is None else f"{level.last_loss:.2f}",
            f"{level.movement:.3%}",
            str(level.due or ""),
        )
    return table


def versions_table(versions: Sequence[wire.SessionVersion], now: float) -> Table:
    table = _table("version", "from", "when", "tokens", "turns", "")
    for one in versions:
        table.add_row(
            str(one.version),
            str(one.parent or "-"),
            ago(now - one.created_at),
            f"{one.tokens:,}",
            str(one.turns),
            "frozen" if one.frozen else "",
        )
    return table


def _last(level: wire.LevelStatus, now: float) -> str:
    if level.last_at is None or level.last_position is None:
        return "not yet"
    return f"{ago(now - level.last_at)}, at token {level.last_position:,}"


def ago(seconds: float) -> str:
    """Say how long ago something was.

    >>> ago(12.3), ago(150), ago(90_000)
    ('12 s ago', '2 min ago', '1 d ago')
    """
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column)
    return table


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Give the prompt line editing, and a memory of its own, where readline exists."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "hope" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)


if __name__ == "__main__":
    sys.exit(main())
