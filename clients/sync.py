"""The blocking client: the async one, run on an event loop in a thread of its own.

```python
with Hope() as hope:
    for piece in hope.session("nora").say("I keep bees."):
        print(piece, end="")
```
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from clients import core, files
from clients.client import DEFAULT_URL, AsyncHope, AsyncReply, AsyncSession, OnMemory
from clients.errors import ConnectionLost, HopeError, ProtocolViolation, Refused, Unreachable
from server import wire

__all__ = [
    "ConnectionLost",
    "Hope",
    "HopeError",
    "ProtocolViolation",
    "Refused",
    "Reply",
    "Session",
    "Unreachable",
]

Result = TypeVar("Result")


class Hope:
    """A client of one server; may be shared between threads. See `AsyncHope`.

    `on_memory` and `on_progress` are called on the client's own thread.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        on_memory: OnMemory | None = None,
        patience: core.Patience = core.PATIENT,
    ) -> None:
        self._hope = AsyncHope(url, api_key, on_memory=on_memory, patience=patience)
        self._loop = _Loop()

    def session(self, name: str) -> Session:
        return Session(self._hope.session(name), self._loop)

    def sessions(self) -> list[wire.Session]:
        return self._loop.run(self._hope.sessions())

    def import_session(
        self,
        name: str,
        place: files.Place,
        *,
        user: str | None = None,
        on_progress: files.Progress | None = None,
    ) -> Session:
        made = self._hope.import_session(name, place, user=user, on_progress=on_progress)
        return Session(self._loop.run(made), self._loop)

    def forget_user(self, user: str) -> wire.DeletedUser:
        return self._loop.run(self._hope.forget_user(user))

    def models(self) -> list[wire.ModelCard]:
        return self._loop.run(self._hope.models())

    def health(self) -> wire.Health:
        return self._loop.run(self._hope.health())

    def close(self) -> None:
        self._loop.run(self._hope.aclose())
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Session:
    """One learner on the server. See `AsyncSession`."""

    def __init__(self, session: AsyncSession, loop: _Loop) -> None:
        self.name = session.name
        self._session = session
        self._loop = loop

    def say(
        self, said: core.Said, *, turn_id: str | None = None, **options: Unpack[core.Options]
    ) -> Reply:
        return Reply(self._session.say(said, turn_id=turn_id, **options), self._loop)

    def ask(
        self, said: core.Said, *, turn_id: str | None = None, **options: Unpack[core.Options]
    ) -> Reply:
        return self.say(said, turn_id=turn_id, **options).finish()

    def status(self) -> wire.Session:
        return self._loop.run(self._session.status())

    def transcript(self) -> list[wire.TranscriptItem]:
        return self._loop.run(self._session.transcript())

    def versions(self) -> list[wire.SessionVersion]:
        return self._loop.run(self._session.versions())

    def rollback(self, version: int, *, if_version: int | None = None) -> wire.Session:
        return self._loop.run(self._session.rollback(version, if_version=if_version))

    def freeze(self, *, if_version: int | None = None) -> wire.Session:
        return self._loop.run(self._session.freeze(if_version=if_version))

    def unfreeze(self, *, if_version: int | None = None) -> wire.Session:
        return self._loop.run(self._session.unfreeze(if_version=if_version))

    def fork(
        self, name: str | None = None, *, version: int | None = None, user: str | None = None
    ) -> Session:
        made = self._session.fork(name, version=version, user=user)
        return Session(self._loop.run(made), self._loop)

    def diff(self, before: int | None = None, after: int | None = None) -> wire.Difference:
        return self._loop.run(self._session.diff(before, after))

    def export(
        self,
        place: files.Place,
        *,
        version: int | None = None,
        on_progress: files.Progress | None = None,
    ) -> core.Exported:
        written = self._session.export(place, version=version, on_progress=on_progress)
        return self._loop.run(written)

    def delete(self) -> wire.DeletedSession:
        return self._loop.run(self._session.delete())


class Reply(core.Record):
    """A reply while it arrives, and its record after. See `AsyncReply`.

    Leaving the loop early, Ctrl-C included, stops the reply; what was said is kept.
    """

    def __init__(self, reply: AsyncReply, loop: _Loop) -> None:
        super().__init__(reply.turn)
        self._reply = reply
        self._loop = loop

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._loop.run(self._reply.next_piece())) is not None:
                yield piece
        finally:
            if not self._reply.over:
                self.cancel()

    def finish(self) -> Self:
        try:
            self._loop.run(self._reply.finish())
        finally:
            if not self._reply.over:
                self.cancel()
        return self

    def cancel(self) -> Self:
        self._loop.run(self._reply.cancel())
        return self


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="hope-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for the work; if the wait is interrupted, so is the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
