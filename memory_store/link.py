"""The store's servers: connections to them, and the errors that can come of that.

Nothing above sees an exception of the client library, and nothing here knows a session.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from memory_store.address import Client, connect
from memory_store.errors import Full, Unavailable

T = TypeVar("T")
Command = tuple[str | bytes | memoryview | int | float, ...]

_PAUSES_S = (0.05, 0.2)  # between the tries; one try more than pauses
_MOVED = (ConnectionError, TimeoutError, ClusterDownError, MovedError, RedisClusterException)
# what another try may mend: a broken line, or a failover under way
_PASSING = (*_MOVED, ReadOnlyError, TryAgainError, AskError)


class Lane:
    """One pool of connections; who finds none free waits for one, but not for ever."""

    def __init__(self, url: str, *, connections: int, timeout: float) -> None:
        """Prepare the connections; the first one is made when it is needed.

        Raises:
            ValueError: the address cannot be read.
        """
        self.client, self.where = connect(url, connections=connections, timeout=timeout)
        self._free = asyncio.Semaphore(connections)
        self._timeout = timeout

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Client]:
        try:
            async with asyncio.timeout(self._timeout):
                await self._free.acquire()
        except builtins.TimeoutError as error:
            raise Unavailable(self.where, "no connection became free") from error
        try:
            yield self.client
        except RuntimeError as error:  # what uvloop says of a line that the other end has closed
            raise ConnectionError(str(error)) from error
        finally:
            self._free.release()

    async def send(
        self, commands: Sequence[Command], *, key: str = "", atomic: bool = False
    ) -> list[Any]:
        """Send commands in one go, once; raise the first error among the replies.

        With `key`, all go over one connection to the server that has the key.
        """
        whole = [("MULTI",), *commands, ("EXEC",)] if atomic else commands
        replies = _sound(await self.replies(whole, key=key))
        return _sound(replies[-1]) if atomic else replies

    async def replies(self, commands: Sequence[Command], *, key: str = "") -> list[Any]:
        """Send commands in one go, once; errors are among the replies."""
        async with self.one() as client:
            if isinstance(client, RedisCluster):
                return await self._cluster_replies(client, commands, key)
            async with client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                return list(await pipe.execute(raise_on_error=False))

    async def close(self) -> None:
        await self.client.aclose()
        pool = getattr(self.client, "connection_pool", None)
        if isinstance(pool, SentinelConnectionPool):
            for sentinel in pool.sentinel_manager.sentinels:
                await sentinel.aclose()

    async def _cluster_replies(
        self, client: RedisCluster, commands: Sequence[Command], key: str
    ) -> list[Any]:
        await client.initialize()
        where = {"target_nodes": client.get_node_from_key(key)} if key else {}
        async with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command, **where)
            # Commands that belong together must not be sent on one by one.
            alone = not key or len(commands) == 1
            replies = await pipe.execute(raise_on_error=False, allow_redirections=alone)
        if any(isinstance(reply, _MOVED) for reply in replies):
            # The client would go on asking a master that is gone.
            with suppress(RedisError, RedisClusterException):
                await client.nodes_manager.initialize()
        return list(replies)


class Link:
    """Connections to the store, in two lanes: large blobs do not delay a lease's renewal.

    A cancelled caller never abandons a reply half-read (which would hand it to the next one):
    work goes on to its end under a shield, and `close` waits for it.
    """

    def __init__(self, url: str, *, timeout: float = 5.0) -> None:
        """Prepare both lanes.

        Raises:
            ValueError: the address cannot be read (it is not repeated: it may hold a password).
        """
        self.timeout = timeout
        self.bulk = Lane(url, connections=16, timeout=timeout)
        self.quick = Lane(url, connections=8, timeout=timeout)
        self.where = self.bulk.where
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish `work` whatever becomes of the caller, and raise only errors of this package."""
        task = asyncio.create_task(self._named(work))
        self._running.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # it may be that nobody is left to hear it

    async def again(self, step: Callable[[], Awaitable[T]]) -> T:
        """Try an idempotent step up to three times while the connection fails."""
        for pause in _PAUSES_S:
            try:
                return await step()
            except _PASSING:
                await asyncio.sleep(pause)
        return await step()

    async def send(
        self, commands: Sequence[Command], *, key: str = "", atomic: bool = False
    ) -> list[Any]:
        """Send commands once, see `Lane.send`."""
        return await self.bulk.send(commands, key=key, atomic=atomic)

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands that may be sent twice."""
        return await self.again(lambda: self.bulk.send(commands))

    async def call(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int],
        then: Sequence[Command] = (),
    ) -> list[Any]:
        """Run a script that may be run twice, and then commands over the same connection.

        The text travels with every call: 4 KiB are nothing beside a blob, and no server, new
        master or other node can be without it. What an error of the commands after it means
        is for the caller to say: the script has been run.
        """
        commands: list[Command] = [("EVAL", script, len(keys), *keys, *arguments), *then]

        async def once() -> list[Any]:
            replies = await self.quick.replies(commands, key=keys[0])
            for number, reply in enumerate(replies):
                if isinstance(reply, _PASSING if number else Exception):
                    raise reply
            return replies

        return await self.again(once)

    async def scan(self, pattern: str) -> list[str]:
        """Return the names of all keys of a pattern, on every server; walks the whole database."""

        async def names() -> list[str]:
            async with self.bulk.one() as client:
                return [n.decode() async for n in client.scan_iter(match=pattern, count=1000)]

        return sorted(set(await self.again(names)))

    async def each(self, *command: str) -> list[Any]:
        """Ask every server that takes writes; return one reply for each."""
        async with self.quick.one() as client:
            if not isinstance(client, RedisCluster):
                return [await client.execute_command(*command)]  # type: ignore[no-untyped-call]
            await client.initialize()
            return [
                await client.execute_command(*command, target_nodes=node)
                for node in client.get_primaries()
            ]

    async def close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        for lane in (self.bulk, self.quick):
            await lane.close()

    async def _named(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except OutOfMemoryError as error:
            raise Full(self.where) from error
        except (RedisError, RedisClusterException) as error:
            raise Unavailable(self.where, str(error)) from error


def _sound(replies: list[Any]) -> list[Any]:
    """Return replies without an error among them; else raise the first."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
