"""The tensors that a configuration asks for, by our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hope_runtime.config import HopeConfig, Variant
from hope_runtime.layers import memory
from hope_runtime.weights.checkpoint import CheckpointError

Shape = tuple[int, ...]


def shapes(config: HopeConfig) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor; lazily, as a crafted file may claim many blocks."""
    yield "embedding", (config.vocabulary, config.width)
    for block in range(config.blocks):
        for part, shape in _block(config, block):
            yield f"blocks.{block}.{part}", shape
    yield "norm", (config.width,)
    if not config.tied_head:
        yield "head", (config.vocabulary, config.width)


def _block(config: HopeConfig, block: int) -> Iterator[tuple[str, Shape]]:
    if config.memory is not None and block in config.memory_blocks:
        yield from memory.shapes(config.memory, config.width)
    else:
        yield from _attention(config)
    for place in range(config.chain):
        chained = f"mlps.{place}." if place else ""
        yield f"{chained}mlp_norm", (config.width,)
        yield f"{chained}gate", (config.hidden, config.width)
        yield f"{chained}up", (config.hidden, config.width)
        yield f"{chained}down", (config.width, config.hidden)
    if config.variant is Variant.INDEPENDENT:
        yield "mlp_shares", (config.chain,)


def _attention(config: HopeConfig) -> Iterator[tuple[str, Shape]]:
    width = config.width
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    yield "attention_norm", (width,)
    yield "query", (queries, width)
    yield "key", (keys, width)
    yield "value", (keys, width)
    yield "output", (width, queries)
    if config.attention_bias:
        yield "query_bias", (queries,)
        yield "key_bias", (keys,)
        yield "value_bias", (keys,)
    if config.query_key_norm:
        yield "query_norm", (config.head_width,)
        yield "key_norm", (config.head_width,)


def require(path: Path, config: HopeConfig, found: Mapping[str, Shape]) -> list[str]:
    """Return the names of all tensors of a model: those `found`, no fewer and no more.

    Only a head may be left over: some files store a tied one twice.
    """
    names = []
    for name, shape in shapes(config):
        if name not in found:
            raise CheckpointError(
                f"{path}: the tensor for {name!r} is missing; the file is incomplete or of "
                "another family: download it again or choose another"
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{path}: the tensor for {name!r} has shape {list(found[name])}, but the "
                f"configuration asks for {list(shape)}; download the model again"
            )
        names.append(name)
    if left := sorted(found.keys() - {*names, "head"}):
        raise CheckpointError(
            f"{path}: the configuration has no place for the tensor {left[0]!r}; the files belong "
            "to different models: download them again"
        )
    return names


def fitted(config: HopeConfig, *positions: int) -> HopeConfig:
    """Narrow the window to what the model was trained for; a limit of 0 is none.

    >>> fitted(HopeConfig(1, 1, 1, 1, 1, 2, 1, 1e-5, 1e4), 8192, 0, 512).window
    512
    """
    return replace(config, window=min(config.window, *(n for n in positions if n > 0)))
