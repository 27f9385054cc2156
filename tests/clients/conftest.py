"""A stand-in server: real sockets, the real wire, and a script instead of a model.

What a turn says decides how it goes: see `StandIn.replies`. Everything else is echoed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from server import wire

PAGE = Path(__file__).parents[2] / "server" / "page"
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
}


def refusal(status: int, code: str, message: str) -> JSONResponse:
    detail = wire.ErrorDetail(type="invalid_request_error", code=code, message=message)
    return JSONResponse({"error": detail.model_dump()}, status)


@dataclass(frozen=True)
class Cut:
    """The line breaks instead of the event of this number; the turn stands if it had ended."""

    at: int


@dataclass(frozen=True)
class Refusal:
    """The turn is refused at once."""

    code: str
    retry_after: float | None = None


@dataclass(frozen=True)
class Failure:
    """The turn fails after some words of it were said."""

    code: str
    outcome: wire.Outcome = wire.Outcome.ROLLED_BACK


class StandIn:
    """Sessions are lists of turns; replies follow a script, and turns are learned once.

    `faults` is what goes wrong with the turns to come, one after the other.
    """

    cut, refusal, failure = Cut, Refusal, Failure

    def __init__(self, *, key: str | None = None) -> None:
        self.key = key
        self.sessions: dict[str, list[tuple[str, str]]] = {}
        self.kept: dict[str, list[list[tuple[str, str]]]] = {}  # the turns of each version
        self.frozen: set[str] = set()
        self.users: dict[str, str] = {}
        self.recovered: str | None = None
        self.learned: dict[str, str] = {}  # what was answered to a turn id
        self.faults: list[Cut | Refusal | Failure] = []
        self.requests: list[wire.ResponseCreate] = []
        self.sockets = 0
        self.url = ""
        self.app = Starlette(
            routes=[
                WebSocketRoute("/v1/responses", self.socket),
                Route("/v1/sessions", self.list),
                Route("/v1/sessions/{id}/versions", self.versions),
                Route("/v1/sessions/{id}/rollback", self.rollback, methods=["POST"]),
                Route("/v1/sessions/{id}/freeze", self.freeze, methods=["POST"]),
                Route("/v1/sessions/{id}/unfreeze", self.freeze, methods=["POST"]),
                Route("/v1/sessions/{id}/fork", self.fork, methods=["POST"]),
                Route("/v1/sessions/{id}/diff", self.diff),
                Route("/v1/sessions/{id}/export", self.export),
                Route("/v1/sessions/{id}/import", self.bring_in, methods=["PUT"]),
                Route("/v1/users/{user}/memory", self.forget, methods=["DELETE"]),
                Route("/v1/sessions/{id:path}", self.one, methods=["GET", "DELETE"]),
                Route("/v1/conversations/{id}/items", self.items),
                Route("/v1/models", self.models),
                Route("/health/ready", self.ready),
                Route("/", self.page),
                Mount("/page", StaticFiles(directory=PAGE)),
            ]
        )

    # --- the socket ---------------------------------------------------------------------------

    async def socket(self, socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]  # where browsers put the key
        if self.key and not self.allowed(socket) and self.key_protocol not in offered:
            await socket.send_denial_response(refusal(401, "invalid_api_key", "Unknown API key."))
            return
        await socket.accept("hope" if "hope" in offered else None)
        self.sockets += 1
        stops: dict[str, asyncio.Event] = {}
        async with asyncio.TaskGroup() as tasks:
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    message = await socket.receive_json()
                    if message["type"] == "response.cancel":
                        await self.stop(socket, message, stops)
                    else:
                        request = wire.ResponseCreate.model_validate(message)
                        self.requests.append(request)
                        stop = stops[request.stream_id or ""] = asyncio.Event()
                        tasks.create_task(self.turn(socket, request, stop))
            for stop in stops.values():
                stop.set()

    async def stop(
        self, socket: WebSocket, message: dict[str, Any], stops: dict[str, asyncio.Event]
    ) -> None:
        if stop := stops.get(message["stream_id"]):
            stop.set()
        else:
            await self.refuse(socket, message["stream_id"], message["event_id"], "nothing_running")

    async def refuse(
        self,
        socket: WebSocket,
        stream: str | None,
        event: str | None,
        code: str,
        retry_after: float | None = None,
    ) -> None:
        detail = wire.ErrorDetail(type="conflict", code=code, message=f"Refused: {code}.")
        error = wire.ErrorEvent(
            status=409, error=detail, stream_id=stream, event_id=event, retry_after_s=retry_after
        )
        await socket.send_text(error.model_dump_json())

    async def turn(
        self, socket: WebSocket, request: wire.ResponseCreate, stop: asyncio.Event
    ) -> None:
        fault = self.faults.pop(0) if self.faults else None
        script = Script(self, socket, request, stop, fault)
        said = str(request.input)
        # a socket that the client closed ends the script
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            match fault:
                case Refusal(code=code, retry_after=wait):
                    await self.refuse(socket, request.stream_id, request.event_id, code, wait)
                case Failure():
                    await script.play("fail", said)
                case _ if request.turn_id in self.learned:
                    await script.repeat(self.learned[request.turn_id or ""])
                case _:
                    await script.play(said.split()[0], said)

    # --- over HTTP ----------------------------------------------------------------------------

    def versions_of(self, name: str) -> list[list[tuple[str, str]]]:
        turns = self.sessions[name]
        return self.kept.setdefault(name, [turns[: n + 1] for n in range(len(turns))])

    def commit(self, name: str, turns: list[tuple[str, str]]) -> None:
        """Make these turns the session's next version."""
        self.sessions.setdefault(name, [])
        self.versions_of(name).append(turns)
        self.sessions[name] = turns

    def session(self, name: str) -> dict[str, Any]:
        turns = self.sessions[name]
        level = wire.LevelStatus(
            name="mid",
            chunk=64,
            blocks=[1, 2],
            updates=len(turns),
            last_position=64,
            last_at=time.time() - 12,
            last_loss=2.5,
            last_outcome="applied",
            movement=0.0125,
            due=1,
        )
        return wire.Session(
            id=name,
            version=len(self.versions_of(name)),
            frozen=name in self.frozen,
            user=self.users.get(name),
            created_at=1.0,
            updated_at=time.time(),
            tokens=1234 * len(turns),
            turns=len(turns),
            bytes=1000,
            stored_bytes=500,
            learning=True,
            surprise=2.25,
            levels=[level],
            model="tiny",
            fingerprint="abc",
            durability="always",
        ).model_dump()

    @property
    def key_protocol(self) -> str:
        encoded = base64.urlsafe_b64encode((self.key or "").encode()).decode()
        return f"hope-key.{encoded.rstrip('=')}"

    def allowed(self, request: HTTPConnection) -> bool:
        return not self.key or request.headers.get("authorization") == f"Bearer {self.key}"

    async def list(self, request: Request) -> JSONResponse:
        if not self.allowed(request):
            return refusal(401, "invalid_api_key", "Unknown API key.")
        names = sorted(self.sessions)
        start = int(request.query_params.get("cursor", "0"))
        end = start + int(request.query_params.get("limit", "2"))
        more = end < len(names)
        page = [self.session(name) for name in names[start:end]]
        return JSONResponse(
            {"data": page, "has_more": more, "next_cursor": str(end) if more else None}
        )

    async def one(self, request: Request) -> JSONResponse:
        name = request.path_params["id"]
        if name == "gone":
            return refusal(410, "session_deleted", "The session was deleted.")
        if name not in self.sessions:
            return refusal(404, "conversation_not_found", f"There is no session {name}.")
        if request.method == "DELETE":
            return JSONResponse(self.receipt(name).model_dump())
        return JSONResponse(self.session(name))

    def receipt(self, name: str) -> wire.DeletedSession:
        del self.sessions[name]
        self.kept.pop(name, None)
        return wire.DeletedSession(
            id=name, deleted=True, keys=3, bytes=1000, remains="backups until they age out"
        )

    async def versions(self, request: Request) -> JSONResponse:
        name = request.path_params["id"]
        if name not in self.sessions:
            return refusal(404, "conversation_not_found", f"There is no session {name}.")
        kept = list(enumerate(self.versions_of(name), 1))
        rows = [
            wire.SessionVersion(
                version=number,
                parent=number - 1,
                created_at=time.time() - 60 * (len(kept) - number),
                tokens=1234 * len(turns),
                turns=len(turns),
                bytes=1000,
                stored_bytes=500,
                frozen=False,
                levels=[],
            )
            for number, turns in reversed(kept)
        ]
        return JSONResponse(wire.VersionList(data=rows).model_dump())

    async def rollback(self, request: Request) -> JSONResponse:
        name = request.path_params["id"]
        kept = self.versions_of(name)
        if request.headers.get("if-match") not in (None, f'"{len(kept)}"'):
            return refusal(412, "precondition_failed", f"The session is at version {len(kept)}.")
        version = wire.RollbackRequest.model_validate_json(await request.body()).version
        if version > len(kept):
            return refusal(404, "version_not_found", f"Version {version} is not kept.")
        if name in self.frozen:
            return refusal(409, "session_frozen", f"Session {name} is frozen; unfreeze it first.")
        self.commit(name, list(kept[version - 1]))
        return JSONResponse(self.session(name))

    async def freeze(self, request: Request) -> JSONResponse:
        name = request.path_params["id"]
        if request.url.path.endswith("/freeze"):
            self.frozen.add(name)
        else:
            self.frozen.discard(name)
        return JSONResponse(self.session(name))

    async def fork(self, request: Request) -> JSONResponse:
        asked = wire.ForkRequest.model_validate_json(await request.body())
        kept = self.versions_of(request.path_params["id"])
        name = asked.id or "conv_1"
        if name in self.sessions:
            return refusal(409, "session_exists", f"Session {name} exists already.")
        self.commit(name, list(kept[(asked.version or len(kept)) - 1]))
        return JSONResponse(self.session(name), 201)

    async def diff(self, request: Request) -> JSONResponse:
        query = request.query_params
        last = len(self.versions_of(request.path_params["id"]))
        level = wire.LevelDifference(
            name="mid", norm_from=2.0, norm_to=3.0, distance=1.5, change=0.75
        )
        return JSONResponse(
            wire.Difference(
                id=request.path_params["id"],
                from_version=int(query.get("from", last - 1)),
                to_version=int(query.get("to", last)),
                tokens=1234,
                levels=[level],
            ).model_dump()
        )

    async def export(self, request: Request) -> Response:
        if not self.allowed(request):
            return refusal(401, "invalid_api_key", "Unknown API key.")
        name = request.path_params["id"]
        if name not in self.sessions:
            return refusal(404, "conversation_not_found", f"There is no session {name}.")
        kept = self.versions_of(name)
        version = int(request.query_params.get("version", len(kept)))
        body = json.dumps(kept[version - 1]).encode()
        body += b" " * (3 << 20)  # more than one chunk
        return Response(
            body,
            media_type="application/octet-stream",
            headers={
                "ETag": f'"{version}"',
                "Content-Disposition": f"attachment; filename*=UTF-8''{name}.{version}.safetensors",
            },
        )

    async def bring_in(self, request: Request) -> JSONResponse:
        name = request.path_params["id"]
        body = await request.body()
        if len(body) != int(request.headers["content-length"]):
            return refusal(400, "invalid_archive", "The file is not whole.")
        try:
            turns = json.loads(body)
        except ValueError:
            return refusal(400, "invalid_archive", "The file is no session.")
        self.commit(name, [(said, text) for said, text in turns])
        if user := request.query_params.get("user"):
            self.users[name] = user
        return JSONResponse(self.session(name), 201)

    async def forget(self, request: Request) -> JSONResponse:
        user = request.path_params["user"]
        names = [name for name in self.sessions if self.users.get(name) == user]
        receipts = [self.receipt(name) for name in names]
        return JSONResponse(
            wire.DeletedUser(
                user=user,
                sessions=receipts,
                keys=sum(one.keys for one in receipts),
                bytes=sum(one.bytes for one in receipts),
                left=0,
                remains="backups until they age out",
            ).model_dump()
        )

    async def items(self, request: Request) -> JSONResponse:
        said = [text for turn in self.sessions.get(request.path_params["id"], []) for text in turn]
        start = int(request.query_params.get("after", "-1")) + 1
        items = [
            {
                "id": str(number),
                "role": "assistant" if number % 2 else "user",
                "content": [{"type": "text", "text": said[number]}],
            }
            for number in range(start, min(start + 3, len(said)))
        ]
        more = start + 3 < len(said)
        last = items[-1]["id"] if items else None
        return JSONResponse({"data": items, "last_id": last, "has_more": more})

    async def models(self, request: Request) -> JSONResponse:
        card = wire.ModelCard(
            id="tiny",
            created=1,
            fingerprint="abc",
            window=64,
            sinks=4,
            dtype="float32",
            device="cpu",
            levels=[],
        )
        return JSONResponse(wire.ModelList(data=[card]).model_dump())

    async def page(self, request: Request) -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=POLICY)

    async def ready(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "draining", "model": "tiny"}, 503)


