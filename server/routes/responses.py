"""`POST /v1/responses`: the Responses API over HTTP and SSE, the twin of the socket."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server import asks, wire
from server.errors import ApiError
from server.events import Narrator
from server.metrics import Request as Measured
from server.service import Service, key, service
from server.turn import Began, Ended, Happening, Words
from server.turns import OpenTurn

router = APIRouter()

SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_PATIENCE = 0.5  # seconds between two looks whether the client is still there


@router.post("/v1/responses", response_model=wire.Response)
async def respond(body: wire.ResponseRequest, request: Request) -> Response:
    """Answer one turn; with `stream`, as server-sent events."""
    served = service(request)
    transport = "sse" if body.stream else "http"
    try:
        session = asks.session_id(body.conversation, request.headers, served.settings)
        owner = key(request, session) if session else None
        ask = asks.from_response(body, owner, served.settings, served.card.name)
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
    turn = served.turns.start(ask)
    if body.stream:
        events = _stream(turn, narrator, served)
        return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)
    with served.metrics.request("responses", "http") as measured:
        ended = await finish(turn, request, measured, narrator)
    if ended.error is not None:
        raise ended.error
    return JSONResponse(narrator.response.model_dump(mode="json"))


async def _stream(turn: OpenTurn, narrator: Narrator, served: Service) -> AsyncIterator[str]:
    with served.metrics.request("responses", "sse") as measured:
        try:
            for event in narrator.begin():
                yield _frame(event)
            async for happening in turn:
                note(measured, happening)
                for message in narrator.tell(happening):
                    yield _frame(message)
                if isinstance(happening, Ended):
                    return
        finally:
            leave(turn)


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
    happenings = aiter(turn)
    try:
        while True:
            step = asyncio.ensure_future(anext(happenings))
            while not (await asyncio.wait({step}, timeout=_PATIENCE))[0]:
                if await request.is_disconnected():
                    turn.cancel(keep=False)
            happening = step.result()
            note(measured, happening)
            if narrator is not None:
                narrator.tell(happening)
            if isinstance(happening, Ended):
                return happening
    finally:
        leave(turn)
