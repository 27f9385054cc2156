"""Tokens per second, all sessions together, against transformers' `generate` side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import (
    checkpoint,
    console,
    engine,
    interleaved,
    prompt,
    run,
    transformers_twin,
    turn,
    where,
)
from hope_runtime.engine import Engine
from hope_runtime.state import State

NEW = 64


def main(rounds: int = 3) -> None:
    """Print one row per precision and number of sessions."""
    found = checkpoint()
    given = prompt(found, "Tell me a long story about a fox and the sea.")
    ids = torch.tensor([[id for id, _ in given]])
    table = Table(
        "dtype",
        "sessions",
        "ours tok/s",
        "transformers tok/s",
        "ratio",
        title=f"{NEW} new tokens after {len(given)}, prompt included; median of {rounds}",
        caption=where(),
    )
    for dtype in (torch.float32, torch.bfloat16):
        ours = engine(found, dtype)
        twin = transformers_twin(found, dtype)
        for sessions in (1, 8, 16):
            mine, theirs = interleaved(
                rounds,
                partial(_answer, ours, given, sessions),
                partial(_generate, twin, ids, sessions),
            )
            rates = sessions * NEW / mine, sessions * NEW / theirs
            table.add_row(
                str(dtype).removeprefix("torch."),
                str(sessions),
                f"{rates[0]:.0f}",
                f"{rates[1]:.0f}",
                f"{rates[0] / rates[1]:.2f}",
            )
    console.print(table)


def _answer(ours: Engine, given: tuple[tuple[int, float], ...], sessions: int) -> None:
    run(ours, *(turn(f"{i}", State(), given, NEW) for i in range(sessions)))


def _generate(twin: Any, ids: torch.Tensor, sessions: int) -> None:
    batch = ids.expand(sessions, -1)
    with torch.no_grad():
        twin.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
