"""The async client: carries the words of `core` over one WebSocket, and REST over HTTP.

```python
async with AsyncHope() as hope:
    session = hope.session("nora")
    async for piece in session.say("I keep bees."):
        print(piece, end="")
```
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Self, TypeVar, Unpack
from urllib.parse import quote, urlsplit
from weakref import WeakValueDictionary

import httpx2
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from clients import core
from clients.errors import (
    ConnectionLost,
    HopeError,
    ProtocolViolation,
    Refused,
    Unreachable,
)
from server import wire

__all__ = [
    "AsyncHope",
    "AsyncReply",
    "AsyncSession",
    "ConnectionLost",
    "HopeError",
    "ProtocolViolation",
    "Refused",
    "Unreachable",
]

DEFAULT_URL = "http://127.0.0.1:8000"
OPEN_TIMEOUT_S = 10.0
REST_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 30.0  # a cancelled turn still has to be committed

Shape = TypeVar("Shape", bound=wire.Wire)
OnMemory = Callable[[core.MemoryNews], None]


class AsyncHope:
    """A client of one server; any number of sessions may talk through it at once.

    The socket is opened by the first turn and again by the first turn after it was lost.
    `on_memory` asks for news of consolidations and commits and is called with each.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        on_memory: OnMemory | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._socket_url = core.socket_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._on_memory = on_memory
        self._near = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._http: httpx2.AsyncClient | None = None
        self._line: _Line | None = None
        self._opening = asyncio.Lock()
        self._sessions: WeakValueDictionary[str, AsyncSession] = WeakValueDictionary()

    def session(self, name: str) -> AsyncSession:
        """Return the session of that name; the server creates it with its first turn."""
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = AsyncSession(self, name)
        return session

    async def sessions(self) -> list[wire.Session]:
        """Return every session of this key, as it stands."""
        sessions: list[wire.Session] = []
        cursor: str | None = None
        while True:
            query = {"cursor": cursor} if cursor else {}
            page = await self.rest("GET", "/v1/sessions", wire.SessionList, query)
            sessions += page.data
            cursor = page.next_cursor
            if not page.has_more or cursor is None:
                return sessions

    async def models(self) -> list[wire.ModelCard]:
        return (await self.rest("GET", "/v1/models", wire.ModelList)).data

    async def health(self) -> wire.Health:
        """Return how the server is, also when it is not ready to serve."""
        response = await self._request("GET", "/health/ready")
        if response.status_code == 503:
            with contextlib.suppress(ValueError):
                return wire.Health.model_validate_json(response.content)
        return _read(response, wire.Health)

    async def aclose(self) -> None:
        """Hang up. Turns still running are lost, and the server rolls them back."""
        if self._line is not None:
            await self._line.close()
        if self._http is not None:
            await self._http.aclose()
        self._line = self._http = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def rest(
        self, method: str, path: str, shape: type[Shape], query: dict[str, str] | None = None
    ) -> Shape:
        """Make one HTTP request and read its answer, or raise what the server refused with."""
        return _read(await self._request(method, path, query), shape)

    def request(
        self,
        session: str | None,
        said: core.Said,
        turn_id: str | None,
        **options: Unpack[core.Options],
    ) -> core.Turn:
        turn_id = turn_id or f"turn_{uuid.uuid4().hex}"
        include = ["hope:memory"] if self._on_memory else []
        return core.Turn(core.request(session, said, turn_id, include, **options), turn_id)

    async def line(self) -> _Line:
        """Return an open line, dialling if there is none."""
        async with self._opening:
            if self._line is None or self._line.dead:
                self._line = _Line(await self._dial(), self._on_memory)
            return self._line

    async def _dial(self) -> ClientConnection:
        try:
            return await connect(
                self._socket_url,
                additional_headers=self._headers,
                compression=None,
                max_size=None,
                open_timeout=OPEN_TIMEOUT_S,
                proxy=None if self._near else True,
            )
        except InvalidStatus as error:
            response = error.response
            retry_after = response.headers.get("Retry-After")
            raise Refused.from_http(
                response.status_code, bytes(response.body or b""), retry_after
            ) from error
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise Unreachable(f"No HOPE Server answers at {self.url}.") from error

    async def _request(
        self, method: str, path: str, query: dict[str, str] | None = None
    ) -> httpx2.Response:
        if self._http is None:
            self._http = httpx2.AsyncClient(
                headers=self._headers, timeout=REST_TIMEOUT_S, trust_env=not self._near
            )
        try:
            return await self._http.request(method, self.url + path, params=query)
        except httpx2.RequestError as error:
            raise Unreachable(f"No HOPE Server answers at {self.url}.") from error


