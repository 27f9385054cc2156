"""One commit to Redis: draft the manifest, pack and stage the new blobs, run the script."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from redis.exceptions import OutOfMemoryError, RedisError

from memory_store import index
from memory_store.codec import (
    FIELD,
    Blob,
    Manifest,
    Packed,
    encode_json,
    encode_manifest,
    off_the_loop,
    pack,
)
from memory_store.errors import Conflict, Corrupt, Deleted, Incomplete
from memory_store.index import Place
from memory_store.keys import Keys
from memory_store.link import Command, Link
from memory_store.row import Row, read_row
from memory_store.scripts import script
from memory_store.snapshot import Change, Committed, SessionKey, TurnRecord

_log = logging.getLogger(__name__)

BATCH = 4 * FIELD  # bytes in one pipeline; more would hold up the server's other clients

_STAGED_S = 3600  # a staged blob that nobody commits is gone after this
_DROPPED_S = 60  # a dropped blob stays so long, for readers in flight


@dataclass(frozen=True, slots=True)
class Step:
    """Commands that belong together, and about how many bytes they move."""

    size: int
    commands: tuple[Command, ...]


def batches(steps: Iterable[Step]) -> Iterator[list[Command]]:
    """Group steps into pipelines of at most `BATCH` bytes."""
    batch: list[Command] = []
    size = 0
    for step in steps:
        if batch and size + step.size > BATCH:
            yield batch
            batch, size = [], 0
        batch += step.commands
        size += step.size
    if batch:
        yield batch


class Committer:
    """Makes changes the next versions of sessions, each wholly or not at all."""

    def __init__(self, link: Link, *, kept_versions: int) -> None:
        if kept_versions < 0:
            raise ValueError(f"kept_versions {kept_versions}: use 0 or more")
        self._link = link
        self._kept_versions = kept_versions
        self._script = link.client.register_script(script("commit.lua"))

    async def commit(
        self, key: SessionKey, change: Change, *, expected: int, commit_id: str
    ) -> Committed:
        row = await read_row(self._link, key)
        if commit_id in row.commits:
            return Committed(row.commits[commit_id], written=0, duplicate=True)
        if row.version != expected:
            raise Conflict(key.session, expected=expected, found=row.version)
        draft = _draft(row, change)
        packed = await off_the_loop(
            sum(map(len, change.put.values())),
            lambda: {name: pack(raw) for name, raw in change.put.items()},
        )
        staged = await self._link.again(lambda: self._stage(Keys(key), packed))
        manifest = replace(draft, blobs={**draft.blobs, **staged})
        done = await self._publish(key, manifest, staged, change.turn, commit_id)
        await self._list(Place(manifest.updated, key.session), key.tenant)
        return done

    async def _stage(self, keys: Keys, packed: Mapping[str, Packed]) -> dict[str, Blob]:
        """Write new blobs that expire unless they are committed.

        Every try has fresh ids: one that timed out may still be under way to the server, and
        must not put a time limit on blobs that have been committed since.
        """
        blobs = {name: item.named(uuid.uuid4().hex) for name, item in packed.items()}
        first: list[Step] = []
        rest: list[Step] = []
        for name, blob in blobs.items():
            target = keys.blob(blob.id)
            head, *tail = packed[name].fields()
            limit: Command = ("EXPIRE", target, _STAGED_S)
            first.append(Step(len(head), (("HSET", target, 0, head), limit)))
            rest += [Step(len(f), (("HSET", target, i, f),)) for i, f in enumerate(tail, 1)]
        async with self._letting_go_if_full(keys, blobs.values()):
            for batch in batches(first):
                await self._link.send(batch, atomic=True)
            for batch in batches(rest):
                await self._link.send(batch)
        return blobs

    async def _publish(
        self,
        key: SessionKey,
        manifest: Manifest,
        staged: Mapping[str, Blob],
        turn: TurnRecord | None,
        commit_id: str,
    ) -> Committed:
        """Run the script. Once it was sent, only it may be sent again, never the staging."""
        keys = Keys(key)
        arguments = _arguments(manifest, turn, commit_id, self._kept_versions)
        async with self._letting_go_if_full(keys, staged.values()):
            reply = await self._link.again(lambda: self._script(keys.scripted, arguments))
        if reply[0] == b"OK":
            return Committed(reply[1], written=sum(blob.stored for blob in staged.values()))
        await self._let_go(keys, staged.values())
        match reply:
            case [b"DUPLICATE", int(version)]:
                return Committed(version, written=0, duplicate=True)
            case [b"GONE"]:
                raise Deleted(key.session)
            case [b"CONFLICT", int(found)]:
                raise Conflict(key.session, expected=manifest.parent, found=found)
            case [b"INCOMPLETE", bytes(blob_id)]:
                raise Incomplete(key.session, _name(manifest, blob_id.decode()))
        raise Corrupt(key.session, f"head: the commit script answered {reply!r}")

    async def _list(self, place: Place, tenant: str) -> None:
        try:
            await index.put(self._link, tenant, place)
        except RedisError as error:
            # The commit stands; the session's next one brings it into the listing.
            _log.warning("a commit could not be listed: %s", error)

    @asynccontextmanager
    async def _letting_go_if_full(self, keys: Keys, blobs: Iterable[Blob]) -> AsyncIterator[None]:
        try:
            yield
        except OutOfMemoryError:
            await self._let_go(keys, blobs)
            raise

    async def _let_go(self, keys: Keys, blobs: Iterable[Blob]) -> None:
        """Remove staged blobs now rather than in an hour, as well as it goes.

        XX leaves alone what has no time limit: blobs that were committed after all.
        """
        commands: list[Command] = [("EXPIRE", keys.blob(blob.id), 0, "XX") for blob in blobs]
        if commands:
            with suppress(RedisError):
                await self._link.send(commands)


def _draft(row: Row, change: Change) -> Manifest:
    """Return the next version's manifest, still without the new blobs."""
    now = time.time()
    before = row.manifest() if row.version else None
    old = before.blobs if before else {}
    if missing := change.keep - old.keys():
        raise Incomplete(row.key.session, min(missing))
    return Manifest(
        version=row.version + 1,
        parent=row.version,
        fingerprint=change.fingerprint,
        created=before.created if before else now,
        updated=now,
        meta=change.meta,
        blobs={name: old[name] for name in sorted(change.keep)},
    )


def _arguments(
    manifest: Manifest, turn: TurnRecord | None, commit_id: str, kept: int
) -> list[str | bytes | int]:
    """Return the arguments of `commit.lua`, in its order."""
    record: tuple[int, str, str | bytes] = (0, "", "")
    if turn is not None:
        record = (1, turn.turn_id, encode_json(turn.payload))
    arguments = [manifest.parent, commit_id, encode_manifest(manifest), kept, _DROPPED_S, *record]
    for blob in manifest.blobs.values():
        arguments += [blob.id, blob.fields, blob.stored]
    return arguments


def _name(manifest: Manifest, blob_id: str) -> str:
    return next(name for name, blob in manifest.blobs.items() if blob.id == blob_id)
