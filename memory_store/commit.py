"""One commit to Redis: draft the manifest, pack and stage the new blobs, run the script."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import OutOfMemoryError, RedisError

from memory_store import index
from memory_store.codec import Blob, Manifest, encode_manifest, off_the_loop, pack
from memory_store.durability import read_durability
from memory_store.errors import (
    Conflict,
    Corrupt,
    Deleted,
    Fenced,
    Incomplete,
    NoVersion,
    Regressed,
    Repeated,
    StoreError,
)
from memory_store.index import Place
from memory_store.keys import Keys
from memory_store.link import Command, Link
from memory_store.row import Row, read_manifest, read_row
from memory_store.scripts import script
from memory_store.snapshot import Change, Committed, Lease, SessionKey, TurnRecord
from memory_store.staging import let_go, letting_go_if_full, stage
from memory_store.transcript import encode_turn
from memory_store.vault import MANIFEST, Vault

_log = logging.getLogger(__name__)

_DROPPED_S = 60  # a dropped blob stays so long, for readers in flight
_COMMIT, _TOUCH = map(script, ("commit.lua", "touch.lua"))


class Committer:
    """Makes changes the next versions of sessions, each wholly or not at all."""

    def __init__(self, link: Link, vault: Vault, *, kept_versions: int, replicas: int) -> None:
        if kept_versions < 0:
            raise ValueError(f"kept_versions {kept_versions}: use 0 or more")
        self._link = link
        self._vault = vault
        self._kept_versions = kept_versions
        self._replicas = replicas

    async def commit(
        self, lease: Lease, change: Change, *, expected: int, commit_id: str, durable: bool
    ) -> Committed:
        key = lease.key
        row = await read_row(self._link, key)
        if commit_id in row.commits:
            return await self._known(key, row.commits[commit_id], durable)
        _check(row, lease, expected)
        draft = await self._draft(row, change)
        packed = await off_the_loop(
            sum(map(len, change.put.values())),
            lambda: {name: pack(raw) for name, raw in change.put.items()},
        )
        if not expected:  # a session that is not listed could be overlooked for ever
            await index.put(self._link, key.tenant, Place(draft.updated, key.session))
        staged = await self._link.again(lambda: stage(self._link, self._vault, key, packed))
        manifest = replace(draft, blobs={**draft.blobs, **staged})
        arguments = self._arguments(lease, manifest, expected, change, commit_id)
        reply, waited = await self._publish(lease, commit_id, arguments, staged, durable)
        match reply:
            case [b"OK", int(version)]:
                written = sum(blob.stored for blob in staged.values())
                done = Committed(version, written, durable=await self._confirmed(waited))
            case [b"DUPLICATE", int(version)]:
                # perhaps by a try of this call whose reply was lost: then the blobs are in use
                await let_go(self._link, Keys(key), staged.values())
                done = await self._known(key, version, durable)
            case _:
                await let_go(self._link, Keys(key), staged.values())
                raise _refused(key, manifest, expected, reply)
        if expected:
            await self._list(Place(manifest.updated, key.session), key.tenant)
        return done

    async def _draft(self, row: Row, change: Change) -> Manifest:
        """Return the next version's manifest, still without the new blobs."""
        now = time.time()
        before = None
        if row.version:
            base = row.version if change.base is None else change.base
            before = await read_manifest(self._link, self._vault, row, base)
        elif change.base is not None:
            raise NoVersion(row.key.session, change.base, kept=(0, 0))
        old = before.blobs if before else {}
        if missing := change.keep - old.keys():
            raise Incomplete(row.key.session, min(missing))
        undone = before.undone if before else ()
        if before and before.version < row.version:
            undone = (*undone, (before.version, row.version))
        return Manifest(
            version=max(row.version, change.above) + 1,
            parent=before.version if before else 0,
            fingerprint=change.fingerprint,
            created=before.created if before else now,
            updated=now,
            meta=change.meta,
            blobs={name: old[name] for name in sorted(change.keep)},
            owner=change.owner or row.user,
            chain=linked(before.chain if before else "", change.turns),
            undone=undone,
        )

    def _arguments(
        self, lease: Lease, manifest: Manifest, expected: int, change: Change, commit_id: str
    ) -> list[str | bytes | int]:
        """Return the arguments of `commit.lua`, in its order."""
        key = lease.key
        arguments: list[str | bytes | int] = [
            expected,
            manifest.version,
            lease.fence,
            lease.owner,
            commit_id,
            bytes(self._vault.close(key, MANIFEST, encode_manifest(manifest))),
            self._kept_versions,
            _DROPPED_S,
            change.owner or "",
            len(change.turns),
        ]
        for turn in change.turns:
            arguments += [turn.turn_id, encode_turn(self._vault, key, turn, manifest.version)]
        for blob in manifest.blobs.values():
            arguments += [blob.id, blob.fields, blob.stored]
        return arguments

    async def _publish(
        self,
        lease: Lease,
        commit_id: str,
        arguments: Sequence[str | bytes | int],
        staged: Mapping[str, Blob],
        durable: bool,
    ) -> tuple[Any, Sequence[Any]]:
        """Run the script. Once it was sent, only it may be sent again, never the staging."""
        keys = Keys(lease.key)
        try:
            async with letting_go_if_full(self._link, keys, staged.values()):
                reply, *waited = await self._link.call(
                    _COMMIT, keys.committed, arguments, self._wait(durable)
                )
        except OutOfMemoryError:
            # Of a second try: the first may have been done, and its reply lost.
            row = await read_row(self._link, lease.key)
            if commit_id not in row.commits:
                raise
            return [b"DUPLICATE", row.commits[commit_id]], ()
        return reply, waited

    async def _known(self, key: SessionKey, version: int, durable: bool) -> Committed:
        """Answer for a commit that was made before; `durable` may still have to be waited for."""
        if not durable:
            return Committed(version, written=0, duplicate=True)
        _, *waited = await self._link.call(_TOUCH, [Keys(key).head], [version], self._wait(True))
        durable = await self._confirmed(waited)
        return Committed(version, written=0, duplicate=True, durable=durable)

    def _wait(self, durable: bool) -> list[Command]:
        """Return the command that waits until all that this connection wrote is on disk."""
        milliseconds = int(800 * self._link.timeout)  # answered before the line is given up
        return [("WAITAOF", 1, self._replicas, milliseconds)] if durable else []

    async def _confirmed(self, waited: Sequence[Any]) -> bool:
        """Tell whether the server said that the commit is on disk, on all that were asked for."""
        match waited:
            case []:
                return False
            case [[int(here), int(elsewhere)]]:
                return here >= 1 and elsewhere >= self._replicas
        # It does not know WAITAOF, or has no AOF. What fsyncs always has done so with its reply.
        if self._replicas:
            return False
        try:
            found = await self._link.again(lambda: read_durability(self._link))
        except (RedisError, StoreError) as error:
            _log.warning("whether a commit is on disk could not be asked: %s", error)
            return False
        return found.mode == "always"

    async def _list(self, place: Place, tenant: str) -> None:
        try:
            await index.put(self._link, tenant, place)
        except (RedisError, StoreError) as error:
            # The commit stands; the session's next one brings it to its place in the listing.
            _log.warning("a commit could not be listed: %s", error)


