"""Where a server can die: at every step to its store and back, and around what it tells.

Installed in a forked server only. A step counts if a turn takes it: health checks, start-up
and questions about a session pass by uncounted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

Phase = Literal["before", "half", "sent", "after"]

# `before` a request is sent; with `half` of it sent (a pipeline breaks between two commands);
# with all of it `sent` and no reply read; `after` the last reply to it.
PHASES: tuple[Phase, ...] = ("before", "half", "sent", "after")

_HOUSEKEEPING = frozenset({"AUTH", "CLIENT", "HELLO", "PING", "SELECT"})
_OVER_S = 0.03  # after a turn is over, for what may still be done about it


@dataclass(frozen=True)
class DieAt:
    """Die at the `step`-th step that has this phase, counted from the `turn`-th turn on.

    By SIGSTOP it does not die but stands still there, until it is resumed.
    """

    step: int
    phase: Phase = "before"
    turn: int = 1
    by: int = signal.SIGKILL


NEVER = DieAt(0)


@dataclass
class _Request:
    name: str
    replies: int
    counted: bool = field(default=False)


class Reaper:
    """Watches the steps of turns, tells them, and kills the process at one of them."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._die: DieAt | None = None
        self._turns = self._counted = 0
        self._armed = 0  # how often; what began before the last time does not count
        self._in_turn: ContextVar[int] = ContextVar("in_turn", default=-1)
        self._scripts = _scripts()

    def install(self) -> None:
        """Replace the library's and the server's own methods by watched ones."""
        self._watch_turns()
        self._watch_consolidations()
        self._watch_store()

    def arm(self, die: DieAt) -> None:
        """Count from here on."""
        self._die, self._turns, self._counted = die, 0, 0
        self._armed += 1

    def _passes(self, phase: Phase, name: str) -> None:
        if self._due(phase):
            self._die_of(f"{name} {phase}")

    def _due(self, phase: Phase) -> bool:
        """Count a step; tell whether it is the last."""
        if self._die is None or self._die.phase != phase or self._in_turn.get() != self._armed:
            return False
        if self._turns < self._die.turn:
            return False
        self._counted += 1
        return self._counted == self._die.step

    def _die_of(self, step: str) -> None:
        assert self._die is not None
        self._say(died=step)
        os.kill(os.getpid(), self._die.by)

    # --- turns --------------------------------------------------------------------------------

    def _watch_turns(self) -> None:
        from server.turn import Ended
        from server.turns import OpenTurn, Turns

        reaper = self
        start, put = Turns.start, OpenTurn.put

        def watched_start(turns: Turns, *args: Any, **options: Any) -> OpenTurn:
            reaper._turns += 1
            token = reaper._in_turn.set(reaper._armed)  # the turn's task inherits it
            try:
                return start(turns, *args, **options)
            finally:
                reaper._in_turn.reset(token)

        def watched_put(turn: OpenTurn, happening: Any) -> None:
            told = isinstance(happening, Ended)
            if told:
                reaper._passes("before", "terminal event")
            put(turn, happening)
            if told:
                reaper._passes("after", "terminal event")
            if happening is None:
                loop = asyncio.get_running_loop()
                loop.call_later(_OVER_S, reaper._tell_over, reaper._in_turn.get())

        Turns.start, OpenTurn.put = watched_start, watched_put  # type: ignore[method-assign]

    def _tell_over(self, armed: int) -> None:
        if armed == self._armed:
            self._say(over=True)

    def _watch_consolidations(self) -> None:
        from hope_runtime.engine import Consolidation
        from hope_runtime.report import Finished
        from server.worker import Worker

        reaper = self
        perform = Worker.perform

        async def watched(worker: Worker, job: Any) -> AsyncGenerator[Any, None]:
            counted = isinstance(job, Consolidation)
            if counted:
                reaper._passes("before", "consolidation")
            async with aclosing(perform(worker, job)) as facts:
                async for fact in facts:
                    if counted and isinstance(fact, Finished):
                        reaper._passes("after", "consolidation")
                    yield fact

        Worker.perform = watched  # type: ignore[method-assign]

    # --- the store ----------------------------------------------------------------------------

    def _watch_store(self) -> None:
        from redis.asyncio.connection import AbstractConnection
        from redis.exceptions import ResponseError

        reaper = self
        send, read = AbstractConnection.send_packed_command, AbstractConnection.read_response

        async def watched_send(connection: Any, command: Any, *args: Any, **options: Any) -> None:
            data = _bytes(command)
            commands = parse(data)
            request = _Request(reaper._name(commands), len(commands))
            request.counted = commands[0][0].decode().upper() not in _HOUSEKEEPING
            if request.counted:
                reaper._passes("before", request.name)
                if reaper._due("half"):
                    await send(connection, [data[: _half(data, commands)]], *args, **options)
                    await _flushed(connection)
                    reaper._die_of(f"{request.name} half")
            await send(connection, command, *args, **options)
            connection.watched_request = request
            if request.counted and reaper._due("sent"):
                await _flushed(connection)
                reaper._die_of(f"{request.name} sent")

        async def watched_read(connection: Any, *args: Any, **options: Any) -> Any:
            try:
                reply = await read(connection, *args, **options)
            except ResponseError:
                reaper._answered(connection)
                raise
            reaper._answered(connection)
            return reply

        AbstractConnection.send_packed_command = watched_send  # type: ignore[method-assign]
        AbstractConnection.read_response = watched_read  # type: ignore[method-assign]

    def _answered(self, connection: Any) -> None:
        request: _Request | None = getattr(connection, "watched_request", None)
        if request is None:
            return
        request.replies -= 1
        if request.replies == 0 and request.counted:
            self._passes("after", request.name)

    def _name(self, commands: list[list[bytes]]) -> str:
        """Return `HGET x4`, `MULTI(HSET EXPIRE)` or `EVALSHA commit.lua`."""
        names = [self._one(command) for command in commands]
        atomic = names[0] == "MULTI"
        if atomic:
            names = names[1:-1]
        counts = [(name, len(list(same))) for name, same in groupby(sorted(names))]
        told = " ".join(f"{name} x{count}" if count > 1 else name for name, count in counts)
        return f"MULTI({told})" if atomic else told

    def _one(self, command: list[bytes]) -> str:
        name = command[0].decode().upper()
        if name in {"EVAL", "EVALSHA", "SCRIPT"}:
            known = next((self._scripts[w] for w in command[1:3] if w in self._scripts), "")
            return f"{name} {known}".strip()
        return name


