"""A TCP proxy before a real server, whose line can be cut, hung or slowed at any moment.

It runs in a thread with a loop of its own, so it serves blocking and asynchronous tests alike;
when a method returns, the change has happened.
"""

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from tests.tools.engines import HOST, free_port

TO_SERVER, TO_CLIENT = "to_server", "to_client"

_QUIET_S = 0.05  # a request that pauses for so long has arrived whole
_DRAIN_S = 10.0
_CHUNK = 1 << 20


@dataclass
class _Lost:
    """Which replies get lost: those to requests with a word in them."""

    word: bytes
    nbytes: int
    times: int


class Proxy:
    """`Proxy(host, port)`, `Proxy("/path/to/socket")`, or `Proxy.of(url)`."""

    def __init__(self, host, port=None):
        self.upstream = (host, port)
        self.port = free_port()
        self.connections = 0  # ever accepted
        self.bytes = {TO_SERVER: 0, TO_CLIENT: 0}  # passed on
        self._flows = {TO_SERVER: asyncio.Event(), TO_CLIENT: asyncio.Event()}
        self._delay = 0.0
        self._lost = None
        self._server = None
        self._links = set()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @classmethod
    def of(cls, url):
        parts = urlsplit(url)
        return cls(unquote(parts.path)) if parts.scheme == "unix" else cls(HOST, parts.port)

    @property
    def url(self):
        return f"redis://{HOST}:{self.port}"

    @property
    def open(self):
        """How many connections there are now."""
        return len(self._links)

    def __enter__(self):
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *error):
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def heal(self):
        """Pass everything on; what was held back flows now. A cut connection stays cut."""
        self._do(self._heal())

    def cut(self):
        """Reset all connections and refuse new ones."""
        self._do(self._cut())

    def hang(self):
        """Accept and keep connections, but pass nothing on, not even their end."""
        self._do(self._become())

    def one_way(self, direction):
        """Let only `to_server` or `to_client` flow; hold the other back."""
        self._do(self._become(direction))

    def delay(self, seconds):
        """Hold each piece back, there and back: a round trip takes twice as long."""
        self._delay = seconds

    def cut_reply_after(self, word, nbytes=0, times=1):
        """Let a request with this word be done, but close its connection during the reply.

        The reply's bytes are counted from the moment the word went by; those to commands before
        it in the same pipeline may be among them.
        """
        self._lost = _Lost(word, nbytes, times)

    def _do(self, change):
        asyncio.run_coroutine_threadsafe(change, self._loop).result(10)

    async def _heal(self):
        self._delay, self._lost = 0.0, None
        await self._become(TO_SERVER, TO_CLIENT)

    async def _become(self, *flowing):
        for direction, flow in self._flows.items():
            if direction in flowing:
                flow.set()
            else:
                flow.clear()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, HOST, self.port, limit=_CHUNK)

    async def _cut(self):
        if self._server:
            self._server.close()
            self._server = None
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)
        await asyncio.sleep(0)  # the sockets are closed in the loop's next round

    async def _serve(self, reader, writer):
        link = asyncio.current_task()
        self._links.add(link)
        self.connections += 1
        ends = [writer]
        try:
            if self._server:  # else it was cut between the connection and now
                far_reader, far_writer = await self._connect()
                ends.append(far_writer)
                await _Link(self, (reader, writer), (far_reader, far_writer)).run()
        except (OSError, asyncio.CancelledError):
            pass  # the server is not there, an end is gone, or it was cut
        finally:
            for end in ends:
                _reset(end)
            self._links.discard(link)

    async def _connect(self):
        host, port = self.upstream
        if port is None:
            return await asyncio.open_unix_connection(host, limit=_CHUNK)
        return await asyncio.open_connection(host, port, limit=_CHUNK)


class _Link:
    """One connection of a client, and the one to the server that it stands for."""

    def __init__(self, proxy, near, far):
        self.proxy = proxy
        self.reader, self.writer = near
        self.far_reader, self.far_writer = far
        self.spared = None  # how much of the reply still gets through, once the word went by
        self.heard = asyncio.Event()  # something more from the client

    async def run(self):
        requests = asyncio.create_task(self.requests())
        try:
            await self.replies()
            if self.spared is not None:
                await self.let_it_be_done(requests)
            await self.close()
        finally:
            requests.cancel()
            with suppress(OSError, asyncio.CancelledError):
                await requests

    async def requests(self):
        tail = b""
        while data := await self.arrived(self.reader, TO_SERVER):
            self.heard.set()
            lost = self.proxy._lost
            if lost and lost.times and self.spared is None and lost.word in tail + data:
                lost.times -= 1
                self.spared = lost.nbytes
            tail = (tail + data)[-len(lost.word) :] if lost else b""
            await self.pass_on(data, self.far_writer, TO_SERVER)
        self.far_writer.write_eof()  # the server answers this with an end of its own

    async def replies(self):
        while data := await self.arrived(self.far_reader, TO_CLIENT):
            if self.spared is None:
                await self.pass_on(data, self.writer, TO_CLIENT)
                continue
            part, self.spared = data[: self.spared], max(0, self.spared - len(data))
            await self.pass_on(part, self.writer, TO_CLIENT)
            if len(part) < len(data):
                break

    async def arrived(self, reader, direction):
        try:
            data = await reader.read(_CHUNK)
        except OSError:
            data = b""  # a reset is an end as well
        if self.proxy._delay:
            await asyncio.sleep(self.proxy._delay)
        await self.proxy._flows[direction].wait()
        return data

    async def pass_on(self, data, writer, direction):
        self.proxy.bytes[direction] += len(data)
        writer.write(data)
        await writer.drain()

    async def let_it_be_done(self, requests):
        """Wait until the server has read and done all that was sent: then it sees the end."""
        with suppress(TimeoutError):
            while True:
                self.heard.clear()
                async with asyncio.timeout(_QUIET_S):
                    await self.heard.wait()
        requests.cancel()
        self.far_writer.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while await self.far_reader.read(_CHUNK):
                    pass

    async def close(self):
        """Close towards the client so that it still gets what was passed on."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


def _reset(writer):
    """Close at once; over TCP, the other end is told by a reset."""
    at = writer.get_extra_info("socket")
    if at is not None and at.fileno() >= 0 and at.family != socket.AF_UNIX:
        at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
