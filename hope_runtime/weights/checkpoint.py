"""What a reader of model files returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hope_runtime.config import HopeConfig

if TYPE_CHECKING:
    from hope_runtime.tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A model that cannot be read; the message names the path, what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as read from disk: shape, tensors by our names, tokenizer, identity."""

    name: str  # what the user calls it: "SmolLM2-135M-Instruct"
    config: HopeConfig  # without levels; window and sinks at their defaults
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    fingerprint: str  # changes whenever weights, shape or tokenizer change
    context: int  # the positions the model was trained for