def linked(chain: str, turns: Sequence[TurnRecord]) -> str:
    """Return the rolling digest of all turn ids after these turns.

    >>> linked("", [TurnRecord("a", {}), TurnRecord("b", {})]) == linked(
    ...     linked("", [TurnRecord("a", {})]), [TurnRecord("b", {})]
    ... )
    True
    """
    for turn in turns:
        chain = hashlib.sha256(f"{chain}\n{turn.turn_id}".encode()).hexdigest()[:32]
    return chain


def _check(row: Row, lease: Lease, expected: int) -> None:
    """Refuse early, and in the script's order, what it would refuse."""
    if lease.fence < row.fence:
        raise Fenced(lease.key.session)
    if (lease.fence, lease.owner) != (row.fence, row.holder):
        raise Regressed(lease.key.session)
    if row.version != expected:
        raise Conflict(lease.key.session, expected=expected, found=row.version)


def _refused(key: SessionKey, manifest: Manifest, expected: int, reply: object) -> StoreError:
    match reply:
        case [b"GONE"]:
            return Deleted(key.session)
        case [b"FENCED"]:
            return Fenced(key.session)
        case [b"REGRESSED"]:
            return Regressed(key.session)
        case [b"CONFLICT", int(found)]:
            return Conflict(key.session, expected=expected, found=found)
        case [b"REPEATED", bytes(turn_id)]:
            return Repeated(key.session, turn_id.decode())
        case [b"INCOMPLETE", bytes(blob_id)]:
            named = {blob.id: name for name, blob in manifest.blobs.items()}
            return Incomplete(key.session, named[blob_id.decode()])
    return Corrupt(key.session, f"head: the commit script answered {reply!r}")
