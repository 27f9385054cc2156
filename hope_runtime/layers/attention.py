"""Windowed attention with sinks, over a past that is only read.

Axes: B sessions, T new tokens, H query heads, K key heads, G = H / K queries per key head,
N head width, P places of the past (the first S of them hold the sinks).

A token at position t attends to the `window` positions up to t and to the session's first S
tokens (sinks). Window keys stand at their true distance. Sinks are looked at as if from position
`window + S - 1`, once t is beyond it, so that no distance ever grows further: positions never
run out. Angles are computed in float64 from absolute positions; a session of
10^9 tokens loses nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hope_runtime.config import HopeConfig, RotaryScaling
from hope_runtime.layers.memory import Memories


class Past(NamedTuple):
    """What sessions have read, as the mixers of some consecutive blocks see it.

    `rotated` and `values` are [attention blocks, B, K, P, N]; `positions` is [B, P], -1 where
    empty; `memories` are those of the memory blocks, None where there are none.
    """

    rotated: Tensor
    values: Tensor
    positions: Tensor
    memories: Memories | None = None


class Rotation(NamedTuple):
    """Cosines and sines for T new tokens of B sessions, each [B, T, 1, N]; float32 or more."""

    cos: Tensor
    sin: Tensor


class Geometry(NamedTuple):
    """Where the new tokens stand: shared by all blocks of one pass."""

    window: Rotation  # for keys, and for queries that meet window keys
    sinks: Rotation | None  # for queries that meet sinks; None where both are the same
    bias: Tensor  # [B, 1, 1, T, P + T]: 0 where attention is allowed, -inf elsewhere


def frequencies(config: HopeConfig, device: torch.device) -> Tensor:
    """Return the rotary angle per position of each pair, [N / 2], float64."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=device)
    base = config.rotary_base ** -(exponents / config.head_width)
    return base if config.rotary_scaling is None else _scale(base, config.rotary_scaling)


def _scale(base: Tensor, scaling: RotaryScaling) -> Tensor:
    if scaling.kind == "linear":
        return base / scaling.factor
    # Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a ramp between
    wavelengths = 2 * math.pi / base
    ramp = (scaling.original / wavelengths - scaling.low) / (scaling.high - scaling.low)
    ramp = ramp.clamp(0.0, 1.0)
    return base * ramp + base / scaling.factor * (1.0 - ramp)


def widened(x: Tensor) -> Tensor:
    """Return numbers that may be rounded to bfloat16 as float32; float64 stays what it is."""
    return x if x.dtype is torch.float64 else x.float()


def rotation(positions: Tensor, frequency: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
    """Return cosines and sines for integer positions [B, T], to turn numbers of `dtype` by."""
    angles = positions.to(torch.float64)[..., None, None] * frequency  # [B, T, 1, N/2]
    angles = torch.cat([angles, angles], -1)
    exact = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(exact), angles.sin().to(exact))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate [B, T, heads, N] in the rotate-half layout of Llama checkpoints."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * by.cos + turned * by.sin).to(x.dtype)


def geometry(
    start: Tensor,
    tokens: int,
    past: Tensor,
    frequency: Tensor,
    *,
    window: int,
    sinks: int,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    """Place `tokens` new tokens per session, from position `start` [B], after `past` [B, P]."""
    if tokens > window:
        raise ValueError(f"one pass takes at most {window} tokens (the window), not {tokens}")
    steps = torch.arange(tokens, device=start.device)
    now = start[:, None] + steps  # [B, T]
    reach = (past[:, None] > now[..., None] - window) | (past[:, None] < sinks)
    seen = reach & (past[:, None] >= 0)  # [B, T, P]
    causal = (steps[:, None] >= steps).expand(start.shape[0], -1, -1)
    allowed = torch.cat([seen, causal], -1)[:, None, None]
    bias = torch.zeros(allowed.shape, device=start.device).masked_fill(~allowed, -math.inf)
    furthest = window + sinks - 1
    beyond = bool((now > furthest).any())
    return Geometry(
        rotation(now, frequency, dtype),
        rotation(now.clamp(max=furthest), frequency, dtype) if beyond else None,
        bias,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    place: Geometry,
    *,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Attend over the past and the new tokens; return the output and the new rotated keys.

    Args:
        query: [B, T, H, N], before rotation.
        key: [B, T, K, N], before rotation.
        value: [B, K, T, N].
        past: rotated keys and values of this block, each [B, K, P, N].
        place: from `geometry`.
        sinks: how many of the P places hold sinks.

    Returns:
        [B, T, H * N] and [B, K, T, N].
    """
    sessions, tokens, heads, width = query.shape
    shared = heads // key.shape[2]
    near = _by_key_head(rotate(query, place.window), shared)
    new = rotate(key, place.window).transpose(1, 2)  # [B, K, T, N]
    rotated, values = past
    before = near @ rotated.mT
    if place.sinks is not None:  # sinks are met under a rotation of their own
        far = _by_key_head(rotate(query, place.sinks), shared)
        before[..., :sinks] = far @ rotated[:, :, :sinks].mT
    scores = torch.cat([before, near @ new.mT], -1)
    scores = widened(scores.view(sessions, -1, shared, tokens, scores.shape[-1]))
    weights = torch.softmax(scores * width**-0.5 + place.bias, -1).to(value.dtype).flatten(2, 3)
    held = values.shape[2]
    out = weights[..., :held] @ values + weights[..., held:] @ value  # [B, K, G * T, N]
    out = out.view(sessions, -1, shared, tokens, width).permute(0, 3, 1, 2, 4)
    return out.reshape(sessions, tokens, heads * width), new


def _by_key_head(query: Tensor, shared: int) -> Tensor:
    """Return [B, T, H, N] as one matrix per key head, [B, K, G * T, N]."""
    sessions, tokens, _, width = query.shape
    grouped = query.view(sessions, tokens, -1, shared, width)
    return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)
