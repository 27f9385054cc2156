"""The paper's equations hold as printed, and five memories are one."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hope_runtime.config import Rule
from hope_runtime.ops import collapsed, naive, titans

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_eq_57_is_the_minimum_of_eq_54_for_keys_of_any_length():
    weight, x, slope = normal(3, 4), 2.5 * normal(4, seed=1), normal(3, seed=2)
    rate = torch.tensor(0.3, dtype=DOUBLE)

    def objective(w):
        distance = (w - weight).square().sum() / (2 * rate)
        return (naive.recall(w, x) + slope).square().sum() / 2 + distance

    found = naive.descended(weight, x, slope, rate).requires_grad_()

    (gradient,) = torch.autograd.grad(objective(found), found)
    assert gradient.abs().max() < 1e-12


def test_eq_57_is_eq_88_at_unit_keys_with_nothing_forgotten():
    weight, x, slope = normal(3, 4), collapsed.unit(normal(4, seed=1)), normal(3, seed=2)
    rate, one = torch.tensor(0.3, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE)

    descended = naive.descended(weight, x, slope, rate)
    written = naive.written(weight, x, slope, rate / (1 + rate), one)

    torch.testing.assert_close(descended, written, atol=1e-11, rtol=1e-11)


def test_the_slopes_are_the_gradients_of_their_losses():
    memory, key, value = normal(3, 4).requires_grad_(), normal(4, seed=1), normal(3, seed=2)

    (l2,) = torch.autograd.grad(naive.loss(memory, key, value), memory)
    (dot,) = torch.autograd.grad(-(naive.recall(memory, key) @ value), memory)

    torch.testing.assert_close(l2, naive.slope(memory, key, value)[:, None] * key)
    torch.testing.assert_close(dot, naive.dot_slope(value)[:, None] * key)


def test_eq_83_to_88_as_they_are_printed(paper, stream):
    """One head, one session, chunk 1, straight from the page."""
    rule = Rule(chunk=1, target_norm=None, memory_norm=None, decay_to_zero=True, reference=True)
    weights = paper(3)
    (x, q), phase = stream(1, 6, 3), torch.tensor([0])
    found, after = naive.naive(naive.empty(1, weights), weights, x, q, phase, rule)

    start = [m[0] for m in naive.started(weights)][:5]
    k_, v_, memory, eta_, alpha_ = start
    for t in range(6):
        x_t = x[0, 0, t]
        y = memory @ q[0, 0, t]
        k = k_ @ x_t / (k_ @ x_t).norm()
        v = v_ @ x_t / (v_ @ x_t).norm()
        eta = 0.5 * torch.sigmoid(eta_ @ x_t + weights.rate_bias[0])
        alpha = 1 - 0.1 * torch.sigmoid(alpha_ @ x_t + weights.retain_bias[0])

        def updated(m, k=k, v=v, eta=eta, alpha=alpha):
            eye = torch.eye(4, dtype=DOUBLE)
            step = m @ (alpha * eye - eta * torch.outer(k, k))
            return step - eta * torch.outer(m @ k - m @ v, k)

        torch.testing.assert_close(found[0, 0, t], y)
        k_, v_, memory, eta_, alpha_ = map(updated, (k_, v_, memory, eta_, alpha_))

    expected = (k_, v_, memory, eta_, alpha_)
    for live, printed in zip(after.live[:5], expected, strict=True):
        torch.testing.assert_close(live[0, 0], printed)


OPTIONS = list(product((False, True), (False, True), (False, True), (2.0, 1.0), (0, 4)))


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(("anchored", "to_zero", "normalised", "erases", "extra"), OPTIONS)
def test_five_memories_are_one(paper, stream, anchored, to_zero, normalised, erases, extra, chunk):
    """M_box = W_box (I + G), and the outputs agree; with `extra` rows, so does a sixth memory."""
    rule = Rule(
        chunk=chunk,
        anchored=anchored,
        decay_to_zero=to_zero,
        normalise_value=normalised,
        erases=erases,
        target_norm=None,
        memory_norm=None,
        reference=True,
    )
    weights = paper(5, extra)
    (x, q), phase = stream(2, 12, 5), torch.tensor([0, 2]) % chunk
    x = x / 2  # raw values grow fast

    y, five = naive.naive(naive.empty(2, weights), weights, x, q, phase, rule)
    y_one, one = collapsed.naive(collapsed.empty(2, weights), weights, x, q, phase, rule)
    y_fast, fast = collapsed.scan(collapsed.empty(2, weights), weights, x, q, phase, rule)

    torch.testing.assert_close(y_one, y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(y_fast, y, atol=1e-12, rtol=1e-12)
    eye = torch.eye(4, dtype=DOUBLE)
    for which in ("live", "anchor"):
        for g in (getattr(one, which), getattr(fast, which)):
            for start, memory in zip(naive.started(weights), getattr(five, which), strict=True):
                torch.testing.assert_close(start @ (eye + g), memory, atol=1e-12, rtol=1e-12)


def test_with_momentum_and_one_erasure_the_memory_is_titans(paper, stream):
    """In the first chunk nothing has modified itself yet, and the projections are static."""
    rule = Rule(
        chunk=16,
        anchored=True,
        decay_to_zero=True,
        erases=1.0,
        normalise_value=False,
        reference=True,
    )
    weights = paper(8)
    start = naive.started(weights)
    value = start.memory @ start.value  # the target that the memory makes of its value
    gates = torch.cat([start.rate, start.retain, torch.zeros_like(start.rate)], -2)
    static = titans.Weights(
        start.memory,
        torch.cat([start.key, value, gates], -2),
        weights.rate_bias,
        weights.retain_bias,
        torch.full_like(weights.rate_bias, 100.0),  # a sigmoid of one
    )
    theirs = titans.Rule(
        chunk=16, momentum_max=0.7, error_norm=None, memory_norm=None, normalise_value=False
    )
    (x, q), phase = stream(2, 11, 8), torch.tensor([0, 0])

    y, after = naive.naive(naive.empty(2, weights), weights, x, q, phase, rule, momentum=0.7)
    expected, memory = titans.naive(titans.empty(2, static), static, x, q, phase, theirs)

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after.live.memory, memory.live)
    torch.testing.assert_close(after.velocity.memory, memory.velocity)


def test_momentum_carries_old_gradients_on(paper, stream):
    rule = Rule(chunk=1, reference=True)
    weights = paper(2)
    (x, q), phase = stream(1, 2, 2), torch.tensor([0])
    first = naive.empty(1, weights)
    _, still = naive.naive(first, weights, x[:, :, :1], q[:, :, :1], phase, rule)
    _, moving = naive.naive(first, weights, x[:, :, :1], q[:, :, :1], phase, rule, momentum=0.5)
    torch.testing.assert_close(moving.live, still.live)

    def second(state, momentum):
        return naive.naive(state, weights, x[:, :, 1:], q[:, :, 1:], phase, rule, momentum)[1]

    for live, without, pace in zip(
        second(moving, 0.5).live, second(still, 0.0).live, moving.velocity, strict=True
    ):
        torch.testing.assert_close(live, without + 0.5 * pace)


def test_zero_is_a_dead_point_of_memories_that_make_their_own_targets(paper, stream):
    """With eq. 88 a linear memory that starts from zero stays there, whatever is read."""
    weights = paper(1)
    weights = weights._replace(start=torch.zeros_like(weights.start))
    x, q = stream(1, 20, 1)

    y, after = naive.naive(naive.empty(1, weights), weights, x, q, torch.tensor([0]), Rule(chunk=4))

    assert not y.any()
    assert not any(memory.any() for memory in after.live)