class Script:
    """One turn, played by the first word of what was said."""

    def __init__(
        self,
        server: StandIn,
        socket: WebSocket,
        request: wire.ResponseCreate,
        stop: asyncio.Event,
        fault: Cut | Refusal | Failure | None = None,
    ) -> None:
        self.fault = fault
        self.replayed = False
        self.server = server
        self.socket = socket
        self.request = request
        self.stopped = stop
        self.number = 0
        self.spoken = ""
        assert isinstance(request.conversation, str)
        self.name = request.conversation

    async def play(self, first: str, said: str) -> None:
        match first:
            case "refuse":
                stream, event = self.request.stream_id, self.request.event_id
                await self.server.refuse(self.socket, stream, event, "version_conflict", 1.5)
            case "waver":  # never the same twice
                await self.begin()
                await self.speak("I said ")
                for number in range(3):
                    await asyncio.sleep(0.02)
                    await self.speak(f"{len(self.server.requests)}.{number} ")
                await self.close_parts()
                await self.end("completed")
            case "fail":
                await self.begin()
                await self.speak("half a ")
                await self.end("failed")
            case "drop":
                await self.begin()
                await self.speak("half a ")
                await self.socket.close(1012, "draining")
            case "babble":
                await self.socket.send_text("this is not JSON")
            case "disorder":
                await self.begin()
                self.number -= 2
                await self.speak("again")
            case "stubborn":  # breaks off rather than be stopped
                await self.begin()
                await self.speak("No. ")
                await self.stopped.wait()
                await self.socket.close(1012, "draining")
            case "forever":
                await self.begin()
                while not self.stopped.is_set():
                    await self.speak("on and ")
                    await asyncio.sleep(0.005)
                await self.close_parts()
                await self.end("incomplete")
            case _:
                await self.begin()
                for word in said.split():
                    await self.speak(f"{word} ")
                await self.close_parts()
                await self.end("completed")
                await self.tell_memory()

    async def repeat(self, text: str) -> None:
        """Answer a turn from the store: the words at once, nothing learned."""
        self.replayed = True
        await self.begin()
        await self.speak(text)
        await self.close_parts()
        await self.end("completed")

    async def send(self, kind: str, **fields: Any) -> None:
        if isinstance(self.fault, Cut) and self.number == self.fault.at:
            await self.socket.close(1012, "draining")
            raise WebSocketDisconnect
        event = {
            "type": kind,
            "sequence_number": self.number,
            "stream_id": self.request.stream_id,
            **fields,
        }
        self.number += 1
        await self.socket.send_json(event)

    async def begin(self) -> None:
        await self.send("response.created", response=self.response("in_progress"))
        await self.send("response.in_progress", response=self.response("in_progress"))
        await self.send("hope:something.new", note="to be ignored")
        await self.send("response.output_item.added", item=self.item("in_progress"))
        await self.send(
            "response.content_part.added", item_id="m1", part={"type": "output_text", "text": ""}
        )

    async def speak(self, piece: str) -> None:
        self.spoken += piece
        await self.send("response.output_text.delta", item_id="m1", delta=piece)

    async def close_parts(self) -> None:
        part = {"type": "output_text", "text": self.spoken}
        await self.send("response.output_text.done", item_id="m1", text=self.spoken)
        await self.send("response.content_part.done", item_id="m1", part=part)
        await self.send("response.output_item.done", item=self.item("completed"))

    async def end(self, status: str) -> None:
        if status != "failed" and not self.replayed:
            turn = str(self.request.input), self.spoken
            self.server.commit(self.name, [*self.server.sessions.get(self.name, []), turn])
            self.server.learned[self.request.turn_id or ""] = self.spoken
        await self.send(f"response.{status}", response=self.response(status))

    async def tell_memory(self) -> None:
        if "hope:memory" not in (self.request.include or []):
            return
        news = wire.ConsolidationEvent(
            type="hope:consolidation.completed",
            conversation=self.name,
            level="mid",
            outcome="applied",
            position=64,
            loss=2.5,
            duration_ms=7.0,
            stream_id=self.request.stream_id,
        )
        await self.socket.send_text(news.model_dump_json())

    def item(self, status: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": self.spoken}]
        return {"type": "message", "id": "m1", "status": status, "content": content}

    def response(self, status: str) -> dict[str, Any]:
        known = self.name in self.server.sessions
        version = len(self.server.versions_of(self.name)) if known else 0
        ended, failed = status != "in_progress", status == "failed"
        memory = wire.MemoryResult(
            conversation=self.name,
            base_version=version if failed else version - 1,
            committed_version=None if failed else version,
            outcome=self.fault.outcome
            if isinstance(self.fault, Failure)
            else wire.Outcome.ROLLED_BACK
            if failed
            else wire.Outcome.COMMITTED,
            replayed=self.replayed,
            recovered=self.server.recovered,
            durability="always",
            updates=1,
            consolidated_levels=["mid"],
            due_levels=["slow"],
            surprise=2.25,
        )
        words = len(self.spoken.split())
        code = self.fault.code if isinstance(self.fault, Failure) else "memory_corrupt"
        failure = wire.ErrorDetail(type="server_error", code=code, message="Broken.")
        return wire.Response(
            id=f"resp_{self.request.turn_id}",
            created_at=1.0,
            status=status,  # type: ignore[arg-type]
            model="tiny",
            output=[wire.OutputMessage.model_validate(self.item("completed"))] if ended else [],
            usage=wire.Usage(input_tokens=3, output_tokens=words, total_tokens=3 + words),
            error=failure if failed else None,
            incomplete_details=wire.IncompleteDetails(reason="cancelled")
            if status == "incomplete"
            else None,
            memory=memory if ended else None,
        ).model_dump()


@contextlib.contextmanager
def running(app: Starlette, port: int = 0) -> Iterator[str]:
    """Serve an app from a thread; yields where."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        ws="websockets-sansio",
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def street() -> Iterator[tuple[Starlette, str]]:
    """One server for every stand-in, each under a path of its own."""
    app = Starlette()
    with running(app) as url:
        yield app, url


@pytest.fixture
def serve(street: tuple[Starlette, str]) -> Callable[..., StandIn]:
    app, url = street

    def start(**options: Any) -> StandIn:
        stand_in = StandIn(**options)
        path = f"/house-{len(app.routes)}"
        app.router.routes.append(Mount(path, stand_in.app))
        stand_in.url = url + path
        return stand_in

    return start


@pytest.fixture
def stand_in(serve: Callable[..., StandIn]) -> StandIn:
    return serve()


@pytest.fixture
def cut_off() -> Iterator[str]:
    """A server whose every answer promises more than it brings."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: "1"\r\n\r\nhalf'

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listening.accept()
                with caller:
                    caller.recv(65536)
                    caller.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C through, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
