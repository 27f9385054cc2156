"""What models are judged by: for each task how it is trained, and what is then asked.

Recall is not what self-modification is for: a plain delta rule recalls as well. It is here because
a memory that cannot recall is of no use, and so that changes of the rule show what they cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hope_runtime.evaluation import languages, synthetic, text
from hope_runtime.evaluation.drawn import Draw
from hope_runtime.training.loop import Batch, Source


class Measure(StrEnum):
    """What is counted."""

    ANSWERS = "answers"  # share of scored tokens that are the likeliest
    STRINGS = "strings"  # share of rows where at each scored place just what is legal is likely
    BITS = "bits"  # per scored token; fewer are better


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training: so many rows a step for a share of the steps."""

    share: float
    rows: int
    draw: Draw


@dataclass(frozen=True, slots=True)
class Probe:
    """What a trained model is asked."""

    name: str
    rows: int
    draw: Draw
    longer: bool = False  # than anything that was trained, or more


@dataclass(frozen=True, slots=True)
class Task:
    """A task: `steps` of training in the short form, five times as many in the full one."""

    name: str
    about: str
    vocabulary: int
    measure: Measure
    chance: float  # what guessing gives
    steps: int
    stages: tuple[Stage, ...]
    probes: tuple[Probe, ...]

    def source(self) -> Source:
        """Return what is trained on: stage after stage, a fifth of the steps from earlier ones."""
        ends = np.cumsum([stage.share for stage in self.stages])

        def draw(chance: np.random.Generator, done: float) -> Batch:
            stage = int(np.searchsorted(ends, min(done, 1.0 - 1e-9) * ends[-1], side="right"))
            if stage and chance.random() < 0.2:
                stage = int(chance.integers(stage))
            drawn = self.stages[stage].draw(chance, self.stages[stage].rows)
            weights = torch.from_numpy(drawn.scored.astype(np.float32))
            return Batch(torch.from_numpy(drawn.tokens), weights)

        return draw


def named(data: Path | None) -> dict[str, Callable[[], Task]]:
    """Return all tasks by name, unmade: making those of text reads it from the folder `data`."""
    made: dict[str, Callable[[], Task]] = {"associations": associations, "facts": facts}
    made |= {each.name: partial(language, each) for each in languages.LANGUAGES}
    if data is not None:
        made |= {name: partial(bits, name, data) for name in text.TEXTS}
    return made


def associations() -> Task:
    """Multi-query associative recall; 32 pairs are twice what was trained."""

    def draw(pairs: int) -> Draw:
        return partial(synthetic.associations, pairs=pairs)

    return Task(
        name="associations",
        about="multi-query associative recall: key-value pairs, then each key again",
        vocabulary=synthetic.PAIR_VOCABULARY,
        measure=Measure.ANSWERS,
        chance=1 / synthetic.KEYS,
        steps=240,
        stages=(
            Stage(0.25, 128, draw(3)),
            Stage(0.25, 64, draw(6)),
            Stage(0.5, 32, draw(16)),
        ),
        probes=(
            Probe("4 pairs", 128, draw(4)),
            Probe("16 pairs", 64, draw(16)),
            Probe("32 pairs", 32, draw(32), longer=True),
            Probe("64 pairs", 16, draw(64), longer=True),
        ),
    )


def facts() -> Task:
    """Facts told in a conversation, a quarter of them changed later; sessions up to 256 tokens."""

    def draw(length: int, fewest: int, most: int, within: float = 0.5) -> Draw:
        return partial(
            synthetic.facts, length=length, count=(fewest, most), again=0.25, within=within
        )

    changed = partial(synthetic.facts, length=256, count=(8, 8), again=1.0, only_changed=True)

    return Task(
        name="facts",
        about="facts told among other talk, a quarter of them changed later, all asked at the end",
        vocabulary=synthetic.FACT_VOCABULARY,
        measure=Measure.ANSWERS,
        chance=1 / synthetic.VALUES,
        steps=300,
        stages=(
            Stage(0.25, 48, draw(48, 2, 3)),
            Stage(0.2, 32, draw(64, 3, 4)),
            Stage(0.25, 16, draw(128, 4, 8)),
            Stage(0.3, 10, draw(256, 4, 8)),
        ),
        probes=(
            Probe("4 facts", 64, draw(256, 4, 4)),
            Probe("8 facts", 32, draw(256, 8, 8)),
            Probe("16 facts", 16, draw(256, 16, 16), longer=True),
            Probe("changed", 32, changed),
            Probe("512 tokens", 32, draw(512, 8, 8, within=0.1), longer=True),
            Probe("2,048 tokens", 16, draw(2048, 8, 8, within=0.025), longer=True),
            Probe("8,192 tokens", 8, draw(8192, 8, 8, within=0.01), longer=True),
        ),
    )


def language(each: languages.Language) -> Task:
    """Return a formal language's task: strings up to 40 symbols (Bin0), and up to 80 (Bin1)."""

    def draw(length: int) -> Draw:
        return partial(languages.training, language=each, length=length)

    def judge(shortest: int, longest: int) -> Draw:
        return partial(languages.judging, language=each, shortest=shortest, longest=longest)

    return Task(
        name=each.name,
        about="which symbols may come next, after each symbol of a string",
        vocabulary=languages.VOCABULARY,
        measure=Measure.STRINGS,
        chance=0.0,
        steps=120,
        stages=(Stage(0.2, 96, draw(10)), Stage(0.3, 64, draw(20)), Stage(0.5, 48, draw(40))),
        probes=(
            Probe("Bin0: 2 to 40", 128, judge(2, 40)),
            Probe("Bin1: 41 to 80", 128, judge(41, 80), longer=True),
        ),
    )


def bits(name: str, data: Path) -> Task:
    """Return the task of predicting the bytes of a text."""
    train, held_out = text.TEXTS[name](data)
    return Task(
        name=name,
        about="bits per byte of held-out text, each row from an empty memory",
        vocabulary=text.VOCABULARY,
        measure=Measure.BITS,
        chance=8.0,
        steps=300,
        stages=(Stage(1.0, 10, partial(text.rows, text=train, length=256)),),
        probes=(
            Probe("256 bytes", 64, partial(text.in_order, text=held_out, length=256)),
            Probe(
                "1,024 bytes", 16, partial(text.in_order, text=held_out, length=1024), longer=True
            ),
        ),
    )
