"""What the memory layer costs a token: the same model with and without it, in turns.

python -m benchmarks memory_layer
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from hope_runtime.engine import Engine, Turn
from hope_runtime.report import Finished, Phase, Stepped
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role
from server.loading import load
from server.settings import Settings

SAID, ROUNDS = 48, 5
TOLD = "My dog is called Biscuit, and my sister's name is Ingrid."
ASKED = "Tell me a long story about the sea."


def main() -> None:
    """Decode in turns with the layer and without, for 1 and 8 sessions."""
    asked: dict[str, Any] = {"model": "smollm2", "threads": torch.get_num_threads()}
    engines = {}
    for name, layer in (("without", "none"), ("with", "auto")):
        settings = Settings(**asked, memory_layer=layer, lanes=8)
        _, model, tokenizer, _ = load(settings, lambda said: None)
        engines[name] = Engine(model, tokenizer, lanes=8, clock=time.perf_counter)
    for sessions in (1, 8):
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, engine in engines.items():
                seconds[name].append(_decode(engine, tokenizer, sessions))
        per = {name: statistics.median(each) * 1000 for name, each in seconds.items()}
        ratio = statistics.median(
            w / wo for w, wo in zip(seconds["with"], seconds["without"], strict=True)
        )
        print(
            f"{sessions} sessions: {per['without']:.1f} ms a step without, {per['with']:.1f} ms "
            f"with, {ratio - 1:+.1%}"
        )


def _decode(engine: Engine, tokenizer: Any, sessions: int) -> float:
    """Return the seconds of a decoding step, the median of a reply's."""

    def turn(id: str, state: State, text: str, most: int) -> Turn:
        render = tokenizer.following if state.position else tokenizer.opening
        spans = render([Message(Role.USER, text)])
        given = tuple((i, float(s.role is Role.USER)) for s in spans for i in s.ids)
        closing = tuple((i, 0.0) for i in tokenizer.closing().ids)
        greedy = Sampling(temperature=0.0)
        return Turn(id, state, given, closing, most, 0.0, greedy, (), learn=True)

    first = _run(engine, *(turn(str(i), State(), TOLD, 1) for i in range(sessions)))
    told = {f.job: f.state for f in first if isinstance(f, Finished)}
    facts = _run(engine, *(turn(i, state, ASKED, SAID) for i, state in told.items()))
    steps = [
        f.seconds
        for f in facts
        if isinstance(f, Stepped) and f.phase is Phase.DECODE and f.sessions == sessions
    ]
    return statistics.median(steps)


def _run(engine: Engine, *turns: Turn) -> list[Any]:
    for each in turns:
        engine.submit(each)
    facts: list[Any] = []
    while not engine.idle:
        facts += engine.step()
    return facts
