"""The memory that serves: its gains, its bounds, and one step of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_runtime.config import Rule
from hope_runtime.ops import collapsed

DOUBLE = torch.float64
FREE = Rule(target_norm=None, memory_norm=None, reference=True)


@pytest.fixture
def weights(paper):
    """Return weights with gains that are not the paper's."""
    drawn = paper(6)
    return drawn._replace(
        modification=torch.tensor([0.3, 0.7], dtype=DOUBLE),
        passage=torch.tensor([0.0, 1.4], dtype=DOUBLE),
    )


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("limit", [None, 0.6])
def test_the_rule_with_gains_and_clip_token_by_token(weights, stream, anchored, limit):
    """Every head for itself, a vector at a time."""
    rule = replace(FREE, chunk=3, anchored=anchored, target_norm=limit)
    (x, q), phase = stream(1, 7, 6), torch.tensor([0])
    found, after = collapsed.naive(collapsed.empty(1, weights), weights, x, q, phase, rule)

    def clip(v):
        return v if limit is None else v * min(1.0, limit / float(v.norm()))

    for head in range(2):
        lam, s = weights.modification[head], weights.passage[head]
        w_k, w_v, w_m, w_eta, w_alpha = weights.start[head].split([4, 4, 4, 1, 1])
        live = anchor = torch.zeros(4, 4, dtype=DOUBLE)
        for t in range(7):
            x_t, q_t = x[0, head, t], q[0, head, t]
            z = x_t + lam * anchor @ x_t
            k, v = w_k @ z / (w_k @ z).norm(), w_v @ z / (w_v @ z).norm()
            eta = 0.5 * torch.sigmoid(w_eta @ z + weights.rate_bias[head])
            alpha = 1 - 0.1 * torch.sigmoid(w_alpha @ z + weights.retain_bias[head])
            torch.testing.assert_close(found[0, head, t], w_m @ (s * q_t + live @ q_t))
            target = clip(v + lam * anchor @ v)
            recalled = s * k + live @ k
            slope = -clip(target - s * k - anchor @ k) if anchored else recalled - target
            live = alpha * live - eta * torch.outer(recalled + slope, k)
            anchor = live if (t + 1) % 3 == 0 else anchor
        torch.testing.assert_close(after.live[0, head], live)
        torch.testing.assert_close(after.anchor[0, head], anchor)


def test_the_change_is_minus_the_gradient_of_the_loss_and_the_erasure(weights, stream):
    """With nothing forgotten: G' - G = -rate (grad |(s I + G) k - v|^2 / 2 + (s I + G) k k^T)."""
    rule = replace(FREE, retain_min=1.0, retain_max=1.0)
    (x, q), phase = stream(2, 1, 3), torch.tensor([0, 0])
    live = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    made = collapsed.project(live, weights, x, q, rule)
    key, target = made.keys[:, :, 0, :, None], made.targets[:, :, 0, :, None]
    g = live.clone().requires_grad_()
    recalled = weights.passage[:, None, None] * key + g @ key
    (gradient,) = torch.autograd.grad((recalled - target).square().sum() / 2, g)

    _, after = collapsed.step(collapsed.Memory(live, live), weights, x, q, phase, rule)

    change = gradient + (recalled @ key.mT).detach()
    torch.testing.assert_close(after.live - live, -made.rate[..., None] * change)


def test_a_rule_that_does_not_modify_is_the_gated_delta_rule(weights, stream):
    rule = Rule(modifies=False, erases=1.0, chunk=4)
    (x, q), phase = stream(1, 9, 2), torch.tensor([0])
    _, after = collapsed.scan(collapsed.empty(1, weights), weights, x, q, phase, rule)

    for head in range(2):
        w_k, w_v, _, w_eta, w_alpha = weights.start[head].split([4, 4, 4, 1, 1])
        live = torch.zeros(4, 4, dtype=DOUBLE)
        for x_t in x[0, head]:
            k, v = w_k @ x_t / (w_k @ x_t).norm(), w_v @ x_t / (w_v @ x_t).norm()
            beta = 0.5 * torch.sigmoid(w_eta @ x_t + weights.rate_bias[head])
            alpha = 1 - 0.1 * torch.sigmoid(w_alpha @ x_t + weights.retain_bias[head])
            live = alpha * live + beta * torch.outer(v - live @ k, k)
        torch.testing.assert_close(after.live[0, head], live)


def test_targets_keep_to_their_norm_and_short_ones_are_left_alone():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])

    torch.testing.assert_close(
        collapsed.clipped(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    )
    assert collapsed.clipped(rows, None) is rows


def test_no_gate_ever_keeps_everything_where_that_is_not_allowed(weights, stream):
    """A sigmoid reaches one in float32; the cap is what keeps the memory from for ever."""
    single = collapsed.Weights(*(part.float() for part in weights))
    single = single._replace(retain_bias=torch.full((2,), -200.0))
    x, q = stream(1, 5, dtype=torch.float32)

    made = collapsed.project(torch.zeros(1, 2, 4, 4), single, x, q, Rule())

    assert (made.retain < 1.0).all()


def test_first_order_training_leaves_the_values_as_they_are(weights, stream, same):
    (x, q), phase = stream(2, 14, 9), torch.tensor([0, 3])
    start = weights.start.clone().requires_grad_()
    mine = weights._replace(start=start)
    state = collapsed.empty(2, weights)

    full = collapsed.scan(state, mine, x, q, phase, Rule(chunk=4))
    first = collapsed.scan(state, mine, x, q, phase, Rule(chunk=4), unroll=False)

    same(first, full, within=0)
    by_full, by_first = (torch.autograd.grad(y.square().sum(), start)[0] for y, _ in (full, first))
    assert not torch.allclose(by_full, by_first)
