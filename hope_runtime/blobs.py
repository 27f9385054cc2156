"""Blobs of named tensors, read with suspicion: what is missing or cannot be is named."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, int8

from hope_runtime.storage import scale_name, unpacked


class StateError(ValueError):
    """A stored state that does not fit the model; the message names the tensor."""


def read(name: str, blobs: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Return the tensors of a blob."""
    if name not in blobs:
        raise StateError(f"blob {name!r} is missing")
    try:
        return load_tensors(blobs[name])
    except SafetensorError as error:
        raise StateError(f"blob {name!r} is not safetensors: {error}") from error


def take(name: str, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a blob, once it is known to be there, of its shape, and finite."""
    tensor = tensors.get(key)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else tuple(tensor.shape)
        raise StateError(f"blob {name!r}: {key} should be {shape}, found {found}")
    if not bool(tensor.isfinite().all()):
        raise StateError(f"blob {name!r}: {key} is not finite")
    return tensor


def unpack(name: str, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a blob in float32 (or wider), in whichever form it was written."""
    tensor = take(name, tensors, key, shape)
    if tensor.dtype is int8:
        scale = take(name, tensors, scale_name(key), shape[:-1])
        if not scale.is_floating_point() or bool((scale < 0.0).any()):
            raise StateError(f"blob {name!r}: {scale_name(key)} is not a scale")
    whole = unpacked(key, tensors)
    if tensor.dtype is int8 and not bool(whole.isfinite().all()):
        raise StateError(f"blob {name!r}: {key} is not finite")
    return whole
