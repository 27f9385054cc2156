"""`POST /v1/responses`: the Responses API over HTTP and SSE, the twin of the socket."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from server import asks, wire
from server.errors import ApiError
from server.events import Narrator
from server.metrics import Request as Measured
from server.open_turn import OpenTurn
from server.service import Service, key, service
from server.turn import Began, Ended, Happening, Words

router = APIRouter()

SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@router.post("/v1/responses", response_model=wire.Response)
async def respond(body: wire.ResponseRequest, request: Request) -> Response:
    """Answer one turn; with `stream`, as server-sent events."""
    served = service(request)
    transport = "sse" if body.stream else "http"
    try:
        session = asks.session_id(body.conversation, request.headers, served.settings)
        owner = key(request, session) if session else None
        ask = asks.from_response(body, owner, served.settings, served.card.name)
        turn = served.turns.start(ask)
    except ApiError as error:
        served.metrics.rejected("responses", transport, error.code)
        raise
    narrator = Narrator(
        body,
        id=f"resp_{uuid.uuid4().hex}",
        model=served.card.name,
        created=time.time(),
        conversation=session,
    )
    if body.stream:
        return EventStream(turn, _stream(turn, narrator, served))
    with served.metrics.request("responses", "http") as measured:
        ended = await finish(turn, request, measured, narrator)
    if ended.error is not None:
        raise ended.error
    return JSONResponse(narrator.response.model_dump(mode="json"))


class EventStream(StreamingResponse):
    """A turn as server-sent events; however the stream ends, an open turn ends with it."""

    def __init__(self, turn: OpenTurn, frames: AsyncGenerator[str, None]) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=SSE_HEADERS)
        self._turn, self._frames = turn, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._frames):
                await super().__call__(scope, receive, send)
        finally:
            leave(self._turn)


async def _stream(turn: OpenTurn, narrator: Narrator, served: Service) -> AsyncGenerator[str, None]:
    with served.metrics.request("responses", "sse") as measured:
        for event in narrator.begin():
            yield _frame(event)
        async for happening in turn:
            note(measured, happening)
            for message in narrator.tell(happening):
                yield _frame(message)
            if isinstance(happening, Ended):
                return


def _frame(message: wire.Wire) -> str:
    return f"event: {getattr(message, 'type', 'message')}\ndata: {message.model_dump_json()}\n\n"


def leave(turn: OpenTurn) -> None:
    """The client has gone: a turn that has not ended leaves no trace."""
    if not turn.ended:
        turn.cancel(keep=False)


def note(measured: Measured, happening: Happening) -> None:
    """Write down what a request's metrics want to know."""
    match happening:
        case Began(source=source):
            measured.source = source
        case Words():
            measured.spoke()
        case Ended(status=status, reason=reason, error=error):
            measured.ended(
                "cancelled" if reason == "cancelled" else status, error.code if error else ""
            )
        case _:
            pass


async def finish(
    turn: OpenTurn, request: Request, measured: Measured, narrator: Narrator | None = None
) -> Ended:
    """Wait for the end of a turn nobody streams, unless the client leaves before it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_leave_with(request, turn))
            async for happening in turn:
                note(measured, happening)
                if narrator is not None:
                    narrator.tell(happening)
                if isinstance(happening, Ended):
                    watch.cancel()
                    return happening
    finally:
        leave(turn)
    raise AssertionError("a turn ends in Ended")


async def _leave_with(request: Request, turn: OpenTurn) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    leave(turn)
