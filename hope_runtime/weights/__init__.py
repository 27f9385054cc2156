"""Readers of model files: GGUF, Hugging Face directories without transformers, native models.

Every reader returns a `Checkpoint`: the model's shape, its tensors under our names
(in torch's `[out, in]` layout, rotary weights in rotate-half order), and its tokenizer.

Names: `embedding`, `norm`, `head` (absent when tied), and for every block i
`blocks.{i}.` + `attention_norm, query, key, value, output, mlp_norm, gate, up, down`,
with `query_bias, key_bias, value_bias` and `query_norm, key_norm` where the family has them.
A block whose mixer is a memory has the names of `layers.memory.shapes` instead of attention's,
and the MLPs of a chain after the first begin with `mlps.{place}.`.
"""

from __future__ import annotations

from pathlib import Path

from hope_runtime.weights.checkpoint import Checkpoint, CheckpointError
from hope_runtime.weights.gguf import read_gguf
from hope_runtime.weights.huggingface import read_directory
from hope_runtime.weights.native import is_native, read_native

__all__ = ["Checkpoint", "CheckpointError", "read"]


def read(path: Path) -> Checkpoint:
    """Read a model from a GGUF file, or a directory of a native or a Hugging Face model."""
    if path.is_dir():
        return read_native(path) if is_native(path) else read_directory(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return read_gguf(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; name a .gguf file or a model's directory")
    raise CheckpointError(
        f"{path}: is neither a .gguf file nor a model's directory; name one of these"
    )
