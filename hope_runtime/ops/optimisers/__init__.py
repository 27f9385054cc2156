"""Optimisers as memories (paper 4, appendix B): pure rules from gradients and a state to updates.

Each is a frozen dataclass of its hyper-parameters with `init(params) -> state` and
`update(gradients, state, params, rate=...) -> (updates, state)`; the updates are to be added.
`naive` has the equations as the paper prints or derives them.
"""

from hope_runtime.ops.optimisers.adam import Adam
from hope_runtime.ops.optimisers.descent import (
    DeltaGradientDescent,
    FactoredDescent,
    GradientDescent,
)
from hope_runtime.ops.optimisers.interface import (
    Decayed,
    Factors,
    Gradient,
    Gradients,
    Optimiser,
    OptimiserState,
    Params,
    apply,
    clip_by_norm,
    flatten,
    restore,
)
from hope_runtime.ops.optimisers.momentum import (
    DeepMomentum,
    DeltaMomentum,
    Momentum,
    PreconditionedMomentum,
)
from hope_runtime.ops.optimisers.orthogonal import M3, Muon, PrintedM3, newton_schulz
from hope_runtime.ops.optimisers.registry import RULES, STATELESS, named

__all__ = [
    "M3",
    "RULES",
    "STATELESS",
    "Adam",
    "Decayed",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "FactoredDescent",
    "Factors",
    "Gradient",
    "GradientDescent",
    "Gradients",
    "Momentum",
    "Muon",
    "Optimiser",
    "OptimiserState",
    "Params",
    "PreconditionedMomentum",
    "PrintedM3",
    "apply",
    "clip_by_norm",
    "flatten",
    "named",
    "newton_schulz",
    "restore",
]
