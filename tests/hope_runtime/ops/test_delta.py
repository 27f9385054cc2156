"""The gated delta recurrence: a chunk at once is token by token; what is written is recalled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hope_runtime.ops import delta

VECTORS = Path(__file__).parent / "vectors" / "gated_delta_rule.safetensors"


def drawn(tokens, seed=0, *, rows=3, width=4, dtype=torch.float64, lowest=0.5):
    source = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    keys = torch.nn.functional.normalize(normal(2, tokens, width), dim=-1)
    retain = lowest + (1.0 - lowest) * torch.rand(2, tokens, generator=source).to(dtype)
    rate = torch.rand(2, tokens, generator=source).to(dtype)
    queries, writes = normal(2, tokens, width), normal(2, tokens, rows)
    return normal(2, rows, width), keys, queries, retain, rate, writes


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_chunk_at_once_is_token_by_token(tokens, seed):
    given = drawn(tokens, seed)

    for found, expected in zip(delta.chunk(*given), delta.naive(*given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1, 31, 64])
def test_a_chunk_at_once_is_token_by_token_in_float32(tokens):
    given = drawn(tokens, dtype=torch.float32)

    for found, expected in zip(delta.chunk(*given), delta.naive(*given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_memory_that_keeps_next_to_nothing_stays_finite_and_right():
    given = drawn(64, dtype=torch.float32)
    nothing = torch.full_like(given[3], 1e-4)  # 64 of these multiply to zero in float32
    given = (*given[:3], nothing, *given[4:])

    for found, expected in zip(delta.chunk(*given), delta.naive(*given), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_of_the_memory_know_nothing_of_each_other():
    memory, keys, queries, retain, rate, writes = drawn(17)

    y, after = delta.chunk(memory, keys, queries, retain, rate, writes)
    y_one, one = delta.chunk(memory[:, 1:2], keys, queries, retain, rate, writes[..., 1:2])

    torch.testing.assert_close(y[..., 1:2], y_one)
    torch.testing.assert_close(after[:, 1:2], one)


def test_an_orthogonal_key_is_recalled_after_many_others():
    keys = torch.eye(8)[None]
    values = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 8)

    _, memory = delta.chunk(torch.zeros(1, 3, 8), keys, keys, one, one, values)

    torch.testing.assert_close(keys @ memory.mT, values)


def test_gradients_of_a_whole_chunk_are_those_of_its_tokens():
    wanted = []
    for run in (delta.naive, delta.chunk):
        given = [part.requires_grad_() for part in drawn(9)]
        y, after = run(*given)
        wanted.append(torch.autograd.grad(y.square().sum() + after.square().sum(), given))

    for found, expected in zip(*wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("run", [delta.naive, delta.chunk])
def test_it_is_the_gated_delta_rule_of_flash_linear_attention(run):
    """Theirs erases what is left after forgetting, and reads after the write; ours before both."""
    theirs = load_file(VECTORS)
    keys, queries, values = (theirs[name].transpose(1, 2) for name in ("k", "q", "v"))
    retain, beta = (theirs[name].transpose(1, 2) for name in ("g", "beta"))
    retain = retain.exp()

    y, after = run(
        theirs["initial_state"].mT, keys, queries, retain, retain * beta, beta[..., None] * values
    )

    torch.testing.assert_close(after, theirs["final_state"].mT, atol=1e-5, rtol=1e-5)
    # their o_t reads what our y_{t+1} reads, with the same query
    shifted = torch.cat([queries[:, :, :1], queries[:, :, :-1]], 2)
    y, _ = run(
        theirs["initial_state"].mT, keys, shifted, retain, retain * beta, beta[..., None] * values
    )
    o = theirs["o"].transpose(1, 2)
    torch.testing.assert_close(y[:, :, 1:], o[:, :, :-1], atol=1e-5, rtol=1e-5)
