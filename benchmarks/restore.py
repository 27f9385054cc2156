"""Bringing a session of 1,000 tokens back from the store, against reading its text again."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch
import uvloop
from rich.table import Table

from benchmarks.common import checkpoint, console, end, engine, run, turn, where
from hope_runtime.engine import Consolidation
from hope_runtime.lanes import Lanes
from hope_runtime.model import Hope
from hope_runtime.state import State
from memory_store import SessionKey
from memory_store.embedded import EmbeddedValkey
from memory_store.redis import RedisStore
from server.book import Book
from server.residency import Residency, Resident

TOKENS = 1000


def main(rounds: int = 5) -> None:
    """Print load, lay-out and re-reading, for a session with and without learned levels."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedValkey(Path(folder)) as valkey,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_measure(valkey.url, rounds))


async def _measure(url: str, rounds: int) -> None:
    found = checkpoint()
    text = "\n".join(
        f"Item {i}: the ship left harbour {i % 7} with {i * 31 % 97} crates." for i in range(200)
    )
    ids = found.tokenizer.encode(text)[:TOKENS]
    store = await RedisStore.open(url)
    table = Table(
        "dtype",
        "session",
        "MB at rest",
        "from store ms",
        "onto a lane ms",
        "re-reading ms",
        "gain",
        title=f"a session of {TOKENS} tokens; median of {rounds}",
        caption=where(),
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = Hope(found.config.stacked(), found.weights, dtype=dtype)
        mind = engine(found, dtype, lanes=1)
        lanes = Lanes(model, 1)
        for learn in (False, True):
            given = [(id, 1.0) for id in ids]
            state = end(run(mind, turn("a", State(), given, 0, learn=learn))).state
            state = end(run(mind, Consolidation("c", state))).state
            key = SessionKey(
                "bench", f"{'learned' if learn else 'plain'}-{dtype}".replace("torch.", "")
            )
            writer = Residency(store, model.config, dtype, "bench", budget=1)
            base = Resident(key, 0, State(), Book())
            lease = await store.acquire(key, "bench", seconds=30)
            await writer.commit(base, state, Book(), lease=lease, commit_id=key.session)
            lease = await store.acquire(key, "bench", seconds=600)
            loads, lays, reads = [], [], []
            for _ in range(rounds):
                reader = Residency(store, model.config, dtype, "bench", budget=1)
                began = time.perf_counter()
                resident = (await reader.get(lease)).resident
                loads.append(time.perf_counter() - began)
                began = time.perf_counter()
                lanes.load(0, resident.state)
                lays.append(time.perf_counter() - began)
                began = time.perf_counter()
                run(mind, turn("b", State(), given, 0))
                reads.append(time.perf_counter() - began)
            load, lay, read = (1000 * statistics.median(each) for each in (loads, lays, reads))
            head = await store.head(key)
            size = sum(blob.stored for blob in head.blobs.values()) / 1e6
            table.add_row(
                str(dtype).removeprefix("torch."),
                "learned" if learn else "window only",
                f"{size:.0f}",
                f"{load:.0f}",
                f"{lay:.0f}",
                f"{read:.0f}",
                f"{read / (load + lay):.1f}x",
            )
    await store.close()
    console.print(table)
