"""Sessions in Redis or Valkey: blobs are staged with plain commands, one script commits.

Whenever the process dies, every session is whole at one version, and what was staged for
another one expires by itself.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence

from memory_store import index
from memory_store.codec import FIELD, Blob, Manifest, off_the_loop, unpack
from memory_store.commit import Committer, Step, batches
from memory_store.durability import read_durability, refuse_unsafe
from memory_store.errors import Corrupt, Deleted, Incompatible, NotFound
from memory_store.index import Place, check_limit
from memory_store.keys import Keys
from memory_store.link import Link
from memory_store.row import decode_row, read_row, row_query
from memory_store.scripts import script
from memory_store.snapshot import (
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)

_log = logging.getLogger(__name__)


class RedisStore:
    """A `MemoryStore` on a server of Redis 7 or Valkey; make one with `RedisStore.open`."""

    def __init__(self, link: Link, *, kept_versions: int = 4) -> None:
        self._link = link
        self._committer = Committer(link, kept_versions=kept_versions)
        self._delete_script = link.client.register_script(script("delete.lua"))

    @classmethod
    async def open(
        cls, url: str, *, kept_versions: int = 4, allow_eviction: bool = False
    ) -> RedisStore:
        """Connect, and read from the server whether it keeps what it acknowledges.

        Args:
            url: redis://, rediss:// or unix://, with credentials where needed.
            kept_versions: how many older versions stay beside the current one.
            allow_eviction: accept a server that drops sessions when its memory runs out.

        Raises:
            ValueError: the address cannot be read.
            Unavailable: nothing answers there.
            Unsafe: the server would lose sessions silently, or is too old.
        """
        link = Link(url)
        try:
            store = cls(link, kept_versions=kept_versions)
            refuse_unsafe(await store.durability(), allow_eviction=allow_eviction)
        except BaseException:
            await link.close()
            raise
        return store

    async def commit(
        self, key: SessionKey, change: Change, *, expected: int, commit_id: str
    ) -> Committed:
        work = self._committer.commit(key, change, expected=expected, commit_id=commit_id)
        return await self._link.run(work)

    async def load(self, key: SessionKey, *, fingerprint: str) -> Snapshot:
        return await self._link.run(self._load(key, fingerprint))

    async def head(self, key: SessionKey) -> Head:
        row = await self._link.run(read_row(self._link, key))
        return row.manifest().head(key)

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        check_limit(limit)
        after = None if cursor is None else Place.parse(cursor)
        return await self._link.run(self._sessions(tenant, after, limit))

    async def turns(self, key: SessionKey, *, limit: int = 200) -> Sequence[TurnRecord]:
        check_limit(limit)
        return await self._link.run(self._turns(key, limit))

    async def delete(self, key: SessionKey) -> Deletion:
        return await self._link.run(self._delete(key))

    async def durability(self) -> Durability:
        link = self._link
        return await link.run(link.again(lambda: read_durability(link.client, link.where)))

    async def close(self) -> None:
        await self._link.close()

    async def _load(self, key: SessionKey, fingerprint: str) -> Snapshot:
        manifest = await self._readable(key, fingerprint)
        try:
            blobs = await self._blobs(key, manifest)
        except Corrupt:
            # Commits may have moved on for so long that a blob of this version has expired.
            newer = await self._readable(key, fingerprint)
            if newer.version == manifest.version:
                raise
            manifest, blobs = newer, await self._blobs(key, newer)
        return Snapshot(manifest.head(key), blobs)

    async def _readable(self, key: SessionKey, fingerprint: str) -> Manifest:
        manifest = (await read_row(self._link, key)).manifest()
        if manifest.fingerprint != fingerprint:
            raise Incompatible(key.session, expected=fingerprint, found=manifest.fingerprint)
        return manifest

    async def _blobs(self, key: SessionKey, manifest: Manifest) -> dict[str, bytes]:
        keys = Keys(key)
        steps = [
            Step(FIELD, (("HGET", keys.blob(blob.id), number),))
            for blob in manifest.blobs.values()
            for number in range(blob.fields)
        ]
        fields: list[bytes | None] = []
        for batch in batches(steps):
            fields += await self._link.ask(batch)
        return await off_the_loop(
            sum(blob.length for blob in manifest.blobs.values()),
            lambda: _unpack_all(key.session, manifest.blobs, fields),
        )

    async def _sessions(self, tenant: str, after: Place | None, limit: int) -> Page:
        living: list[tuple[Place, Head]] = []
        while len(living) <= limit:
            places = await index.places(self._link, tenant, after, limit + 1 - len(living))
            if not places:
                break
            living += await self._living(tenant, places)
            after = places[-1]
        heads = tuple(head for _, head in living[:limit])
        return Page(heads, str(living[limit - 1][0]) if len(living) > limit else None)

    async def _living(self, tenant: str, places: Sequence[Place]) -> list[tuple[Place, Head]]:
        """Read the heads, and take those out of the index that are gone."""
        keys = [SessionKey(tenant, place.session) for place in places]
        rows = await self._link.ask([row_query(key) for key in keys])
        living: list[tuple[Place, Head]] = []
        dead: list[str] = []
        for place, key, found in zip(places, keys, rows, strict=True):
            try:
                living.append((place, decode_row(key, found).manifest().head(key)))
            except (NotFound, Deleted):
                dead.append(key.session)
            except (Corrupt, Incompatible) as error:
                _log.warning("left out of the listing: %s", error)
        await index.remove(self._link, tenant, dead)
        return living

    async def _turns(self, key: SessionKey, limit: int) -> list[TurnRecord]:
        if not (await read_row(self._link, key)).version:
            raise NotFound(key.session)
        items = Keys(key).items
        [last] = await self._link.ask([("HGET", items, "n")])
        count = int(last or 0)
        places = [f"n:{place}" for place in range(max(1, count - limit + 1), count + 1)]
        [ids] = await self._link.ask([("HMGET", items, *places)]) if places else [[]]
        present = [turn_id for turn_id in ids if turn_id is not None]
        fields = [b"t:" + turn_id for turn_id in present]
        [records] = await self._link.ask([("HMGET", items, *fields)]) if fields else [[]]
        return [
            _record(key.session, turn_id.decode(), record)
            for turn_id, record in zip(present, records, strict=True)
            if record is not None
        ]

    async def _delete(self, key: SessionKey) -> Deletion:
        keys, now = Keys(key).scripted, [repr(time.time())]
        reply = await self._link.again(lambda: self._delete_script(keys, now))
        if reply[0] == b"GONE":
            raise Deleted(key.session)
        if reply[0] == b"MISSING":
            raise NotFound(key.session)
        await index.remove(self._link, key.tenant, [key.session])
        return Deletion(key.session, keys=reply[1], bytes=reply[2])


def _unpack_all(
    session: str, blobs: Mapping[str, Blob], fields: Sequence[bytes | None]
) -> dict[str, bytes]:
    raw: dict[str, bytes] = {}
    start = 0
    for name, blob in blobs.items():
        raw[name] = unpack(session, name, blob, fields[start : start + blob.fields])
        start += blob.fields
    return raw


def _record(session: str, turn_id: str, record: bytes) -> TurnRecord:
    try:
        return TurnRecord(turn_id, json.loads(record))
    except ValueError as error:
        raise Corrupt(session, f"turn {turn_id!r}: {error}") from error
