"""The shape of a model and of its learning, validated once, when it is made.

A Llama-family model served as HOPE is the same numbers as its checkpoint plus `window`, `sinks`
and `levels`: which MLPs belong to which level of the Continuum Memory System. A native HOPE has
memories for mixers, and more than one MLP a block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

WINDOW = 1024  # tokens of attention where nothing else is said


class Mixer(StrEnum):
    """What lets the tokens of a session see each other."""

    ATTENTION = "attention"
    MEMORY = "memory"


class Form(StrEnum):
    """Which update rule the memories follow."""

    HOPE = "hope"  # self-modifying: `ops/collapsed.py`
    TITANS = "titans"  # static projections, and momentum: `ops/titans.py`; for comparison


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
    mlp: int = 0  # which MLP of each block: its place in the chain

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
class Rule:
    """The update rule of a fast memory; the defaults are the form that may be served.

    With `reference` forms run that are known to blow up or to die: for tests and study only.
    """

    chunk: int = 32
    rate_max: float = 0.5
    retain_min: float = 0.9
    retain_max: float = 1.0 - 1e-5
    target_norm: float | None = 1.0  # self-made targets are clipped to it; None: not clipped
    memory_norm: float | None = 16.0  # a head's G is scaled back to it at every chunk's end
    anchored: bool = False  # the gradient at the anchor (eq. 90, 93), not at the live memory
    decay_to_zero: bool = False  # as printed; else decay goes to the learned start
    normalise_value: bool = True
    modifies: bool = True  # keys, values and targets follow the memory; off: the delta rule
    erases: float = 2.0  # eq. 88 erases twice: by its preconditioner and by its gradient
    reference: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ConfigError(f"memory chunk {self.chunk} must be at least 1 token")
        if not self.rate_max >= 0.0:
            raise ConfigError(f"memory rate_max {self.rate_max} must not be negative")
        if not 0.0 < self.retain_min <= self.retain_max <= 1.0:
            raise ConfigError(
                f"memory retain must lie in (0, 1], not in [{self.retain_min}, {self.retain_max}]"
            )
        if not self.reference and (why := self.unsafe):
            raise ConfigError(f"{why}; it runs with reference=True only, and is never served")

    @property
    def unsafe(self) -> str | None:
        """Say why a session's memory could blow up or die under this rule; None: it is bounded."""
        if self.anchored:
            return "the gradient at the anchor blows up under adversarial input (eq. 90, 93)"
        if self.decay_to_zero:
            return "decay to zero kills the projections within 8,000 tokens"
        if not self.normalise_value:
            return "values that are not normalised grow without bound through their own memory"
        if self.erases * self.rate_max > 1.0:
            return (
                f"rate_max {self.rate_max} with {self.erases:g} erasures turns what a key recalls "
                "around at each step, and can grow"
            )
        if self.retain_max >= 1.0 or self.memory_norm is None or self.target_norm is None:
            return "without retain_max < 1, target_norm and memory_norm nothing bounds the memory"
        return None


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """The mixers that are memories: `heads` matrices of `head_width` squared in each."""

    heads: int
    head_width: int
    taps: int = 4  # of the short convolution before keys, values and queries
    adaptive_query: bool = False  # queries from a memory of their own (paper, table 6)
    rule: Rule = Rule()
    form: Form = Form.HOPE  # Titans takes of the rule what its equations have

    def __post_init__(self) -> None:
        if min(self.heads, self.head_width, self.taps) < 1:
            raise ConfigError(
                f"a memory needs heads, head_width and taps of at least 1, not {self.heads}, "
                f"{self.head_width} and {self.taps}"
            )
        if self.form is Form.TITANS and self.adaptive_query:
            raise ConfigError("adaptive_query needs the form 'hope': Titans' queries are static")


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
    """A model: `blocks` of a mixer and a chain of gated MLPs, some of them CMS levels.

    A mixer is windowed attention or a memory. The paper's Hope is all memories, its
    Hope-Attention all attention; any mixture is a `mixers` of one name per block.
    """

    vocabulary: int
    width: int
    blocks: int
    heads: int  # this and the next two: of attention; 0 where no block attends
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
    mixers: tuple[Mixer, ...] = ()  # one a block; none: all attention
    memory: MemoryConfig | None = None
    chain: int = 1  # MLPs a block, applied one after the other
    independent: bool = False  # or beside each other, summed with learned weights (eq. 74)

    def __post_init__(self) -> None:
        attention = ("heads", "key_heads", "head_width") if self.attention_blocks else ()
        for name in ("vocabulary", "width", "blocks", "hidden", "chain", *attention):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.attention_blocks and self.heads % self.key_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.key_heads} key heads")
        if self.head_width % 2:
            raise ConfigError(f"head_width {self.head_width} must be even to be rotated")
        if self.window < 2 or self.sinks < 0:
            raise ConfigError(f"window {self.window} must be >= 2 and sinks {self.sinks} >= 0")
        if len(self.mixers) not in {0, self.blocks}:
            raise ConfigError(f"{len(self.mixers)} mixers do not suit {self.blocks} blocks")
        if self.memory_blocks and self.memory is None:
            raise ConfigError("blocks with a memory need the memory's configuration")
        self._check_levels()

    def _check_levels(self) -> None:
        taken: dict[tuple[int, int], str] = {}
        for level in self.levels:
            if not 0 <= level.mlp < self.chain:
                raise ConfigError(
                    f"level {level.name!r}: mlp {level.mlp} is not one of 0..{self.chain - 1}"
                )
            if self.attention_blocks and level.chunk > self.window:
                raise ConfigError(
                    f"level {level.name!r}: chunk {level.chunk} is longer than the window "
                    f"({self.window}); a chunk must fit into it"
                )
            for block in level.blocks:
                if not 0 <= block < self.blocks:
                    raise ConfigError(
                        f"level {level.name!r}: block {block} is not one of 0..{self.blocks - 1}"
                    )
                if other := taken.get((block, level.mlp)):
                    raise ConfigError(f"block {block} is in level {other!r} and in {level.name!r}")
                taken[block, level.mlp] = level.name
        if len({level.name for level in self.levels}) != len(self.levels):
            raise ConfigError("two levels have the same name")

    @property
    def attention_blocks(self) -> Sequence[int]:
        """The blocks whose mixer is attention."""
        if not self.mixers:
            return range(self.blocks)  # not a tuple: a crafted file may claim many blocks
        return tuple(i for i, mixer in enumerate(self.mixers) if mixer is Mixer.ATTENTION)

    @property
    def memory_blocks(self) -> tuple[int, ...]:
        """The blocks whose mixer is a memory."""
        return tuple(i for i, mixer in enumerate(self.mixers) if mixer is Mixer.MEMORY)

    @property
    def first_level_block(self) -> int:
        """The lowest block that learns; everything below it is the same for all sessions."""
        return min((b for level in self.levels for b in level.blocks), default=self.blocks)

    @property
    def learning_digest(self) -> str:
        """Names what a stored session depends on beside the weights: levels and sinks.

        What concerns memories alone (the place in a chain, the memory's chunk and rule) is left
        out where it is the default, so that the names of sessions without memories stay.
        """
        kept: list[Any] = [
            [level.name, level.chunk, level.blocks, *([level.mlp] if level.mlp else [])]
            for level in self.levels
        ]
        parts = [kept, self.sinks]
        if self.memory_blocks and self.memory is not None:
            parts.append(asdict(self.memory))
        return sha256(json.dumps(parts).encode()).hexdigest()[:8]

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

    def native(self) -> HopeConfig:
        """Return this native shape with its default levels: each MLP of the chain is one.

        The first learns every 128 tokens, each later one four times more slowly.
        """
        every = tuple(range(self.blocks))
        return replace(
            self,
            levels=tuple(
                LevelConfig(
                    f"level{place + 1}",
                    128 * 4**place,
                    every,
                    rate=4.7e-4,
                    retain=0.995,
                    clip=0.3,
                    mlp=place,
                )
                for place in range(self.chain)
            ),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> HopeConfig:
        """Return the configuration that `to_json` wrote.

        Raises:
            ConfigError: a field is missing, unknown, or has a value that cannot be.
        """
        try:
            made = dict(fields)
            made["levels"] = tuple(
                LevelConfig(**{**level, "blocks": tuple(level["blocks"])})
                for level in made.get("levels", ())
            )
            made["mixers"] = tuple(Mixer(mixer) for mixer in made.get("mixers", ()))
            if scaling := made.get("rotary_scaling"):
                made["rotary_scaling"] = RotaryScaling(**scaling)
            if memory := made.get("memory"):
                form, rule = Form(memory.get("form", Form.HOPE)), Rule(**memory["rule"])
                made["memory"] = MemoryConfig(**{**memory, "rule": rule, "form": form})
            return cls(**made)
        except ConfigError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"not a model's configuration: {error}") from error
