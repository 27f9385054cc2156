"""What every optimiser is: a rule that turns gradients into updates and carries its state along.

Nothing here is mutated and nothing is hidden: the same gradients, state and parameters give the
same updates and the same next state. Nothing stops gradients either: call under `torch.no_grad()`
unless you want to learn through the update.

Axes: n tokens, O outputs and I inputs of a linear layer; any axes before the last two are a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


class Factors(NamedTuple):
    """The gradient of a linear layer y = W x as what it is made of, one row a token.

    The gradient is the sum over tokens of output (dL/dy) times input (x). For a loss that is a
    mean over n tokens, divide both the tokens' own output gradients and the inputs by sqrt(n): the
    product is the mean gradient, and a rule that looks at the inputs sees their mean too.

    >>> Factors(torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0, 5.0]])).dense
    tensor([[ 2.,  0., 10.],
            [ 3.,  0., 15.]])
    """

    outputs: Tensor  # [..., n, O]
    inputs: Tensor  # [..., n, I]

    @property
    def dense(self) -> Tensor:
        return self.outputs.mT @ self.inputs  # [..., O, I]


Gradient = Tensor | Factors
Gradients = Mapping[str, Gradient]


class OptimiserState(NamedTuple):
    """What an optimiser remembers: how many updates it made, and its memories.

    A memory is named by what it holds, then by the parameter: `memories["momentum"]["down"]`.
    """

    step: Tensor  # [] int64, on the CPU
    memories: Mapping[str, Mapping[str, Tensor]]  # float32, or float64 for such parameters


class Optimiser(Protocol):
    """A rule of learning; a frozen dataclass of its hyper-parameters."""

    def init(self, params: Params) -> OptimiserState:
        """Return the state before the first update."""
        ...

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        """Return what is to be added to the parameters, and the next state."""
        ...


@dataclass(frozen=True, slots=True)
class Decayed:
    """Another rule with decoupled weight decay: `rate * decay` of a parameter is also forgotten.

    Around Adam this is AdamW. When the parameters are a session's deltas, it is the deltas that
    fade, and the base stays.
    """

    rule: Optimiser
    decay: float

    def init(self, params: Params) -> OptimiserState:
        return self.rule.init(params)

    def update(
        self,
        gradients: Gradients,
        state: OptimiserState,
        params: Params | None = None,
        *,
        rate: float,
    ) -> tuple[dict[str, Tensor], OptimiserState]:
        weights = needed(params, "weight decay")
        updates, state = self.rule.update(gradients, state, weights, rate=rate)
        faded = {name: u - rate * self.decay * weights[name] for name, u in updates.items()}
        return faded, state


def apply(params: Params, updates: Params) -> dict[str, Tensor]:
    """Return the parameters with the updates added, in the parameters' own precision.

    >>> apply({"w": torch.ones(2)}, {"w": torch.tensor([-1.0, 1.0])})
    {'w': tensor([0., 2.])}
    """
    return {name: (p + updates[name]).to(p.dtype) for name, p in params.items()}


def clip_by_norm(gradients: Gradients, limit: float) -> tuple[dict[str, Gradient], Tensor]:
    """Return the gradients scaled to a global norm of at most `limit`, and the norm they had.

    A norm that is not finite makes everything NaN: look at it before the update.

    >>> clip_by_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    ({'a': tensor([0.6000]), 'b': tensor([0.8000])}, tensor(5.))
    """
    squares = [_squared_norm(gradient) for gradient in gradients.values()]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    share = (limit / norm.clamp_min(1e-12)).clamp_max(1.0)
    return {name: _scaled(gradient, share) for name, gradient in gradients.items()}, norm


def flatten(state: OptimiserState) -> dict[str, Tensor]:
    """Return the state as named tensors, for safetensors or a session's memory.

    >>> sorted(flatten(fresh({"down": torch.ones(2)}, "momentum")))
    ['momentum/down', 'step']
    """
    flat = {
        f"{kind}/{name}": tensor.contiguous()
        for kind, memory in state.memories.items()
        for name, tensor in memory.items()
    }
    return {"step": state.step, **flat}


def restore(tensors: Mapping[str, Tensor]) -> OptimiserState:
    """Return the state that `flatten` gave as `tensors`."""
    if "step" not in tensors:
        raise ValueError(f"no optimiser's state: 'step' is not among {sorted(tensors)[:8]}")
    memories: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        kind, slash, name = path.partition("/")
        if slash:
            memories.setdefault(kind, {})[name] = tensor
        elif path != "step":
            raise ValueError(f"{path!r} is not 'step' and names no memory, as 'momentum/down' does")
    return OptimiserState(tensors["step"], memories)


def fresh(params: Params, *kinds: str) -> OptimiserState:
    """Return a state at step zero with empty memories of these kinds."""
    zeros = {
        kind: {name: torch.zeros_like(wide(p)) for name, p in params.items()} for kind in kinds
    }
    return OptimiserState(torch.zeros((), dtype=torch.int64), zeros)


def following(state: OptimiserState, **memories: Mapping[str, Tensor]) -> OptimiserState:
    """Return the state one update later."""
    return OptimiserState(state.step + 1, memories)


def dense(gradients: Gradients, state: OptimiserState) -> dict[str, Tensor]:
    """Return the gradients as plain tensors, after checking that the state knows their names."""
    for kind, memory in state.memories.items():
        if strange := sorted(memory.keys() ^ gradients.keys()):
            raise ValueError(f"gradients and {kind} do not have the same names: {strange[:8]}")
    return {
        name: wide(gradient.dense if isinstance(gradient, Factors) else gradient)
        for name, gradient in gradients.items()
    }


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is: half precision forgets small steps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rows(tensor: Tensor) -> Tensor:
    """Return a matrix as it is, and a vector as a matrix of one row."""
    return tensor if tensor.ndim > 1 else tensor.reshape(1, -1)


def matrices(gradients: Mapping[str, Tensor], rule: str) -> None:
    """Refuse what is not a matrix."""
    for name, gradient in gradients.items():
        if gradient.ndim < 2:
            shape = tuple(gradient.shape)
            raise ValueError(f"{rule} learns matrices; {name!r} is {shape}: give it to Adam")


def needed(params: Params | None, what: str) -> Params:
    """Return the parameters, which this rule cannot do without."""
    if params is None:
        raise ValueError(f"{what} looks at the parameters: pass params to update")
    return params


def check_shares(**shares: float) -> None:
    """Refuse what is not between 0 and 1."""
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is {share}, but must lie in [0, 1]")


def check_positive(**values: float) -> None:
    """Refuse what is not above zero."""
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{name} is {value}, but must be positive")


def _nothing(param: Tensor) -> Tensor:
    # contiguous whatever the parameter is, as it will be after a restart
    return torch.zeros_like(wide(param), memory_format=torch.contiguous_format)


def _squared_norm(gradient: Gradient) -> Tensor:
    if isinstance(gradient, Factors):
        outputs, inputs = wide(gradient.outputs), wide(gradient.inputs)
        if outputs.shape[-2] > outputs.shape[-1]:
            return (outputs.mT @ inputs).square().sum()
        # ||D^T X||^2 = <D D^T, X X^T>: with few tokens the matrix itself need not be made
        return ((outputs @ outputs.mT) * (inputs @ inputs.mT)).sum().clamp_min(0.0)
    return wide(gradient).square().sum()


def _scaled(gradient: Gradient, share: Tensor) -> Gradient:
    if isinstance(gradient, Factors):
        return gradient._replace(outputs=gradient.outputs * share.to(gradient.outputs))
    return gradient * share.to(gradient)
