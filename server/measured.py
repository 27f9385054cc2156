"""A store whose every operation is counted and timed."""

from __future__ import annotations

from collections.abc import Sequence

from memory_store import (
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
    Lease,
    MemoryStore,
    Page,
    SessionKey,
    Snapshot,
    TurnRecord,
)
from server.metrics import Metrics


class MeasuredStore:
    """Passes everything on, and tells the metrics."""

    def __init__(self, store: MemoryStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self.promised = Durability("unknown", "unknown", "unknown", aof=False, where="unknown")

    async def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        async with self._metrics.store_op("lease"):
            return await self._store.acquire(key, owner, seconds=seconds)

    async def renew(self, held: Lease, *, seconds: float) -> bool:
        async with self._metrics.store_op("lease"):
            return await self._store.renew(held, seconds=seconds)

    async def release(self, held: Lease) -> None:
        async with self._metrics.store_op("lease"):
            await self._store.release(held)

    async def commit(
        self,
        lease: Lease,
        change: Change,
        *,
        expected: int,
        commit_id: str,
        durable: bool = False,
    ) -> Committed:
        async with self._metrics.store_op("commit") as operation:
            done = await self._store.commit(
                lease, change, expected=expected, commit_id=commit_id, durable=durable
            )
            if done.duplicate:
                operation.outcome = "dup"
            return done

    async def load(
        self, key: SessionKey, *, fingerprint: str, version: int | None = None
    ) -> Snapshot:
        async with self._metrics.store_op("load"):
            snapshot = await self._store.load(key, fingerprint=fingerprint, version=version)
        self._metrics.read(sum(blob.stored for blob in snapshot.head.blobs.values()))
        self._metrics.corrupt.inc(bool(snapshot.damaged))
        return snapshot

    async def head(self, key: SessionKey) -> Head:
        async with self._metrics.store_op("load"):
            return await self._store.head(key)

    async def versions(self, key: SessionKey) -> Sequence[Head]:
        async with self._metrics.store_op("load"):
            return await self._store.versions(key)

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        async with self._metrics.store_op("scan"):
            return await self._store.sessions(tenant, cursor=cursor, limit=limit)

    async def owned(self, tenant: str, owner: str) -> Sequence[SessionKey]:
        async with self._metrics.store_op("scan"):
            return await self._store.owned(tenant, owner)

    async def turns(
        self, key: SessionKey, *, limit: int = 200, version: int | None = None
    ) -> Sequence[TurnRecord]:
        async with self._metrics.store_op("load"):
            return await self._store.turns(key, limit=limit, version=version)

    async def turn(self, key: SessionKey, turn_id: str) -> TurnRecord | None:
        async with self._metrics.store_op("load"):
            return await self._store.turn(key, turn_id)

    async def delete(self, key: SessionKey) -> Deletion:
        async with self._metrics.store_op("delete"):
            return await self._store.delete(key)

    async def durability(self) -> Durability:
        """Ask the store, and remember what it said in `promised`."""
        async with self._metrics.store_op("scan"):
            self.promised = await self._store.durability()
        self._metrics.promised(self.promised)
        return self.promised

    async def close(self) -> None:
        await self._store.close()
