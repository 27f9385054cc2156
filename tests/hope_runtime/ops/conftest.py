"""The memories under test, each with the same five functions, and ways to feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hope_runtime.config import Rule
from hope_runtime.ops import collapsed, mlp, titans

HEADS, WIDTH, HIDDEN = 2, 4, 5


@dataclass(frozen=True)
class Form:
    """One memory: its module, a rule, and how to draw weights for it."""

    name: str
    module: Any
    rule: Any
    draw: Callable[[torch.Generator], Any]

    def weights(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        drawn = self.draw(torch.Generator().manual_seed(seed))
        return to(drawn, dtype)

    def empty(self, sessions: int, weights: Any) -> Any:
        return self.module.empty(sessions, weights)

    def naive(self, state: Any, weights: Any, x: Tensor, q: Tensor, phase: Any, **changes: Any):
        rule = replace(self.rule, **changes)
        return self.module.naive(state, weights, x, q, torch.as_tensor(phase), rule)

    def scan(
        self,
        state: Any,
        weights: Any,
        x: Tensor,
        q: Tensor,
        phase: Any,
        lengths: Any = None,
        **changes: Any,
    ):
        rule = replace(self.rule, **changes)
        own = None if lengths is None else torch.as_tensor(lengths)
        return self.module.scan(state, weights, x, q, torch.as_tensor(phase), rule, own)


def to(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype)
    return type(tree)(*(to(part, dtype) for part in tree))


def leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in tree:
            yield from leaves(part)


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def collapsed_weights(
    draw: torch.Generator, heads: int = HEADS, width: int = WIDTH, extra: int = 0
) -> collapsed.Weights:
    return collapsed.Weights(
        start=normal(draw, heads, 3 * width + 2 + extra, width) / width**0.5,
        rate_bias=normal(draw, heads),
        retain_bias=normal(draw, heads) - 2.0,
        modification=normal(draw, heads).exp() / 2,
        passage=normal(draw, heads).exp() / 2,
    )


def paper_weights(draw: torch.Generator, extra: int = 0) -> collapsed.Weights:
    weights = collapsed_weights(draw, extra=extra)
    one = torch.ones_like(weights.passage)
    return weights._replace(modification=one, passage=one)


def mlp_weights(draw: torch.Generator) -> mlp.Weights:
    start = mlp.Layers(
        inner=normal(draw, HEADS, 5, HIDDEN, WIDTH) / WIDTH**0.5,
        outer=normal(draw, HEADS, 3, WIDTH, HIDDEN) / HIDDEN**0.5,
        gates=normal(draw, HEADS, 2, 1, HIDDEN) / HIDDEN**0.5,
    )
    return mlp.Weights(start, normal(draw, HEADS), normal(draw, HEADS))


def titans_weights(draw: torch.Generator) -> titans.Weights:
    return titans.Weights(
        start=normal(draw, HEADS, WIDTH, WIDTH) / WIDTH,
        projection=normal(draw, HEADS, 2 * WIDTH + 3, WIDTH) / WIDTH**0.5,
        rate_bias=normal(draw, HEADS),
        retain_bias=normal(draw, HEADS),
        momentum_bias=normal(draw, HEADS),
    )


FREE = {"target_norm": None, "memory_norm": None}
COLLAPSED = {
    "served": Rule(),
    "without bounds": Rule(**FREE, reference=True),
    "anchored": Rule(anchored=True, reference=True),
    "anchored, erased once": Rule(anchored=True, erases=1.0, reference=True),
    "decaying to zero": Rule(decay_to_zero=True, reference=True),
    "raw values": Rule(normalise_value=False, reference=True),
    "erased once": Rule(erases=1.0),
    "delta rule": Rule(modifies=False, erases=1.0),
}
MLP = {
    "served": mlp.Rule(),
    "without bounds": mlp.Rule(error_norm=None, memory_norm=None),
    "decaying to zero": mlp.Rule(decay_to_zero=True),
    "proximal": mlp.Rule(proximal=True),
    "the port's": replace(mlp.NESTED_LEARNING, rate_max=0.01),
}
TITANS = {
    "served": titans.Rule(),
    "without bounds": titans.Rule(error_norm=None, memory_norm=None),
    "raw values": titans.Rule(normalise_value=False),
}
FORMS = [
    *(Form(f"collapsed, {k}", collapsed, rule, collapsed_weights) for k, rule in COLLAPSED.items()),
    Form(
        "collapsed, adaptive query", collapsed, Rule(), lambda d: collapsed_weights(d, extra=WIDTH)
    ),
    *(Form(f"mlp, {k}", mlp, rule, mlp_weights) for k, rule in MLP.items()),
    *(Form(f"titans, {k}", titans, rule, titans_weights) for k, rule in TITANS.items()),
]
SERVED = [form for form in FORMS if form.name.endswith("served")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", FORMS, ids=lambda form: form.name)
    if "served" in metafunc.fixturenames:
        metafunc.parametrize("served", SERVED, ids=lambda form: form.name)


@pytest.fixture(scope="session")
def stream() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function that draws x and q, [sessions, heads, tokens, width]."""

    def draw(
        sessions: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        x, q = normal(source, 2, sessions, HEADS, tokens, WIDTH).to(dtype)
        return x, collapsed.unit(q)

    return draw


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """Return a comparison of trees of tensors; `within` zero means bit for bit."""

    def compare(found: Any, expected: Any, within: float = 1e-10) -> None:
        for left, right in zip(leaves(found), leaves(expected), strict=True):
            torch.testing.assert_close(left, right, atol=within, rtol=within)

    return compare


@pytest.fixture(scope="session")
def session() -> Callable[[Any, int], Any]:
    """Return a function that takes one session, as a batch of one, out of a tree."""

    def pick(tree: Any, index: int) -> Any:
        if isinstance(tree, Tensor):
            return tree[index : index + 1]
        return type(tree)(*(pick(part, index) for part in tree))

    return pick


@pytest.fixture(scope="session")
def paper() -> Callable[..., collapsed.Weights]:
    """Return a function that draws weights with the paper's gains; `extra` rows for queries."""
    return lambda seed=0, extra=0: paper_weights(torch.Generator().manual_seed(seed), extra)
