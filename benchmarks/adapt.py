"""Perplexity while reading, without and with learning: `python -m benchmarks.adapt FILE ...`.

Every token is scored before it is learned: the loss of a chunk is taken under the weights from
before its consolidation.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import checkpoint, console, engine, run, turn, where
from hope_runtime import weights
from hope_runtime.config import LevelConfig
from hope_runtime.report import Learned
from hope_runtime.state import State
from hope_runtime.weights.checkpoint import Checkpoint


def main() -> None:
    """Print one row per document and window."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapt", description=__doc__)
    parser.add_argument("file", nargs="+", type=Path, help="plain text to read")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of each file")
    parser.add_argument("--skip", type=int, default=0, help="characters to skip first")
    parser.add_argument("--window", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rate", type=float, nargs="+", default=[], help="instead of the default")
    parser.add_argument(
        "--level",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of every level: rank=32 gate=1",
    )
    parser.add_argument("--model", type=Path, help="a model's directory, instead of the default")
    options = parser.parse_args()
    changes = dict(map(_change, options.level))
    found = weights.read(options.model) if options.model else checkpoint()
    if not found.config.attention_blocks:
        options.window = options.window[:1]  # nothing looks through it
    defaults = [level.rate for level in _levels(found)]
    rates: list[list[float]] = [[rate] * len(defaults) for rate in options.rate] or [defaults]
    table = Table(
        "document",
        "window",
        "rate",
        "static ppl",
        "learning ppl",
        "change",
        "moved",
        title=f"{options.tokens} tokens, scored before they are learned {changes or ''}",
        caption=where(),
    )
    for file in options.file:
        ids = found.tokenizer.encode(file.read_text()[options.skip :])[: options.tokens]
        for window in options.window:
            static, _ = _read(found, ids, window, [0.0] * len(defaults), {})
            for each in rates:
                learned, moved = _read(found, ids, window, each, changes)
                table.add_row(
                    file.name,
                    str(window),
                    "/".join(f"{rate:g}" for rate in each),
                    f"{math.exp(static):.2f}",
                    f"{math.exp(learned):.2f}",
                    f"{math.exp(learned - static) - 1:+.1%}",
                    f"{moved:.2%}",
                )
    console.print(table)


def _levels(found: Checkpoint) -> tuple[LevelConfig, ...]:
    """Return the model's own levels, or the default ones: the same chunks at every window."""
    return found.config.levels or found.config.stacked().levels


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, value if name == "optimiser" else json.loads(value)


def _read(
    found: Checkpoint, ids: list[int], window: int, rates: list[float], changes: dict[str, Any]
) -> tuple[float, float]:
    """Return nats per token, and how far the fastest level moved, of its base's norm."""
    levels = _levels(found)
    fast = min(level.chunk for level in levels)
    levels = tuple(
        replace(level, rate=rate, **changes) for level, rate in zip(levels, rates, strict=True)
    )
    config = replace(found.config, window=window, levels=levels)
    mind = engine(replace(found, config=config), torch.bfloat16, lanes=1)
    facts = run(mind, turn("read", State(), [(id, 1.0) for id in ids], 0, learn=True))
    learned = [fact.consolidated for fact in facts if isinstance(fact, Learned)]
    scored = [c for c in learned if c.end - c.start == fast]
    nats = sum(c.loss * c.tokens for c in scored) / sum(c.tokens for c in scored)
    return nats, scored[-1].movement


if __name__ == "__main__":
    main()
