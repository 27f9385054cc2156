"""Committing sessions of 1 to 100 MB and reading them back, and what everybody else feels of it.

A ticker on the same loop stands for another session's stream: the longest gap between two of its
ticks is how long that stream would have stood still.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvloop
from rich.table import Table

from benchmarks.common import checkpoint, console, end, engine, run, turn, where
from hope_runtime.engine import Consolidation, Engine
from hope_runtime.state import State
from memory_store import EmbeddedValkey, RedisStore, SessionKey
from server.book import Book
from server.residency import Residency, Resident

SIZES_MB = (1, 10, 26)
TICK_S = 0.001


class Ticker:
    """Ticks every millisecond and remembers its longest gap."""

    def __init__(self) -> None:
        self.longest = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._tick())
        await asyncio.sleep(5 * TICK_S)
        try:
            yield
        finally:
            await asyncio.sleep(5 * TICK_S)
            task.cancel()

    async def _tick(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            self.longest = max(self.longest, now - before - TICK_S)
            before = now


def main(rounds: int = 9) -> None:
    """Print medians and longest stalls of the default model's sessions, window only, bfloat16."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedValkey(Path(folder)) as valkey,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_measure(valkey.url, rounds))


async def _measure(url: str, rounds: int) -> None:
    found = checkpoint()
    mind = engine(found, torch.bfloat16, lanes=1)
    config = found.config.stacked()
    ids = found.tokenizer.encode("The ship left the harbour with its crates at dawn. " * 300)
    store = await RedisStore.open(url, kept_versions=1)
    table = Table(
        "MB",
        "tokens",
        "commit ms",
        "from store ms",
        "longest stall of another stream, ms: commit",
        "load",
        title=f"sessions of SmolLM2-135M in bfloat16; medians of {rounds}",
        caption=where(),
    )
    sessions = {f"{size} MB": _of_size(size, mind, ids) for size in SIZES_MB}
    sessions["learned"] = _learned(mind, ids)
    for name, state in sessions.items():
        commits, loads, stalls = [], [], (Ticker(), Ticker())
        for n in range(rounds):
            key = SessionKey("bench", f"{name.split()[0]}-{n}")
            writer, reader = (
                Residency(store, config, torch.bfloat16, "bench", budget=1) for _ in range(2)
            )
            lease = await store.acquire(key, "bench", seconds=30)
            base = Resident(key, 0, State(), Book())
            async with stalls[0].running():
                began = time.perf_counter()
                await writer.commit(base, state, Book(), lease=lease, commit_id="c")
                commits.append(time.perf_counter() - began)
            lease = await store.acquire(key, "bench", seconds=30)
            async with stalls[1].running():
                began = time.perf_counter()
                await reader.get(lease)
                loads.append(time.perf_counter() - began)
            await store.delete(key)
        figures = [statistics.median(commits), statistics.median(loads)]
        figures += [each.longest for each in stalls]
        table.add_row(
            f"{state.bytes / 1e6:.1f}",
            str(state.position),
            *(f"{1000 * each:.1f}" for each in figures),
        )
    await store.close()
    console.print(table)


def _of_size(size: int, mind: Engine, ids: list[int]) -> State:
    """Return a session of about so many MB that has learned nothing."""
    sample = _read(mind, ids[:16])
    return _read(mind, ids[: max(1, round(16 * size * 1e6 / sample.bytes))])


def _learned(mind: Engine, ids: list[int]) -> State:
    """Return a session whose levels have moved, with a delta of float32 for every weight."""
    given = [(token, 1.0) for token in ids[:1024]]
    state = end(run(mind, turn("a", State(), given, 0, learn=True))).state
    return end(run(mind, Consolidation("c", state))).state


def _read(mind: Engine, ids: list[int]) -> State:
    return end(run(mind, turn("a", State(), [(token, 0.0) for token in ids], 0))).state


if __name__ == "__main__":
    main()
