"""A memory layer in a file of its own, beside the base that it was trained for.

One safetensors file holds its tensors; its header says which base it belongs to and how it is
configured. Its name is the hash of both, and sessions keep the name of the layer that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hope_runtime.config import ConfigError, HopeConfig, RecallConfig
from hope_runtime.layers import recall
from hope_runtime.weights.checkpoint import CheckpointError

FILE = "layer.safetensors"
# fields of its configuration that may be set anew: what sessions hold does not depend on them
ANSWERING = {
    "digest", "formerly", "asks", "knows", "ends", "digits", "maybe", "opening", "unknown"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryLayer:
    """A layer as read from disk."""

    base: str  # the fingerprint of the model it was trained for
    config: RecallConfig
    tensors: Mapping[str, Tensor]  # by names that begin with `recall.NAME`


def write_layer(file: Path, base: str, config: RecallConfig, weights: recall.Weights) -> None:
    """Write a layer to one file, at once."""
    about = {"base": base, "config": json.dumps(asdict(replace(config, digest="")))}
    draft = file.with_suffix(".draft")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights._asdict().items()}
    save_file(tensors, draft, about)
    os.replace(draft, file)


def read_layer(path: Path) -> MemoryLayer:
    """Read a layer's file, or the one in a directory.

    Raises:
        CheckpointError: with what is wrong and the remedy.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        base, fields = about["base"], json.loads(about["config"])
        config = RecallConfig.from_json(fields)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a memory layer: {error}; make one with hope train memory"
        ) from error
    writing = {name: value for name, value in fields.items() if name not in ANSWERING}
    digest = hashlib.sha256(json.dumps(writing).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return MemoryLayer(
        base,
        replace(config, digest=digest.hexdigest()[:16]),
        {recall.NAME + name: tensor for name, tensor in tensors.items()},
    )


def require_fit(layer: MemoryLayer, config: HopeConfig, base: str, *, where: Path) -> None:
    """Check that a layer suits a model.

    Raises:
        CheckpointError: it is another base's, or its tensors have other shapes.
    """
    if layer.base != base:
        raise CheckpointError(
            f"{where}: the memory layer was trained for {layer.base}, and the model is {base}; "
            "train one for it with hope train memory, or serve with --memory-layer none"
        )
    try:
        replace(config, recall=layer.config)
    except ConfigError as error:
        raise CheckpointError(
            f"{where}: {error}; serve with other levels, or with --memory-layer none"
        ) from error
    for name, shape in recall.shapes(layer.config, config.width, config.vocabulary):
        found = layer.tensors.get(recall.NAME + name)
        if found is None or tuple(found.shape) != shape:
            seen = None if found is None else tuple(found.shape)
            raise CheckpointError(f"{where}: tensor {name!r} is {seen}, and should be {shape}")
