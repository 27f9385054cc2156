"""Optimisers by the names that a configuration gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from hope_runtime.ops.optimisers.adam import Adam
from hope_runtime.ops.optimisers.descent import (
    DeltaGradientDescent,
    FactoredDescent,
    GradientDescent,
)
from hope_runtime.ops.optimisers.interface import Decayed, Optimiser
from hope_runtime.ops.optimisers.momentum import (
    DeepMomentum,
    DeltaMomentum,
    Momentum,
    PreconditionedMomentum,
)
from hope_runtime.ops.optimisers.orthogonal import M3, Muon, PrintedM3

RULES: Mapping[str, Callable[..., Optimiser]] = {
    "gradient_descent": GradientDescent,
    "factored_descent": FactoredDescent,
    "delta_gradient_descent": DeltaGradientDescent,
    "momentum": Momentum,
    "preconditioned_momentum": PreconditionedMomentum,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "muon": Muon,
    "m3": M3,
    "m3_printed": PrintedM3,
    "adam": Adam,
    "adamw": Adam,
}
STATELESS = ("gradient_descent", "factored_descent")  # what they did before makes no difference
_DECAY = {"adamw": 0.01}  # as torch.optim.AdamW; all others decay only when told to


def named(name: str, *, decay: float | None = None, **hyper: object) -> Optimiser:
    """Return the rule of that name, with decoupled weight decay around it if it is not zero.

    >>> named("momentum", retain=0.5)
    Momentum(retain=0.5)
    >>> named("m3", chunk=10, decay=0.1).decay
    0.1
    """
    if name not in RULES:
        raise ValueError(f"no optimiser {name!r}; known are {', '.join(RULES)}")
    known = [*inspect.signature(RULES[name]).parameters]
    if strange := sorted(hyper.keys() - set(known)):
        raise ValueError(f"{name} has no {strange[0]!r}; it has {', '.join(['decay', *known])}")
    rule = RULES[name](**hyper)
    share = _DECAY.get(name, 0.0) if decay is None else decay
    return Decayed(rule, share) if share else rule
