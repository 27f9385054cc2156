"""The mixer of a native HOPE block: self-modifying Titans (paper 8, Titans 4.4).

A short causal convolution, SiLU, the memory, a norm per head, and a gate. Its state has the same
size however long the session. In the form of plain Titans, for comparison, the memory is another
and everything around it the same.

Axes: B sessions, T tokens, H heads, N head width, K convolution taps, L memory blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_runtime.config import Form, MemoryConfig, Rule
from hope_runtime.ops import collapsed, titans
from hope_runtime.ops.collapsed import Memory, Weights, unit


class Memories(NamedTuple):
    """What sessions keep for some memory blocks; a single session's, at rest, has no B axis.

    G is how far a memory is from its learned start, so that zeros are a session's beginning.
    """

    live: Tensor  # [L, B, H, N, N]: G now; float32, or float64 where the model is
    anchor: Tensor  # [L, B, H, N, N]: G at the start of the chunk
    ring: Tensor  # [L, B, K - 1, 2HN], the last inputs of the convolution
    velocity: Tensor  # [L, B, H, N, N] of Titans; [L, B, 0, N, N] where nothing has momentum

    def expand(self, sessions: int) -> Memories:
        """Return one session's, [L, ...], as those of `sessions` that are equal, [L, B, ...]."""
        return Memories(*(t[:, None].expand(-1, sessions, *t.shape[1:]) for t in self))

    def session(self, row: int) -> Memories:
        """Return one session of a batch, without the B axis; a copy."""
        return Memories(*(t[:, row].clone() for t in self))

    def blocks(self, first: int) -> Memories:
        """Return what the blocks from the `first` of these on hold."""
        return Memories(*(t[first:] for t in self))


class MemoryLayer(NamedTuple):
    """Weights of one memory mixer."""

    norm: Tensor  # [width]
    input_query: Tensor  # [2HN, width]
    gate: Tensor  # [HN, width]
    output: Tensor  # [width, HN]
    convolution: Tensor  # [2HN, K]
    head_norm: Tensor  # [H, N]
    weights: Weights | titans.Weights  # in float32 (float64 where the model is)


