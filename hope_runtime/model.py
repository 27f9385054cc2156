"""Hope: blocks of a mixer and a CMS, over frozen base weights; a function of explicit state.

The same `run` serves prefill, decoding and the gradient of a chunk: it reads a past, returns
what the new tokens add to it, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import ConfigError, Form, HopeConfig, Variant
from hope_runtime.layers import attention, cms, memory, recall
from hope_runtime.layers.attention import Past, widened
from hope_runtime.layers.cms import Deltas
from hope_runtime.layers.memory import Memories, MemoryLayer


class Read(NamedTuple):
    """What a pass over T new tokens of B sessions found.

    `keys` (before rotation), `rotated` and `values` are [attention blocks, B, K, T, N]; `inputs`
    is what entered the first block that learns, [B, T, width]; `hidden` what left the last block;
    `remembered` what each of the memory blocks holds after the tokens, [B, ...]; `tapped` what
    the blocks that a memory layer sees made of the tokens, [B, T, 2 width], None without one.
    """

    hidden: Tensor
    keys: Tensor
    rotated: Tensor
    values: Tensor
    inputs: Tensor
    remembered: tuple[Memories, ...]
    tapped: Tensor | None = None

    @property
    def memories(self) -> Memories | None:
        """What the memory blocks hold, [L, B, ...]: a copy; None where there are none."""
        parts = zip(*self.remembered, strict=True)
        return Memories(*map(torch.stack, parts)) if self.remembered else None


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Weights of an attention mixer; query, key and value as one matrix."""

    norm: Tensor
    query_key_value: Tensor
    query_key_value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor


