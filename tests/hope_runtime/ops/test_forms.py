"""What every memory keeps: one chunk at a time is token by token, however a stream is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=6, deadline=None)
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=3)
chunks = st.sampled_from([1, 2, 5, 8, 64])
seeds = st.integers(0, 2**31)


def in_calls(form, state, weights, x, q, phase, chunk, sizes):
    found, done = [], 0
    for size in sizes:
        part = slice(done, done + size)
        y, state = form.scan(state, weights, x[:, :, part], q[:, :, part], phase, chunk=chunk)
        found.append(y)
        phase, done = (phase + size) % chunk, done + size
    return torch.cat(found, -2), state


@few
@given(sizes=cuts, chunk=chunks, seed=seeds)
def test_a_stream_in_any_calls_is_the_stream_token_by_token(form, stream, same, sizes, chunk, seed):
    weights = form.weights(seed)
    x, q = stream(3, sum(sizes), seed)
    phase = torch.arange(3) * 3 % chunk
    state = form.empty(3, weights)

    whole = form.scan(state, weights, x, q, phase, chunk=chunk)
    parts = in_calls(form, state, weights, x, q, phase, chunk, sizes)
    tokens = form.naive(state, weights, x, q, phase, chunk=chunk)

    same(whole, tokens)
    same(parts, tokens)


@few
@given(lengths=st.lists(st.integers(0, 11), min_size=3, max_size=3), chunk=chunks, seed=seeds)
def test_sessions_of_any_length_and_phase_in_one_batch_are_each_as_if_alone(
    form, stream, same, session, lengths, chunk, seed
):
    weights = form.weights(seed)
    x, q = stream(3, max(*lengths, 1), seed)
    phase = torch.randint(0, chunk, (3,), generator=torch.Generator().manual_seed(seed))
    _, before = form.scan(form.empty(3, weights), weights, *stream(3, 5, seed + 1), 0 * phase)
    live = session(before, 0)

    y, after = form.scan(before, weights, x, q, phase, lengths, chunk=chunk)

    assert y.shape == x.shape
    for i, own in enumerate(lengths):
        live = session(before, i)
        if own == 0:
            same(session(after, i), live)
            continue
        here = (slice(i, i + 1), slice(None), slice(own))
        alone = form.naive(live, weights, x[here], q[here], phase[i : i + 1], chunk=chunk)
        same((y[here], session(after, i)), alone)


def test_float32_is_near_enough(form, stream, same):
    weights = form.weights(3, torch.float32)
    x, q = stream(2, 67, 3, torch.float32)
    phase = torch.tensor([5, 0])
    state = form.empty(2, weights)

    chunked = form.scan(state, weights, x, q, phase, chunk=16)
    tokens = form.naive(state, weights, x, q, phase, chunk=16)

    for found, expected in zip(chunked[1], tokens[1], strict=True):
        same(found, expected, within=1e-4)
    same(chunked[0], tokens[0], within=1e-4)


def test_what_comes_later_changes_no_bit_of_what_came_before(form, stream):
    weights = form.weights(1, torch.float32)
    x, q = stream(2, 23, 1, torch.float32)
    other, asked = stream(2, 23, 2, torch.float32)
    phase = torch.tensor([0, 3])
    state = form.empty(2, weights)
    y, _ = form.scan(state, weights, x, q, phase, chunk=8)

    for here in (1, 7, 8, 15, 22):
        changed = torch.cat([x[:, :, :here], other[:, :, here:]], 2)
        asking = torch.cat([q[:, :, :here], asked[:, :, here:]], 2)
        again, _ = form.scan(state, weights, changed, asking, phase, chunk=8)
        assert torch.equal(again[:, :, :here], y[:, :, :here])


def test_filler_is_never_read(form, stream):
    weights = form.weights(1)
    x, q = stream(2, 12, 1)
    state, lengths = form.empty(2, weights), [4, 9]
    y, after = form.scan(state, weights, x, q, [2, 2], lengths, chunk=8)
    x[0, :, 4:], x[1, :, 9:] = 77.0, -3.0

    again, after_too = form.scan(state, weights, x, q, [2, 2], lengths, chunk=8)

    torch.testing.assert_close(again[0, :, :4], y[0, :, :4], atol=0, rtol=0)
    torch.testing.assert_close(again[1, :, :9], y[1, :, :9], atol=0, rtol=0)
    torch.testing.assert_close(after_too, after, atol=0, rtol=0)


def test_at_rate_zero_nothing_is_ever_written(served, stream, same):
    weights = served.weights(dtype=torch.float32)
    if served.module.__name__.endswith("titans"):
        weights = weights._replace(start=torch.zeros_like(weights.start))
    x, q = stream(2, 70, dtype=torch.float32)
    state = served.empty(2, weights)

    _, after = served.scan(state, weights, x, q, [0, 9], rate_max=0.0)
    _, after_too = served.naive(state, weights, x, q, [0, 9], rate_max=0.0)

    same(after, state, within=0)
    same(after_too, state, within=0)


def test_gradients_through_both_are_one(form, stream, same):
    x, q = stream(2, 13, 4)
    wanted = []
    for run in (form.naive, form.scan):
        weights = form.weights(4)
        inputs = [leaf.requires_grad_() for leaf in _leaves(weights)] + [x.clone(), q.clone()]
        for leaf in inputs[-2:]:
            leaf.requires_grad_()
        state = form.empty(2, weights)
        y, after = run(state, weights, inputs[-2], inputs[-1], [0, 3], chunk=5)
        loss = y.square().sum() + sum(leaf.square().sum() for leaf in _leaves(after))
        wanted.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))

    same(wanted[0], wanted[1])
    assert all(bool(gradient.isfinite().all()) for gradient in wanted[0])


@pytest.mark.parametrize("limit", [0.1, 1.0])
def test_the_norm_holds_at_the_end_of_every_chunk(served, stream, limit):
    weights = served.weights(7, torch.float32)
    x, q = stream(3, 40, 7, torch.float32)
    state, reached = served.empty(3, weights), 0.0

    for start in range(0, 40, 4):
        part = slice(start, start + 4)
        _, state = served.scan(
            state, weights, x[:, :, part], q[:, :, part], [0, 0, 0], chunk=4, memory_norm=limit
        )
        for live in _leaves(state.live):
            size = torch.linalg.vector_norm(live, dim=(-2, -1)).max().item()
            assert size <= limit * (1 + 1e-6)
            reached = max(reached, size)

    assert reached > 0.9 * limit


def _leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for part in tree for leaf in _leaves(part)]
