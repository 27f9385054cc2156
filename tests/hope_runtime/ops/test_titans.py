"""Linear Titans memory against its equations."""

from __future__ import annotations

import pytest
import torch

from hope_runtime.ops import titans

DOUBLE = torch.float64
FREE = titans.Rule(chunk=16, error_norm=None, memory_norm=None)


@pytest.fixture
def weights():
    source = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=DOUBLE) / 2

    return titans.Weights(normal(2, 4, 4), normal(2, 11, 4), normal(2), normal(2), normal(2))


def test_the_chunk_is_eq_16_where_there_is_no_momentum(weights, stream):
    """M_t = beta_t M_0 - sum over i <= t of theta_i (beta_t / beta_i) grad l(M_0; x_i)."""
    rule = titans.Rule(chunk=16, momentum_max=0.0, error_norm=None, memory_norm=None)
    (x, q), phase = stream(1, 9, 1), torch.tensor([0])
    made = titans.project(weights, x, rule)
    beta = made.retain.cumprod(-1)
    start = weights.start.expand(1, 2, 4, 4).clone().requires_grad_()
    expected = beta[..., -1, None, None] * start.detach()
    for i in range(9):
        key, value = made.keys[:, :, i, :, None], made.values[:, :, i, :, None]
        (gradient,) = torch.autograd.grad((start @ key - value).square().sum() / 2, start)
        share = made.rate[:, :, i] * beta[..., -1] / beta[..., i]
        expected = expected - share[..., None, None] * gradient

    _, after = titans.scan(titans.empty(1, weights), weights, x, q, phase, rule)

    torch.testing.assert_close(after.live, expected)


def test_the_rule_as_it_is_printed(weights, stream):
    """Eq. 9, 10, 13 and 14, a head at a time, in chunks of four."""
    rule = titans.Rule(chunk=4, error_norm=None, memory_norm=None)
    (x, q), phase = stream(1, 10, 2), torch.tensor([0])
    made = titans.project(weights, x, rule)
    y, after = titans.scan(titans.empty(1, weights), weights, x, q, phase, rule)

    for head in range(2):
        memory = anchor = weights.start[head]
        surprise = torch.zeros(4, 4, dtype=DOUBLE)
        for t in range(10):
            key, value = made.keys[0, head, t], made.values[0, head, t]
            theta, kept, eta = (gate[0, head, t] for gate in made[2:])
            torch.testing.assert_close(y[0, head, t], memory @ q[0, head, t])
            surprise = eta * surprise - theta * torch.outer(anchor @ key - value, key)
            memory = kept * memory + surprise
            anchor = memory if (t + 1) % 4 == 0 else anchor
        torch.testing.assert_close(after.live[0, head], memory)
        torch.testing.assert_close(after.velocity[0, head], surprise)


def test_momentum_may_be_exactly_zero(weights, stream):
    weights = weights._replace(momentum_bias=torch.full((2,), -1e4, dtype=DOUBLE))
    x, q = stream(1, 9, 2)
    phase = torch.tensor([0])

    chunked = titans.scan(titans.empty(1, weights), weights, x, q, phase, FREE)
    tokens = titans.naive(titans.empty(1, weights), weights, x, q, phase, FREE)

    torch.testing.assert_close(chunked, tokens)
    assert chunked[0].isfinite().all()
