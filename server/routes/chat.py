"""`POST /v1/chat/completions`: for clients of that API. Stateless unless a session is named."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server import asks, wire
from server.errors import ApiError
from server.open_turn import OpenTurn
from server.routes.responses import EventStream, finish, note
from server.service import Service, key, service
from server.turn import Ended, Words

router = APIRouter()


@router.post("/v1/chat/completions", response_model=wire.ChatCompletion)
async def complete(body: wire.ChatRequest, request: Request) -> Response:
    """Answer the last message; with a session, only what it has not read yet is read."""
    served = service(request)
    transport = "sse" if body.stream else "http"
    try:
        session = asks.session_id(body.conversation, request.headers, served.settings)
        owner = key(request, session) if session else None
        ask = asks.from_chat(body, owner, served.settings, served.card.name)
        turn = served.turns.start(ask)
    except ApiError as error:
        served.metrics.rejected("chat_completions", transport, error.code)
        raise
    if body.stream:
        teller = _Teller(body, served.card.name)
        return EventStream(turn, _stream(turn, teller, served))
    with served.metrics.request("chat_completions", "http") as measured:
        ended = await finish(turn, request, measured)
    if ended.error is not None:
        raise ended.error
    completion = wire.ChatCompletion(
        id=_id(),
        created=int(time.time()),
        model=served.card.name,
        choices=[
            wire.ChatChoice(message=wire.ChatReply(content=turn.text), finish_reason=_reason(ended))
        ],
        usage=_usage(ended),
        memory=ended.memory,
    )
    return JSONResponse(completion.model_dump(mode="json"))


async def _stream(turn: OpenTurn, teller: _Teller, served: Service) -> AsyncGenerator[str, None]:
    with served.metrics.request("chat_completions", "sse") as measured:
        yield teller.chunk(wire.ChatDelta(role="assistant", content=""))
        async for happening in turn:
            note(measured, happening)
            if isinstance(happening, Words):
                yield teller.chunk(wire.ChatDelta(content=happening.text))
            if isinstance(happening, Ended):
                for line in teller.end(happening):
                    yield line
                return


class _Teller:
    """Writes the chunks of one completion."""

    def __init__(self, request: wire.ChatRequest, model: str) -> None:
        self._id = _id()
        self._created = int(time.time())
        self._model = model
        self._usage = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(self, delta: wire.ChatDelta, reason: Literal["stop", "length"] | None = None) -> str:
        return self._line([wire.ChatChunkChoice(delta=delta, finish_reason=reason)])

    def end(self, ended: Ended) -> list[str]:
        if ended.error is not None:
            error = wire.ErrorEvent(status=ended.error.status, error=ended.error.detail)
            return [f"data: {error.model_dump_json()}\n\n"]
        last = [
            self._line(
                [wire.ChatChunkChoice(delta=wire.ChatDelta(), finish_reason=_reason(ended))], ended
            )
        ]
        if self._usage:
            last.append(self._line([], ended, usage=True))
        return [*last, "data: [DONE]\n\n"]

    def _line(
        self,
        choices: list[wire.ChatChunkChoice],
        ended: Ended | None = None,
        *,
        usage: bool = False,
    ) -> str:
        chunk = wire.ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=_usage(ended) if ended and usage else None,
            memory=ended.memory if ended else None,
        )
        return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"


def _id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _reason(ended: Ended) -> Literal["stop", "length"]:
    return "length" if ended.reason == "max_output_tokens" else "stop"


def _usage(ended: Ended) -> wire.ChatUsage:
    read = ended.read + ended.skipped
    return wire.ChatUsage(
        prompt_tokens=read, completion_tokens=ended.said, total_tokens=read + ended.said
    )
