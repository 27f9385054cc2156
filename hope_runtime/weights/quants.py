"""The number formats of GGUF tensors, each turned into float32 exactly as their authors do.

N blocks are read at once; a block holds 32 numbers (256 in the K formats), their scale, and
sometimes their minimum. Nibbles lie low halves first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Format:
    """How `values` numbers are stored in `size` bytes."""

    name: str
    values: int
    size: int
    decode: Callable[[Bytes], Floats]  # [N, size] -> [N, values]


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    return _scaled(blocks[:, 2:].view(np.int8).astype(np.float32), blocks)


def _q4_0(blocks: Bytes) -> Floats:
    return _scaled(_nibbles(blocks[:, 2:], 16) - np.float32(8), blocks)


def _q4_1(blocks: Bytes) -> Floats:
    return _raised(_scaled(_nibbles(blocks[:, 4:], 16), blocks), blocks)


def _q5_0(blocks: Bytes) -> Floats:
    numbers = _nibbles(blocks[:, 6:], 16) + 16 * _fifth_bits(blocks[:, 2:6])
    return _scaled(numbers - np.float32(16), blocks)


def _q5_1(blocks: Bytes) -> Floats:
    numbers = _nibbles(blocks[:, 8:], 16) + 16 * _fifth_bits(blocks[:, 4:8])
    return _raised(_scaled(numbers, blocks), blocks)


def _q4_k(blocks: Bytes) -> Floats:
    scale, least = _k_scales(blocks)
    numbers = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32)
    return (scale * numbers - least).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Floats:
    scale, least = _k_scales(blocks)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [N, 8, 32]
    numbers = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) + 16 * high.astype(np.float32)
    return (scale * numbers - least).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3  # [N, 2, 4, 32]
    numbers = _nibbles(blocks[:, :128], 64) + 16 * high.reshape(-1, 256).astype(np.float32)
    scales = _f16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return np.repeat(scales, 16, axis=1) * (numbers - np.float32(32))


def _scaled(numbers: Floats, blocks: Bytes) -> Floats:
    numbers *= _f16(blocks[:, :2])
    return numbers


def _raised(numbers: Floats, blocks: Bytes) -> Floats:
    numbers += _f16(blocks[:, 2:4])
    return numbers


def _nibbles(blocks: Bytes, run: int) -> Floats:
    """Unpack the low halves of each `run` bytes, then their high halves."""
    shifts = np.array([0, 4], np.uint8)[:, None]
    halves = blocks.reshape(len(blocks), -1, 1, run) >> shifts & 15  # [N, runs, 2, run]
    return halves.reshape(len(blocks), -1).astype(np.float32)


def _fifth_bits(blocks: Bytes) -> Floats:
    return np.unpackbits(blocks, axis=1, bitorder="little").astype(np.float32)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Unpack eight scales and eight minima of six bits each, as [N, 8, 1]."""
    low, least, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    minima = np.concatenate([least & 63, high >> 4 | least >> 2 & 48], axis=1)
    return (
        (_f16(blocks[:, :2]) * scales.astype(np.float32))[..., None],
        (_f16(blocks[:, 2:4]) * minima.astype(np.float32))[..., None],
    )


FORMATS = {
    0: Format("F32", 1, 4, _f32),
    1: Format("F16", 1, 2, _f16),
    2: Format("Q4_0", 32, 18, _q4_0),
    3: Format("Q4_1", 32, 20, _q4_1),
    6: Format("Q5_0", 32, 22, _q5_0),
    7: Format("Q5_1", 32, 24, _q5_1),
    8: Format("Q8_0", 32, 34, _q8_0),
    12: Format("Q4_K", 256, 144, _q4_k),
    13: Format("Q5_K", 256, 176, _q5_k),
    14: Format("Q6_K", 256, 210, _q6_k),
    30: Format("BF16", 1, 2, _bf16),
}
