"""What a session is to the server, beside its state: small, and stored with every version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hope_runtime.tokenizer import Message, Role


@dataclass(frozen=True, slots=True)
class Book:
    """Counts and digests of what was said, and what the session was told about itself."""

    turns: int = 0
    items: int = 0  # messages ingested, replies included
    first: str = ""  # digest of the first of them
    chain: str = ""  # rolling digest of all of them
    instructions: str = ""  # digest of the system instructions in force
    surprise: float | None = None  # of the last reply, nats per token
    learned_at: Mapping[str, float] = field(default_factory=dict)  # by level, since the epoch
    metadata: Mapping[str, str] = field(default_factory=dict)
    frozen: bool = False  # read, but not written, until it is thawed

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
            "frozen": self.frozen,
        }


def link(chain: str, message: Message) -> str:
    """Return the rolling digest after one more message."""
    item = json.dumps([chain, str(message.role), message.text.strip()])
    return hashlib.sha256(item.encode()).hexdigest()[:32]


def digest(instructions: str) -> str:
    """Return the digest of system instructions."""
    return link("", Message(Role.SYSTEM, instructions))


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