class Mlp(NamedTuple):
    """Weights of one MLP of a block; gate and up as one matrix. `name` is that of its deltas."""

    name: str
    norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of one block."""

    mixer: AttentionLayer | MemoryLayer
    mlps: tuple[Mlp, ...]
    shares: Tensor | None  # of each MLP in the sum, where they lie beside each other


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, computed in float32."""
    wide = widened(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * gain


class Hope:
    """A model on a device. Holds base weights only, which never change."""

    def __init__(
        self,
        config: HopeConfig,
        weights: Mapping[str, Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        unroll: bool = True,
    ) -> None:
        self.config = config
        self._unroll = unroll  # of gradients only: see `collapsed.scan`
        self.device = torch.device(device)
        self.dtype = dtype
        self._weights = weights
        self._bytes = 0
        self.embedding = self._take("embedding")
        self.norm = self._take("norm")
        self.head = self.embedding if config.tied_head else self._take("head")
        self.blocks = tuple(self._block(i) for i in range(config.blocks))
        self.frequency = attention.frequencies(config, self.device)
        self.recall = self._recall() if recall.NAME + "gain" in weights else None
        self.codes = self._codes()  # what each token is written as, [V, R]
        self._weights = {}

    @property
    def bytes(self) -> int:
        """The size of the weights."""
        return self._bytes

    def _take(self, name: str) -> Tensor:
        return self._put(name, self.dtype)

    def _take_exact(self, name: str) -> Tensor:
        """Take what a memory computes with: never in less than float32."""
        return self._put(name, torch.promote_types(self.dtype, torch.float32))

    def _put(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._weights:
            raise ConfigError(f"the checkpoint has no tensor {name!r}")
        tensor = self._weights[name].to(self.device, dtype)
        self._bytes += int(tensor.nbytes)
        return tensor

    def _block(self, i: int) -> Block:
        config = self.config
        name = f"blocks.{i}."
        mixer: AttentionLayer | MemoryLayer
        if i in config.memory_blocks:
            mixer = memory.layer(
                config.memory.form if config.memory else Form.HOPE,
                lambda part: self._take(name + part),
                lambda part: self._take_exact(name + part),
            )
        else:
            mixer = self._attention(name)
        return Block(
            mixer=mixer,
            mlps=tuple(self._mlp(cms.mlp_name(i, place)) for place in range(config.chain)),
            shares=(
                self._take(name + "mlp_shares") if config.variant is Variant.INDEPENDENT else None
            ),
        )

    def _attention(self, name: str) -> AttentionLayer:
        config = self.config

        def take(part: str) -> Tensor:
            return self._take(name + part)

        def join(*parts: str) -> Tensor:
            return torch.cat([take(part) for part in parts])

        return AttentionLayer(
            norm=take("attention_norm"),
            query_key_value=join("query", "key", "value"),
            query_key_value_bias=(
                join("query_bias", "key_bias", "value_bias") if config.attention_bias else None
            ),
            query_norm=take("query_norm") if config.query_key_norm else None,
            key_norm=take("key_norm") if config.query_key_norm else None,
            output=take("output"),
        )

    def _mlp(self, name: str) -> Mlp:
        return Mlp(
            name=name,
            norm=self._take(f"{name}.mlp_norm"),
            gate_up=torch.cat([self._take(f"{name}.gate"), self._take(f"{name}.up")]),
            down=self._take(f"{name}.down"),
        )

    def _recall(self) -> recall.Weights:
        tables = {"spaced": torch.int32, "opens": torch.bool}
        return recall.Weights(
            *(
                self._put(recall.NAME + name, tables.get(name, torch.float32))
                for name in recall.Weights._fields
            )
        )

    def _codes(self) -> Tensor | None:
        if self.recall is None:
            return None
        codes = recall.values(self.recall, self.embedding).to(self.dtype)
        self._bytes += int(codes.nbytes)
        return codes

    def no_facts(self, sessions: int) -> recall.Facts | None:
        """Return what the memory layer of sessions holds that have read nothing; None: no layer."""
        if self.recall is None or self.config.recall is None:
            return None
        return recall.empty(sessions, self.config.recall, self.embedding)

    def laid_out(self, facts: recall.Facts | None) -> recall.Facts:
        """Return what one session holds, at rest or nothing, as the layer works with it."""
        assert self.recall is not None
        assert self.config.recall is not None
        if facts is None:
            return recall.empty(1, self.config.recall, self.embedding)
        held = recall.Facts(*(t.to(self.device) for t in facts))
        around = F.linear(held.recent, self.recall.context)
        there = (held.tokens != recall.NOTHING)[..., None]
        return held._replace(around=torch.where(there, around, 0.0))

    def likeness(self, read: Tensor) -> Tensor:
        """Return how like every token's value what was read is, [..., V] (`layers.recall`)."""
        assert self.codes is not None
        return recall.likeness(read, self.codes)

    def state_facts(
        self, held: recall.Facts, read: Read, tokens: Tensor, stated: Tensor, lengths: Tensor | None
    ) -> recall.Facts:
        """Return what sessions hold of the memory layer after a pass."""
        assert self.recall is not None
        assert self.config.recall is not None
        assert read.tapped is not None
        return recall.advance(
            self.recall, self.config.recall, held, read.tapped, tokens, stated, self.embed, lengths
        )

    def frozen(self) -> Hope:
        """Return the same model with memories that are never written; it shares the weights."""
        config = self.config
        assert config.memory is not None
        rule = replace(config.memory.rule, rate_max=0.0)
        twin = copy(self)
        twin.config = replace(config, memory=replace(config.memory, rule=rule))
        return twin

    def embed(self, tokens: Tensor) -> Tensor:
        """Return [B, T, width] for token ids [B, T]."""
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits over the vocabulary, in float32 or more, for hidden states [..., width]."""
        return widened(F.linear(norm(hidden, self.norm, self.config.norm_eps), self.head))

    def familiar(self, likeness: Tensor, matrix: Tensor) -> Tensor:
        """Return how likely it is that something was told for what was read (`layers.recall`)."""
        assert self.codes is not None
        return recall.familiar(likeness, matrix, self.codes)

    def recalled(self, logits: Tensor, likeness: Tensor, loud: float = 1.0) -> Tensor:
        """Return logits [..., V] with what was read from memory, by its `likeness` to tokens."""
        assert self.recall is not None
        return recall.recalled(self.recall, logits, likeness, loud)

    def run(
        self,
        x: Tensor,
        start: Tensor,
        past: Past,
        deltas: Sequence[Deltas],
        *,
        first: int = 0,
        lengths: Tensor | None = None,
    ) -> Read:
        """Pass `x` [B, T, width] through the blocks from `first` on.

        Args:
            x: what enters block `first` (the embedding, for block 0).
            start: position of each session's first new token, [B], int64.
            past: what the sessions have read, for blocks `first` and up.
            deltas: each session's own weights by name, empty where it never consolidated.
            first: the first block to run.
            lengths: how many of the T tokens are each session's own, [B]; all where None.
                What follows them is filler that nothing sees and no memory is written by.
        """
        config = self.config
        place = self._geometry(start, x.shape[1], past)
        phase = start % config.memory.rule.chunk if config.memory else start
        inputs = x
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        kept: list[Memories] = []
        taps = config.recall.taps if config.recall else ()
        tapped: list[Tensor] = []
        attended = iter(zip(past.rotated, past.values, strict=True))
        remembered = iter(zip(*past.memories, strict=True)) if past.memories else iter(())
        for i in range(first, config.blocks):
            if i == config.first_level_block:
                inputs = x
            block = self.blocks[i]
            h = norm(x, block.mixer.norm, config.norm_eps)
            if isinstance(block.mixer, MemoryLayer):
                mixed, after = self._remember(h, block.mixer, next(remembered), phase, lengths)
                kept.append(after)
            else:
                assert place is not None
                mixed, new = self._attend(h, block.mixer, next(attended), place)
                found.append(new)
            x = self._think(x + mixed, block, deltas)
            if i in taps:
                tapped.append(x)
        if found:
            keys, rotated, values = (torch.stack(parts) for parts in zip(*found, strict=True))
        else:
            shape = (0, len(x), config.key_heads, x.shape[1], config.head_width)
            keys = rotated = values = x.new_zeros(shape)
        seen = torch.cat(tapped, -1) if tapped and len(tapped) == len(taps) else None
        return Read(x, keys, rotated, values, inputs, tuple(kept), seen)

    def _geometry(self, start: Tensor, tokens: int, past: Past) -> attention.Geometry | None:
        config = self.config
        if not config.attention_blocks:
            return None
        return attention.geometry(
            start,
            tokens,
            past.positions,
            self.frequency,
            window=config.window,
            sinks=config.sinks,
            dtype=self.dtype,
        )

    def _remember(
        self,
        h: Tensor,
        layer: MemoryLayer,
        before: tuple[Tensor, ...],
        phase: Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Memories]:
        assert self.config.memory is not None
        rule, held = self.config.memory.rule, Memories(*before)
        return memory.mix(h, layer, held, phase, lengths, rule, unroll=self._unroll)

    def _think(self, x: Tensor, block: Block, deltas: Sequence[Deltas]) -> Tensor:
        """Pass tokens through the block's MLPs: a chain (eq. 70, 72, 73), or a sum (eq. 74)."""
        total = x
        for place, mlp in enumerate(block.mlps):
            h = norm(x, mlp.norm, self.config.norm_eps)
            y = cms.gated_mlp(h, mlp.gate_up, mlp.down, mlp.name, deltas)
            if block.shares is None:
                x = total = x + y
            else:
                total = total + block.shares[place] * y
        return total

    def _attend(
        self,
        h: Tensor,
        layer: AttentionLayer,
        past: tuple[Tensor, Tensor],
        place: attention.Geometry,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        config = self.config
        joint = F.linear(h, layer.query_key_value, layer.query_key_value_bias)
        heads = joint.unflatten(-1, (-1, config.head_width))  # [B, T, H + 2 K, N]
        query, key, value = heads.split([config.heads, config.key_heads, config.key_heads], 2)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = norm(query, layer.query_norm, config.norm_eps)
            key = norm(key, layer.key_norm, config.norm_eps)
        value = value.transpose(1, 2)
        out, rotated = attention.attend(query, key, value, past, place, sinks=config.sinks)
        return F.linear(out, layer.output), (key.transpose(1, 2), rotated, value)

    def nothing(self, sessions: int, first: int = 0) -> Past:
        """Return the past of `sessions` that have read nothing, for blocks `first` and up."""
        config = self.config
        blocks = sum(i >= first for i in config.attention_blocks)
        shape = (blocks, sessions, config.key_heads, 0, config.head_width)
        none = torch.zeros(shape, device=self.device, dtype=self.dtype)
        positions = torch.zeros((sessions, 0), device=self.device, dtype=torch.int64)
        remembering = sum(i >= first for i in config.memory_blocks)
        if config.memory is None or not remembering:
            return Past(none, none, positions)
        start = memory.empty(config.memory, remembering, self.embedding)
        return Past(none, none, positions, start.expand(sessions))
