"""What a native model is before its first training step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hope_runtime.config import HopeConfig
from hope_runtime.weights.shapes import Shape, shapes


def initial(config: HopeConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return the weights of an untrained model by name, float32.

    Activations keep their size through the blocks, what is added to the residual stream starts
    small, and the memory's convolution starts random: near the identity nothing is learned for
    hundreds of steps. Retention is spread over the heads, from 1,500 tokens to 80,000.

    >>> from hope_runtime.weights.random import tiny_config
    >>> sorted(initial(tiny_config()))[:2]
    ['blocks.0.attention_norm', 'blocks.0.down']
    """
    generator = torch.Generator().manual_seed(seed)
    depth = config.blocks * (1 + config.chain)
    return {name: _draw(name, shape, generator, depth) for name, shape in shapes(config)}


def _draw(name: str, shape: Shape, generator: torch.Generator, depth: int) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    match name.rpartition(".")[2]:
        case "norm" | "attention_norm" | "mlp_norm" | "query_norm" | "key_norm":
            return torch.ones(shape)
        case "memory_norm" | "memory_head_norm":
            return torch.ones(shape)
        case "mlp_shares":
            return torch.full(shape, 1.0 / shape[0])
        case "embedding" | "head":
            return 0.02 * noise
        case "memory_start":
            return _start(noise)
        case "memory_projection":
            return _projection(noise)
        case "memory_matrix":
            return 0.1 * noise / math.sqrt(shape[-1])
        case "memory_convolution":
            return 0.5 * noise
        case "memory_retain_bias":
            return torch.linspace(-5.0, -9.0, shape[0])
        case "memory_modification":
            return torch.full(shape, 0.1)
        case "memory_rate_bias" | "memory_passage" | "memory_momentum_bias":
            return torch.zeros(shape)
        case "query_bias" | "key_bias" | "value_bias":
            return torch.zeros(shape)
        case "output" | "down" | "memory_output":
            return noise / math.sqrt(shape[1] * depth)
        case _:
            return noise / math.sqrt(shape[1])


def _start(noise: Tensor) -> Tensor:
    """Return the memories' learned starts: random keys and values, reading near the identity."""
    width = noise.shape[-1]
    start = noise / math.sqrt(width)
    reading = slice(2 * width, 3 * width)
    start[:, reading] = 0.1 * start[:, reading] + torch.eye(width)
    start[:, 3 * width : 3 * width + 2] *= 0.1  # gates: near their biases
    return start


def _projection(noise: Tensor) -> Tensor:
    """Return the static projections of Titans: random keys and values, gates near their biases."""
    projection = noise / math.sqrt(noise.shape[-1])
    projection[:, 2 * noise.shape[-1] :] *= 0.1
    return projection
