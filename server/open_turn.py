"""A turn in flight, as those who asked for it see it: what happens, and how to stop it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

from server.turn import Ask, Began, Ended, Happening, Words


class OpenTurn:
    """A turn in flight: iterate over what happens; `cancel` when a person presses stop."""

    def __init__(self, ask: Ask, stop: Callable[[str, bool], None]) -> None:
        self.ask = ask
        self.id = uuid.uuid4().hex
        self.cancelled = False
        self.dropped = False  # by a client that left, or that wants nothing of it kept
        self.committing = False  # from here on the store may have it, whatever goes wrong
        self.deleted = False  # its session was, while it ran
        self.ended = False
        self.over = False  # nothing more will happen
        self.text = ""  # the reply so far
        self.began: Began | None = None
        self._stop = stop
        self._happenings: asyncio.Queue[Happening | None] = asyncio.Queue()

    def cancel(self, *, keep: bool) -> None:
        """End the turn at its next token, with what was said kept or rolled back."""
        self.cancelled = True
        self.dropped = self.dropped or not keep
        self._stop(self.id, keep)

    def put(self, happening: Happening | None) -> None:
        match happening:
            case Began():
                self.began = happening
            case Words(text=text):
                self.text += text
            case Ended():
                self.ended = True
            case None:
                self.over = True
        self._happenings.put_nowait(happening)

    def __aiter__(self) -> AsyncIterator[Happening]:
        """Go on to the end; what comes after `Ended` is the consolidation it left due."""
        return self

    async def __anext__(self) -> Happening:
        if (happening := await self._happenings.get()) is None:
            self._happenings.put_nowait(None)  # it stays over
            raise StopAsyncIteration
        return happening
