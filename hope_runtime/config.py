"""The shape of a model and of its learning, validated once, when it is made.

A Llama-family model served as HOPE is the same numbers as its checkpoint plus `window`, `sinks`
and `levels`: which MLPs belong to which level of the Continuum Memory System.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

WINDOW = 1024  # tokens of attention where nothing else is said


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the value and the remedy."""


@dataclass(frozen=True, slots=True)
class LevelConfig:
    """One level of the CMS: some blocks' MLPs that learn every `chunk` tokens.

    `delta <- retain * delta - rate * ||base|| * clip(gradient)`: a step is measured against the
    base weights, so that one rate suits models of every size. The gradient is that of the mean
    next-token loss over the chunk's learnable tokens (paper eq. 71 with f = gradient descent),
    its global norm clipped to `clip`, so that
    ||delta|| <= rate * clip / (1 - retain) * ||base|| for ever.
    """

    name: str
    chunk: int
    blocks: tuple[int, ...]
    rate: float
    retain: float
    clip: float = 1.0
    bound: float = 0.05  # refuse a delta whose norm passes this share of the base weights' norm

    def __post_init__(self) -> None:
        if self.chunk < 2:
            raise ConfigError(f"level {self.name!r}: chunk {self.chunk} must be at least 2 tokens")
        if not self.blocks:
            raise ConfigError(f"level {self.name!r} has no blocks")
        if not self.rate >= 0.0:
            raise ConfigError(f"level {self.name!r}: rate {self.rate} must not be negative")
        if not 0.0 < self.retain <= 1.0:
            raise ConfigError(f"level {self.name!r}: retain {self.retain} must be in (0, 1]")
        if not self.clip > 0.0 or not self.bound > 0.0:
            raise ConfigError(f"level {self.name!r}: clip and bound must be positive")


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """Frequency scaling of Llama 3.1 checkpoints (`rope_type: llama3`) or plain `linear`."""

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in {"linear", "llama3"}:
            raise ConfigError(
                f"rotary scaling {self.kind!r} is not supported; supported: linear, llama3"
            )


@dataclass(frozen=True, slots=True)
class HopeConfig:
    """A model: `blocks` of windowed attention and a gated MLP, some of them CMS levels."""

    vocabulary: int
    width: int
    blocks: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int  # inner width of the MLPs
    norm_eps: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None = None
    tied_head: bool = True
    attention_bias: bool = False  # on query, key and value (Qwen2)
    query_key_norm: bool = False  # RMS norm per head before rotation (Qwen3)
    window: int = WINDOW
    sinks: int = 4
    levels: tuple[LevelConfig, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "blocks", "heads", "key_heads", "head_width", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.key_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.key_heads} key heads")
        if self.head_width % 2:
            raise ConfigError(f"head_width {self.head_width} must be even to be rotated")
        if self.window < 2 or self.sinks < 0:
            raise ConfigError(f"window {self.window} must be >= 2 and sinks {self.sinks} >= 0")
        taken: dict[int, str] = {}
        for level in self.levels:
            if level.chunk > self.window:
                raise ConfigError(
                    f"level {level.name!r}: chunk {level.chunk} is longer than the window "
                    f"({self.window}); a chunk must fit into it"
                )
            for block in level.blocks:
                if not 0 <= block < self.blocks:
                    raise ConfigError(
                        f"level {level.name!r}: block {block} is not one of 0..{self.blocks - 1}"
                    )
                if block in taken:
                    raise ConfigError(
                        f"block {block} is in level {taken[block]!r} and in {level.name!r}"
                    )
                taken[block] = level.name
        if len({level.name for level in self.levels}) != len(self.levels):
            raise ConfigError("two levels have the same name")

    @property
    def first_level_block(self) -> int:
        """The lowest block that learns; everything below it is the same for all sessions."""
        return min((b for level in self.levels for b in level.blocks), default=self.blocks)

    @property
    def learning_digest(self) -> str:
        """Names what a stored session depends on beside the weights: levels and sinks."""
        kept = [[level.name, level.chunk, level.blocks] for level in self.levels]
        return sha256(json.dumps([kept, self.sinks]).encode()).hexdigest()[:8]

    def stacked(self) -> HopeConfig:
        """Return this shape with the default levels: the paper's ad-hoc level stacking (7.3).

        The top quarter of the blocks learns: the upper half of it every 64 tokens, the lower
        every 256. Windows too short for these chunks get shorter ones. A step is nearly always
        clipped, to 1.4e-4 of the base's norm: the best of those tried (docs/log.md).
        """
        first = self.blocks - max(self.blocks // 4, min(2, self.blocks))
        middle = (first + self.blocks) // 2
        fast = min(64, self.window // 8)
        upper = tuple(range(middle, self.blocks))
        levels = [LevelConfig("fast", fast, upper, rate=4.7e-4, retain=0.995, clip=0.3)]
        if first < middle:
            lower = tuple(range(first, middle))
            levels.append(LevelConfig("slow", 4 * fast, lower, rate=4.7e-4, retain=0.996, clip=0.3))
        return replace(self, levels=tuple(levels))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
