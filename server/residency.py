"""Which sessions are in RAM: loaded from the store when asked for, dropped when room is needed.

Everything here was committed before it came here, so anything may be dropped at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from hope_runtime.config import HopeConfig
from hope_runtime.state import State, dump, restore
from hope_runtime.tokenizer import Message
from memory_store import Change, MemoryStore, NotFound, SessionKey, TurnRecord

Source = Literal["host", "store", "new"]


@dataclass(frozen=True, slots=True)
class Book:
    """What a session is to the server, beside its state: small, and stored with every version."""

    turns: int = 0
    items: int = 0  # messages ingested, replies included
    first: str = ""  # digest of the first of them
    chain: str = ""  # rolling digest of all of them
    instructions: str = ""  # digest of the system instructions in force
    surprise: float | None = None  # of the last reply, nats per token
    learned_at: Mapping[str, float] = field(default_factory=dict)  # by level, since the epoch
    metadata: Mapping[str, str] = field(default_factory=dict)

    def with_item(self, message: Message) -> Book:
        chain = link(self.chain, message)
        return replace(self, items=self.items + 1, first=self.first or chain, chain=chain)

    def to_json(self) -> dict[str, Any]:
        return {
            "turns": self.turns,
            "items": self.items,
            "first": self.first,
            "chain": self.chain,
            "instructions": self.instructions,
            "surprise": self.surprise,
            "learned_at": dict(self.learned_at),
            "metadata": dict(self.metadata),
        }


def link(chain: str, message: Message) -> str:
    """Return the rolling digest after one more message."""
    item = json.dumps([chain, str(message.role), message.text.strip()])
    return hashlib.sha256(item.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Resident:
    """A session as of a committed version."""

    key: SessionKey
    version: int
    state: State
    book: Book


class Residency:
    """Sessions in RAM, least recently used first out, within a budget of bytes."""

    def __init__(
        self,
        store: MemoryStore,
        config: HopeConfig,
        dtype: torch.dtype,
        fingerprint: str,
        *,
        budget: int,
        evicted: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self._config = config
        self._dtype = dtype
        self._fingerprint = fingerprint
        self._budget = budget
        self._evicted = evicted
        self._held: OrderedDict[SessionKey, Resident] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    async def get(self, key: SessionKey) -> tuple[Resident, Source]:
        """Return the session's last committed state; an unknown session is a new one.

        Raises:
            StoreError, StateError: it exists and cannot be read whole.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key], "host"
        try:
            snapshot = await self.store.load(key, fingerprint=self._fingerprint)
        except NotFound:
            return Resident(key, 0, State(), Book()), "new"
        meta = snapshot.head.meta
        state = await asyncio.to_thread(
            restore, meta["state"], snapshot.blobs, self._config, self._dtype
        )
        resident = Resident(key, snapshot.head.version, state, Book(**meta["book"]))
        self._hold(resident)
        return resident, "store"

    async def commit(
        self, base: Resident, state: State, book: Book, *, commit_id: str, turn: TurnRecord | None
    ) -> tuple[Resident, int]:
        """Make `state` the session's next version; return it and the bytes written.

        Raises:
            StoreError: nothing was committed, or (Unavailable) it is unknown whether it was;
                either way the copy in RAM is dropped and the next turn reads from the store.
        """
        stored = base.state if base.version else None
        facts, put, keep = await asyncio.to_thread(dump, state, stored)
        change = Change(
            fingerprint=self._fingerprint,
            meta={"state": facts, "book": book.to_json()},
            put=put,
            keep=frozenset(keep),
            turn=turn,
        )
        try:
            done = await self.store.commit(
                base.key, change, expected=base.version, commit_id=commit_id
            )
        except BaseException:
            self.drop(base.key)
            raise
        resident = Resident(base.key, done.version, state, book)
        self._hold(resident)
        return resident, done.written

    def drop(self, key: SessionKey) -> None:
        """Forget the copy in RAM."""
        if (resident := self._held.pop(key, None)) is not None:
            self.bytes -= resident.state.bytes

    def _hold(self, resident: Resident) -> None:
        self.drop(resident.key)
        self._held[resident.key] = resident
        self.bytes += resident.state.bytes
        while self.bytes > self._budget and len(self._held) > 1:
            oldest = next(iter(self._held))
            self.drop(oldest)
            self._evicted()


def known_prefix(book: Book, messages: Sequence[Message]) -> int | None:
    """Return how many of `messages` the session has read already; None: they diverge.

    A client that re-sends the whole conversation starts with the first message ever ingested;
    anything else is new. A single message is always new: people do say hello twice.
    """
    if len(messages) < 2 or not book.items or link("", messages[0]) != book.first:
        return 0
    chain = ""
    for message in messages[: book.items]:
        chain = link(chain, message)
    return book.items if len(messages) > book.items and chain == book.chain else None
