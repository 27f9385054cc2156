"""The async client: carries the words of `core` over a WebSocket, and REST over HTTP.

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
import random
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Self, TypeVar, Unpack
from urllib.parse import quote, urlsplit
from weakref import WeakValueDictionary

import httpx2
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from clients import core, files
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
    `patience` says how often a turn is sent again that was lost or came at a bad time: it is
    learned once however often it is sent.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        on_memory: OnMemory | None = None,
        patience: core.Patience = core.PATIENT,
    ) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self._socket_url = core.socket_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._on_memory = on_memory
        self._near = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._http: httpx2.AsyncClient | None = None
        self._line: _Line | None = None
        self._lines: set[_Line] = set()
        self._opening = asyncio.Lock()
        self.starting: set[AsyncReply] = set()  # replies whose request is not on its way yet
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

    async def import_session(
        self,
        name: str,
        place: files.Place,
        *,
        user: str | None = None,
        on_progress: files.Progress | None = None,
    ) -> AsyncSession:
        """Make a session of a file that `AsyncSession.export` wrote, and return it.

        Args:
            name: of the new session.
            place: the file, by its path or open for reading bytes.
            user: the person whose session it is.
            on_progress: called with the bytes sent so far, and the bytes in all.
        """
        async with files.reading(place) as (file, size):
            response = await self._request(
                "PUT",
                f"/v1/sessions/{quote(name, safe='')}/import",
                {"user": user} if user is not None else None,
                content=files.chunks(file, size, on_progress),
                headers={
                    "Content-Length": str(size),
                    "Content-Type": "application/octet-stream",
                },
            )
        _read(response, wire.Session)
        return self.session(name)

    async def forget_user(self, user: str) -> wire.DeletedUser:
        """Delete every session of a person, and return the receipt."""
        path = f"/v1/users/{quote(user, safe='')}/memory"
        return await self.rest("DELETE", path, wire.DeletedUser)

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
        for reply in list(self.starting):
            await reply.cancel()
        for line in list(self._lines):
            await line.close()
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
        self,
        method: str,
        path: str,
        shape: type[Shape],
        query: Mapping[str, str] | None = None,
        *,
        body: wire.Wire | None = None,
        if_version: int | None = None,
    ) -> Shape:
        """Make one HTTP request and read its answer, or raise what the server refused with."""
        headers = {} if if_version is None else {"If-Match": f'"{if_version}"'}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = body.model_dump_json(exclude_none=True).encode()
        response = await self._request(method, path, query, content=content, headers=headers)
        return _read(response, shape)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str] | None = None
    ) -> AsyncGenerator[httpx2.Response]:
        """Get something that may be too large to hold; yields it once it is on its way."""
        try:
            async with self._client().stream("GET", self.url + path, params=query) as response:
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                yield response
        except httpx2.RequestError as error:
            raise self._broken(error, "GET", path) from error

    def request(
        self,
        session: str | None,
        said: core.Said,
        turn_id: str | None,
        **options: Unpack[core.Options],
    ) -> core.Turn:
        turn_id = turn_id or f"turn_{uuid.uuid4().hex}"
        if options.get("seed") is None:
            options["seed"] = random.getrandbits(53)  # the same reply, should it be sent again
        include = ["hope:memory"] if self._on_memory else []
        return core.Turn(core.request(session, said, turn_id, include, **options), turn_id)

    async def line(self) -> _Line:
        """Return an open line, dialling if there is none."""
        async with self._opening:
            if self._line is None or self._line.dead:
                self._line = self._hold(_Line(await self._dial(), self._on_memory))
            return self._line

    async def line_for_one(self) -> _Line:
        """Return a line that ends with the turn it is for: hanging up harms no other."""
        return self._hold(_Line(await self._dial(), self._on_memory, for_one=True))

    def _hold(self, line: _Line) -> _Line:
        self._lines = {line, *(one for one in self._lines if not one.dead)}
        return line

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

    def _client(self) -> httpx2.AsyncClient:
        if self._http is None:
            self._http = httpx2.AsyncClient(
                headers=self._headers, timeout=REST_TIMEOUT_S, trust_env=not self._near
            )
        return self._http

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        content: bytes | AsyncGenerator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        try:
            return await self._client().request(
                method, self.url + path, params=query, content=content, headers=headers
            )
        except httpx2.RequestError as error:
            raise self._broken(error, method, path) from error

    def _broken(self, error: httpx2.RequestError, method: str, path: str) -> HopeError:
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return Unreachable(f"No HOPE Server answers at {self.url}.")
        why = str(error) or type(error).__name__
        return HopeError(f"{method} {path} broke off before its answer was whole: {why}")


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
        return await self.hope.rest("GET", self._path, wire.Session)

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

    async def versions(self) -> list[wire.SessionVersion]:
        """Return the versions that are kept, the newest first."""
        return (await self.hope.rest("GET", f"{self._path}/versions", wire.VersionList)).data

    async def rollback(self, version: int, *, if_version: int | None = None) -> wire.Session:
        """Go on from an older kept version; that becomes a new one, so it can be undone.

        Args:
            version: the one to go on from.
            if_version: refuse (412) unless the session is still at this version.
        """
        return await self._act("rollback", wire.RollbackRequest(version=version), if_version)

    async def freeze(self, *, if_version: int | None = None) -> wire.Session:
        """Let turns read the memory, and nothing change it."""
        return await self._act("freeze", None, if_version)

    async def unfreeze(self, *, if_version: int | None = None) -> wire.Session:
        """Let turns change the memory again."""
        return await self._act("unfreeze", None, if_version)

    async def fork(
        self, name: str | None = None, *, version: int | None = None, user: str | None = None
    ) -> AsyncSession:
        """Copy the session to a new one, and return that; they share nothing from then on.

        Args:
            name: of the new session; the server makes one up where it is left out.
            version: an older kept version to copy; left out, the last.
            user: the person whose session the new one is; left out, the same.
        """
        asked = wire.ForkRequest(id=name, version=version, user=user)
        made = await self.hope.rest("POST", f"{self._path}/fork", wire.Session, body=asked)
        return self.hope.session(made.id)

    async def diff(self, before: int | None = None, after: int | None = None) -> wire.Difference:
        """Tell how far two kept versions are apart, level by level; by default the last two."""
        query = {"from": before, "to": after}
        given = {name: str(version) for name, version in query.items() if version is not None}
        return await self.hope.rest("GET", f"{self._path}/diff", wire.Difference, given)

    async def export(
        self,
        place: files.Place,
        *,
        version: int | None = None,
        on_progress: files.Progress | None = None,
    ) -> core.Exported:
        """Write all of the session to one safetensors file.

        Args:
            place: a path, which gets the whole file or stays as it was; or a file to write to.
            version: an older kept version; left out, the last.
            on_progress: called with the bytes written so far, and the bytes in all.
        """
        query = {"version": str(version)} if version is not None else None
        async with self.hope.stream(f"{self._path}/export", query) as response:
            size = int(response.headers.get("Content-Length", 0))
            done = 0
            async with files.writing(place) as file:
                async for chunk in response.aiter_bytes(files.CHUNK):
                    await asyncio.to_thread(file.write, chunk)
                    done += len(chunk)
                    if on_progress is not None:
                        on_progress(done, size)
            tag = response.headers["ETag"].removeprefix("W/").strip('"')
            return core.Exported(int(tag), done)

    async def delete(self) -> wire.DeletedSession:
        """Forget the session and everything it learned; the name is not free again.

        The receipt tells what was deleted, and where older copies may still be.
        """
        return await self.hope.rest("DELETE", self._path, wire.DeletedSession)

    async def _act(self, name: str, body: wire.Wire | None, if_version: int | None) -> wire.Session:
        path = f"{self._path}/{name}"
        return await self.hope.rest("POST", path, wire.Session, body=body, if_version=if_version)

    @property
    def _path(self) -> str:
        return f"/v1/sessions/{quote(self.name, safe='')}"

    @property
    def _items(self) -> str:
        return f"/v1/conversations/{quote(self.name, safe='')}/items"


class AsyncReply(core.Record):
    """A reply while it arrives, and its record after.

    Leaving the iteration early stops the reply: what was said until then is kept. `await
    reply.cancel()` does the same and returns when the server has told what became of the turn.
    Turns of one session wait for each other.

    A turn that was lost, or refused for a moment, is sent again under its id, and the reply goes
    on after what was handed out of it. Should it be another reply this time, the iteration
    raises what the first one broke off with.
    """

    def __init__(self, session: AsyncSession, turn: core.Turn) -> None:
        super().__init__(turn)
        self.session = session
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._shown = 0  # characters handed out
        self._over = asyncio.Event()
        self._line: _Line | None = None
        self._starting: asyncio.Task[None] | None = None
        self._has_floor = False
        self._stopping = False
        self._waited = 0.0  # seconds between tries

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

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it; `ended` may speak of a try that is had again."""
        return self._over.is_set()

    async def start(self) -> None:
        """Send the request, once; later calls wait for the first."""
        starting = self._starting or self._begin(0.0)
        await asyncio.wait([starting])
        if not starting.cancelled():
            starting.result()

    async def next_piece(self) -> str | None:
        """Return the next piece of text, or None at the end; raises what the turn failed with."""
        await self.start()
        piece = await self._pieces.get()
        if piece is None:
            self._pieces.put_nowait(None)
            if self.turn.error is not None:
                raise self.turn.error
        else:
            self._shown += len(piece)
        return piece

    async def finish(self) -> Self:
        """Wait for the end; raises what the turn failed with."""
        try:
            await self.start()
            await self._over.wait()
        finally:
            if not self._over.is_set():
                await self.cancel()
        if self.turn.error is not None:
            raise self.turn.error
        return self

    async def cancel(self) -> Self:
        """Stop the reply and wait until the server has told what was kept."""
        if self._starting is None or self._over.is_set():
            return self
        first, self._stopping = not self._stopping, True
        if self._line is None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
            if not self._over.is_set():
                unsent = HopeError("The turn was stopped before it was sent.")
                self._end(next(reversed(self.turn.failures), unsent))
            return self
        if self.turn.behind:  # what would be kept is less than what was shown: rather nothing
            await self._line.close()
        elif first:
            await self._line.cancel(self.turn)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), CANCEL_TIMEOUT_S)
        return self

    def hear(self, fact: core.Fact) -> None:
        match fact:
            case core.Text():
                self._pieces.put_nowait(fact.piece)
            case core.Finished():
                self._end()
            case core.Failed():
                self._fail(fact.error)
            case _:
                pass

    def _begin(self, pause: float) -> asyncio.Task[None]:
        self.session.hope.starting.add(self)
        self._starting = asyncio.create_task(self._start(pause))
        return self._starting

    async def _start(self, pause: float) -> None:
        hope = self.session.hope
        try:
            await asyncio.sleep(pause)
            if not self._has_floor:
                await self.session.floor.acquire()
                self._has_floor = True
            self._line = await (hope.line_for_one() if self._shown else hope.line())
            hope.starting.discard(self)
            await self._line.ask(self)
        except HopeError as error:
            self._fail(error)

    def _fail(self, error: HopeError) -> None:
        """Have the turn again if that may help, or end it."""
        pause = self.session.hope.patience.wait(
            self.turn, error, waited=self._waited, chance=random.random()
        )
        hung_up = self._line is not None and self._line.hung_up
        if pause is None or self._stopping or hung_up:
            self._end(error)
            return
        self._waited += pause
        self._line = None
        self.turn.again(error, self._shown)
        while not self._pieces.empty():  # said, and not handed out: this try may say it otherwise
            self._pieces.get_nowait()
        self._begin(pause)

    def _end(self, error: HopeError | None = None) -> None:
        if error is not None:
            self.turn.fail(self.turn.verdict(error))
        self.session.hope.starting.discard(self)
        if self._has_floor:
            self._has_floor = False
            self.session.floor.release()
        self._over.set()
        self._pieces.put_nowait(None)


