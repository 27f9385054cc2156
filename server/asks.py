"""From a request on the wire to a turn: defaults, limits, and which session it is about."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from hope_runtime.sampling import Sampling
from hope_runtime.tokenizer import Message, Role
from memory_store import SessionKey
from server import wire
from server.errors import ApiError
from server.settings import Settings
from server.turn import Ask


def session_id(
    conversation: str | wire.ConversationRef | None,
    headers: Mapping[str, str],
    settings: Settings,
) -> str | None:
    """Return the session a request names, in its body or a header (400 when they disagree)."""
    body = conversation.id if isinstance(conversation, wire.ConversationRef) else conversation
    for name in settings.session_headers:
        value = headers.get(name)
        if value and body and value != body:
            raise ApiError(
                400,
                "session_mismatch",
                f"the body names session {body!r}, the header {name} {value!r}; send one of them",
                param="conversation",
            )
        body = body or value
    return body


def from_response(
    request: wire.ResponseRequest, key: SessionKey | None, settings: Settings, model: str
) -> Ask:
    """Return the turn that a Responses request asks for."""
    check_model(request.model, model)
    if request.previous_response_id is not None:
        raise ApiError(
            404,
            "previous_response_not_found",
            f"response {request.previous_response_id!r} is not kept; "
            "name the session with `conversation` instead",
            param="previous_response_id",
        )
    if isinstance(request.input, str):
        messages: tuple[Message, ...] = (Message(Role.USER, request.input),)
    else:
        messages = tuple(Message(Role(m.role), m.text) for m in request.input)
    return _ask(
        request,
        key,
        settings,
        messages=messages,
        instructions=request.instructions,
        most=_most(request.max_output_tokens, settings, "max_output_tokens"),
        memory=request.memory,
        turn_id=request.turn_id or getattr(request, "event_id", None) or "",
        metadata=request.metadata or {},
        history=False,
    )


def from_chat(
    request: wire.ChatRequest, key: SessionKey | None, settings: Settings, model: str
) -> Ask:
    """Return the turn that a chat completion asks for; its messages may be the whole history."""
    check_model(request.model, model)
    most = request.max_completion_tokens or request.max_tokens
    return _ask(
        request,
        key,
        settings,
        messages=tuple(Message(Role(m.role), m.text) for m in request.messages),
        instructions=None,
        most=_most(most, settings, "max_tokens"),
        memory=request.memory,
        turn_id=request.turn_id or "",
        metadata={},
        history=True,
    )


def _ask(
    request: wire.ResponseRequest | wire.ChatRequest,
    key: SessionKey | None,
    settings: Settings,
    *,
    messages: tuple[Message, ...],
    instructions: str | None,
    most: int,
    memory: wire.MemoryOptions,
    turn_id: str,
    metadata: Mapping[str, str],
    history: bool,
) -> Ask:
    if not any(message.text.strip() for message in messages):
        raise ApiError(400, "invalid_request", "the input is empty; say something", param="input")
    if not messages[-1].text.strip():
        raise ApiError(400, "invalid_request", "the last message is empty", param="input")
    if memory.if_version is not None and (key is None or memory.mode is wire.Mode.OFF):
        raise ApiError(
            400,
            "invalid_request",
            "if_version speaks of a session, and this turn reads none; name one, or leave it out",
            param="memory.if_version",
        )
    stop = request.stop
    writes = key is not None and memory.mode is wire.Mode.READ_WRITE
    return Ask(
        key=key,
        messages=messages,
        instructions=instructions,
        sampling=_sampling(request, settings),
        most=most,
        stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        mode=memory.mode,
        on_cancel=memory.on_cancel,
        if_version=memory.if_version,
        rates=tuple((Role(role), rate) for role, rate in (memory.rates or {}).items()),
        history=history,
        turn_id=turn_id,
        metadata=tuple(metadata.items()),
        user=request.user,
        fresh=key is not None and memory.window == "fresh",
        durable=writes and (memory.wait or settings.wait) == "durable",
    )


def _sampling(request: wire.Sampling, settings: Settings) -> Sampling:
    given = request.temperature
    return Sampling(
        temperature=settings.temperature if given is None else given,
        top_p=settings.top_p if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or settings.repetition_penalty,
        seed=secrets.randbits(63) if request.seed is None else request.seed & (2**63 - 1),
    )


def _most(asked: int | None, settings: Settings, param: str) -> int:
    if asked is None:
        return min(settings.default_output_tokens, settings.max_output_tokens)
    if asked > settings.max_output_tokens:
        raise ApiError(
            400,
            "invalid_request",
            f"{param} {asked} is more than this server's {settings.max_output_tokens}",
            param=param,
        )
    return asked


def check_model(asked: str | None, served: str) -> None:
    if asked not in (None, "", "default", served):
        raise ApiError(
            404,
            "model_not_found",
            f"model {asked!r} is not served here; use {served!r}",
            param="model",
        )
