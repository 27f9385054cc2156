"""One connection as a pure state machine: no socket, no clock, no model in sight.

Feed it what arrived and what happened; it returns what to do. An illegal message changes
nothing and is answered with a recoverable `error`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from server.errors import ApiError
from server.wire import ErrorEvent, ResponseCancel, ResponseCreate, Wire

MAX_STREAMS = 32  # turns in flight on one socket


@dataclass(frozen=True, slots=True)
class Send:
    message: Wire


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a turn under this response id."""

    request: ResponseCreate
    response_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    response_id: str


Effect = Send | Start | Cancel

_KINDS: dict[str, type[ResponseCreate | ResponseCancel]] = {
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}
_JSON = TypeAdapter(dict[str, object])


class Connection:
    """The conversation with one client over one socket."""

    def __init__(self) -> None:
        self._running: dict[str, str | None] = {}  # response id -> stream id, oldest first

    @property
    def running(self) -> tuple[str, ...]:
        return tuple(self._running)

    def receive(self, text: str, response_id: str) -> list[Effect]:
        """Take a message; `response_id` is the id a new response would get."""
        try:
            message = _parse(text)
        except ApiError as error:
            return [Send(refusal(error, *_echo(text)))]
        try:
            if isinstance(message, ResponseCreate):
                return self._create(message, response_id)
            return self._cancel(message)
        except ApiError as error:
            return [Send(refusal(error, message.stream_id, message.event_id))]

    def ended(self, response_id: str) -> None:
        """The terminal event of a response was sent."""
        self._running.pop(response_id, None)

    def _create(self, message: ResponseCreate, response_id: str) -> list[Effect]:
        if len(self._running) >= MAX_STREAMS:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"{MAX_STREAMS} responses are running on this socket; wait for one to end",
            )
        if message.stream_id is not None and message.stream_id in self._running.values():
            raise ApiError(
                409,
                "session_busy",
                f"stream {message.stream_id!r} has a response running; wait, or cancel it",
                param="stream_id",
            )
        self._running[response_id] = message.stream_id
        return [Start(message, response_id)]

    def _cancel(self, message: ResponseCancel) -> list[Effect]:
        for response_id, stream_id in self._running.items():
            by_id = message.response_id in (None, response_id)
            if by_id and (message.stream_id is None or message.stream_id == stream_id):
                return [Cancel(response_id)]
        raise ApiError(400, "invalid_request", "there is no such response to cancel")


def _parse(text: str) -> ResponseCreate | ResponseCancel:
    try:
        fields = _JSON.validate_json(text)
    except ValidationError:
        raise ApiError(400, "invalid_json", "the message is not a JSON object") from None
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ApiError(
            400,
            "unknown_event_type",
            f"type {kind!r} is not known; known: {', '.join(sorted(_KINDS))}",
            param="type",
        )
    try:
        return _KINDS[kind].model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)) from None


# how pydantic calls the shapes a field may have, on its way to what is wrong
_SHAPE = re.compile(r"constrained-str|list\[.*\]|ConversationRef|\[key\]")


def invalid(complaints: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return pydantic's complaints about a request as an answer: the most particular of them.

    Where a field may have several shapes there is a complaint for each; the one that was
    followed furthest is the one that was meant, or else the one whose type was right.
    """
    chosen = max(complaints, key=lambda c: (len(c["loc"]), not c["type"].endswith("_type")))
    parts = [str(part) for part in chosen["loc"] if part != "body"]
    where = ".".join(part for part in parts if not _SHAPE.fullmatch(part)) or None
    shown = repr(chosen.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = f"{where or 'the body'}: {chosen['msg']} (got {shown})"
    return ApiError(400, "invalid_request", message, param=where)


def refusal(error: ApiError, stream_id: str | None, event_id: str | None) -> ErrorEvent:
    """Return a recoverable error as it goes over the socket."""
    return ErrorEvent(
        status=error.status,
        error=error.detail,
        stream_id=stream_id,
        event_id=event_id,
        retry_after_s=error.retry_after,
    )


def _echo(text: str) -> tuple[str | None, str | None]:
    """Return the stream and event id of a message that could not be taken, if it has them."""
    try:
        fields = _JSON.validate_json(text)
    except ValidationError:
        return None, None
    stream, event = fields.get("stream_id"), fields.get("event_id")
    return stream if isinstance(stream, str) else None, event if isinstance(event, str) else None
