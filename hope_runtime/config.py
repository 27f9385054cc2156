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
from itertools import pairwise
from typing import Any

from hope_runtime.ops.optimisers import RULES, STATELESS

OPENING = "It's"  # what stands before what a memory layer answers, and is trained to follow
WINDOW = 1024  # tokens of attention where nothing else is said
RANK = 32  # of what the slow level of a model learns, where its matrices are wide


class Mixer(StrEnum):
    """What lets the tokens of a session see each other."""

    ATTENTION = "attention"
    MEMORY = "memory"


class Form(StrEnum):
    """Which update rule the memories follow."""

    HOPE = "hope"  # self-modifying: `ops/collapsed.py`
    TITANS = "titans"  # static projections, and momentum: `ops/titans.py`; for comparison


class Variant(StrEnum):
    """How the levels of the CMS relate, and what passes from one to another.

    Whatever the variant, one level's output depends on the others' weights (direct, parametric
    transfer; section 3.3), and knowledge moves by backpropagation: a level's gradient is taken
    through those above it, under all of their deltas as they then are. `NESTED` adds transfer by
    initialisation.

    `SEQUENTIAL` (paper eq. 70, 73): the MLPs of a block are one chain. Every level starts at the
    base, which training learns through them all, and none begins again.

    `INDEPENDENT` (eq. 74): they lie beside each other, summed with learned shares.

    `NESTED` (eq. 72): a chain in which each level lives inside the next slower one. At the end of
    the slower one's chunk, after its own last step and the slower one's, a level begins again from
    a start that the slower one hands down. That start is learned too, toward the argmin of
    eq. 72 to first order (eq. 28; Reptile): `start <- start + start_rate * (delta - start)`,
    `delta` where the level ended. It begins at the base.
    """

    SEQUENTIAL = "sequential"
    INDEPENDENT = "independent"
    NESTED = "nested"


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

    Another `optimiser` gets the clipped gradient and the same rate; what it answers is cut to
    rate * clip * ||base||, the longest step of gradient descent, so that the bound holds for every
    rule. Those that set their own scale (Adam, Muon, M3) always ask for more: rate * clip is the
    length of their steps.
    """

    name: str
    chunk: int
    blocks: tuple[int, ...]
    rate: float
    retain: float
    clip: float = 1.0
    bound: float = 0.05  # refuse a delta whose norm passes this share of the base weights' norm
    mlp: int = 0  # which MLP of each block: its place in the chain
    offset: int = 0  # chunks end at offset + n * chunk: levels need not learn at the same token
    optimiser: str = "gradient_descent"  # one of `ops.optimisers`, with its default settings
    rank: int | None = None  # of each matrix's delta, kept as two thin factors; None: whole
    gate: float = 0.0  # steps are scaled by min(1, surprise / usual surprise) ** gate
    start_rate: float = 0.0  # how fast the start of a nested level is learned
    lasts: bool = True  # off: what it learned goes with the window that it learned it in

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
        if not 0 <= self.offset < self.chunk:
            raise ConfigError(
                f"level {self.name!r}: offset {self.offset} is not one of 0..{self.chunk - 1}"
            )
        if not self.gate >= 0.0:
            raise ConfigError(f"level {self.name!r}: gate {self.gate} must not be negative")
        if not 0.0 <= self.start_rate <= 1.0:
            raise ConfigError(f"level {self.name!r}: start_rate {self.start_rate} is not in [0, 1]")
        self._check_rule()

    def _check_rule(self) -> None:
        if self.optimiser not in RULES:
            raise ConfigError(
                f"level {self.name!r}: no optimiser {self.optimiser!r}; known: {', '.join(RULES)}"
            )
        if self.optimiser == "delta_gradient_descent":
            raise ConfigError(
                f"level {self.name!r}: delta_gradient_descent needs the inputs of every layer, "
                "which a consolidation does not keep; choose another optimiser"
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"level {self.name!r}: rank {self.rank} must be at least 1, or None")
        if self.rank is not None and self.optimiser not in STATELESS:
            raise ConfigError(
                f"level {self.name!r}: the moments of {self.optimiser} would be as large as the "
                f"delta that rank makes small; choose {' or '.join(STATELESS)}, or no rank"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LevelConfig:
        """Return the level whose fields were written as JSON."""
        return cls(**{**fields, "blocks": tuple(fields["blocks"])})

    @property
    def kind(self) -> dict[str, Any]:
        """What a stored delta depends on beside its chunk and blocks, where it is not the rule."""
        found = {
            "offset": self.offset or None,
            "optimiser": None if self.optimiser in STATELESS else self.optimiser,
            "rank": self.rank,
        }
        return {name: value for name, value in found.items() if value is not None}


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
            return (
                "the gradient at the anchor (eq. 90, 93) blows up under adversarial input "
                "unless it is clipped, and gains nothing"
            )
        if self.decay_to_zero:
            return "decay to zero kills the projections within 8,000 tokens"
        if not self.normalise_value:
            return (
                "values that are not normalised feed back through their own memory: unless targets "
                "are clipped they grow without bound"
            )
        if self.erases * self.rate_max > 2.0 * self.retain_min:
            return (
                f"rate_max {self.rate_max} with {self.erases:g} erasures and retain_min "
                f"{self.retain_min} can turn what a key recalls into more than its opposite"
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
class RecallConfig:
    """The memory layer beside a pre-trained base (`layers/recall.py`)."""

    taps: tuple[int, int]  # the blocks whose outputs it sees; below every level that learns
    whitened: int = 512  # what is made of them and of the token's own embedding
    own: int = 128  # of these: of the embedding
    behind: int = 32  # tokens of context, before one that is written
    ahead: int = 16  # and after it
    heads: int = 8  # of the attention to the context
    attention: int = 256  # width of all of them
    keys: int = 256  # the memory is a matrix of values by keys
    values: int = 256
    gate: int = 128
    hidden: int = 192
    floor: float = 0.02  # rates below it are none
    digest: str = ""  # names the trained layer: what it wrote, no other can read
    formerly: tuple[str, ...] = ()  # other names that it wrote under
    # from here on: how answers are given, which may change without touching what was written
    asks: float = 0.0  # the logit from which a question is one about the user
    knows: float = 0.25  # and how `familiar` what was read has to be, to be an answer
    ends: float = 4.5  # logits by which what goes on with a value leads before a full stop
    digits: float = 4.5  # and after a digit, which any other digit seems to follow
    maybe: float = 2.0  # how far below `asks` a question may be whose answer is known
    opening: str = OPENING  # what stands before an answer
    unknown: str = "I don't know that yet."  # what is said where there is none

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.whitened - self.own, self.behind) < 1:
            raise ConfigError("a memory layer needs keys, values and whitened features")
        if self.attention % self.heads:
            raise ConfigError(
                f"memory layer: {self.heads} heads do not divide a width of {self.attention}"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RecallConfig:
        """Return the configuration that was written as JSON."""
        tuples = {"taps": fields["taps"], "formerly": fields.get("formerly", ())}
        return cls(**{**fields, **{name: tuple(value) for name, value in tuples.items()}})


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
    chain: int = 1  # MLPs a block
    variant: Variant = Variant.SEQUENTIAL
    recall: RecallConfig | None = None  # the memory layer beside a pre-trained base

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
        if self.recall and max(self.recall.taps) >= min(self.first_level_block, self.blocks):
            raise ConfigError(
                f"the memory layer sees block {max(self.recall.taps)}, which learns or does not "
                f"exist; it can see those below {min(self.first_level_block, self.blocks)}"
            )

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
        self._check_nesting()

    def _check_nesting(self) -> None:
        ordered = sorted(self.levels, key=lambda level: level.chunk)
        nested = self.variant is Variant.NESTED
        for level in ordered if not nested else ordered[-1:]:
            if level.start_rate:
                raise ConfigError(
                    f"level {level.name!r} has a start_rate, but lives in no slower level"
                )
        for fast, slow in pairwise(ordered if nested else ()):
            apart = (slow.offset - fast.offset) % fast.chunk
            if slow.chunk % fast.chunk or slow.chunk == fast.chunk or apart:
                raise ConfigError(
                    f"level {fast.name!r} cannot be nested in {slow.name!r}: every end of the "
                    "slower one's chunks must be one of the faster one's, and not the reverse"
                )

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
    def unserved(self) -> str | None:
        """Say why sessions may not be served with this configuration; None: they may."""
        return self.memory.rule.unsafe if self.memory_blocks and self.memory else None

    @property
    def learning_digest(self) -> str:
        """Names what a stored session depends on beside the weights: levels and sinks.

        What concerns memories alone (the place in a chain, the memory's chunk and rule) is left
        out where it is the default, as is what levels may have besides, so that the names of
        sessions without any of it stay. A memory layer is none of it: what it wrote carries its
        own name, and a session without facts can begin to have some.
        """
        kept: list[Any] = [
            [
                level.name,
                level.chunk,
                level.blocks,
                *([level.mlp] if level.mlp else []),
                *([level.kind] if level.kind else []),
            ]
            for level in self.levels
        ]
        parts = [kept, self.sinks]
        if self.variant is Variant.NESTED:
            parts.append(self.variant)
        if self.memory_blocks and self.memory is not None:
            parts.append(asdict(self.memory))
        return sha256(json.dumps(parts).encode()).hexdigest()[:8]

    def stacked(self) -> HopeConfig:
        """Return this shape with the default levels: the paper's ad-hoc level stacking (7.3).

        The top quarter of the blocks learns: the upper half of it every 64 tokens, for as long as
        the window lasts, by steps of 1.3e-3 of the base's norm in which all weights move alike; the
        lower half every 256 tokens, to stay, by steps of at most 3.6e-5, in thin factors where
        these save something. Windows too short for these chunks get shorter ones. How they were
        chosen: docs/log.md.
        """
        first = self.blocks - max(self.blocks // 4, min(2, self.blocks))
        middle = (first + self.blocks) // 2
        fast = min(64, self.window // 8)
        upper = tuple(range(middle, self.blocks))
        levels = [
            LevelConfig(
                "fast",
                fast,
                upper,
                rate=4.2e-3,
                retain=0.99,
                clip=0.3,
                bound=0.13,  # what the three above allow at most
                optimiser="factored_descent",
                lasts=False,
            )
        ]
        if first < middle:
            lower = tuple(range(first, middle))
            levels.append(
                LevelConfig(
                    "slow",
                    4 * fast,
                    lower,
                    rate=1.2e-4,
                    retain=0.996,
                    clip=0.3,
                    rank=RANK if self.width >= 8 * RANK else None,  # else it would save nothing
                )
            )
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
            made["levels"] = tuple(map(LevelConfig.from_json, made.get("levels", ())))
            if made.pop("independent", False):  # what `variant` was called at first
                made["variant"] = Variant.INDEPENDENT
            made["variant"] = Variant(made.get("variant", Variant.SEQUENTIAL))
            made["mixers"] = tuple(Mixer(mixer) for mixer in made.get("mixers", ()))
            if scaling := made.get("rotary_scaling"):
                made["rotary_scaling"] = RotaryScaling(**scaling)
            if memory := made.get("memory"):
                form, rule = Form(memory.get("form", Form.HOPE)), Rule(**memory["rule"])
                made["memory"] = MemoryConfig(**{**memory, "rule": rule, "form": form})
            if recall := made.get("recall"):
                made["recall"] = RecallConfig.from_json(recall)
            return cls(**made)
        except ConfigError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"not a model's configuration: {error}") from error
