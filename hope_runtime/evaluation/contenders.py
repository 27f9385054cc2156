"""Who is compared: models of one width and depth that differ in what lets tokens see each other.

The inner width of their MLPs is chosen so that all have nearly as many weights.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hope_runtime.config import Form, HopeConfig, MemoryConfig, Mixer, Rule
from hope_runtime.weights.shapes import shapes

WIDTH, BLOCKS, HEADS, HEAD_WIDTH, CHUNK = 96, 2, 2, 32, 32
SEES = 1 << 14  # tokens that attention looks back: all of any task
_HIDDEN = 96  # of HOPE's MLPs; that of the others follows

MEMORIES = {
    "hope": MemoryConfig(HEADS, HEAD_WIDTH, rule=Rule(chunk=CHUNK)),
    "delta": MemoryConfig(
        HEADS, HEAD_WIDTH, rule=Rule(chunk=CHUNK, modifies=False, erases=1.0, rate_max=1.0)
    ),
    "titans": MemoryConfig(HEADS, HEAD_WIDTH, rule=Rule(chunk=CHUNK), form=Form.TITANS),
    "frozen": MemoryConfig(HEADS, HEAD_WIDTH, rule=Rule(chunk=CHUNK, rate_max=0.0)),
    # what a key recalls may be turned around, nearly to its opposite: it can track a state
    "reflecting": MemoryConfig(
        HEADS, HEAD_WIDTH, rule=Rule(chunk=CHUNK, rate_max=0.99, retain_min=0.99)
    ),
}
ABOUT = {
    "hope": "self-modifying memory, as served",
    "delta": "gated delta rule: keys, values and targets do not follow the memory",
    "titans": "Titans: static projections, momentum, gradient at the chunk's start",
    "transformer": "attention over everything that was read",
    "frozen": "HOPE whose memory is never written: convolution and MLPs alone",
    "reflecting": "HOPE with rates up to 0.99: a write can turn around what a key recalls",
}
USUAL = ("hope", "delta", "titans", "transformer", "frozen")  # if none are named


def contender(name: str, vocabulary: int) -> HopeConfig:
    """Return a contender's shape; its MLPs make up for what its mixers are smaller."""
    hope = _shape("hope", vocabulary, _HIDDEN)
    here = _shape(name, vocabulary, _HIDDEN)
    missing = weights(hope) - weights(here)
    return replace(here, hidden=_HIDDEN + round(missing / (3 * WIDTH * BLOCKS)))


def weights(config: HopeConfig) -> int:
    """Count a model's weights."""
    return sum(math.prod(shape) for _, shape in shapes(config))


def _shape(name: str, vocabulary: int, hidden: int) -> HopeConfig:
    attends = name == "transformer"
    return HopeConfig(
        vocabulary=vocabulary,
        width=WIDTH,
        blocks=BLOCKS,
        heads=HEADS if attends else 0,
        key_heads=HEADS if attends else 0,
        head_width=HEAD_WIDTH if attends else 0,
        hidden=hidden,
        norm_eps=1e-5,
        rotary_base=10_000.0,
        window=SEES,
        sinks=0,
        mixers=(Mixer.ATTENTION if attends else Mixer.MEMORY,) * BLOCKS,
        memory=None if attends else MEMORIES[name],
    )
