"""How large a memory gets under adversarial input: the rules that are served, and others.

`python -m benchmarks.stability --tokens 1000000 --served` is the long form.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.adversary import HEADS, STEADY, WIDTH, Subject, endure
from benchmarks.common import console, where
from hope_runtime.config import Rule
from hope_runtime.ops import collapsed, mlp, titans

SERVED = Rule()
FREE = Rule(target_norm=None, memory_norm=None, reference=True)


def main(tokens: int = 100_000, *, others: bool = True) -> None:
    """Print one row per memory: what may be served first."""
    table = Table(
        "memory",
        *STEADY,
        "greedy",
        "proven bound",
        "median, largest singular value",
        title=f"largest norm of a head's memory over {tokens:,} tokens of each kind of input",
        caption=f"{HEADS} heads of width {WIDTH}, float32, random starts; {where()}",
    )
    with torch.no_grad():
        for subject in (*served(), *(refused() if others else ())):
            found = endure(subject, tokens)
            end = ""
            if found.blown is not None:
                end = f"blown up by token {found.blown:,}"
            elif found.median is not None:
                end = f"{found.median:.1g}, {found.largest:.1g}"
            table.add_row(
                subject.name,
                *(_short(size) for size in found.peaks.values()),
                "" if subject.bound is None else _short(subject.bound),
                end,
            )
    console.print(table)


def served() -> Iterator[Subject]:
    """Yield what a server may run: any gains and gates that training may come to."""
    yield memory("paper's gains", SERVED)
    yield memory("paper's gains, gates at their limits", SERVED, limits=True)
    yield memory("small gains, gates at their limits", SERVED, limits=True, gains=(0.1, 0.0))
    yield memory("large gains, gates at their limits", SERVED, limits=True, gains=(4.0, 2.0))
    yield memory(
        "delta rule, gates at their limits",
        replace(SERVED, modifies=False, erases=1.0),
        limits=True,
    )
    turning = replace(SERVED, rate_max=0.99, retain_min=0.99)
    yield memory("rates to 0.99, gates at their limits", turning, limits=True)
    yield memory("paper's gains, kept in bfloat16", SERVED, dtype=torch.bfloat16)


def refused() -> Iterator[Subject]:
    """Yield the rule as printed, its variants, and the memories that are for comparison."""
    to_zero = replace(FREE, decay_to_zero=True)
    yield memory("printed: decay to zero, raw v", replace(to_zero, normalise_value=False))
    yield memory("decay to zero", to_zero)
    yield memory("raw v", replace(FREE, normalise_value=False))
    yield memory("raw v, clip and cap", replace(SERVED, normalise_value=False, reference=True))
    yield memory("anchored", replace(FREE, anchored=True))
    anchored = replace(SERVED, anchored=True, reference=True)
    yield memory("anchored, clip and cap", anchored)
    yield memory("anchored, clip and cap, gates at limits", anchored, limits=True)
    yield memory("no clip, no cap", FREE)
    yield memory("no clip, no cap, gates at limits", replace(FREE, retain_max=1.0), limits=True)
    yield memory(
        "rate 1.0, no clip, no cap, gates at limits",
        replace(FREE, rate_max=1.0, retain_max=1.0),
        limits=True,
    )
    yield memory(
        "rate 1.2, no clip, no cap, gates at limits",
        replace(FREE, rate_max=1.2, retain_max=1.0),
        limits=True,
    )
    yield layers("MLP", mlp.Rule())
    yield layers("MLP, no clip, no cap", mlp.Rule(error_norm=None, memory_norm=None))
    yield layers(
        "MLP, no clip, no cap, eq. 57 for W1",
        mlp.Rule(error_norm=None, memory_norm=None, proximal=True),
    )
    yield layers(
        "MLP, decay to zero, raw v, no clip, no cap",
        mlp.Rule(error_norm=None, memory_norm=None, decay_to_zero=True, normalise_value=False),
    )
    yield layers("MLP, the port's reading", mlp.NESTED_LEARNING)
    yield plain("Titans, linear", titans.Rule())
    yield plain("Titans, no clip, no cap", titans.Rule(error_norm=None, memory_norm=None))


def memory(
    name: str,
    rule: Rule,
    *,
    limits: bool = False,
    gains: tuple[float, float] = (1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Return a collapsed memory; with `limits`, its gates are as large as the rule allows."""
    source = torch.Generator().manual_seed(0)
    start = torch.randn(HEADS, 3 * WIDTH + 2, WIDTH, generator=source) / WIDTH**0.5
    if limits:
        start[:, 3 * WIDTH :] = 0.0
    weights = collapsed.Weights(
        start=start,
        rate_bias=torch.full((HEADS,), 50.0 if limits else 0.0),
        retain_bias=torch.full((HEADS,), -50.0 if limits else -5.0),
        modification=torch.full((HEADS,), gains[0]),
        passage=torch.full((HEADS,), gains[1]),
    )

    def scan(
        state: collapsed.Memory, x: Tensor, q: Tensor, phase: Tensor
    ) -> tuple[Tensor, collapsed.Memory]:
        y, after = collapsed.scan(state, weights, x, q, phase, rule)
        if dtype is not torch.float32:
            after = collapsed.Memory(*(part.to(dtype).float() for part in after))
        return y, after

    def spectrum(state: collapsed.Memory) -> Tensor:
        gain = gains[0] if rule.modifies else 0.0
        return torch.linalg.svdvals(torch.eye(WIDTH) + gain * state.live)

    return Subject(
        name=name,
        chunk=rule.chunk,
        empty=lambda sessions: collapsed.empty(sessions, weights),
        scan=scan,
        matrix=lambda state: state.live,
        spectrum=spectrum,
        bound=None if rule.unsafe else proven(rule, gains[1]),
    )


