"""Consolidation: the true gradient of the chunk's loss, clipped, bounded, or refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hope_runtime.cadence import Due, completed, marked, until_boundary
from hope_runtime.config import LevelConfig, Variant
from hope_runtime.consolidation import Outcome, consolidate, learnable
from hope_runtime.engine import Engine, Turn
from hope_runtime.lanes import Lanes
from hope_runtime.layers.cms import mlp_name
from hope_runtime.model import Hope
from hope_runtime.report import Finished
from hope_runtime.sampling import Sampling
from hope_runtime.state import LevelState, Mark, Piece, State, compact, extend, trim
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_mixed, tiny_native

FREE = {"clip": 1e9, "bound": 1e9}  # neither clipped nor refused
PARTS = (5, 1, 9, 3, 14, 2, 7, 13, 16, 4)  # turns whose ends fall before, on and after boundaries


def levels(fast, slow, *, shape=None, **changes):
    """Return two levels whose `rate` is absolute: the config's is a share of the base's norm."""
    each = {"rate": 1.0, "retain": 0.9, **FREE, **changes}
    return (
        level("fast", fast, (3,), shape=shape, **each),
        level("slow", slow, (1, 2), shape=shape, **each),
    )


def chained(fast, slow, shape=None):
    """Return one level for each MLP of a native model's blocks."""
    each = {"rate": 1.0, "retain": 0.9, "shape": shape or tiny_native(), **FREE}
    return (
        level("fast", fast, (0, 1), **each),
        level("slow", slow, (0, 1), mlp=1, **each),
    )


def level(name, chunk, blocks, *, rate, shape=None, mlp=0, **each):
    share = rate / base_norm(model_of(shape or tiny_config()), blocks, mlp)
    return LevelConfig(name=name, chunk=chunk, blocks=blocks, rate=share, mlp=mlp, **each)


def only_fast(**changes):
    each = {"rate": 0.1, "retain": 0.9, **FREE, **changes}
    return tiny_config(levels=(level("fast", 8, (2, 3), **each),))


def model_of(config, **options):
    return Hope(config, random_checkpoint(config).weights, **options)


def tokens_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 123, (count,), generator=generator).tolist()


@torch.no_grad()
def read(model, state, tokens, weights=None):
    """Return the state after a call that reads `tokens`, with the chunks that it made due."""
    weights = [1.0] * len(tokens) if weights is None else weights
    lanes, start = Lanes(model, 1), state.position
    lanes.load(0, state)
    deltas = {name: d.to(model.dtype) for name, d in state.deltas.items()}
    past = lanes.view(0, 1, start)
    found = model.run(model.embed(torch.tensor([tokens])), torch.tensor([start]), past, [deltas])
    piece = Piece(
        start,
        torch.tensor(tokens),
        torch.tensor(weights),
        found.keys[:, 0],
        found.values[:, 0],
        found.inputs[0],
    )
    lanes.append(0, torch.tensor([start]), found)
    memories = lanes.memories(0)
    state = replace(extend(state, piece, model.config), memories=memories)
    if state.position in marked(state.position, (), model.config):
        below = sum(i < model.config.first_level_block for i in model.config.memory_blocks)
        mark = Mark(state.position, memories.blocks(below))
        state = replace(state, marks=(*state.marks, mark))
    due = completed(start, piece.end, model.config)
    due = tuple(each for each in due if learnable(state, each))
    return trim(replace(state, due=(*state.due, *due)), model.config)


def ready(model, *, chunks=1, weights=None, seed=0):
    """Return a state that has one chunk due, after `chunks - 1` that were consolidated."""
    length, state = model.config.levels[0].chunk, State()
    for i in range(chunks):
        if state.due:
            state, _ = consolidate(model, state)
        state = read(model, state, tokens_of(length, seed + i), weights)
    assert len(state.due) == 1
    return state


def norm(deltas):
    return math.sqrt(sum(float(d.double().square().sum()) for d in deltas.values()))


def base_norm(model, blocks, mlp=0):
    parts = [model.blocks[i].mlps[mlp] for i in blocks]
    return math.sqrt(sum(float(w.square().sum()) for p in parts for w in (p.gate_up, p.down)))


