"""One Redis-protocol server: its address, its connections, and the errors that can come of it.

Nothing above sees an exception of the client library, and nothing here knows a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    RedisError,
    TimeoutError,
)

from memory_store.errors import Full, Unavailable

T = TypeVar("T")
Command = tuple[str | bytes | memoryview | int | float, ...]

_TIMEOUT_S = 5.0
_CONNECTIONS = 16
_PAUSES_S = (0.05, 0.2)  # between the tries; one try more than pauses

_BAD_URL = (
    "the Redis address cannot be read; write redis://[user:password@]host[:port][/database], "
    "rediss://... for TLS, or unix:///path/to/socket, and percent-encode special characters "
    "of a password"
)


class Link:
    """Connections to one server.

    A cancelled caller never abandons a reply half-read (which would hand it to the next one):
    work goes on to its end under a shield, and `close` waits for it.
    """

    def __init__(self, url: str) -> None:
        """Prepare the connections; the first one is made when it is needed.

        Raises:
            ValueError: the address cannot be read (it is not repeated: it may hold a password).
        """
        self.client = _client(url)
        self.where = _address(self.client)
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish `work` whatever becomes of the caller, and raise only errors of this package."""
        task = asyncio.create_task(self._named(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def again(self, step: Callable[[], Awaitable[T]]) -> T:
        """Try an idempotent step up to three times while the connection fails."""
        for pause in _PAUSES_S:
            try:
                return await step()
            except (ConnectionError, TimeoutError):
                await asyncio.sleep(pause)
        return await step()

    async def send(self, commands: Sequence[Command], *, atomic: bool = False) -> list[Any]:
        """Send commands in one go, once; raise the first error among the replies."""
        async with self.client.pipeline(transaction=atomic) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            replies: list[Any] = await pipe.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands that may be sent twice."""
        return await self.again(lambda: self.send(commands))

    async def close(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        await self.client.aclose()

    async def _named(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except OutOfMemoryError as error:
            raise Full(self.where) from error
        except RedisError as error:
            raise Unavailable(self.where, str(error)) from error


def _client(url: str) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            health_check_interval=15,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        pool.make_connection()  # type: ignore[no-untyped-call]  # finds unknown options
    except (ValueError, TypeError):
        raise ValueError(_BAD_URL) from None
    return Redis.from_pool(pool)


def _address(client: Redis) -> str:
    options = client.connection_pool.connection_kwargs
    if path := options.get("path"):
        return f"unix://{path}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