def proven(rule: Rule, passage: float) -> float:
    """Return what the norm of G never passes (docs/stability.md)."""
    assert rule.memory_norm is not None
    assert rule.target_norm is not None
    per_token = rule.rate_max * (rule.target_norm + rule.erases * abs(passage) * rule.modifies)
    within = rule.memory_norm + rule.chunk * per_token
    return min(within, per_token / (1.0 - rule.retain_max))


def layers(name: str, rule: mlp.Rule) -> Subject:
    """Return MLP memories with as many hidden units as the head is wide."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(HEADS, *shape, generator=source) / WIDTH**0.5

    start = mlp.Layers(normal(5, WIDTH, WIDTH), normal(3, WIDTH, WIDTH), normal(2, 1, WIDTH))
    weights = mlp.Weights(start, torch.zeros(HEADS), torch.full((HEADS,), -5.0))

    def matrix(state: mlp.Memory) -> Tensor:  # the largest way of any matrix, under W2's rows
        ways = [way.flatten(2, -2) for way in state.live]
        return torch.cat(ways, 2)

    return Subject(
        name=name,
        chunk=rule.chunk,
        empty=lambda sessions: mlp.empty(sessions, weights),
        scan=lambda state, x, q, phase: mlp.scan(state, weights, x, q, phase, rule),
        matrix=matrix,
        spectrum=lambda state: torch.linalg.svdvals(state.live.inner[:, :, 0] + start.inner[:, 0]),
    )


def plain(name: str, rule: titans.Rule) -> Subject:
    """Return a linear Titans memory."""
    source = torch.Generator().manual_seed(0)
    weights = titans.Weights(
        torch.zeros(HEADS, WIDTH, WIDTH),
        torch.randn(HEADS, 2 * WIDTH + 3, WIDTH, generator=source) / WIDTH**0.5,
        torch.zeros(HEADS),
        torch.full((HEADS,), -5.0),
        torch.zeros(HEADS),
    )
    return Subject(
        name=name,
        chunk=rule.chunk,
        empty=lambda sessions: titans.empty(sessions, weights),
        scan=lambda state, x, q, phase: titans.scan(state, weights, x, q, phase, rule),
        matrix=lambda state: state.live,
    )


def _short(size: float) -> str:
    return f"{size:.2f}" if size < 1e4 else f"{size:.0e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--served", action="store_true", help="only what may be served")
    options = parser.parse_args()
    main(options.tokens, others=not options.served)
