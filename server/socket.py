"""The WebSocket loop: performs what `connection.py` decides, and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from server import asks
from server.connection import Cancel, Connection, Effect, Send, Start, refusal
from server.errors import ApiError
from server.events import Narrator
from server.open_turn import OpenTurn
from server.routes.responses import leave, note
from server.security import SUBPROTOCOL
from server.service import Service, key, service
from server.turn import Ended
from server.wire import ResponseCreate, Wire

router = APIRouter()

PATIENCE = 30.0  # seconds a client may let a frame wait before it is cut off
FAREWELL = 1.0  # seconds for the close frame of such a client
SLOW_CONSUMER = 1013


@router.websocket("/v1/responses")
async def responses(socket: WebSocket) -> None:
    """Serve one client until it leaves."""
    served = service(socket)
    offered = socket.scope.get("subprotocols", [])
    await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
    with served.metrics.connection():
        code = await _Loop(socket, served).run()
    served.metrics.closed(code)


class _Loop:
    """One socket's turns, each pumped by a task of its own; all end with the socket."""

    def __init__(self, socket: WebSocket, served: Service) -> None:
        self._socket = socket
        self._served = served
        self._connection = Connection()
        self._turns: dict[str, OpenTurn] = {}
        self._sending = asyncio.Lock()

    async def run(self) -> int:
        """Return the close code."""
        code = 1000
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    while True:
                        text = await self._receive()
                        fresh = f"resp_{uuid.uuid4().hex}"
                        for effect in self._connection.receive(text, fresh):
                            await self._perform(effect, tasks)
                finally:
                    for turn in self._turns.values():
                        leave(turn)
        except* WebSocketDisconnect as left:
            code = _code(left)
        except* TimeoutError:
            code = SLOW_CONSUMER
            # the close frame stands behind what the client does not read
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await self._socket.close(code, "the client reads too slowly")
        return code

    async def _receive(self) -> str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        return message.get("text") or ""  # a binary frame is no JSON, and is told so

    async def _perform(self, effect: Effect, tasks: asyncio.TaskGroup) -> None:
        match effect:
            case Send(message=message):
                await self._send(message)
            case Cancel(response_id=response_id):
                turn = self._turns[response_id]
                turn.cancel(keep=turn.ask.on_cancel == "keep")
            case Start(request=request, response_id=response_id):
                try:
                    turn, narrator = self._start(request, response_id)
                except ApiError as error:
                    self._connection.ended(response_id)
                    self._served.metrics.rejected("responses", "websocket", error.code)
                    await self._send(refusal(error, request.stream_id, request.event_id))
                    return
                self._turns[response_id] = turn
                tasks.create_task(self._pump(turn, narrator, response_id))

    def _start(self, request: ResponseCreate, response_id: str) -> tuple[OpenTurn, Narrator]:
        card, settings = self._served.card, self._served.settings
        session = asks.session_id(request.conversation, self._socket.headers, settings)
        owner = key(self._socket, session) if session else None
        ask = asks.from_response(request, owner, settings, card.name)
        narrator = Narrator(
            request, id=response_id, model=card.name, created=time.time(), conversation=session
        )
        return self._served.turns.start(ask), narrator

    async def _pump(self, turn: OpenTurn, narrator: Narrator, response_id: str) -> None:
        try:
            await self._tell(turn, narrator, response_id)
        finally:
            leave(turn)
            self._turns.pop(response_id, None)

    async def _tell(self, turn: OpenTurn, narrator: Narrator, response_id: str) -> None:
        with self._served.metrics.request("responses", "websocket") as measured:
            for event in narrator.begin():
                await self._send(event)
            async for happening in turn:
                note(measured, happening)
                if isinstance(happening, Ended):
                    self._connection.ended(response_id)
                for message in narrator.tell(happening):
                    await self._send(message)
                if isinstance(happening, Ended):
                    break
        async for happening in turn:
            for message in narrator.tell(happening):
                await self._send(message)

    async def _send(self, message: Wire) -> None:
        async with self._sending, asyncio.timeout(PATIENCE):
            try:
                await self._socket.send_text(message.model_dump_json())
            except RuntimeError as error:  # closed from here: a ping went unanswered, or a drain
                raise WebSocketDisconnect(1006) from error


def _code(left: BaseExceptionGroup[WebSocketDisconnect]) -> int:
    for error in left.exceptions:
        if isinstance(error, WebSocketDisconnect):
            return int(error.code)
        if isinstance(error, BaseExceptionGroup):
            return _code(error)
    return 1006
