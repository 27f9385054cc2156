"""The outer loop: it lowers the loss, restarts exactly, and learns through the inner updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hope_runtime.model import Hope
from hope_runtime.training import loop
from hope_runtime.training.loop import Batch, Recipe, TrainingError
from hope_runtime.weights.random import tiny_native

CPU = torch.device("cpu")
CONFIG = tiny_native(vocabulary=16)
RECIPE = Recipe(steps=40, warmup=4)


def pairs(chance: np.random.Generator, done: float) -> Batch:
    """Return rows in which two symbols are told one after the other, and come again."""
    row = chance.integers(1, 16, (8, 1, 6))
    tokens = torch.from_numpy(np.tile(row, (1, 4, 1)).reshape(8, 24))
    weights = torch.zeros(tokens.shape)
    weights[:, 6:] = 1.0
    return Batch(tokens, weights)


def counting(chance: np.random.Generator, done: float) -> Batch:
    """Return rows that count up by three, from anywhere."""
    first = torch.from_numpy(chance.integers(0, 16, (8, 1)))
    return Batch((first + 3 * torch.arange(24)) % 16, torch.ones(8, 24))


def run(progress, steps, recipe=RECIPE, config=CONFIG, source=pairs):
    losses = []
    for _ in range(steps):
        progress, did = loop.advance(
            config, recipe, progress, source, device=CPU, dtype=torch.float32
        )
        losses.append(did.loss)
    return progress, losses


def assert_equal(one, other):
    assert one.step == other.step
    for name, value in one.params.items():
        torch.testing.assert_close(value, other.params[name], rtol=0, atol=0)
    assert one.chance.bit_generator.state == other.chance.bit_generator.state


@pytest.mark.parametrize(("optimiser", "rate"), [("muon", 0.02), ("adamw", 3e-3), ("m3", 1e-4)])
def test_training_lowers_the_loss(optimiser, rate):
    recipe = replace(RECIPE, optimiser=optimiser, rate=rate)

    _, losses = run(loop.begin(CONFIG, recipe), 40, recipe, source=counting)

    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    whole, _ = run(loop.begin(CONFIG, RECIPE), 9)

    half, _ = run(loop.begin(CONFIG, RECIPE), 4)
    loop.save(tmp_path / "run.safetensors", CONFIG, RECIPE, half)
    config, recipe, again = loop.load(tmp_path / "run.safetensors")
    rest, _ = run(again, 5, recipe, config)

    assert (config, recipe) == (CONFIG, RECIPE)
    assert_equal(rest, whole)


def test_a_file_that_is_no_run_is_named(tmp_path):
    file = tmp_path / "run.safetensors"
    file.write_bytes(b"not tensors")

    with pytest.raises(TrainingError, match=r"run\.safetensors: not a training run"):
        loop.load(file)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was():
    progress = loop.begin(CONFIG, RECIPE)
    broken = progress._replace(params={n: p * torch.nan for n, p in progress.params.items()})

    with pytest.raises(TrainingError, match="lower --rate"):
        run(broken, 1)


@pytest.mark.parametrize("unroll", [True, False], ids=["to second order", "to first order"])
def test_gradients_reach_the_learned_start_through_the_memory_s_writes(unroll):
    batch = pairs(np.random.default_rng(0), 0.0)
    params = loop.begin(CONFIG, RECIPE).params

    _, gradients = loop.gradient(
        CONFIG, params, batch, replace(RECIPE, unroll=unroll), device=CPU, dtype=torch.float32
    )

    start = gradients["blocks.0.memory_start"]
    width = CONFIG.memory.head_width
    for rows in (start[:, :width], start[:, width : 2 * width], start[:, 3 * width :]):
        assert float(rows.norm()) > 0  # keys, values and gates act through what was written only
    modification = gradients["blocks.0.memory_modification"]
    assert bool((modification != 0).all())


def test_gradients_to_first_and_to_second_order_differ():
    batch = pairs(np.random.default_rng(0), 0.0)
    params = loop.begin(CONFIG, RECIPE).params

    def start(unroll):
        recipe = replace(RECIPE, unroll=unroll)
        found = loop.gradient(CONFIG, params, batch, recipe, device=CPU, dtype=torch.float32)
        return found[0], found[1]["blocks.0.memory_start"]

    (loss, whole), (same, first) = start(True), start(False)

    assert loss == same
    assert float((whole - first).norm()) > 1e-4 * float(whole.norm())


def test_the_gradient_of_the_loop_is_that_of_finite_differences():
    batch = pairs(np.random.default_rng(0), 0.0)
    recipe = replace(RECIPE, unroll=True)
    params = {n: p.double() for n, p in loop.begin(CONFIG, recipe).params.items()}
    generator = torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=generator).double() for n, p in params.items()}

    def loss(step):
        moved = {n: p + step * way[n] for n, p in params.items()}
        model = Hope(CONFIG, moved, dtype=torch.float64)
        weights = batch.weights[:, 1:]
        return float((loop.losses(model, batch.tokens) * weights).sum() / weights.sum())

    _, gradients = loop.gradient(CONFIG, params, batch, recipe, device=CPU, dtype=torch.float64)
    slope = sum(float((gradients[n] * way[n]).sum()) for n in params)

    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-5)


def test_weights_say_what_counts():
    def only_first(chance, done):
        batch = pairs(chance, done)
        return Batch(batch.tokens, torch.cat([torch.ones(8, 2), torch.zeros(8, 22)], 1))

    progress = loop.begin(CONFIG, RECIPE)
    _, (loss,) = run(progress, 1, source=only_first)

    batch = only_first(np.random.default_rng(RECIPE.seed), 0.0)
    every = loop.losses(Hope(CONFIG, progress.params), batch.tokens)
    assert loss == pytest.approx(float(every[:, 0].mean()), rel=1e-5)