SHAPES = {
    "far beyond the window": tiny_config(window=16, sinks=2, levels=levels(8, 16)),
    "without sinks": tiny_config(window=16, sinks=0, levels=levels(8, 16)),
    "more sinks than a chunk": tiny_config(window=16, sinks=11, levels=levels(4, 8)),
    "chunks that share no boundary": tiny_config(window=16, sinks=2, levels=levels(6, 16)),
    "a window longer than the session": tiny_config(window=128, levels=levels(8, 32)),
    "a head of its own": tiny_config(window=16, tied_head=False, levels=levels(8, 16)),
    "memories": tiny_native(levels=chained(8, 16)),
    "memories and MLPs in a sum": tiny_native(
        variant=Variant.INDEPENDENT, levels=chained(8, 16, tiny_native(variant=Variant.INDEPENDENT))
    ),
    "memories whose chunks share no boundary": tiny_native(levels=chained(6, 15)),
    "memories between attention": tiny_mixed(window=16, levels=levels(8, 16, shape=tiny_mixed())),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_every_update_is_the_gradient_of_a_plain_forward_pass(plain, config):
    """Earlier tokens' keys and values are constants, as they were read, under the deltas of then.

    The reference reads the whole session; the state must have kept all that the chunk can see,
    though turns end anywhere.
    """
    checkpoint = random_checkpoint(config)
    model, reference = Hope(config, checkpoint.weights), plain(config, checkpoint.weights)
    tokens = tokens_of(sum(PARTS))
    weights = [(0.0, 0.5, 1.0, 1.0, 2.0)[token % 5] for token in tokens]
    state, checked = State(), []
    for part in PARTS:
        turn, end = state.position, state.position + part
        while state.position < end:
            until = until_boundary(state.position, config)
            new = slice(state.position, min(state.position + until, end))
            with torch.no_grad():
                reference.read(tokens[new], state.deltas)
            state = read(model, state, tokens[new], weights[new])
            while state.due:
                due = state.due[0]
                expected, loss, counted = gradient(reference, state, due, tokens, weights)
                before = state.levels.get(due.level, LevelState()).delta
                state, done = consolidate(model, state)
                after = state.levels[due.level].delta

                for name, g in expected.items():
                    wanted = 0.9 * before[name] - g if before else -g
                    size = float(g.abs().max())
                    torch.testing.assert_close(
                        after[name].double(), wanted, rtol=1e-5, atol=2e-5 * size
                    )
                assert done.loss == pytest.approx(loss, abs=1e-5)
                assert done.tokens == counted
                checked.append(due)
        state = compact(state, turn, config)
    assert {due.level for due in checked} == {"fast", "slow"}
    assert checked[-1].start > 3 * config.levels[0].chunk


def gradient(reference, state, due, tokens, weights):
    """Return the gradient of the chunk's loss, the mean of its surprises, their number."""
    config = reference.config
    level = next(each for each in config.levels if each.name == due.level)
    history = [list(block) for block in reference.history]
    first = max(due.start - 1, 0)
    own = {}
    for i in level.blocks:
        name = mlp_name(i, level.mlp)
        own[f"{name}.gate_up"] = torch.zeros(2 * config.hidden, config.width).double()
        own[f"{name}.down"] = torch.zeros(config.width, config.hidden).double()
    own |= {n: d.double() for n, d in state.levels.get(due.level, LevelState()).delta.items()}
    own = {name: d.requires_grad_() for name, d in own.items()}
    reference.forget(first)
    logits = reference.read(tokens[first : due.end - 1], {**state.deltas, **own})
    reference.history = history
    targets = torch.tensor(tokens[first + 1 : due.end])
    surprise = logits.logsumexp(-1) - logits[range(len(targets)), targets]
    counts = torch.tensor(weights[first + 1 : due.end]).double()
    loss = (surprise * counts).sum() / (due.end - due.start)
    found = torch.autograd.grad(loss, list(own.values()))
    return (
        dict(zip(own, found, strict=True)),
        float(surprise[counts > 0].detach().mean()),
        int((counts > 0).sum()),
    )


@pytest.mark.parametrize("config", [tiny_config(window=16), tiny_native(), tiny_mixed(window=16)])
def test_the_engine_consolidates_what_reading_by_hand_does(config):
    checkpoint = random_checkpoint(config)
    model, tokens = Hope(config, checkpoint.weights), tokens_of(40)
    state = State()
    while state.position < 40:
        until = state.position + until_boundary(state.position, config)
        state = read(model, state, tokens[state.position : until])
        while state.due:
            state, _ = consolidate(model, state)

    engine = Engine(model, checkpoint.tokenizer, lanes=1, clock=lambda: 0.0)
    given = tuple((token, 1.0) for token in tokens)
    engine.submit(Turn("a", State(), given, (), 0, 0.0, Sampling(), (), True))
    facts = []
    while not engine.idle:
        facts += engine.step()

    (finished,) = [fact for fact in facts if isinstance(fact, Finished)]
    assert finished.state.levels["slow"].updates == 2
    for name, delta in state.deltas.items():
        assert torch.equal(finished.state.deltas[name], delta)


def test_the_update_keeps_a_share_of_the_old_delta_and_steps_against_the_gradient():
    """With a rate of zero only the retained part is left; the rest is linear in the rate."""

    def after(rate):
        model = model_of(only_fast(rate=rate))
        state = ready(model_of(only_fast()), chunks=2)
        return state.deltas, consolidate(model, state)[0].deltas

    before, still = after(0.0)
    _, once = after(0.1)
    _, twice = after(0.2)

    for name, delta in before.items():
        torch.testing.assert_close(still[name], 0.9 * delta)
        torch.testing.assert_close(
            twice[name] - still[name], 2 * (once[name] - still[name]), rtol=1e-4, atol=1e-7
        )


def test_a_gradient_beyond_the_clip_is_shortened_to_it():
    size = norm(consolidate(*both(only_fast(rate=1.0)))[0].deltas)
    assert size > 0.01

    clipped, done = consolidate(*both(only_fast(rate=1.0, clip=0.01)))
    barely, not_clipped = consolidate(*both(only_fast(rate=1.0, clip=1.01 * size)))

    assert done.outcome is Outcome.CLIPPED
    assert norm(clipped.deltas) == pytest.approx(0.01, rel=1e-4)
    assert not_clipped.outcome is Outcome.APPLIED
    assert norm(barely.deltas) == pytest.approx(size, rel=1e-5)
    for name, delta in clipped.deltas.items():
        torch.testing.assert_close(delta * size / 0.01, barely.deltas[name])


def both(config, **options):
    model = model_of(config)
    return model, ready(model, **options)


def test_the_facts_tell_step_and_movement_as_shares_of_the_base():
    model, state = both(only_fast(), chunks=2)
    base = base_norm(model, (2, 3))

    after, done = consolidate(model, state)

    step = {name: delta - state.deltas[name] for name, delta in after.deltas.items()}
    assert done.step == pytest.approx(norm(step) / base, rel=1e-5)
    assert done.movement == pytest.approx(norm(after.deltas) / base, rel=1e-5)
    level = after.levels["fast"]
    assert (level.updates, level.position, level.outcome) == (2, 16, "applied")
    assert level.movement == done.movement
    assert level.loss == done.loss
    assert (done.level, done.start, done.end) == ("fast", 8, 16)


def test_a_delta_past_its_bound_is_refused_and_the_old_one_stays():
    state = ready(model_of(only_fast()), chunks=2)
    bound = 0.5 * state.levels["fast"].movement
    strict = model_of(only_fast(bound=bound))

    after, done = consolidate(strict, state)

    assert done.outcome is Outcome.REJECTED
    assert after.levels["fast"].delta is state.levels["fast"].delta
    assert after.levels["fast"].updates == 1
    assert after.levels["fast"].movement == state.levels["fast"].movement
    assert after.levels["fast"].outcome == "rejected"
    assert after.levels["fast"].position == 16
    assert done.step == 0.0
    assert after.due == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("chunks", [1, 2], ids=["first", "later"])
def test_a_loss_that_is_not_finite_changes_nothing(value, chunks):
    model = model_of(only_fast())
    state = ready(model, chunks=chunks)
    last = state.pieces[-1]
    inputs = last.inputs.clone()
    inputs[3, 5] = value
    state = replace(state, pieces=(*state.pieces[:-1], replace(last, inputs=inputs)))

    after, done = consolidate(model, state)

    assert done.outcome is Outcome.REJECTED
    before = state.levels.get("fast", LevelState())
    assert after.levels["fast"].delta == before.delta
    assert after.levels["fast"].updates == before.updates
    assert after.levels["fast"].loss is None
    assert after.due == ()


def test_a_gradient_that_is_not_finite_changes_nothing():
    """Activations so large that the loss is still a number, but not its square."""
    model = model_of(only_fast())
    state = ready(model)
    name = "blocks.2.gate_up"
    huge = {
        key: torch.full_like(d, 3e18 if key == name else 1e18)
        for key, d in consolidate(model, state)[0].deltas.items()
    }
    state = replace(state, levels={"fast": LevelState(delta=huge, updates=1)})

    after, done = consolidate(model, state)

    assert done.outcome is Outcome.REJECTED
    assert after.levels["fast"].delta is huge
    assert after.levels["fast"].updates == 1


def test_many_updates_never_pass_the_proven_bound():
    model = model_of(only_fast(rate=50.0, retain=0.8, clip=0.1))
    most = 50.0 * 0.1 / (1 - 0.8)
    state, sizes = State(), []
    for i in range(60):
        state = read(model, state, tokens_of(8, seed=i % 3))
        state, done = consolidate(model, state)
        assert done.outcome is Outcome.CLIPPED
        sizes.append(norm(state.deltas))

    assert max(sizes) <= most * (1 + 1e-5)
    assert max(sizes) > 0.2 * most  # near enough for the bound to be of use


def test_at_a_shared_boundary_the_slow_level_learns_first():
    config = tiny_config()
    model = model_of(config)
    state = read(model, State(), tokens_of(16))
    order = []
    while state.due:
        state, done = consolidate(model, state)
        order.append((done.level, done.start, done.end))

    assert order == [("fast", 0, 8), ("slow", 0, 16), ("fast", 8, 16)]


def test_a_level_learns_under_the_deltas_of_the_other():
    model = model_of(tiny_config(levels=levels(8, 16)))
    state = read(model, State(), tokens_of(16))
    state, _ = consolidate(model, state)
    alone = replace(state, levels={})

    _, together = consolidate(model, state)
    _, apart = consolidate(model, alone)

    assert together.level == apart.level == "slow"
    assert together.loss != apart.loss


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.0] * 8, False),
        ([1.0] + [0.0] * 7, False),  # nothing comes before the session's first token
        ([0.0] * 7 + [0.1], True),
    ],
    ids=["nothing counts", "only the first token", "only the last token"],
)
def test_a_chunk_is_due_only_if_a_token_of_it_can_be_learned(weights, expected):
    state = read(model_of(only_fast()), State(), tokens_of(8), weights)

    assert learnable(state, Due("fast", 0, 8)) is expected
    assert bool(state.due) is expected


