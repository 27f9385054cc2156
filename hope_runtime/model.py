"""Hope: blocks of a mixer and a CMS, over frozen base weights; a function of explicit state.

The same `run` serves prefill, decoding and the gradient of a chunk: it reads a past, returns
what the new tokens add to it, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig
from hope_runtime.layers import attention, cms
from hope_runtime.layers.attention import Past
from hope_runtime.layers.cms import Deltas


class Read(NamedTuple):
    """What a pass over T new tokens of B sessions found.

    `keys` (before rotation), `rotated` and `values` are [blocks, B, K, T, N]; `inputs` is what
    entered the first block that learns, [B, T, width]; `hidden` what left the last block.
    """

    hidden: Tensor
    keys: Tensor
    rotated: Tensor
    values: Tensor
    inputs: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of one block; query, key and value as one matrix, gate and up as one."""

    attention_norm: Tensor
    query_key_value: Tensor
    query_key_value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, computed in float32."""
    wide = x.float()
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
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._weights = weights
        self.embedding = self._take("embedding")
        self.norm = self._take("norm")
        self.head = self.embedding if config.tied_head else self._take("head")
        self.blocks = tuple(self._block(i) for i in range(config.blocks))
        self.frequency = attention.frequencies(config, self.device)
        self._weights = {}

    @property
    def bytes(self) -> int:
        """The size of the weights."""
        own = {id(t): t for t in (self.embedding, self.norm, self.head)}
        held = [*own.values()]
        for block in self.blocks:
            parts = (getattr(block, name) for name in Block.__slots__)
            held += [part for part in parts if part is not None]
        return sum(int(tensor.nbytes) for tensor in held)

    def _take(self, name: str) -> Tensor:
        if name not in self._weights:
            raise ConfigError(f"the checkpoint has no tensor {name!r}")
        return self._weights[name].to(self.device, self.dtype)

    def _block(self, i: int) -> Block:
        config = self.config

        def take(name: str) -> Tensor:
            return self._take(f"blocks.{i}.{name}")

        def join(*names: str) -> Tensor:
            return torch.cat([take(name) for name in names])

        return Block(
            attention_norm=take("attention_norm"),
            query_key_value=join("query", "key", "value"),
            query_key_value_bias=(
                join("query_bias", "key_bias", "value_bias") if config.attention_bias else None
            ),
            query_norm=take("query_norm") if config.query_key_norm else None,
            key_norm=take("key_norm") if config.query_key_norm else None,
            output=take("output"),
            mlp_norm=take("mlp_norm"),
            gate_up=join("gate", "up"),
            down=take("down"),
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return [B, T, width] for token ids [B, T]."""
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits over the vocabulary for hidden states [..., width]."""
        return F.linear(norm(hidden, self.norm, self.config.norm_eps), self.head).float()

    def run(
        self,
        x: Tensor,
        start: Tensor,
        past: Past,
        deltas: Sequence[Deltas],
        *,
        first: int = 0,
    ) -> Read:
        """Pass `x` [B, T, width] through the blocks from `first` on.

        Args:
            x: what enters block `first` (the embedding, for block 0).
            start: position of each session's first new token, [B], int64.
            past: what the sessions have read, for blocks `first` and up.
            deltas: each session's own weights by name, empty where it never consolidated.
            first: the first block to run.
        """
        config = self.config
        place = attention.geometry(
            start,
            x.shape[1],
            past.positions,
            self.frequency,
            window=config.window,
            sinks=config.sinks,
        )
        inputs = x
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(first, config.blocks):
            if i == config.first_level_block:
                inputs = x
            before = past.rotated[i - first], past.values[i - first]
            mixed, new = self._mix(self.blocks[i], x, before, place)
            x = x + mixed
            found.append(new)
            h = norm(x, self.blocks[i].mlp_norm, config.norm_eps)
            block = self.blocks[i]
            x = x + cms.gated_mlp(h, block.gate_up, block.down, f"blocks.{i}", deltas)
        keys, rotated, values = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Read(x, keys, rotated, values, inputs)

    def _mix(
        self, block: Block, x: Tensor, past: tuple[Tensor, Tensor], place: attention.Geometry
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        config = self.config
        h = norm(x, block.attention_norm, config.norm_eps)
        joint = F.linear(h, block.query_key_value, block.query_key_value_bias)
        heads = joint.unflatten(-1, (-1, config.head_width))  # [B, T, H + 2 K, N]
        query, key, value = heads.split([config.heads, config.key_heads, config.key_heads], 2)
        if block.query_norm is not None and block.key_norm is not None:
            query = norm(query, block.query_norm, config.norm_eps)
            key = norm(key, block.key_norm, config.norm_eps)
        value = value.transpose(1, 2)
        out, rotated = attention.attend(query, key, value, past, place, sinks=config.sinks)
        return F.linear(out, block.output), (key.transpose(1, 2), rotated, value)
