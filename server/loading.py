"""From settings to a model on its device, ready to serve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import hope_runtime
from hope_runtime import weights
from hope_runtime.config import WINDOW, ConfigError, HopeConfig, LevelConfig
from hope_runtime.engine import Engine
from hope_runtime.model import Hope
from hope_runtime.tokenizer import Tokenizer
from hope_runtime.weights.checkpoint import Checkpoint
from hope_runtime.weights.default import default_cache, fetch_default
from hope_runtime.weights.memory_layer import FILE, MemoryLayer, read_layer, require_fit
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native
from server.service import Card
from server.settings import Settings

Report = Callable[[str], None]


def load(settings: Settings, report: Report) -> tuple[Card, Hope, Tokenizer, Engine]:
    """Read the model that the settings name (fetching the default one at first use).

    Raises:
        CheckpointError, ConfigError: with the value and the remedy.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    checkpoint = _read(settings, report)
    config = _shape(checkpoint, settings)
    layer = _memory_layer(checkpoint, config, settings, report)
    weights_of = checkpoint.weights
    if layer is not None:
        config = replace(config, recall=layer.config)
        weights_of = {**weights_of, **layer.tensors}
    if why := config.unserved:
        raise ConfigError(f"{checkpoint.name} cannot be served: {why}; train it with another rule")
    report(f"putting {checkpoint.name} on the {device.type}")
    model = Hope(config, weights_of, device=device, dtype=dtype)
    card = Card(
        name=checkpoint.name,
        fingerprint=f"{checkpoint.fingerprint}/{config.learning_digest}",
        config=config,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        loaded=int(time.time()),
    )
    engine = Engine(model, checkpoint.tokenizer, lanes=settings.lanes, clock=time.perf_counter)
    return card, model, checkpoint.tokenizer, engine


def shipped(name: str) -> Path:
    """Return the directory of a model that comes with the package."""
    return Path(hope_runtime.__file__).parent / "models" / name


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision; `auto` takes bfloat16 where the hardware multiplies it natively."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
        name = "bfloat16" if fast else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _read(settings: Settings, report: Report) -> Checkpoint:
    match settings.model:
        case "smollm2":
            path = fetch_default(default_cache(), report)
        case "random":
            return random_checkpoint(tiny_config(window=settings.window, sinks=settings.sinks))
        case "random-native":
            return random_checkpoint(tiny_native(), name=settings.model)
        case "hope-nano":
            path = shipped(settings.model)
        case name:
            path = Path(name)
    report(f"reading {path.name}")
    return weights.read(path)


def _memory_layer(
    checkpoint: Checkpoint, config: HopeConfig, settings: Settings, report: Report
) -> MemoryLayer | None:
    """Read the memory layer that the settings name; one that comes with the package by itself."""
    if settings.memory_layer == "none":
        return None
    if settings.memory_layer != "auto":
        path = Path(settings.memory_layer)
        layer = read_layer(path)
        require_fit(layer, config, checkpoint.fingerprint, where=path)
        report(f"reading the memory layer of {path.name}")
        return layer
    for path in sorted(shipped("memory-layers").glob(f"*/{FILE}")):
        layer = read_layer(path)
        if layer.base == checkpoint.fingerprint:
            require_fit(layer, config, checkpoint.fingerprint, where=path)
            return layer
    return None


def _with_levels(config: HopeConfig, file: Path) -> HopeConfig:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        levels = tuple(LevelConfig.from_json(level) for level in found)
        if not levels:
            raise ValueError("it is empty; --no-learning serves without")
        return replace(config, levels=levels)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--levels {file}: not a list of levels for this model: {error}; "
            "docs/learning.md shows one"
        ) from error


def _shape(checkpoint: Checkpoint, settings: Settings) -> HopeConfig:
    config = checkpoint.config
    if settings.levels is not None:
        config = _with_levels(config, settings.levels)
    if not config.attention_blocks:
        return config
    # a reader narrows the window only where the model was trained for less than the default
    widest = config.window if config.window < WINDOW else checkpoint.context - settings.sinks
    window = min(settings.window, widest)
    config = replace(config, window=window, sinks=settings.sinks)
    return config if config.levels or config.memory_blocks else config.stacked()