def shapes(config: MemoryConfig, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of a block's tensors."""
    heads, each = config.heads, config.head_width
    inner = heads * each
    rows = (4 if config.adaptive_query else 3) * each + 2
    yield "memory_norm", (width,)
    yield "memory_input", (inner, width)
    yield "memory_query", (inner, width)
    yield "memory_gate", (inner, width)
    yield "memory_output", (width, inner)
    yield "memory_convolution", (2 * inner, config.taps)
    yield "memory_head_norm", (heads, each)
    yield "memory_rate_bias", (heads,)
    yield "memory_retain_bias", (heads,)
    match config.form:
        case Form.HOPE:
            yield "memory_start", (heads, rows, each)
            yield "memory_modification", (heads,)
            yield "memory_passage", (heads,)
        case Form.TITANS:
            yield "memory_matrix", (heads, each, each)
            yield "memory_projection", (heads, 2 * each + 3, each)
            yield "memory_momentum_bias", (heads,)
        case _:
            assert_never(config.form)


def layer(form: Form, take: Callable[[str], Tensor], exact: Callable[[str], Tensor]) -> MemoryLayer:
    """Put a block's weights together; `exact` takes those that are never rounded to bfloat16."""
    weights: Weights | titans.Weights
    if form is Form.TITANS:
        weights = titans.Weights(
            start=exact("memory_matrix"),
            projection=exact("memory_projection"),
            rate_bias=exact("memory_rate_bias"),
            retain_bias=exact("memory_retain_bias"),
            momentum_bias=exact("memory_momentum_bias"),
        )
    else:
        weights = Weights(
            start=exact("memory_start"),
            rate_bias=exact("memory_rate_bias"),
            retain_bias=exact("memory_retain_bias"),
            modification=exact("memory_modification"),
            passage=exact("memory_passage"),
        )
    return MemoryLayer(
        norm=take("memory_norm"),
        input_query=torch.cat([take("memory_input"), take("memory_query")]),
        gate=take("memory_gate"),
        output=take("memory_output"),
        convolution=take("memory_convolution"),
        head_norm=take("memory_head_norm"),
        weights=weights,
    )


def empty(config: MemoryConfig, blocks: int, like: Tensor) -> Memories:
    """Return one session's memory before its first token, on the device of `like`."""
    heads, each = config.heads, config.head_width
    exact = torch.float64 if like.dtype is torch.float64 else torch.float32
    nothing = torch.zeros(blocks, heads, each, each, dtype=exact, device=like.device)
    ring = torch.zeros(
        blocks, config.taps - 1, 2 * heads * each, dtype=like.dtype, device=like.device
    )
    momentum = nothing if config.form is Form.TITANS else nothing[:, :0]
    return Memories(nothing, nothing, ring, momentum)


def mix(
    h: Tensor,
    parts: MemoryLayer,
    before: Memories,
    phase: Tensor,
    lengths: Tensor | None,
    rule: Rule,
    *,
    unroll: bool = True,
) -> tuple[Tensor, Memories]:
    """Pass normed inputs through one memory.

    Args:
        h: [B, T, width].
        parts: the block's weights.
        before: what the sessions hold for this block, without the L axis.
        phase: tokens that each session is into its chunk, [B].
        lengths: how many of the T tokens are each session's own, [B]; all where None.
        rule: the update rule.
        unroll: see `collapsed.scan`.

    Returns:
        [B, T, width], and what they hold after the tokens.
    """
    sessions, tokens, _ = h.shape
    heads, each = parts.head_norm.shape
    taps = parts.convolution.shape[1]
    seen = torch.cat([before.ring, F.linear(h, parts.input_query)], 1)  # [B, K - 1 + T, 2HN]
    mixed = sum(
        (seen[:, i : i + tokens] * parts.convolution[:, i] for i in range(1, taps)),
        seen[:, :tokens] * parts.convolution[:, 0],
    )
    apart = F.silu(mixed).view(sessions, tokens, 2, heads, each).permute(2, 0, 3, 1, 4)
    x, q = apart.to(parts.weights.start.dtype)  # each [B, H, T, N]
    ring = _last(seen, taps - 1, lengths)
    if isinstance(parts.weights, titans.Weights):
        y, after = _titans(before, ring, parts.weights, x, unit(q), phase, lengths, rule)
    else:
        memory = Memory(before.live, before.anchor)
        if tokens == 1 and lengths is None:
            y, memory = collapsed.step(memory, parts.weights, x, unit(q), phase, rule)
        else:
            y, memory = collapsed.scan(
                memory, parts.weights, x, unit(q), phase, rule, lengths, unroll=unroll
            )
        after = Memories(memory.live, memory.anchor, ring, before.velocity)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * parts.head_norm[:, None]
    y = y.transpose(1, 2).flatten(2).to(h.dtype) * F.silu(F.linear(h, parts.gate))
    return F.linear(y, parts.output), after


def _titans(
    before: Memories,
    ring: Tensor,
    weights: titans.Weights,
    x: Tensor,
    q: Tensor,
    phase: Tensor,
    lengths: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Memories]:
    """Read and write a memory in the form of Titans; the norm of its errors is the targets'."""
    own = titans.Rule(
        chunk=rule.chunk,
        rate_max=rule.rate_max,
        retain_min=rule.retain_min,
        retain_max=rule.retain_max,
        error_norm=rule.target_norm,
        memory_norm=rule.memory_norm,
        normalise_value=rule.normalise_value,
    )
    live, anchor = weights.start + before.live, weights.start + before.anchor
    memory = titans.Memory(live, anchor, before.velocity)
    y, after = titans.scan(memory, weights, x, q, phase, own, lengths)
    live, anchor = after.live - weights.start, after.anchor - weights.start
    return y, Memories(live, anchor, ring, after.velocity)


def _last(seen: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """Return the last `count` inputs of each session's own, [B, count, 2HN]."""
    if lengths is None:
        return seen[:, seen.shape[1] - count :]
    places = lengths[:, None] + torch.arange(count, device=seen.device)
    return seen.gather(1, places[..., None].expand(-1, -1, seen.shape[-1]))