def parse(data: bytes) -> list[list[bytes]]:
    r"""Read packed commands.

    >>> parse(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*1\r\n$4\r\nPING\r\n")
    [[b'GET', b'a'], [b'PING']]
    """
    commands, at = [], 0
    while at < len(data):
        end = data.index(b"\r\n", at)
        words, count = [], int(data[at + 1 : end])
        at = end + 2
        for _ in range(count):
            end = data.index(b"\r\n", at)
            size = int(data[at + 1 : end])
            words.append(data[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        commands.append(words)
    return commands


def _bytes(command: str | bytes | Iterable[bytes]) -> bytes:
    if isinstance(command, str):
        return command.encode()
    return command if isinstance(command, bytes) else b"".join(command)


def _half(data: bytes, commands: list[list[bytes]]) -> int:
    """Return where to cut: between two commands, or in the middle of the only one."""
    if len(commands) == 1:
        return len(data) // 2
    kept = len(commands) // 2 | 1  # odd: pairs are parted
    return sum(_size(command) for command in commands[:kept])


def _size(command: list[bytes]) -> int:
    words = sum(len(b"$%d\r\n" % len(word)) + len(word) + 2 for word in command)
    return len(b"*%d\r\n" % len(command)) + words


async def _flushed(connection: Any) -> None:
    """Wait until the kernel has it all: what a killed process had written is delivered."""
    for _ in range(1000):
        await asyncio.sleep(0)
        if not connection._writer.transport.get_write_buffer_size():
            return


def _scripts() -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    import memory_store

    for path in Path(memory_store.__file__).parent.rglob("*.lua"):
        text = path.read_bytes()
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        found |= {text: path.name, digest: path.name}
    return found
