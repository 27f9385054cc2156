"""A small model of random numbers that reads and writes bytes, for tests and for trying things."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import tokenizers
import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from hope_runtime.config import HopeConfig, LevelConfig, MemoryConfig, Mixer, Rule
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.weights.checkpoint import Checkpoint
from hope_runtime.weights.fingerprint import fingerprint
from hope_runtime.weights.shapes import Shape, shapes

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose first 256 ids are the bytes, with ChatML."""
    backend = tokenizers.Tokenizer(BPE(_symbols(), []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, template=CHATML, eos="<|im_end|>")


def tiny_config(**changes: Any) -> HopeConfig:
    """Return the shape of a model that runs in a moment, with `changes` to any of its fields."""
    tiny = HopeConfig(
        vocabulary=256 + len(SPECIAL),
        width=32,
        blocks=4,
        heads=4,
        key_heads=2,
        head_width=8,
        hidden=64,
        norm_eps=1e-5,
        rotary_base=10000.0,
        window=32,
        sinks=2,
        levels=(
            LevelConfig(name="fast", chunk=8, blocks=(3,), rate=0.005, retain=0.99),
            LevelConfig(name="slow", chunk=16, blocks=(2,), rate=0.005, retain=0.999),
        ),
    )
    return replace(tiny, **changes)


def tiny_native(**changes: Any) -> HopeConfig:
    """Return the shape of a tiny native HOPE: memories for mixers, and two MLPs a block."""
    every = (0, 1)
    tiny = HopeConfig(
        vocabulary=256 + len(SPECIAL),
        width=32,
        blocks=2,
        heads=0,
        key_heads=0,
        head_width=0,
        hidden=48,
        norm_eps=1e-5,
        rotary_base=10000.0,
        window=32,
        sinks=0,
        levels=(
            LevelConfig(name="fast", chunk=8, blocks=every, rate=0.005, retain=0.99),
            LevelConfig(name="slow", chunk=16, blocks=every, rate=0.005, retain=0.999, mlp=1),
        ),
        mixers=(Mixer.MEMORY,) * 2,
        memory=MemoryConfig(heads=2, head_width=16, rule=Rule(chunk=4)),
        chain=2,
    )
    return replace(tiny, **changes)


def tiny_mixed(**changes: Any) -> HopeConfig:
    """Return the shape of a tiny model whose blocks attend and remember in turn."""
    memory = MemoryConfig(heads=2, head_width=16, rule=Rule(chunk=4))
    mixers = (Mixer.ATTENTION, Mixer.MEMORY) * 2
    return tiny_config(**{"mixers": mixers, "memory": memory, **changes})


def random_checkpoint(config: HopeConfig, seed: int = 0, name: str = "random") -> Checkpoint:
    """Draw a model of this shape; equal seeds give equal models. The config is kept as it is."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _draw(name, shape, generator) for name, shape in shapes(config)}
    tokenizer = byte_tokenizer()
    return Checkpoint(
        name=name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        fingerprint=fingerprint(name, _parts(config, tokenizer, weights)),
        context=2048,
    )


def _draw(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw one tensor, scaled so that activations stay near one and the blocks outweigh the input.

    With a tied head a model whose embedding dominates would only repeat its last token.
    """
    noise = torch.randn(shape, generator=generator)
    part = name.rpartition(".")[2]
    if part.endswith("norm"):
        return 1.0 + 0.1 * noise
    if part == "memory_start":
        return noise * math.sqrt(1.0 / shape[-1])
    if part in {"memory_modification", "memory_passage"}:
        return 0.5 + 0.1 * noise
    if part == "memory_retain_bias":
        return noise - 4.0
    if part.endswith("bias"):
        return 0.1 * noise
    if part == "mlp_shares":
        return 0.5 + 0.1 * noise
    if part in {"embedding", "head"}:
        return 0.3 * noise
    return noise * math.sqrt(2.0 / shape[1])


def _parts(
    config: HopeConfig, tokenizer: Tokenizer, weights: Mapping[str, Tensor]
) -> Iterator[bytes]:
    yield json.dumps(config.to_json(), sort_keys=True).encode()
    yield tokenizer.to_json().encode()
    for tensor in weights.values():
        yield tensor.numpy().tobytes()


def _symbols() -> dict[str, int]:
    """Name every byte by its byte-level symbol: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256))
    return {chr(b if b in printable else 256 + next(hidden)): b for b in range(256)}
