"""GGUF files of the Llama family: llama (and mistral), qwen2, qwen3.

Other arithmetic under the same names, such as experts or partial rotation, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig, RotaryScaling
from hope_runtime.weights.checkpoint import Checkpoint, CheckpointError
from hope_runtime.weights.fingerprint import file_parts, fingerprint
from hope_runtime.weights.gguf_format import GgufFile, Metadata, open_gguf
from hope_runtime.weights.gguf_tokenizer import gguf_tokenizer
from hope_runtime.weights.quants import Floats
from hope_runtime.weights.shapes import fitted, require

Progress = Callable[[int, int], None]  # tensors read, tensors in all

FAMILIES = ("llama", "qwen2", "qwen3")
_TOP = {
    "token_embd.weight": "embedding",
    "output_norm.weight": "norm",
    "output.weight": "head",
}
_BLOCK = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "query",
    "attn_k.weight": "key",
    "attn_v.weight": "value",
    "attn_output.weight": "output",
    "attn_q.bias": "query_bias",
    "attn_k.bias": "key_bias",
    "attn_v.bias": "value_bias",
    "attn_q_norm.weight": "query_norm",
    "attn_k_norm.weight": "key_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}
_FACTORS = "rope_freqs.weight"
_SLIDING = "attention.sliding_window"


def read_gguf(path: Path, progress: Progress | None = None) -> Checkpoint:
    """Read a model; its tensors come as float32, in torch's layout and rotate-half order."""
    file = open_gguf(path)
    family = _family(file.metadata)
    tokenizer = gguf_tokenizer(file.metadata)
    context = file.metadata.integer(f"{family}.context_length")
    try:
        config = _config(file, family, tokenizer.vocabulary)
        config = fitted(config, context, file.metadata.integer(f"{family}.{_SLIDING}", 0))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; choose another model") from error
    sources = {_ours(path, name): name for name in file.tensors if name != _FACTORS}
    found = {ours: file.tensors[theirs].shape for ours, theirs in sources.items()}
    weights: dict[str, Tensor] = {}
    names = require(path, config, found)
    if _FACTORS in file.tensors:
        config = _scaled_by(path, file.read(_FACTORS), config)
    for name in names:
        numbers = file.read(sources[name])
        if family == "llama":
            numbers = _unpermuted(name, numbers, config)
        weights[name] = torch.from_numpy(numbers)
        if progress:
            progress(len(weights), len(names))
    name = _name(path)
    parts = file_parts(path, header=file.header)
    return Checkpoint(name, config, weights, tokenizer, fingerprint(name, parts), context)


def _family(metadata: Metadata) -> str:
    family = metadata.text("general.architecture")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{metadata.path}: its architecture {family!r} is not supported; choose a model of "
            f"{', '.join(FAMILIES)}"
        )
    if metadata.integer("split.count", 1) > 1:
        raise CheckpointError(
            f"{metadata.path}: it is one part of several; join them with llama-gguf-split --merge"
        )
    if metadata.integer(f"{family}.expert_count", 0):
        raise CheckpointError(
            f"{metadata.path}: mixtures of experts are not supported; choose a dense model"
        )
    return family


def _config(file: GgufFile, family: str, vocabulary: int) -> HopeConfig:
    def integer(key: str, default: int | None = None) -> int:
        return file.metadata.integer(f"{family}.{key}", default)

    width, heads = integer("embedding_length"), integer("attention.head_count")
    head_width = integer("attention.key_length", width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_width) != head_width:
            raise ConfigError(
                f"{family}.{key} is {integer(key)}, but only that of the heads, {head_width}, is "
                "supported"
            )
    return HopeConfig(
        vocabulary=vocabulary,
        width=width,
        blocks=integer("block_count"),
        heads=heads,
        key_heads=integer("attention.head_count_kv", heads),
        head_width=head_width,
        hidden=integer("feed_forward_length"),
        norm_eps=file.metadata.number(f"{family}.attention.layer_norm_rms_epsilon"),
        rotary_base=file.metadata.number(f"{family}.rope.freq_base", 10000.0),
        rotary_scaling=_scaling(file.metadata, family),
        tied_head="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        query_key_norm="blk.0.attn_q_norm.weight" in file.tensors,
    )


def _scaling(metadata: Metadata, family: str) -> RotaryScaling | None:
    kind = metadata.text(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return RotaryScaling(kind, metadata.number(f"{family}.rope.scaling.factor"))


def _scaled_by(path: Path, factors: Floats, config: HopeConfig) -> HopeConfig:
    """Recognise the factors of Llama 3.1, which a file stores one by one, for what they are."""
    if bool((factors == 1.0).all()):
        return config
    scaling = RotaryScaling("llama3", round(float(factors.max()), 4))
    if factors.shape != (config.head_width // 2,) or not np.allclose(
        factors, llama3_factors(config, scaling), rtol=1e-4
    ):
        raise CheckpointError(
            f"{path}: the rotary factors of {_FACTORS!r} are not those of Llama 3.1; "
            "choose another model"
        )
    return replace(config, rotary_scaling=scaling)


def llama3_factors(config: HopeConfig, scaling: RotaryScaling) -> Floats:
    """Return by how much Llama 3.1 divides each rotary frequency: slow ones by the full factor."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float64) / config.head_width
    turns = scaling.original * config.rotary_base**-exponents / (2 * math.pi)
    smooth = ((turns - scaling.low) / (scaling.high - scaling.low)).clip(0.0, 1.0)
    factors: Floats = (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)
    return factors


def _ours(path: Path, name: str) -> str:
    """Translate a tensor's name; every tensor must be known, else its arithmetic would be lost."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _BLOCK:
        raise CheckpointError(
            f"{path}: the tensor {name!r} belongs to no supported family; choose another model"
        )
    return f"blocks.{match[1]}.{_BLOCK[match[2]]}"


def _unpermuted(name: str, numbers: Floats, config: HopeConfig) -> Floats:
    """Undo llama.cpp's interleaving of the rows of query and key, whose rotation pairs neighbours.

    >>> tiny = HopeConfig(1, 4, 1, 1, 1, 4, 1, 1e-5, 1e4)
    >>> _unpermuted("blocks.0.key_bias", np.array([0, 2, 1, 3], np.float32), tiny)
    array([0., 1., 2., 3.], dtype=float32)
    """
    part = name.rpartition(".")[2].removesuffix("_bias")
    if part not in {"query", "key"}:
        return numbers
    heads = config.heads if part == "query" else config.key_heads
    rows = numbers.reshape(heads, config.head_width // 2, 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(numbers.shape)


def _name(path: Path) -> str:
    """Name a model by its file, without the quantisation.

    >>> _name(Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    'SmolLM2-135M-Instruct'
    """
    return re.sub(r"[.-](I?Q\d\w*|B?F\d+)$", "", path.stem, flags=re.IGNORECASE)
