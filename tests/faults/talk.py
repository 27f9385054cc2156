"""Turns that are in flight while something happens: their events are heard one by one.

The users here are those of `oracle.py`; what they are told goes into the same book.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from tests.faults.oracle import TERMINAL, Answer, Fate, Line, Turn, Twins, Witness
from tests.tools.proxy import Proxy

BEFORE = "my name is Ada"  # what a session has heard, where it has heard anything
COMMIT = b"One commit of a session"  # said by commit.lua, which travels with every call
STAGE = b"HSET"  # the first command of a blob on its way
LONG = 4000  # tokens: more than any test listens to

_LIKELY = (8, 7)  # which of the words were right when this was written
_FATES = {
    "committed": Fate.COMMITTED,
    "read_only": Fate.READ_ONLY,
    "off": Fate.READ_ONLY,
    "rolled_back": Fate.REFUSED,
}


class Stream:
    """One turn over HTTP, told event by event, on a connection of its own."""

    def __init__(
        self, url: str, session: str | None, turn: Turn, *, seconds: float = 30.0, **memory: Any
    ) -> None:
        body = {
            "input": turn.text,
            "turn_id": turn.id,
            "max_output_tokens": turn.most,
            "temperature": 0,
            "memory": {"rates": {"user": 1, "assistant": 1}} | memory,
            "stream": True,
        } | ({"conversation": session} if session else {})
        self.turn = turn
        self.said = 0  # pieces of text so far
        self.times: list[float] = []  # when each of them came
        self.status = "in_progress"
        self._line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=seconds)
        headers = {"Content-Type": "application/json"}
        self._line.request("POST", "/v1/responses", json.dumps(body), headers)
        self._reply = self._line.getresponse()
        assert self._reply.status == 200, self._reply.read()

    def hear(self, pieces: int) -> None:
        """Listen until so many pieces of text have come."""
        while self.said < pieces:
            event = self._event()
            if event is None or event["type"] in TERMINAL:
                self.close()
                raise AssertionError(f"it has ended: {event}")

    def end(self) -> Answer:
        """Listen to the end; return what was told."""
        try:
            while (event := self._event()) is not None:
                if event["type"] in TERMINAL:
                    self.status = event["response"]["status"]
                    return judged(event["response"])
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self.close()
        return Answer(Fate.UNKNOWN, code="cut")

    def hang_up(self) -> None:
        """Leave without a word."""
        at = self._line.sock
        at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._reply.close()
        self._line.close()

    def _event(self) -> dict[str, Any] | None:
        while line := self._reply.readline():
            if line.startswith(b"data: ") and line.endswith(b"\n"):
                event: dict[str, Any] = json.loads(line[6:])
                if event["type"] == "response.output_text.delta":
                    self.said += 1
                    self.times.append(time.monotonic())
                return event
        return None


def judged(response: Mapping[str, Any]) -> Answer:
    """Return what a terminal response tells."""
    memory = response["memory"]
    reply = "".join(part["text"] for item in response["output"] for part in item["content"])
    code = (response["error"] or {}).get("code", "")
    return Answer(_FATES.get(memory["outcome"], Fate.UNKNOWN), reply, memory, code)


class Talker(Witness):
    """A user to whose turns something happens while they are in flight."""

    def __init__(self, name: str, twins: Twins, store_url: str | None) -> None:
        super().__init__(name, twins, store_url)

    def begin(self, url: str, text: str, most: int = LONG) -> Stream:
        return Stream(url, self.name, Turn(text, most))

    def note(self, turn: Turn, answer: Answer) -> Answer:
        """Write down what became of a turn."""
        if answer.fate is Fate.COMMITTED:
            self._acknowledged(turn, answer)
        elif answer.fate is Fate.UNKNOWN:
            self.doubtful = turn
        return answer

    def again(self, url: str, turn: Turn, most: int = 16) -> Answer:
        """Send a turn again under its id (with a limit of its own) until it is had."""
        shorter = Turn(turn.text, most, turn.id)
        return self.note(shorter, Line(url).insist(self.name, shorter))


def replayed(url: str, talker: Witness) -> Answer:
    """Ask for the last acknowledged turn once more; check that it is only told, not had."""
    turn, reply = talker.history[-1]
    before = Line(url).settled(talker.name)
    answer = Line(url).insist(talker.name, turn)
    assert answer.fate is Fate.COMMITTED, answer
    assert answer.memory["replayed"]
    assert answer.reply == reply
    after = Line(url).settled(talker.name)
    assert (after["version"], after["turns"]) == (before["version"], before["turns"])
    return answer


class InBackground:
    """Work in a thread: `with InBackground(call, *args) as work: ...; work.result()`."""

    def __init__(self, work: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._work = lambda: work(*args, **options)
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, seconds: float = 30.0) -> Any:
        self._thread.join(seconds)
        assert not self.running, f"it has not ended in {seconds} s"
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error


class Gate(Proxy):
    """A proxy that can keep requests with some word from going on, while all others pass."""

    def __init__(self, host: str, port: int | None = None) -> None:
        super().__init__(host, port)
        self.word: bytes | None = None
        self.kept = 0  # requests that wait now
        self.opened = asyncio.Event()

    def close_for(self, word: bytes) -> None:
        self._do(self._close(word))

    def let_through(self) -> None:
        """Let go what waits, and whatever comes."""
        self._do(self._open())

    def let_one_through(self) -> None:
        """Let go what waits, and keep what comes."""
        self._do(self._open(self.word))

    def wait(self, seconds: float = 10.0) -> None:
        """Wait until something waits."""
        wait_until(lambda: self.kept > 0, seconds)

    async def _close(self, word: bytes) -> None:
        self.word, self.kept = word, 0
        self.opened.clear()

    async def _open(self, word: bytes | None = None) -> None:
        self.word, self.kept = word, 0
        self.opened.set()
        if word is not None:
            self.opened.clear()  # those who waited have been woken

    async def _connect(self) -> Any:
        reader, writer = await super()._connect()
        return reader, _Barred(writer, self)


class _Barred:
    """The end towards the store, where a request waits that is kept."""

    def __init__(self, writer: asyncio.StreamWriter, gate: Gate) -> None:
        self._writer, self._gate = writer, gate
        self._waiting = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def write(self, data: bytes) -> None:
        word = self._gate.word
        if self._waiting or (word is not None and word in data):
            self._gate.kept += not self._waiting
            self._waiting += data
        else:
            self._writer.write(data)

    async def drain(self) -> None:
        if self._waiting:
            await self._gate.opened.wait()
            waiting, self._waiting = self._waiting, b""
            self._writer.write(waiting)
        await self._writer.drain()


def endless_words(line: Line, *before: str, pieces: int = 200, mode: str = "read_write") -> str:
    """Find words that a session which has heard these turns answers at great length."""
    for number in (*_LIKELY, *range(64)):
        session, words = f"endless-{uuid.uuid4().hex}", f"tell me more {number}"
        for text in before:
            assert line.insist(session, Turn(text)).fate is Fate.COMMITTED
            line.settled(session)
        stream = Stream(line.url, session, Turn(words, LONG), mode=mode)
        with suppress(AssertionError):
            stream.hear(pieces)
            stream.hang_up()
            return words
    raise AssertionError("the tiny model ends all of its replies")


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not come within {seconds} s"
        time.sleep(0.01)


def metric(url: str, name: str, **labels: str) -> float:
    """Return one value of the server's metrics; 0 where there is none."""
    _, page = Line(url).get("/metrics")
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    for line in page.decode().splitlines():
        told, _, value = line.rpartition(" ")
        label, _, rest = told.partition("{")
        if label == name and wanted <= set(_labels(rest)):
            return float(value)
    return 0.0


def _labels(rest: str) -> Iterator[str]:
    yield from rest.rstrip("}").split(",")


def quiet(url: str, seconds: float = 10.0) -> None:
    """Wait until no turn is under way on a server."""
    wait_until(
        lambda: metric(url, "hope_requests_in_progress") + metric(url, "hope_leases_held") == 0,
        seconds,
    )
