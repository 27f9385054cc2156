"""A turn as it is recorded: what was said, and the answer for whoever asks a second time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hope_runtime.tokenizer import Message, Role
from memory_store import TurnRecord
from server.turn import Ask, Ended
from server.wire import TURN_ID, MemoryResult


def record(
    turn_id: str, ask: Ask, messages: Sequence[Message], reason: str, text: str, ended: Ended
) -> TurnRecord:
    """Return what is kept of a turn that is about to be committed."""
    return TurnRecord(
        turn_id,
        {
            "items": [[str(message.role), message.text] for message in messages],
            "reason": reason,
            "at": time.time(),
            "asked": ask.digest,
            "result": {
                "text": text,
                "status": ended.status,
                "reason": ended.reason,
                "read": ended.read,
                "skipped": ended.skipped,
                "said": ended.said,
                "memory": ended.memory.model_dump(mode="json"),
            },
        },
    )


def replayed(found: TurnRecord, **changes: Any) -> tuple[str, Ended] | None:
    """Return the reply and the end of a turn that is not had again; None: an older build's.

    Raises:
        ValueError, TypeError, KeyError: it is no record of ours.
    """
    if (result := found.payload.get("result")) is None:
        return None
    memory = MemoryResult.model_validate(
        {**result["memory"], "committed_version": found.version, "replayed": True, **changes}
    )
    read, skipped, said = (int(result[name]) for name in ("read", "skipped", "said"))
    ended = Ended(result["status"], result["reason"], read, skipped, said, memory)
    if ended.status not in ("completed", "incomplete"):
        raise ValueError(f"a turn that ended {ended.status!r} is not recorded")
    return str(result["text"]), ended


def check(found: TurnRecord) -> None:
    """Look at a record that came from elsewhere as closely as its readers will need.

    Raises:
        ValueError, TypeError, KeyError: it is no record of ours.
    """
    if not 0 < len(found.turn_id) <= TURN_ID:
        raise ValueError(f"a turn id has {len(found.turn_id)} characters, not 1 to {TURN_ID}")
    found.turn_id.encode()  # half a surrogate pair could not be told again
    for role, text in found.payload["items"]:
        if Role(role) is Role.MARKUP:
            raise ValueError(f"nobody speaks as {role!r}")
        Message(Role(role), text.strip()).text.encode()
    if not isinstance(found.payload["reason"], str):
        raise TypeError("reason is not text")
    if found.payload.get("result") is not None:
        str(found.payload["asked"])
        text, _ = replayed(found) or ("", None)
        text.encode()
