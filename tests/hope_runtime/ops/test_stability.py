"""The bound of docs/stability.md holds under attack, and what is refused does blow up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.adversary import endure
from benchmarks.stability import SERVED, layers, memory, proven, refused, served
from hope_runtime.config import Rule
from hope_runtime.ops import collapsed, mlp

SUBJECTS = {subject.name: subject for subject in (*served(), *refused())}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("subject", [*served()], ids=lambda subject: subject.name)
def test_what_is_served_stays_within_the_proven_bound(subject):
    found = endure(subject, 3_200)  # of each of 22 inputs

    assert found.blown is None
    assert max(found.peaks.values()) <= subject.bound * (1 + 1e-5)


def test_the_bound_holds_for_longer():
    subject = SUBJECTS["paper's gains, gates at their limits"]

    assert max(endure(subject, 20_480).peaks.values()) <= subject.bound * (1 + 1e-5)


@pytest.mark.parametrize(("limit", "passage"), [(0.5, 1.0), (2.0, 4.0)])
def test_the_bound_holds_where_the_cap_bites_at_every_chunk(limit, passage):
    rule = replace(SERVED, memory_norm=limit, rate_max=0.5)
    subject = memory("capped", rule, limits=True, gains=(1.0, passage))

    found = endure(subject, 640)

    assert limit < max(found.peaks.values()) <= proven(rule, passage) * (1 + 1e-5)


@pytest.mark.parametrize(
    "rule",
    [SERVED, replace(SERVED, erases=1.0), replace(SERVED, rate_max=0.99, retain_min=0.99)],
    ids=["twice", "once", "turned around"],
)
def test_one_write_takes_and_adds_no_more_than_the_proof_says(rule):
    """|G'| <= retain |G| + rate (target_norm + erases |s|), token by token, from any G."""
    source = torch.Generator().manual_seed(0)
    weights = collapsed.Weights(
        torch.randn(2, 14, 4, generator=source), *torch.randn(4, 2, generator=source)
    )
    live = 10.0 * torch.randn(64, 2, 4, 4, generator=source)
    x, q = torch.randn(2, 64, 2, 1, 4, generator=source)
    phase = torch.zeros(64, dtype=torch.int64)
    made = collapsed.project(live, weights, x, q, rule)

    _, after = collapsed.step(collapsed.Memory(live, live), weights, x, q, phase, rule)

    before, size = (torch.linalg.vector_norm(g, dim=(-2, -1)) for g in (live, after.live))
    added = made.rate[..., 0] * (rule.target_norm + rule.erases * weights.passage.abs())
    assert (size <= (made.retain[..., 0] * before + added) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("printed: decay to zero, raw v", 1_000),
        ("raw v", 1_000),
        ("anchored", 10_000),
        ("rate 1.2, no clip, no cap, gates at limits", 1_000),
        ("MLP, decay to zero, raw v, no clip, no cap", 1_000),
        ("MLP, the port's reading", 100),
        ("Titans, no clip, no cap", 1_000),
    ],
)
def test_what_is_refused_blows_up(name, tokens):
    assert endure(SUBJECTS[name], tokens).blown is not None


def test_decay_to_zero_kills_the_projections():
    """Nothing grows: every direction of I + G, and so of all five memories, goes to nothing."""
    found = endure(SUBJECTS["decay to zero"], 6_400)

    assert found.blown is None
    assert found.largest < 1e-3
    assert endure(memory("decay to the start", Rule()), 6_400).largest > 1.0


def test_an_mlp_with_clip_and_cap_stays_bounded():
    assert endure(layers("MLP", mlp.Rule()), 640).blown is None
