"""Who waits for which session in this server: one at a time has it, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from memory_store import SessionKey
from server.errors import ApiError


class Queues:
    """The sessions that somebody has or waits for."""

    def __init__(self, waiting: int) -> None:
        self._most = waiting
        self._queues: dict[SessionKey, _Queue] = {}

    def __len__(self) -> int:
        return len(self._queues)

    @asynccontextmanager
    async def alone(self, key: SessionKey) -> AsyncIterator[None]:
        """Have the session, once those who came before have left it.

        Raises:
            ApiError: 409 `session_busy` behind a full queue.
        """
        queue = self._queues.setdefault(key, _Queue())
        if queue.waiting > self._most:
            raise ApiError(
                409,
                "session_busy",
                f"session {key.session!r} has {queue.waiting} turns waiting; retry when one ended",
                retry_after=1,
            )
        queue.waiting += 1
        try:
            async with queue.lock:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self._queues.pop(key, None)


class _Queue:
    """Who waits for a session, the one it answers included."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
