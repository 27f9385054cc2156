"""Sampling: the draw's support is that of a plain full sort, and its surprise is the model's."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_runtime.sampling import Sampling, generator, sample

WIDE = {"temperature": 1.0, "top_p": 1.0}  # nothing is cut off


def draws(logits, count, history=(), **changes):
    chosen = Sampling(**{**WIDE, **changes})
    source = generator(chosen)
    return Counter(sample(logits, history, chosen, source)[0] for _ in range(count))


def shares(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Return what each token's share should be: sort all, cut, and divide the rest anew."""
    probabilities = torch.softmax(torch.tensor(logits).double() / temperature, 0).tolist()
    ranked = sorted(enumerate(probabilities), key=lambda pair: -pair[1])
    ranked = ranked[: top_k or len(ranked)]
    whole, before, kept = sum(p for _, p in ranked), 0.0, {}
    for token, p in ranked:
        if before < top_p and p >= min_p * ranked[0][1]:
            kept[token] = p
        before += p / whole
    return {token: p / sum(kept.values()) for token, p in kept.items()}


def test_a_temperature_of_zero_takes_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])

    assert draws(logits, 20, temperature=0.0) == {1: 20}


@settings(max_examples=60, deadline=None)
@given(
    # a tenth apart, so that no rounding decides an order
    st.lists(st.integers(-30, 30), min_size=2, max_size=9, unique=True),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 10),
    st.sampled_from([0.11, 0.5, 0.83, 1.0]),
    st.sampled_from([0.0, 0.07, 0.41, 1.0]),
)
def test_draws_come_from_where_a_full_sort_says(tenths, temperature, top_k, top_p, min_p):
    cuts = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = [number / 10 for number in tenths]
    expected = shares(logits, **cuts)

    found = draws(torch.tensor(logits), 300, **cuts)

    assert found.keys() <= expected.keys()
    assert found.keys() >= {token for token, share in expected.items() if share > 0.1}


def test_draws_are_as_frequent_as_their_shares():
    logits = [0.0, 1.0, 2.0, 0.5, -1.0, 1.5]
    cuts = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.02}
    expected = shares(logits, **cuts)
    count = 4000

    found = draws(torch.tensor(logits), count, **cuts)

    assert len(expected) == 4
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        assert found[token] / count == pytest.approx(share, abs=4 * math.sqrt(0.25 / count))


@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 3000},
        {"top_k": 3000, "top_p": 0.6},
        {"top_p": 0.5},
        {"min_p": 0.8},
        {},
    ],
    ids=["top_k", "a nucleus of top_k", "top_p", "min_p", "nothing"],
)
def test_more_tokens_than_are_looked_at_first_can_stay(cuts):
    """Six thousand tokens, each a little less likely than the one before, in no order."""
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(0))
    logits = torch.empty(6000)
    logits[order] = -1e-4 * torch.arange(6000)
    kept = shares(logits.tolist(), **cuts)
    assert len(kept) > 1500

    found = draws(logits, 400, **cuts)

    assert found.keys() <= kept.keys()
    ranks = sorted(int((order == token).nonzero()) for token in found)
    assert ranks[-1] > 0.95 * len(kept)


def test_the_tail_of_a_large_vocabulary_keeps_its_share():
    """Twenty likely tokens hold half of everything, fifty thousand others the rest."""
    logits = torch.zeros(50_000)
    logits[:20] = math.log(50_000 / 20)

    found = draws(logits, 300)

    assert sum(count for token, count in found.items() if token >= 20) == pytest.approx(150, abs=45)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature):
    assert draws(torch.tensor([40.0, -3.0, 41.0]), 5, temperature=temperature) == {2: 5}


@pytest.mark.parametrize("penalty", [1e-30, 1e-300, 5e-324, 1e30, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_extreme_penalty_still_gives_a_draw(penalty, temperature):
    logits = torch.tensor([40.0, -3.0, 0.0, 41.0, 1.0])

    chosen = Sampling(temperature=temperature, repetition_penalty=penalty)
    token, surprise = sample(logits, [0, 1, 2, 3], chosen, generator(chosen))

    assert token in ({0, 3} if penalty < 1 else {0, 2, 3, 4})
    assert math.isfinite(surprise)


def test_the_repetition_penalty_makes_what_was_seen_less_likely():
    """Logits 2 and -1 become 1 and -2; how often a token was seen does not matter."""
    logits = torch.tensor([2.0, -1.0, 0.5])
    plain = shares([1.0, -2.0, 0.5])

    found = draws(logits, 4000, history=[0, 0, 0, 1], repetition_penalty=2.0)

    for token, share in plain.items():
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)


def test_the_repetition_penalty_also_turns_the_greedy_choice():
    logits = torch.tensor([2.0, 1.9, 0.0])
    chosen = Sampling(temperature=0.0, repetition_penalty=1.2)

    assert sample(logits, [], chosen, generator(chosen))[0] == 0
    assert sample(logits, [0], chosen, generator(chosen))[0] == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, 0.0])


def test_a_seed_gives_the_same_draws_and_another_seed_others():
    logits = torch.zeros(100)

    def sequence(seed):
        chosen = Sampling(**WIDE, seed=seed)
        source = generator(chosen)
        return [sample(logits, [], chosen, source)[0] for _ in range(20)]

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


def test_surprise_is_that_of_the_model_before_anything_was_cut():
    logits = torch.tensor([1.0, 2.0, 4.0, 0.0])
    chosen = Sampling(temperature=0.5, top_k=2, top_p=0.9, repetition_penalty=3.0)
    source = generator(chosen)
    expected = -torch.log_softmax(logits.double(), 0)

    for _ in range(10):
        token, surprise = sample(logits, [2], chosen, source)
        assert surprise == pytest.approx(float(expected[token]), abs=1e-6)
