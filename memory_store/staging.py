"""New blobs on their way into Redis: in batches, and gone by themselves unless committed."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from redis.exceptions import OutOfMemoryError, RedisError

from memory_store.codec import FIELD, Blob, Packed, off_the_loop
from memory_store.errors import StoreError
from memory_store.keys import Keys
from memory_store.link import Command, Link
from memory_store.snapshot import SessionKey
from memory_store.vault import Vault, field_place

BATCH = 4 * FIELD  # bytes in one pipeline; more would hold up the server's other clients

_COMMAND = 1 << 10  # bytes that a command counts for, however little it moves
_STAGED_S = 3600  # a staged blob that nobody commits is gone after this


@dataclass(frozen=True, slots=True)
class Step:
    """Commands that belong together, and about how many bytes they move."""

    size: int
    commands: tuple[Command, ...]


def batches(steps: Iterable[Step]) -> Iterator[list[Command]]:
    """Group steps into pipelines of at most `BATCH` bytes."""
    batch: list[Command] = []
    size = 0
    for step in steps:
        if batch and size + step.size > BATCH:
            yield batch
            batch, size = [], 0
        batch += step.commands
        size += step.size + _COMMAND
    if batch:
        yield batch


async def stage(
    link: Link, vault: Vault, key: SessionKey, packed: Mapping[str, Packed]
) -> dict[str, Blob]:
    """Write new blobs that expire unless they are committed.

    Every try has fresh ids: one that timed out may still be under way to the server, and
    must not put a time limit on blobs that have been committed since.
    """
    keys = Keys(key)
    blobs = {name: item.named(uuid.uuid4().hex) for name, item in packed.items()}
    closed = await off_the_loop(
        sum(blob.stored for blob in blobs.values()),
        lambda: {name: _closed(vault, key, blobs[name], packed[name]) for name in blobs},
    )
    steps = [
        Step(len(part), _written(keys.blob(blob.id), number, part))
        for name, blob in blobs.items()
        for number, part in enumerate(closed[name])
    ]
    async with letting_go_if_full(link, keys, blobs.values()):
        for batch in batches(steps):
            await link.send(batch, key=keys.head, atomic=True)
    return blobs


@asynccontextmanager
async def letting_go_if_full(link: Link, keys: Keys, blobs: Iterable[Blob]) -> AsyncIterator[None]:
    try:
        yield
    except OutOfMemoryError:
        await let_go(link, keys, blobs)
        raise


async def let_go(link: Link, keys: Keys, blobs: Iterable[Blob]) -> None:
    """Remove staged blobs now rather than in an hour, as well as it goes.

    XX leaves alone what has no time limit: blobs that were committed after all.
    """
    commands: list[Command] = [("EXPIRE", keys.blob(blob.id), 0, "XX") for blob in blobs]
    if commands:
        with suppress(RedisError, StoreError):
            await link.send(commands, key=keys.head)


def _written(name: str, number: int, part: bytes | memoryview) -> tuple[Command, ...]:
    # A limit with every field: a deletion may have swept the blob away since the one before.
    return ("HSET", name, number, part), ("EXPIRE", name, _STAGED_S)


def _closed(vault: Vault, key: SessionKey, blob: Blob, packed: Packed) -> list[bytes | memoryview]:
    return [
        vault.close(key, field_place(blob.id, number, blob.fields), part)
        for number, part in enumerate(packed.fields())
    ]
