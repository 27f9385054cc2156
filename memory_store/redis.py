"""Sessions in Redis or Valkey: blobs are staged with plain commands, one script commits.

Whenever the process dies, every session is whole at one version, and what was staged for
another one expires by itself.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence

from memory_store import index, lease
from memory_store.commit import Committer
from memory_store.durability import read_durability, refuse_unsafe
from memory_store.errors import Corrupt, Deleted, Incompatible, NotFound
from memory_store.index import Place, check_limit
from memory_store.keys import Keys, heads_of, session_of
from memory_store.link import Link
from memory_store.reader import Reader
from memory_store.row import decode_row, read_manifest, read_row, row_query
from memory_store.scripts import script
from memory_store.seal import Keyring
from memory_store.snapshot import (
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Lease,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)
from memory_store.transcript import read_turn, read_turns
from memory_store.vault import Vault

_log = logging.getLogger(__name__)

_DELETE = script("delete.lua")
_MANY = 200  # heads that are asked for in one go


class RedisStore:
    """A `MemoryStore` on Redis 7 or Valkey: one server, sentinels' master, or a cluster."""

    def __init__(
        self,
        link: Link,
        *,
        kept_versions: int = 4,
        keyring: Keyring | None = None,
        replicas: int = 0,
    ) -> None:
        self._link = link
        self._vault = Vault(keyring)
        self._reader = Reader(link, self._vault)
        self._committer = Committer(
            link, self._vault, kept_versions=kept_versions, replicas=replicas
        )

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        kept_versions: int = 4,
        allow_eviction: bool = False,
        keyring: Keyring | None = None,
        replicas: int = 0,
        patience: float = 5.0,
    ) -> RedisStore:
        """Connect, and read from the server whether it keeps what it acknowledges.

        Args:
            url: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://, with
                credentials where needed.
            kept_versions: how many older versions stay beside the current one.
            allow_eviction: accept a server that drops sessions when its memory runs out.
            keyring: what to seal with all that is stored.
            replicas: how many must have a durable commit on disk, beside the server itself.
            patience: seconds until a server that says nothing counts as silent.

        Raises:
            ValueError: the address cannot be read.
            Unavailable: nothing answers there.
            Unsafe: the server would lose sessions silently, or is too old.
        """
        link = Link(url, timeout=patience)
        try:
            store = cls(link, kept_versions=kept_versions, keyring=keyring, replicas=replicas)
            refuse_unsafe(await store.durability(), allow_eviction=allow_eviction)
        except BaseException:
            await link.close()
            raise
        return store

    async def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        return await self._link.run(lease.acquire(self._link, key, owner, seconds))

    async def renew(self, held: Lease, *, seconds: float) -> bool:
        return await self._link.run(lease.renew(self._link, held, seconds))

    async def release(self, held: Lease) -> None:
        await self._link.run(lease.release(self._link, held))

    async def commit(
        self,
        lease: Lease,
        change: Change,
        *,
        expected: int,
        commit_id: str,
        durable: bool = False,
    ) -> Committed:
        work = self._committer.commit(
            lease, change, expected=expected, commit_id=commit_id, durable=durable
        )
        return await self._link.run(work)

    async def load(
        self, key: SessionKey, *, fingerprint: str, version: int | None = None
    ) -> Snapshot:
        reader = self._reader
        work = (
            reader.newest(key, fingerprint)
            if version is None
            else reader.version(key, fingerprint, version)
        )
        return await self._link.run(work)

    async def head(self, key: SessionKey) -> Head:
        row = await self._link.run(read_row(self._link, key))
        return row.manifest(self._vault).head(key)

    async def versions(self, key: SessionKey) -> Sequence[Head]:
        return await self._link.run(self._reader.versions(key))

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        check_limit(limit)
        after = None if cursor is None else Place.parse(cursor)
        return await self._link.run(self._sessions(tenant, after, limit))

    async def owned(self, tenant: str, owner: str) -> Sequence[SessionKey]:
        return await self._link.run(self._owned(tenant, owner))

    async def turns(
        self, key: SessionKey, *, limit: int = 200, version: int | None = None
    ) -> Sequence[TurnRecord]:
        check_limit(limit)
        return await self._link.run(self._turns(key, limit, version))

    async def turn(self, key: SessionKey, turn_id: str) -> TurnRecord | None:
        return await self._link.run(self._turn(key, turn_id))

    async def delete(self, key: SessionKey) -> Deletion:
        return await self._link.run(self._delete(key))

    async def durability(self) -> Durability:
        link = self._link
        return await link.run(link.again(lambda: read_durability(link)))

    async def close(self) -> None:
        await self._link.close()

    # --- listing ------------------------------------------------------------------------------

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
                living.append((place, decode_row(key, found).manifest(self._vault).head(key)))
            except NotFound:
                if place.updated < time.time() - index.YOUNG_S:  # else it may be about to be made
                    dead.append(key.session)
            except Deleted:
                dead.append(key.session)
            except (Corrupt, Incompatible) as error:
                _log.warning("left out of the listing: %s", error)
        await index.remove(self._link, tenant, dead)
        return living

    async def _owned(self, tenant: str, owner: str) -> list[SessionKey]:
        heads = await self._link.scan(heads_of(tenant))
        found: list[SessionKey] = []
        for start in range(0, len(heads), _MANY):
            some = heads[start : start + _MANY]
            users = await self._link.ask([("HGET", head, "user") for head in some])
            found += [
                session_of(head)
                for head, user in zip(some, users, strict=True)
                if user is not None and user.decode() == owner
            ]
        return found

    # --- turns --------------------------------------------------------------------------------

    async def _turns(self, key: SessionKey, limit: int, version: int | None) -> list[TurnRecord]:
        row = await read_row(self._link, key)
        wanted = row.version if version is None else version
        manifest = await read_manifest(self._link, self._vault, row, wanted)
        return await read_turns(self._link, self._vault, key, manifest, limit)

    async def _turn(self, key: SessionKey, turn_id: str) -> TurnRecord | None:
        await read_row(self._link, key)  # says so where it was deleted
        return await read_turn(self._link, self._vault, key, turn_id)

    # --- deleting -----------------------------------------------------------------------------

    async def _delete(self, key: SessionKey) -> Deletion:
        keys, name = Keys(key), f"{time.time()!r} {uuid.uuid4().hex}"
        [reply] = await self._link.call(_DELETE, keys.committed, [name])
        if reply[0] == b"GONE":
            raise Deleted(key.session)
        if reply[0] == b"MISSING":
            raise NotFound(key.session)
        await index.remove(self._link, key.tenant, [key.session])
        swept, left = await self._sweep(keys)
        return Deletion(key.session, keys=reply[1] + swept, bytes=reply[2], left=left)

    async def _sweep(self, keys: Keys) -> tuple[int, int]:
        """Remove what writers that were fenced out had staged; return how much, and what is left.

        What one of them stages after this is let go when its commit is refused, and expires.
        """
        if not (strays := await self._strays(keys)):
            return 0, 0
        await self._link.ask([("UNLINK", name) for name in strays])
        return len(strays), len(await self._strays(keys))

    async def _strays(self, keys: Keys) -> list[str]:
        return [name for name in await self._link.scan(keys.all) if name != keys.head]
