"""A turn: what is asked, and what happens while it is answered. Values only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from hope_runtime.consolidation import Consolidated
from hope_runtime.sampling import Sampling
from hope_runtime.tokenizer import Message, Role
from memory_store import SessionKey
from server.errors import ApiError
from server.wire import MemoryResult, Mode


@dataclass(frozen=True, slots=True)
class Ask:
    """One turn as asked for, whatever endpoint it came by."""

    key: SessionKey | None  # None: no session; nothing is kept
    messages: tuple[Message, ...]
    instructions: str | None
    sampling: Sampling
    most: int
    stops: tuple[str, ...] = ()
    mode: Mode = Mode.READ_WRITE
    on_cancel: Literal["keep", "rollback"] = "keep"
    if_version: int | None = None
    rates: tuple[tuple[Role, float], ...] = ()
    history: bool = False  # messages may be the whole conversation so far (chat completions)
    turn_id: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    user: str | None = None  # the person whose session it is
    fresh: bool = False  # begin with an empty window
    durable: bool = False  # complete only when it is on disk

    @property
    def digest(self) -> str:
        """What is asked, in short: the same turn id must stand for the same."""
        said = [[str(message.role), message.text] for message in self.messages]
        return hashlib.sha256(json.dumps([said, self.instructions]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Began:
    """The session is loaded and the turn queued for the device."""

    base_version: int
    source: str  # where the session was: host, store, new


@dataclass(frozen=True, slots=True)
class Words:
    """Text that may be shown."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn is over, and what became of it: the terminal event."""

    status: Literal["completed", "incomplete", "failed"]
    reason: Literal["max_output_tokens", "cancelled"] | None
    read: int
    skipped: int  # input tokens the session had read before
    said: int
    memory: MemoryResult
    error: ApiError | None = None


@dataclass(frozen=True, slots=True)
class Grown:
    """A level was consolidated (or refused); may come after `Ended`."""

    consolidated: Consolidated
    seconds: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A version was committed; may come after `Ended`."""

    version: int


Happening = Began | Words | Ended | Grown | Kept
