"""Seconds per consolidation, beside the reading of the same tokens and the writing of as many."""

from __future__ import annotations

import statistics

import torch
from rich.table import Table

from benchmarks.common import checkpoint, console, engine, run, turn, where
from hope_runtime.report import Learned, Phase, Stepped
from hope_runtime.state import State

TOKENS = 1024


def main() -> None:
    """Print one row per precision and level."""
    found = checkpoint()
    text = "\n".join(
        f"Item {i}: the ship left harbour {i % 7} with {i * 31 % 97} crates." for i in range(200)
    )
    given = [(id, 1.0) for id in found.tokenizer.encode(text)[:TOKENS]]
    table = Table(
        "dtype",
        "level",
        "chunk",
        "consolidate s",
        "read chunk s",
        "say chunk s",
        "share of saying",
        title=f"over {len(given)} tokens, medians",
        caption=where(),
    )
    for dtype in (torch.float32, torch.bfloat16):
        mind = engine(found, dtype, lanes=1)
        facts = run(mind, turn("a", State(), given, 64, learn=True))
        for level in found.config.stacked().levels:
            took = statistics.median(
                f.seconds
                for f in facts
                if isinstance(f, Learned) and f.consolidated.level == level.name
            )
            read = _each(facts, Phase.PREFILL) * level.chunk
            say = _each(facts, Phase.DECODE) * level.chunk
            table.add_row(
                str(dtype).removeprefix("torch."),
                level.name,
                str(level.chunk),
                f"{took:.2f}",
                f"{read:.2f}",
                f"{say:.2f}",
                f"{took / say:.0%}",
            )
    console.print(table)


def _each(facts: list[object], phase: Phase) -> float:
    """Return median seconds per token of a phase."""
    return statistics.median(
        f.seconds / f.tokens for f in facts if isinstance(f, Stepped) and f.phase is phase
    )