class AsyncSession:
    """One learner on the server: what it is told here, it still knows tomorrow."""

    def __init__(self, hope: AsyncHope, name: str) -> None:
        self.hope = hope
        self.name = name
        self.floor = asyncio.Lock()  # held by the reply whose turn it is

    def say(
        self, said: core.Said, *, turn_id: str | None = None, **options: Unpack[core.Options]
    ) -> AsyncReply:
        """Return the reply to come; nothing is sent until it is iterated, awaited or entered."""
        return AsyncReply(self, self.hope.request(self.name, said, turn_id, **options))

    async def ask(
        self, said: core.Said, *, turn_id: str | None = None, **options: Unpack[core.Options]
    ) -> AsyncReply:
        """Say something and return the whole reply."""
        return await self.say(said, turn_id=turn_id, **options).finish()

    async def status(self) -> wire.Session:
        return await self.hope.rest("GET", f"/v1/sessions/{self._quoted}", wire.Session)

    async def transcript(self) -> list[wire.TranscriptItem]:
        """Return all that was said, oldest first."""
        items: list[wire.TranscriptItem] = []
        query: dict[str, str] = {}
        while True:
            page = await self.hope.rest("GET", self._items, wire.Transcript, query)
            items += page.data
            if not page.has_more or page.last_id is None or query.get("after") == page.last_id:
                return items
            query = {"after": page.last_id}

    async def delete(self) -> wire.DeletedSession:
        """Forget the session and everything it learned."""
        return await self.hope.rest("DELETE", f"/v1/sessions/{self._quoted}", wire.DeletedSession)

    @property
    def _quoted(self) -> str:
        return quote(self.name, safe="")

    @property
    def _items(self) -> str:
        return f"/v1/conversations/{self._quoted}/items"


class AsyncReply(core.Record):
    """A reply while it arrives, and its record after.

    Leaving the iteration early stops the reply: what was said until then is kept. `await
    reply.cancel()` does the same and returns when the server has told what became of the turn.
    Turns of one session wait for each other.
    """

    def __init__(self, session: AsyncSession, turn: core.Turn) -> None:
        super().__init__(turn)
        self.session = session
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._over = asyncio.Event()
        self._line: _Line | None = None
        self._starting: asyncio.Task[None] | None = None
        self._has_floor = False

    async def __aiter__(self) -> AsyncGenerator[str]:
        try:
            while (piece := await self.next_piece()) is not None:
                yield piece
        finally:
            if not self._over.is_set():
                await self.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.cancel()

    async def start(self) -> None:
        """Send the request, once; later calls wait for the first."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.wait([self._starting])
        if not self._starting.cancelled():
            self._starting.result()

    async def next_piece(self) -> str | None:
        """Return the next piece of text, or None at the end; raises what the turn failed with."""
        await self.start()
        piece = await self._pieces.get()
        if piece is None:
            self._pieces.put_nowait(None)
            if self.turn.error is not None:
                raise self.turn.error
        return piece

    async def finish(self) -> Self:
        """Wait for the end; raises what the turn failed with."""
        async for _ in self:
            pass
        return self

    async def cancel(self) -> Self:
        """Stop the reply and wait until the server has told what was kept."""
        if self._starting is None or self._over.is_set():
            return self
        if self._line is None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
            if not self._over.is_set():
                self._end(HopeError("The turn was stopped before it was sent."))
            return self
        await self._line.cancel(self.turn)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), CANCEL_TIMEOUT_S)
        return self

    def hear(self, fact: core.Fact) -> None:
        match fact:
            case core.Text():
                self._pieces.put_nowait(fact.piece)
            case core.Finished() | core.Failed():
                self._end()
            case _:
                pass

    async def _start(self) -> None:
        await self.session.floor.acquire()
        self._has_floor = True
        try:
            self._line = await self.session.hope.line()
            await self._line.ask(self)
        except HopeError as error:
            self._end(error)

    def _end(self, error: HopeError | None = None) -> None:
        if error is not None:
            self.turn.fail(error)
        if self._has_floor:
            self.session.floor.release()
        self._over.set()
        self._pieces.put_nowait(None)


class _Line:
    """One open socket and the turns that run on it."""

    def __init__(self, socket: ClientConnection, on_memory: OnMemory | None) -> None:
        self._socket = socket
        self._on_memory = on_memory
        self._connection = core.Connection()
        self._replies: dict[str, AsyncReply] = {}
        self._reader = asyncio.create_task(self._read())
        self.dead = False

    async def ask(self, reply: AsyncReply) -> None:
        self._replies[reply.turn.id] = reply
        message = self._connection.ask(reply.turn)
        try:
            await self._socket.send(message)
        except ConnectionClosed:
            await self._reader  # has told every open turn, or does now

    async def cancel(self, turn: core.Turn) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(self._connection.cancel(turn))

    async def close(self) -> None:
        self.dead = True
        await self._socket.close()
        await self._reader

    async def _read(self) -> None:
        reason = "the client failed"
        try:
            async for message in self._socket:
                self._tell(self._connection.receive(message))
            reason = self._farewell()
        except ConnectionClosed:
            reason = self._farewell()
        except ProtocolViolation as error:
            reason = error.message
            await self._socket.close(1002)
        finally:
            self.dead = True
            self._tell(self._connection.lose(reason))

    def _farewell(self) -> str:
        code, words = self._socket.close_code, self._socket.close_reason
        if self.dead:
            return "the client hung up"
        if code == 1006:
            return "the server went away"
        return words or f"the server closed with code {code}"

    def _tell(self, heard: list[core.Heard]) -> None:
        for turn_id, fact in heard:
            if isinstance(fact, core.MemoryEvent):
                if self._on_memory is not None:
                    self._on_memory(fact.news)
            elif turn_id is not None:
                self._replies[turn_id].hear(fact)
                if isinstance(fact, core.Finished | core.Failed):
                    del self._replies[turn_id]


def _read(response: httpx2.Response, shape: type[Shape]) -> Shape:
    if response.is_error:
        raise Refused.from_http(
            response.status_code, response.content, response.headers.get("Retry-After")
        )
    try:
        return shape.model_validate_json(response.content)
    except ValueError as error:
        raise ProtocolViolation(
            f"the answer to {response.request.method} {response.request.url.path} "
            f"is not a {shape.__name__}: {error}"
        ) from error
