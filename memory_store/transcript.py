"""The records of a session's turns: for the transcript, and for whoever asks a second time."""

from __future__ import annotations

import hashlib
import json

from memory_store.codec import Manifest, encode_json
from memory_store.errors import Corrupt
from memory_store.keys import Keys
from memory_store.link import Link
from memory_store.snapshot import SessionKey, TurnRecord
from memory_store.vault import Vault, turn_place


def encode_turn(vault: Vault, key: SessionKey, turn: TurnRecord, version: int) -> bytes:
    """Return `<version> <digest> <JSON>`, what follows the version sealed.

    Raises:
        TypeError, ValueError: the payload is not JSON.
    """
    body = encode_json(turn.payload)
    body = _digest(turn.turn_id, version, body) + b" " + body
    return b"%d %s" % (version, bytes(vault.close(key, turn_place(turn.turn_id), body)))


async def read_turns(
    link: Link, vault: Vault, key: SessionKey, manifest: Manifest, limit: int
) -> list[TurnRecord]:
    """Return the last turns that are part of this version, oldest first."""
    items = Keys(key).items
    [last] = await link.ask([("HGET", items, "n")])
    found: list[TurnRecord] = []
    end = int(last or 0)
    while end > 0 and len(found) < limit:
        start = max(0, end - limit)
        places = [f"n:{place}" for place in range(start + 1, end + 1)]
        [ids] = await link.ask([("HMGET", items, *places)])
        present = [turn_id for turn_id in ids if turn_id is not None]
        if not present:
            break  # older ones have made room
        [records] = await link.ask([("HMGET", items, *(b"t:" + each for each in present))])
        if None in records:  # it has made room meanwhile, or is lost
            lost = present[records.index(None)]
            [still] = await link.ask([("HMGET", items, *places)])
            if lost in still:
                raise Corrupt(key.session, f"turn {lost.decode()!r}: its record is missing")
        turns = (
            _decoded(vault, key, turn_id.decode(), record)
            for turn_id, record in zip(present, records, strict=True)
            if record is not None
        )
        found = [turn for turn in turns if manifest.includes(turn.version)] + found
        end = start
    return found[-limit:]


async def read_turn(link: Link, vault: Vault, key: SessionKey, turn_id: str) -> TurnRecord | None:
    [record] = await link.ask([("HGET", Keys(key).items, f"t:{turn_id}")])
    return None if record is None else _decoded(vault, key, turn_id, record)


def _decoded(vault: Vault, key: SessionKey, turn_id: str, record: bytes) -> TurnRecord:
    """Read a record; before format 2 it was only the JSON object."""
    number, space, rest = record.partition(b" ")
    if not (space and number.isdigit()):
        number, rest = b"0", record
    version = int(number)
    body = vault.open(key, turn_place(turn_id), rest)
    if version:
        digest, _, body = body.partition(b" ")
        if digest != _digest(turn_id, version, body):
            raise Corrupt(key.session, f"turn {turn_id!r}: its checksum does not match")
    try:
        return TurnRecord(turn_id, json.loads(body), version)
    except ValueError as error:
        raise Corrupt(key.session, f"turn {turn_id!r}: {error}") from error


def _digest(turn_id: str, version: int, body: bytes) -> bytes:
    return (
        hashlib.sha256(b"%s\n%d\n%s" % (turn_id.encode(), version, body)).hexdigest()[:32].encode()
    )
