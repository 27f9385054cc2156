"""Training with levels that learn: they learn as when they are served, and so can their periods."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hope_runtime.config import LevelConfig, Variant
from hope_runtime.engine import Engine, Turn
from hope_runtime.model import Hope
from hope_runtime.report import Finished, Learned
from hope_runtime.sampling import Sampling
from hope_runtime.state import State
from hope_runtime.training import cms, loop
from hope_runtime.training.loop import Batch, Recipe
from hope_runtime.training.period import relaxed
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native

CONFIGS = {
    "attention": tiny_config(window=16),
    "native": tiny_native(),
    "native, nested, with moments": tiny_native(
        variant=Variant.NESTED,
        levels=(
            replace(tiny_native().levels[0], start_rate=0.5, optimiser="adam"),
            tiny_native().levels[1],
        ),
    ),
}


def still(config):
    return replace(config, levels=tuple(replace(level, rate=0.0) for level in config.levels))


def rows(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 123, (count, length + 1), generator=generator)


def served(model, row):
    """Return what serving learns from a row, and the state it leaves."""
    engine = Engine(model, random_checkpoint(tiny_config()).tokenizer, lanes=1, clock=lambda: 0.0)
    given = tuple((token, 1.0) for token in row.tolist())
    engine.submit(Turn("a", State(), given, (), 0, 0.0, Sampling(), (), True))
    facts = []
    while not engine.idle:
        facts += engine.step()
    (finished,) = [fact for fact in facts if isinstance(fact, Finished)]
    return finished.state, [fact.consolidated for fact in facts if isinstance(fact, Learned)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_levels_learn_in_training_what_they_learn_when_served(config):
    """In float64: Adam can make much of a last bit."""
    weights = random_checkpoint(config).weights
    own = {name: w.double().requires_grad_() for name, w in weights.items()}
    trained = Hope(config, own, dtype=torch.float64)
    tokens = rows(2, 40)

    losses, states = cms.read(trained, tokens)

    for row, state, nats in zip(tokens, states, losses, strict=True):
        expected, learned = served(Hope(config, weights, dtype=torch.float64), row[:-1])
        assert state.deltas.keys() == expected.deltas.keys()
        for name, delta in expected.deltas.items():
            size = float(delta.abs().max())
            torch.testing.assert_close(state.deltas[name], delta, rtol=1e-4, atol=1e-4 * size)
        assert [each.end for each in learned if each.level == "fast"] == [8, 16, 24, 32, 40]
        assert float(nats[:7].detach().mean()) == pytest.approx(learned[0].loss, rel=1e-4)


@pytest.mark.parametrize("config", [still(c) for c in CONFIGS.values()], ids=CONFIGS)
def test_levels_that_stay_give_the_losses_and_gradients_of_one_pass(config):
    tokens = rows(3, 29)
    found = []
    for losses in (cms.losses, loop.losses):
        weights = random_checkpoint(config).weights
        own = {name: w.double().requires_grad_() for name, w in weights.items()}
        if losses is loop.losses and config.attention_blocks:
            config = replace(config, window=64)  # one pass is no longer than the window
        value = losses(Hope(config, own, dtype=torch.float64), tokens)[:, :15]
        gradients = torch.autograd.grad(value.mean(), list(own.values()), allow_unused=True)
        found.append((value, gradients))

    (value, gradients), (expected, wanted) = found
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients, wanted, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_gradient_is_that_of_reading_under_deltas_that_are_given():
    """First order: as if the deltas had been there, whatever the weights."""
    config = tiny_native(levels=(LevelConfig("fast", 8, (0, 1), rate=0.05, retain=1.0),))
    own = {n: w.clone().requires_grad_() for n, w in random_checkpoint(config).weights.items()}
    tokens = rows(1, 12)
    last = cms.losses(Hope(config, own), tokens)[:, 8:].sum()
    found = torch.autograd.grad(last, own["blocks.1.down"])[0]

    _, (state,) = cms.read(Hope(config, own), tokens[:, :9])
    with torch.no_grad():
        moved = dict(own)
        for name, delta in state.deltas.items():
            if name.endswith("down"):
                moved[name] = own[name] + delta
            else:
                stem = name.removesuffix("gate_up")
                gate, up = delta.chunk(2)
                moved[f"{stem}gate"] = own[f"{stem}gate"] + gate
                moved[f"{stem}up"] = own[f"{stem}up"] + up
    moved = {name: w.detach().requires_grad_() for name, w in moved.items()}
    base, after = Hope(config, own), Hope(config, moved)
    start = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        first = base.run(base.embed(tokens[:, :8]), start, base.nothing(1), [{}])
    past = base.nothing(1)._replace(memories=first.memories)
    second = after.run(after.embed(tokens[:, 8:12]), start + 8, past, [{}])
    expected = F.cross_entropy(after.logits(second.hidden).mT, tokens[:, 9:], reduction="sum")

    assert float(last.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    # what the first chunk adds, by the memory that it wrote, comes through the base alone
    wanted = torch.autograd.grad(expected, moved["blocks.1.down"])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_model_is_trained_with_its_levels_learning_and_restarts_exactly(tmp_path):
    level = LevelConfig("fast", 8, (0, 1), rate=0.01, retain=1.0)
    config = tiny_native(vocabulary=16, chain=1, levels=(level,))
    recipe = Recipe(steps=8, warmup=2, levels=True)

    def counting(chance, done):
        first = torch.from_numpy(chance.integers(0, 16, (2, 1)))
        return Batch((first + 3 * torch.arange(18)) % 16, torch.ones(2, 18))

    def run(progress, steps):
        found = []
        for _ in range(steps):
            progress, did = loop.advance(
                config, recipe, progress, counting, device=torch.device("cpu"), dtype=torch.float32
            )
            found.append(did.loss)
        return progress, found

    half, first = run(loop.begin(config, recipe), 4)
    loop.save(tmp_path / "run", config, recipe, half)
    whole, second = run(half, 4)
    _, again, restored = loop.load(tmp_path / "run")
    other, same = run(restored, 4)

    assert again == recipe
    assert same == second
    assert all(torch.equal(p, other.params[name]) for name, p in whole.params.items())
    assert second[-1] < first[0]


# --- periods ------------------------------------------------------------------------------------

PERIODS = (1, 4, 16)


def stream(generator, kind):
    """Return 48 sightings of a target: one that stays, badly seen; or one that jumps, well seen."""
    noise = torch.randn(48, generator=generator)
    if kind == "slow":
        return 1.0 + 2.0 * noise
    target = torch.randn(16, generator=generator).repeat_interleave(3)
    return 2.0 * target + 0.05 * noise


def sighting(seen):
    return lambda weights, i: (weights["w"] - seen[i]).square().sum() / 2


@pytest.mark.parametrize("chosen", range(len(PERIODS)))
def test_one_share_is_the_plain_chunk_of_that_period(chosen):
    seen = stream(torch.Generator().manual_seed(1), "fast")
    scores = torch.full((3,), -1e9).index_fill(0, torch.tensor(chosen), 0.0)
    w, sums, losses = torch.zeros(1), torch.zeros(1), []
    for i, x in enumerate(seen):
        losses.append((w - x).square().sum() / 2)
        sums = sums + (w - x)
        if (i + 1) % PERIODS[chosen] == 0:
            w, sums = 0.9 * w - 0.3 * sums / PERIODS[chosen], torch.zeros(1)

    found = relaxed(
        sighting(seen), {"w": torch.zeros(1)}, 48, PERIODS, scores, rate=0.3, retain=0.9
    )

    torch.testing.assert_close(found, torch.stack(losses).mean())


@pytest.mark.parametrize(("kind", "best"), [("slow", 16), ("fast", 1)])
def test_a_learned_period_is_long_where_change_is_slow_and_short_where_it_is_fast(kind, best):
    generator = torch.Generator().manual_seed(0)
    scores = torch.zeros(3, requires_grad=True)
    rule = torch.optim.Adam([scores], lr=0.2)
    start = {"w": torch.ones(1)}
    for _ in range(30):
        rule.zero_grad()
        seen = stream(generator, kind)
        relaxed(sighting(seen), start, 48, PERIODS, scores, rate=0.8).backward()
        rule.step()

    assert PERIODS[int(scores.argmax())] == best
    assert float(torch.softmax(scores.detach(), 0).max()) > 0.6


def test_a_period_is_learned_through_the_levels_of_a_model():
    config = tiny_native()
    model = Hope(config, random_checkpoint(config).weights)
    tokens = rows(1, 32)
    names = {"blocks.1.down": (config.width, config.hidden)}
    start = {name: torch.zeros(shape) for name, shape in names.items()}
    scores = torch.zeros(2, requires_grad=True)

    def loss(weights, i):
        piece = tokens[:, 8 * i : 8 * i + 9]
        none = torch.zeros(1, dtype=torch.int64)
        read = model.run(model.embed(piece[:, :-1]), none, model.nothing(1), [weights])
        return F.cross_entropy(model.logits(read.hidden).mT, piece[:, 1:])

    relaxed(loss, start, 4, (1, 2), scores, rate=1.0).backward()

    assert bool(scores.grad.isfinite().all())
    assert float(scores.grad.abs().sum()) > 0
