"""Sessions as resources: list, look at, delete; the same as OpenAI's Conversations."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from memory_store import Deletion, Head, archive
from memory_store.headers import BadArchive
from server import wire
from server.errors import ApiError
from server.service import Service, key, service, tenant

router = APIRouter()

IfMatch = Annotated[str | None, Header(alias="If-Match")]


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
    return _receipt(await served.sessions.delete(key(request, session)), served)


@router.delete("/v1/users/{user:path}/memory")
async def delete_user(user: str, request: Request) -> wire.DeletedUser:
    """Delete every session of a person."""
    served = service(request)
    receipts = await served.sessions.delete_of(tenant(request), user)
    return wire.DeletedUser(
        user=user,
        sessions=[_receipt(each, served) for each in receipts],
        keys=sum(each.keys for each in receipts),
        bytes=sum(each.bytes for each in receipts),
        left=sum(each.left for each in receipts),
        remains=_remains(served),
    )


@router.get("/v1/sessions/{session}/versions")
async def list_versions(session: str, request: Request) -> wire.VersionList:
    """List the kept versions of a session, the newest first."""
    served = service(request)
    heads = await served.store.versions(key(request, session))
    return wire.VersionList(data=[_version(head, served) for head in heads])


@router.post("/v1/sessions/{session}/rollback")
async def rollback(
    session: str, body: wire.RollbackRequest, request: Request, if_match: IfMatch = None
) -> wire.Session:
    """Go on from an older kept version."""
    served = service(request)
    at = _version_of(if_match)
    return describe(await served.sessions.rollback(key(request, session), body.version, at), served)


@router.post("/v1/sessions/{session}/fork", status_code=201)
async def fork(
    session: str, request: Request, body: wire.ForkRequest | None = None
) -> wire.Session:
    """Copy a session, or an older version of it, to a new id."""
    served = service(request)
    asked = body or wire.ForkRequest()
    target = key(request, asked.id or f"conv_{uuid.uuid4().hex}", param="id")
    source = key(request, session)
    return describe(await served.sessions.fork(source, target, asked.version, asked.user), served)


@router.post("/v1/sessions/{session}/freeze")
async def freeze(session: str, request: Request, if_match: IfMatch = None) -> wire.Session:
    """Let turns read the session, and nothing change it."""
    served = service(request)
    at = _version_of(if_match)
    return describe(await served.sessions.freeze(key(request, session), True, at), served)


@router.post("/v1/sessions/{session}/unfreeze")
async def unfreeze(session: str, request: Request, if_match: IfMatch = None) -> wire.Session:
    """Let turns write the session again."""
    served = service(request)
    at = _version_of(if_match)
    return describe(await served.sessions.freeze(key(request, session), False, at), served)


@router.get("/v1/sessions/{session}/diff")
async def diff(
    session: str,
    request: Request,
    before: Annotated[int | None, Query(alias="from", ge=1)] = None,
    after: Annotated[int | None, Query(alias="to", ge=1)] = None,
) -> wire.Difference:
    """Compare two kept versions level by level; by default the last two."""
    served = service(request)
    one, other, apart = await served.sessions.difference(key(request, session), before, after)
    return wire.Difference(
        id=session,
        from_version=one.version,
        to_version=other.version,
        tokens=_tokens(other) - _tokens(one),
        levels=[
            wire.LevelDifference(
                name=part.name,
                norm_from=part.before,
                norm_to=part.after,
                distance=part.distance,
                change=part.distance / part.before if part.before else None,
            )
            for part in apart
        ],
    )


@router.get("/v1/sessions/{session}/export")
async def export(
    session: str, request: Request, version: Annotated[int | None, Query(ge=1)] = None
) -> StreamingResponse:
    """Return all of a session as one safetensors file."""
    found = await service(request).sessions.export(key(request, session), version)
    length, chunks = await asyncio.to_thread(archive.write, found)
    name = f"{session}.{found.version}.safetensors"
    return StreamingResponse(
        chunks,
        media_type="application/octet-stream",
        headers={
            "Content-Length": str(length),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}",
            "ETag": f'"{found.version}"',
            "Cache-Control": "no-store",
        },
    )


@router.put("/v1/sessions/{session}/import", status_code=201)
async def import_session(
    session: str,
    request: Request,
    user: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> wire.Session:
    """Make a session of an exported file, which is checked before room is made for it."""
    served = service(request)
    owner = key(request, session)
    async with served.sessions.importing:  # each may hold a whole file
        reader = archive.Reader(limit=served.settings.max_import_mib << 20)
        try:
            async for chunk in request.stream():
                await asyncio.to_thread(reader.feed, chunk)
        except ClientDisconnect:  # nobody hears this
            raise BadArchive("the client left before the file ended") from None
        found = await asyncio.to_thread(reader.done)
        head = await served.sessions.bring_in(
            owner, found, user, lambda head: describe(head, served)
        )
    return describe(head, served)


@router.post("/v1/conversations")
async def create_conversation(
    request: Request, body: wire.ConversationRequest | None = None
) -> wire.Conversation:
    """Create an empty session under a fresh id."""
    asked = body or wire.ConversationRequest()
    owner = key(request, f"conv_{uuid.uuid4().hex}")
    head = await service(request).sessions.create(owner, asked.metadata or {}, asked.user)
    return _conversation(head)


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
    book = head.meta["book"]
    return wire.Session(
        id=head.key.session,
        version=head.version,
        created_at=head.created,
        updated_at=head.updated,
        tokens=_tokens(head),
        turns=book["turns"],
        bytes=sum(blob.length for blob in head.blobs.values()),
        stored_bytes=sum(blob.stored for blob in head.blobs.values()),
        learning=served.settings.learning,
        surprise=book["surprise"],
        levels=_levels(head, served),
        model=served.card.name,
        fingerprint=head.fingerprint,
        durability=served.store.promised.mode,
        metadata=book["metadata"],
        user=head.owner,
        frozen=book.get("frozen", False),
    )


def _version(head: Head, served: Service) -> wire.SessionVersion:
    book = head.meta["book"]
    return wire.SessionVersion(
        version=head.version,
        parent=head.parent,
        created_at=head.updated,
        tokens=_tokens(head),
        turns=book["turns"],
        bytes=sum(blob.length for blob in head.blobs.values()),
        stored_bytes=sum(blob.stored for blob in head.blobs.values()),
        frozen=book.get("frozen", False),
        levels=_levels(head, served),
    )


def _tokens(head: Head) -> int:
    state = head.meta["state"]
    return int(state["position"]) + len(state["carry"])


def _levels(head: Head, served: Service) -> list[wire.LevelStatus]:
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
    return levels


def _version_of(if_match: str | None) -> int | None:
    """Return the version that an If-Match header names; None: any."""
    if if_match is None or if_match.strip() == "*":
        return None
    try:
        return int(if_match.strip().removeprefix("W/").strip('"'))
    except ValueError:
        raise ApiError(
            400,
            "invalid_request",
            f'If-Match {if_match!r} names no version; write a number, such as "7"',
            param="If-Match",
        ) from None


def _receipt(deletion: Deletion, served: Service) -> wire.DeletedSession:
    return wire.DeletedSession(
        id=deletion.session,
        keys=deletion.keys,
        bytes=deletion.bytes,
        left=deletion.left,
        remains=_remains(served),
    )


def _remains(served: Service) -> str:
    """Tell where older copies may be that no store of ours can reach."""
    if served.store.promised.mode == "memory":
        return "nowhere: this store is the process's memory"
    return (
        "the store's append-only file and snapshots until they are rewritten (BGREWRITEAOF does "
        "it now), its replicas until they caught up, and backups until they age out"
    )
