"""Hugging Face directories of llama, mistral, qwen2 and qwen3 models, as transformers saves them.

Weights keep the dtype of their file. Other arithmetic under the same names is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig, RotaryScaling
from hope_runtime.weights.checkpoint import Checkpoint, CheckpointError
from hope_runtime.weights.fingerprint import file_parts, fingerprint
from hope_runtime.weights.huggingface_tokenizer import directory_tokenizer
from hope_runtime.weights.json_file import Fields
from hope_runtime.weights.shapes import Shape, fitted, require

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_TOP = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
_BLOCK = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "query",
    "self_attn.k_proj.weight": "key",
    "self_attn.v_proj.weight": "value",
    "self_attn.o_proj.weight": "output",
    "self_attn.q_proj.bias": "query_bias",
    "self_attn.k_proj.bias": "key_bias",
    "self_attn.v_proj.bias": "value_bias",
    "self_attn.q_norm.weight": "query_norm",
    "self_attn.k_norm.weight": "key_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
_COMPUTED = "rotary_emb.inv_freq"  # some old files hold what follows from the configuration
_DTYPES = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file, not yet read."""

    file: Path
    name: str
    shape: Shape


def read_directory(path: Path) -> Checkpoint:
    """Read a model that was saved by transformers, without transformers."""
    fields = Fields.read(path / "config.json")
    family = _family(fields)
    files = _files(path)
    found = {ours: tensor for file in files for ours, tensor in _tensors(file)}
    context = fields.integer("max_position_embeddings", 2048)
    try:
        config = fitted(_config(fields, family, found), context, _sliding(fields))
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {error}; choose another model") from error
    names = require(path, config, {ours: tensor.shape for ours, tensor in found.items()})
    tokenizer = directory_tokenizer(path, fields, config.vocabulary)
    weights = dict(_read({name: found[name] for name in names}))
    name = _name(path)
    parts = _parts(config, tokenizer.to_json(), files)
    return Checkpoint(name, config, weights, tokenizer, fingerprint(name, parts), context)


def _family(fields: Fields) -> str:
    family = fields.text("model_type", "")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{fields.path}: the model_type {family!r} is not supported; choose a model of "
            f"{', '.join(FAMILIES)}"
        )
    if "quantization_config" in fields.values:
        raise CheckpointError(
            f"{fields.path}: the model is quantised, which is read from GGUF files only; choose "
            "the original model or its GGUF file"
        )
    if (activation := fields.text("hidden_act", "silu")) != "silu":
        raise CheckpointError(
            f"{fields.path}: hidden_act {activation!r} is not supported; choose a model with 'silu'"
        )
    return family


def _config(fields: Fields, family: str, found: Mapping[str, StoredTensor]) -> HopeConfig:
    width = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    rotary = _rotary(fields)
    return HopeConfig(
        vocabulary=fields.integer("vocab_size"),
        width=width,
        blocks=fields.integer("num_hidden_layers"),
        heads=heads,
        key_heads=fields.integer("num_key_value_heads", heads),
        head_width=fields.integer("head_dim", 128 if family == "qwen3" else width // max(heads, 1)),
        hidden=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rotary_base=rotary.number("rope_theta", fields.number("rope_theta", 10000.0)),
        rotary_scaling=_scaling(rotary),
        tied_head=fields.flag("tie_word_embeddings", "head" not in found),
        attention_bias="blocks.0.query_bias" in found,
        query_key_norm="blocks.0.query_norm" in found,
    )


def _rotary(fields: Fields) -> Fields:
    """Return what is said of rotation: `rope_parameters` since transformers 5, before in parts."""
    return fields.inner("rope_parameters" if "rope_parameters" in fields.values else "rope_scaling")


def _scaling(rotary: Fields) -> RotaryScaling | None:
    kind = rotary.text("rope_type", rotary.text("type", "default"))
    if rotary.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("heads that are rotated in part are not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(kind, rotary.number("factor"))
    scaling = RotaryScaling(kind, rotary.number("factor", 1.0))  # refuses what it does not know
    return RotaryScaling(
        scaling.kind,
        scaling.factor,
        rotary.number("low_freq_factor"),
        rotary.number("high_freq_factor"),
        rotary.integer("original_max_position_embeddings"),
    )


def _sliding(fields: Fields) -> int:
    return fields.integer("sliding_window", 0) if fields.flag("use_sliding_window", True) else 0


def _files(path: Path) -> list[Path]:
    """Return the weight files of a directory, whole or in shards."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = {str(name) for name in Fields.read(index).inner("weight_map").values.values()}
        for shard in sorted(shards):
            if Path(shard).name != shard or not (path / shard).is_file():
                raise CheckpointError(
                    f"{path}: the file {shard!r}, which {index.name} names, is missing; "
                    "download it too"
                )
        return [path / shard for shard in sorted(shards)]
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path}: model.safetensors is missing; download it, or save the model again with "
            "transformers' save_pretrained"
        )
    return [path / "model.safetensors"]


def _tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    with _opened(file) as content:
        for name in content.keys():  # noqa: SIM118 - not a dict
            if name.endswith(_COMPUTED):
                continue
            part = content.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{file}: the tensor {name!r} is of type {part.get_dtype()}; choose a model "
                    f"of {', '.join(sorted(_DTYPES))}"
                )
            yield _ours(file, name), StoredTensor(file, name, tuple(part.get_shape()))


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file: {error}; download it again"
        ) from error


def _ours(file: Path, name: str) -> str:
    """Translate a tensor's name; every tensor must be known, else its arithmetic would be lost."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _BLOCK:
        raise CheckpointError(
            f"{file}: the tensor {name!r} belongs to no supported family; choose another model"
        )
    return f"blocks.{match[1]}.{_BLOCK[match[2]]}"


def _read(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Read tensor by tensor, each file opened once."""
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with _opened(file) as content:
            for ours, tensor in tensors.items():
                if tensor.file == file:
                    yield ours, content.get_tensor(tensor.name)


def _name(path: Path) -> str:
    """Name a model by its directory, also in a hub's cache.

    >>> _name(Path("/cache/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f"))
    'SmolLM2-135M'
    """
    path = path.absolute()
    cached = path.parent.name == "snapshots"
    return path.parent.parent.name.rpartition("--")[2] if cached else path.name


def _parts(config: HopeConfig, tokenizer: str, files: list[Path]) -> Iterator[bytes]:
    yield json.dumps(config.to_json(), sort_keys=True).encode()
    yield tokenizer.encode()
    for file in files:
        yield file.name.encode()
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        yield from file_parts(file, header=header)
