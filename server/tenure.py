"""Which sessions this server may write now: leases acquired, renewed and let go of.

A lease is held for a turn, not longer: whoever is asked next may be another server. Affinity
makes things fast; the fence, raised with every acquisition, keeps them right without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from memory_store import Fenced, Held, Lease, MemoryStore, SessionKey, StoreError
from server.metrics import Metrics

log = logging.getLogger(__name__)

_POLL_S = 0.1
_FAREWELL_S = 2.0  # for a store to take a lease back; it runs out by itself


class Hold:
    """A session that this server may write, until it is left."""

    def __init__(self, lease: Lease, since: float) -> None:
        self.lease = lease
        self.since = since  # on the loop's clock
        self.lost = False
        self.decided = False  # by the fence, and by nothing else

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Commit in here: the fence decides about it, and a lost lease does not interrupt it."""
        self.decided = True
        try:
            yield
        finally:
            self.decided = False


class Tenures:
    """Acquires leases and keeps them alive."""

    def __init__(
        self, store: MemoryStore, metrics: Metrics, *, owner: str, seconds: float, patience: float
    ) -> None:
        """Prepare.

        Args:
            store: who keeps the leases.
            metrics: who counts them.
            owner: this server's name. A server that is started again under the same name takes
                its own leases over at once.
            seconds: how long a lease lives without being renewed.
            patience: how many seconds to wait for another server to let go.
        """
        self._store = store
        self._metrics = metrics
        self._owner = owner
        self._seconds = seconds
        self._patience = patience

    @asynccontextmanager
    async def hold(self, key: SessionKey) -> AsyncIterator[Hold]:
        """Hold the session's lease; the body is cancelled when the lease is lost.

        Raises:
            Held: another server has it and does not let go.
            Fenced: it was lost; nothing that the body did was committed.
            StoreError: the store does not give it.
        """
        hold = await self._acquire(key)
        task = asyncio.current_task()
        assert task is not None
        left = asyncio.Event()
        keeping = asyncio.create_task(self._keep(hold, task, left), name=f"lease-{key.tag}")
        try:
            with self._metrics.holding():
                yield hold
        except asyncio.CancelledError:
            if hold.lost and not task.uncancel():
                raise Fenced(key.session) from None
            raise
        finally:
            left.set()
            releasing = asyncio.create_task(self._release(hold, keeping))
            try:
                await asyncio.shield(releasing)
            except asyncio.CancelledError:
                await releasing
                raise

    async def _acquire(self, key: SessionKey) -> Hold:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            since = loop.time()
            asking = asyncio.create_task(
                self._store.acquire(key, self._owner, seconds=self._seconds)
            )
            try:
                lease = await asyncio.shield(asking)
            except Held:
                if loop.time() > deadline:
                    self._metrics.lease("refused")
                    raise
                await asyncio.sleep(_POLL_S)
            except asyncio.CancelledError:  # the store may be about to give it
                with contextlib.suppress(StoreError, TimeoutError):
                    async with asyncio.timeout(_FAREWELL_S):
                        await self._store.release(await asking)
                raise
            else:
                self._metrics.lease("acquired")
                return Hold(lease, since)

    async def _keep(self, hold: Hold, task: asyncio.Task[object], left: asyncio.Event) -> None:
        """Renew every third of a lease's life; cancel `task` once it cannot be kept in time."""
        loop = asyncio.get_running_loop()
        renewed = hold.since
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds / 3):
                    await left.wait()
                    return
            asked = loop.time()
            # what is left is for stopping the turn before somebody else begins one
            if not await self._renew(hold.lease, renewed + 5 / 6 * self._seconds):
                break
            self._metrics.renewed(renewed + self._seconds - loop.time())
            renewed = asked
        if left.is_set():
            return
        self._metrics.lease("lost")
        hold.lost = True
        if not hold.decided:
            task.cancel()

    async def _renew(self, lease: Lease, deadline: float) -> bool:
        """Renew a lease, trying again until it is too late."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._store.renew(lease, seconds=self._seconds)
                    except StoreError as error:
                        log.warning("session %s: its lease was not renewed: %s", lease.key, error)
                        await asyncio.sleep(self._seconds / 10)
        except TimeoutError:
            return False

    async def _release(self, hold: Hold, keeping: asyncio.Task[None]) -> None:
        """Let go, behind a renewal that is under way: it would take the lease again."""
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await keeping
                if not hold.lost:
                    await self._store.release(hold.lease)
                    self._metrics.lease("released")
        except (StoreError, TimeoutError) as error:  # it runs out by itself
            log.warning("session %s: its lease was not released: %s", hold.lease.key, error)
