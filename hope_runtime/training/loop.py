"""The outer loop: what all sessions share is learned through what each session learns.

One step reads a batch of sessions from their first token on, each with an empty memory, and
follows the gradient of the loss through the memory's own updates. Everything that a later step
depends on is in `Progress`: a run that is stopped and restored goes on exactly as if it had not
been.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hope_runtime.config import HopeConfig
from hope_runtime.model import Hope
from hope_runtime.ops import optimisers
from hope_runtime.ops.optimisers import Gradient, Optimiser, OptimiserState
from hope_runtime.training import cms
from hope_runtime.training.initial import initial
from hope_runtime.weights.shapes import shapes


class TrainingError(ValueError):
    """A run that cannot go on; the message names the value and the remedy."""


class Batch(NamedTuple):
    """Rows of training: each a session from its first token on."""

    tokens: Tensor  # [B, T + 1] int64
    weights: Tensor  # [B, T + 1] float32, how much each token counts as a target


Source = Callable[[np.random.Generator, float], Batch]  # (chance, share of the run that is done)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; with the data and the seed it determines the result."""

    steps: int
    optimiser: str = "muon"  # of matrices; what is no matrix, and the embedding, take AdamW
    rate: float = 0.02  # of matrices
    vector_rate: float = 3e-3  # of the rest
    decay: float = 0.01
    warmup: int = 50  # steps
    cooldown: float = 0.4  # the last share of the run, in which the rate falls to a twentieth
    clip: float = 1.0
    unroll: bool = False  # gradients to second order, through what memory did to its projections
    seed: int = 0
    levels: bool = False  # learn while rows are read; off: rows are read under the base

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TrainingError(f"steps {self.steps} must be at least 1")
        if not 0.0 <= self.cooldown <= 1.0:
            raise TrainingError(f"cooldown {self.cooldown} is a share, between 0 and 1")

    def at(self, step: int) -> float:
        """Return the share of the rate at a step: it rises, stays, and falls.

        >>> recipe = Recipe(steps=100, warmup=10, cooldown=0.5)
        >>> [round(recipe.at(step), 3) for step in (0, 9, 50, 99)]
        [0.1, 1.0, 1.0, 0.069]
        """
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.cooldown * self.steps, 1.0)
        return rising * min(1.0, 0.05 + 0.95 * left)


class Progress(NamedTuple):
    """A run between two steps."""

    step: int
    params: Mapping[str, Tensor]  # float32
    matrices: OptimiserState
    vectors: OptimiserState
    chance: np.random.Generator


class Stepped(NamedTuple):
    """What one step did."""

    step: int
    loss: float  # nats per weighted target
    norm: float  # of the gradient, before it was clipped
    tokens: int


def begin(config: HopeConfig, recipe: Recipe) -> Progress:
    """Return a run before its first step."""
    params = initial(config, recipe.seed)
    ours, theirs = _rules(recipe)
    matrices, vectors = _apart(params)
    return Progress(
        0, params, ours.init(matrices), theirs.init(vectors), np.random.default_rng(recipe.seed)
    )


def advance(
    config: HopeConfig,
    recipe: Recipe,
    progress: Progress,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Progress, Stepped]:
    """Take one step.

    Raises:
        TrainingError: the loss or its gradient is not finite; `progress` is whole.
    """
    chance = deepcopy(progress.chance)  # a step that is broken off has drawn nothing
    batch = source(chance, progress.step / recipe.steps)
    loss, gradients = gradient(config, progress.params, batch, recipe, device=device, dtype=dtype)
    clipped, norm = optimisers.clip_by_norm(gradients, recipe.clip)
    if not (math.isfinite(loss) and math.isfinite(float(norm))):
        raise TrainingError(
            f"the loss at step {progress.step} is {loss}, the gradient's norm {float(norm)}; go "
            "back to a checkpoint with a lower --rate"
        )
    share = recipe.at(progress.step)
    ours, theirs = _rules(recipe)
    matrices, vectors = _apart(progress.params)
    with torch.no_grad():
        moved, first = ours.update(
            {n: clipped[n] for n in matrices}, progress.matrices, matrices, rate=share * recipe.rate
        )
        others, second = theirs.update(
            {n: clipped[n] for n in vectors},
            progress.vectors,
            vectors,
            rate=share * recipe.vector_rate,
        )
        params = optimisers.apply(progress.params, {**moved, **others})
    done = Progress(progress.step + 1, params, first, second, chance)
    return done, Stepped(progress.step, loss, float(norm), batch.tokens[:, 1:].numel())


