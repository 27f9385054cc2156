"""Directories of native HOPE models: config.json, model.safetensors and a tokenizer.

`config.json` holds `"model_type": "hope"`, and our configuration under `hope`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.weights.checkpoint import Checkpoint, CheckpointError
from hope_runtime.weights.fingerprint import file_parts, fingerprint
from hope_runtime.weights.huggingface_tokenizer import directory_tokenizer
from hope_runtime.weights.json_file import Fields
from hope_runtime.weights.shapes import require

FAMILY = "hope"
# what a memory computes with stays in float32
_EXACT = frozenset(
    f"memory_{part}" for part in ("start", "rate_bias", "retain_bias", "modification", "passage")
)


def is_native(path: Path) -> bool:
    """Tell whether a directory holds a native model."""
    return Fields.read_if_there(path / "config.json").text("model_type", "") == FAMILY


def read_native(path: Path) -> Checkpoint:
    """Read a model that `write_native` wrote.

    Raises:
        CheckpointError: with what is wrong and the remedy.
    """
    fields = Fields.read(path / "config.json")
    try:
        config = HopeConfig.from_json(fields.inner("hope").values)
    except ConfigError as error:
        raise CheckpointError(f"{fields.path}: {error}; train or download it again") from error
    file = path / "model.safetensors"
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file: {error}; train or download it again"
        ) from error
    require(path, config, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    for key, tensor in weights.items():  # the memory's bound holds for gains that are numbers
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {key!r} is not finite; train or download it again")
    tokenizer = directory_tokenizer(path, fields, config.vocabulary)
    name = path.absolute().name
    parts = _parts(config, tokenizer, file)
    context = fields.integer("context", config.window)
    return Checkpoint(name, config, weights, tokenizer, fingerprint(name, parts), context)


def write_native(
    path: Path, config: HopeConfig, weights: Mapping[str, Tensor], *, context: int
) -> None:
    """Write a model into a directory that already holds its tokenizer; matrices in bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    about = {"model_type": FAMILY, "context": context, "hope": config.to_json()}
    (path / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    rounded = {
        name: tensor.contiguous()
        if name.rpartition(".")[2] in _EXACT
        else tensor.to(torch.bfloat16).contiguous()
        for name, tensor in weights.items()
    }
    draft = path / "model.draft"
    save_file(rounded, draft, {"format": "pt"})
    os.replace(draft, path / "model.safetensors")


def _parts(config: HopeConfig, tokenizer: Tokenizer, file: Path) -> Iterator[bytes]:
    yield json.dumps(config.to_json(), sort_keys=True).encode()
    yield tokenizer.to_json().encode()
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    yield from file_parts(file, header=header)
