"""Sessions as resources: list, look at, delete; the same as OpenAI's Conversations."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from hope_runtime.state import State
from memory_store import Head
from server import wire
from server.errors import ApiError
from server.residency import Book, Resident
from server.service import Service, key, service, tenant

router = APIRouter()


@router.get("/v1/sessions")
async def list_sessions(
    request: Request,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> wire.SessionList:
    """List the tenant's sessions, most recently used first."""
    served = service(request)
    try:
        page = await served.store.sessions(tenant(request), cursor=cursor, limit=limit)
    except ValueError as error:  # a cursor that is none of ours
        raise ApiError(400, "invalid_request", str(error), param="cursor") from None
    return wire.SessionList(
        data=[describe(head, served) for head in page.heads],
        has_more=page.cursor is not None,
        next_cursor=page.cursor,
    )


@router.get("/v1/sessions/{session}")
async def get_session(session: str, request: Request) -> wire.Session:
    """Show one session: version, size, levels, durability."""
    served = service(request)
    return describe(await served.store.head(key(request, session)), served)


@router.delete("/v1/sessions/{session}")
@router.delete("/v1/conversations/{session}")
async def delete_session(session: str, request: Request) -> wire.DeletedSession:
    """Delete a session, in the store and in RAM; its id is not free again."""
    served = service(request)
    owner = key(request, session)
    async with served.turns.alone(owner):
        served.residency.drop(owner)
        receipt = await served.store.delete(owner)
    return wire.DeletedSession(id=session, keys=receipt.keys, bytes=receipt.bytes)


@router.post("/v1/conversations")
async def create_conversation(
    request: Request, body: wire.ConversationRequest | None = None
) -> wire.Conversation:
    """Create an empty session under a fresh id."""
    served = service(request)
    owner = key(request, f"conv_{uuid.uuid4().hex}")
    metadata = (body.metadata if body else None) or {}
    empty = Resident(owner, 0, State(), Book())
    await served.residency.commit(
        empty, State(), Book(metadata=metadata), commit_id=uuid.uuid4().hex, turn=None
    )
    return _conversation(await served.store.head(owner))


@router.get("/v1/conversations/{session}")
async def get_conversation(session: str, request: Request) -> wire.Conversation:
    """Show a session in the shape of the Conversations API."""
    return _conversation(await service(request).store.head(key(request, session)))


@router.get("/v1/conversations/{session}/items")
async def list_items(
    session: str, request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 200
) -> wire.Transcript:
    """Return what was said in the session's last turns, oldest first."""
    owner = key(request, session)
    await service(request).store.head(owner)  # 404 and 410 come from here
    items = [
        wire.TranscriptItem(
            id=f"item_{turn.turn_id}_{number}",
            role=role,
            status="incomplete" if _cut(turn.payload, number) else "completed",
            content=[
                wire.TextPart(
                    type="output_text" if role == "assistant" else "input_text", text=text
                )
            ],
        )
        for turn in await service(request).store.turns(owner, limit=limit)
        for number, (role, text) in enumerate(turn.payload["items"])
    ]
    return wire.Transcript(
        data=items,
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
    )


def _cut(payload: Mapping[str, Any], number: int) -> bool:
    """Tell whether an item is a reply that was stopped or reached its limit."""
    return number == len(payload["items"]) - 1 and payload["reason"] != "stop"


def _conversation(head: Head) -> wire.Conversation:
    return wire.Conversation(
        id=head.key.session,
        created_at=head.created,
        metadata=head.meta["book"]["metadata"],
    )


def describe(head: Head, served: Service) -> wire.Session:
    """Tell a session from its head alone; nothing is loaded."""
    state, book = head.meta["state"], head.meta["book"]
    due = [level for level, _, _ in state["due"]]
    levels = []
    for level in served.card.config.levels:
        known = state["levels"].get(level.name, {})
        levels.append(
            wire.LevelStatus(
                name=level.name,
                chunk=level.chunk,
                blocks=list(level.blocks),
                updates=known.get("updates", 0),
                last_position=known.get("position"),
                last_at=book["learned_at"].get(level.name),
                last_loss=known.get("loss"),
                last_outcome=known.get("outcome"),
                movement=known.get("movement", 0.0),
                due=due.count(level.name),
            )
        )
    return wire.Session(
        id=head.key.session,
        version=head.version,
        created_at=head.created,
        updated_at=head.updated,
        tokens=state["position"] + len(state["carry"]),
        turns=book["turns"],
        bytes=sum(blob.length for blob in head.blobs.values()),
        stored_bytes=sum(blob.stored for blob in head.blobs.values()),
        learning=served.settings.learning,
        surprise=book["surprise"],
        levels=levels,
        model=served.card.name,
        fingerprint=head.fingerprint,
        durability=served.durability.mode,
        metadata=book["metadata"],
    )