def test_the_first_token_of_a_later_chunk_counts():
    model = model_of(only_fast())
    state = read(model, State(), tokens_of(8), [0.0] * 8)
    state = read(model, state, tokens_of(8, seed=1), [1.0] + [0.0] * 7)

    _, done = consolidate(model, state)

    assert (done.start, done.tokens) == (8, 1)


def test_weights_scale_the_step():
    model = model_of(only_fast())
    whole, one = consolidate(model, ready(model))
    third, other = consolidate(model, ready(model, weights=[0.25] * 8))

    assert one.loss == other.loss
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(third.deltas[name], 0.25 * delta)


def test_what_only_one_token_says_moves_the_level_an_eighth():
    """The mean is over the chunk's length, not over the tokens that count."""
    model = model_of(only_fast())
    alone = [
        consolidate(model, ready(model, weights=[float(i == j) for j in range(8)]))[0].deltas
        for i in range(1, 8)
    ]
    whole = consolidate(model, ready(model))[0].deltas

    for name, delta in whole.items():
        total = sum(part[name] for part in alone)
        torch.testing.assert_close(total, delta, rtol=1e-4, atol=1e-8)


def test_neither_the_base_nor_the_state_given_is_touched():
    model, state = both(tiny_config(levels=levels(8, 16)), chunks=1)
    state, _ = consolidate(model, state)
    state = read(model, state, tokens_of(8))
    base = [
        model.embedding,
        model.norm,
        *(w for b in model.blocks for m in b.mlps for w in (m.gate_up, m.down)),
    ]
    parts = ("tokens", "weights", "keys", "values", "inputs")
    held = [*base, *state.deltas.values()]
    held += [getattr(p, part) for p in (*state.pieces, state.sinks) for part in parts]
    copies, shape = [tensor.clone() for tensor in held], replace(state)

    after, _ = consolidate(model, state)

    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert not any(tensor.requires_grad for tensor in (*held, *after.deltas.values()))
    assert state == shape
    assert state.due
    assert len(after.due) == len(state.due) - 1


def test_a_model_in_bfloat16_keeps_its_deltas_in_float32_and_learns_alike():
    config = only_fast()
    exact = consolidate(*both(config))[0].deltas
    model = model_of(config, dtype=torch.bfloat16)

    rough = consolidate(model, ready(model))[0].deltas

    for name, delta in exact.items():
        assert rough[name].dtype == torch.float32
        alike = torch.nn.functional.cosine_similarity(delta.view(-1), rough[name].view(-1), 0)
        assert float(alike) > 0.98


def test_learning_lowers_the_loss_of_what_was_learned():
    model = model_of(only_fast())
    state = ready(model)
    losses = []
    for _ in range(10):
        again = replace(state, due=(Due("fast", 0, 8),))
        state, done = consolidate(model, again)
        losses.append(done.loss)

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