def gradient(
    config: HopeConfig,
    params: Mapping[str, Tensor],
    batch: Batch,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, dict[str, Gradient]]:
    """Return the loss of a batch and its gradient by name."""
    own = {name: p.detach().to(device).requires_grad_() for name, p in params.items()}
    model = Hope(config, own, device=device, dtype=dtype, unroll=recipe.unroll)
    loss = (cms.losses if recipe.levels else losses)(model, batch.tokens)
    weights = batch.weights[:, 1:].to(device)
    mean = (loss * weights).sum() / weights.sum().clamp(min=1e-6)
    found = torch.autograd.grad(mean, list(own.values()), allow_unused=True, materialize_grads=True)
    return float(mean.detach()), dict(zip(own, (g.cpu() for g in found), strict=True))


@torch.no_grad()
def judged(
    config: HopeConfig,
    params: Mapping[str, Tensor],
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Return the mean loss in nats of a batch's targets that count."""
    model = Hope(config, params, device=device, dtype=dtype)
    weights = batch.weights[:, 1:].to(device)
    return float((losses(model, batch.tokens) * weights).sum() / weights.sum())


def losses(model: Hope, tokens: Tensor) -> Tensor:
    """Return the loss in nats of each token but the first, [B, T], read from empty memories."""
    tokens = tokens.to(model.device)
    sessions = len(tokens)
    start = torch.zeros(sessions, dtype=torch.int64, device=model.device)
    past, none = model.nothing(sessions), [dict[str, Tensor]()] * sessions
    read = model.run(model.embed(tokens[:, :-1]), start, past, none)
    logits = model.logits(read.hidden)
    return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def _rules(recipe: Recipe) -> tuple[Optimiser, Optimiser]:
    # orthogonalising in bfloat16 will do, and takes a tenth of the time
    orthogonal = {"precision": torch.bfloat16} if recipe.optimiser in {"muon", "m3"} else {}
    ours = optimisers.named(recipe.optimiser, decay=recipe.decay, **orthogonal)
    return ours, optimisers.named("adamw", decay=0.0, square_retain=0.95)


def _apart(params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the matrices that map activations to activations from everything else."""
    apart = ("embedding", "head", "memory_convolution", "memory_head_norm", "memory_start")

    def is_matrix(name: str) -> bool:
        return params[name].dim() == 2 and name.rpartition(".")[2] not in apart

    ours = {name: p for name, p in params.items() if is_matrix(name)}
    return ours, {name: p for name, p in params.items() if name not in ours}


# --- at rest ----------------------------------------------------------------------------------


def save(path: Path, config: HopeConfig, recipe: Recipe, progress: Progress) -> None:
    """Write a run to one file, at once: a crash leaves the file as it was, or as it is to be."""
    tensors = {f"params/{name}": p for name, p in progress.params.items()}
    for kind, state in (("matrices", progress.matrices), ("vectors", progress.vectors)):
        tensors |= {f"{kind}/{name}": t for name, t in optimisers.flatten(state).items()}
    about = {
        "config": json.dumps(config.to_json()),
        "recipe": json.dumps(asdict(recipe)),
        "step": str(progress.step),
        "chance": json.dumps(progress.chance.bit_generator.state),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    save_file({name: t.contiguous() for name, t in tensors.items()}, draft, about)
    os.replace(draft, path)


def load(path: Path) -> tuple[HopeConfig, Recipe, Progress]:
    """Read what `save` wrote.

    Raises:
        TrainingError: the file is no run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = HopeConfig.from_json(json.loads(about["config"]))
        recipe = Recipe(**json.loads(about["recipe"]))
        chance: dict[str, Any] = json.loads(about["chance"])
        step = int(about["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: not a training run's file: {error}") from error

    def part(kind: str) -> dict[str, Tensor]:
        names = (name for name in tensors if name.startswith(kind + "/"))
        return {name.removeprefix(kind + "/"): tensors[name] for name in names}

    generator = np.random.default_rng()
    generator.bit_generator.state = chance
    params = part("params")
    try:  # in the order that they were made in: sums over them are then the same to the last bit
        params = {name: params[name] for name, _ in shapes(config)}
    except KeyError as error:
        raise TrainingError(f"{path}: the run has no tensor {error}") from error
    progress = Progress(
        step,
        params,
        optimisers.restore(part("matrices")),
        optimisers.restore(part("vectors")),
        generator,
    )
    return config, recipe, progress
