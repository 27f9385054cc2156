"""A store whose every operation is counted and timed."""

from __future__ import annotations

from collections.abc import Sequence

from memory_store import (
    Change,
    Committed,
    Deletion,
    Durability,
    Head,
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

    async def commit(
        self, key: SessionKey, change: Change, *, expected: int, commit_id: str
    ) -> Committed:
        async with self._metrics.store_op("commit"):
            return await self._store.commit(key, change, expected=expected, commit_id=commit_id)

    async def load(self, key: SessionKey, *, fingerprint: str) -> Snapshot:
        async with self._metrics.store_op("load"):
            snapshot = await self._store.load(key, fingerprint=fingerprint)
        self._metrics.read(sum(blob.stored for blob in snapshot.head.blobs.values()))
        return snapshot

    async def head(self, key: SessionKey) -> Head:
        async with self._metrics.store_op("load"):
            return await self._store.head(key)

    async def sessions(self, tenant: str, *, cursor: str | None = None, limit: int = 50) -> Page:
        async with self._metrics.store_op("scan"):
            return await self._store.sessions(tenant, cursor=cursor, limit=limit)

    async def turns(self, key: SessionKey, *, limit: int = 200) -> Sequence[TurnRecord]:
        async with self._metrics.store_op("load"):
            return await self._store.turns(key, limit=limit)

    async def delete(self, key: SessionKey) -> Deletion:
        async with self._metrics.store_op("delete"):
            return await self._store.delete(key)

    async def durability(self) -> Durability:
        async with self._metrics.store_op("scan"):
            found = await self._store.durability()
        self._metrics.promised(found)
        return found

    async def close(self) -> None:
        await self._store.close()