class _Line:
    """One open socket and the turns that run on it; one `for_one` ends with its turn."""

    def __init__(
        self, socket: ClientConnection, on_memory: OnMemory | None, *, for_one: bool = False
    ) -> None:
        self._socket = socket
        self._for_one = for_one
        self._on_memory = on_memory
        self._connection = core.Connection()
        self._replies: dict[str, AsyncReply] = {}
        self._reader = asyncio.create_task(self._read())
        self.dead = False
        self.hung_up = False  # from this end

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
        self.dead = self.hung_up = True
        await self._socket.close()
        await self._reader

    async def _read(self) -> None:
        reason = "the client failed"
        try:
            async for message in self._socket:
                self._tell(self._connection.receive(message))
                if self._for_one and not self._replies:
                    await self._socket.close()
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
        if self.hung_up:
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
                if isinstance(fact, core.Finished | core.Failed):
                    self._replies.pop(turn_id).hear(fact)
                else:
                    self._replies[turn_id].hear(fact)


def _read(response: httpx2.Response, shape: type[Shape]) -> Shape:
    if response.is_error:
        raise _refusal(response)
    try:
        return shape.model_validate_json(response.content)
    except ValueError as error:
        raise ProtocolViolation(
            f"the answer to {response.request.method} {response.request.url.path} "
            f"is not a {shape.__name__}: {error}"
        ) from error


def _refusal(response: httpx2.Response) -> Refused:
    return Refused.from_http(
        response.status_code, response.content, response.headers.get("Retry-After")
    )
