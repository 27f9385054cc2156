"""What a level may be beside plain: nested, of low rank, gated, staggered, of another rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hope_runtime.blobs import StateError
from hope_runtime.config import ConfigError, HopeConfig, LevelConfig, Variant
from hope_runtime.consolidation import Outcome
from hope_runtime.engine import Engine, Turn
from hope_runtime.model import Hope
from hope_runtime.ops import optimisers
from hope_runtime.ops.low_rank import truncated
from hope_runtime.own_levels import add_level, remove_level
from hope_runtime.report import Finished, Learned
from hope_runtime.sampling import Sampling
from hope_runtime.state import FORMAT, State, dump, restore
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native

VECTORS = Path(__file__).parent / "vectors"
FAST = LevelConfig("fast", 8, (3,), rate=0.01, retain=0.99)
SLOW = LevelConfig("slow", 16, (2,), rate=0.01, retain=0.999)


def tiny(*levels, **changes):
    return tiny_config(levels=levels, **changes)


def tokens_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 123, (count,), generator=generator).tolist()


def model_of(config):
    return Hope(config, random_checkpoint(config).weights)


def learn(model, state, tokens, *, said=0):
    """Return the state after a turn, and what each consolidation did."""
    facts = run(model, (state, tokens), said=said)
    (finished,) = [fact for fact in facts if isinstance(fact, Finished)]
    return finished.state, [fact.consolidated for fact in facts if isinstance(fact, Learned)]


def run(model, *turns, said=0):
    """Return the facts of turns that are taken together."""
    tokenizer = random_checkpoint(tiny_config()).tokenizer
    engine = Engine(model, tokenizer, lanes=len(turns), clock=lambda: 0.0)
    for i, (state, tokens) in enumerate(turns):
        given = tuple((token, 1.0) for token in tokens)
        engine.submit(Turn(f"{i}", state, given, (), said, 1.0, Sampling(seed=1), (), True))
    facts = []
    while not engine.idle:
        facts += engine.step()
    return facts


def again(state, config):
    """Return the state as it comes back from the store."""
    facts, blobs, _ = dump(state, None)
    return restore(json.loads(json.dumps(facts)), blobs, config, torch.float32)


def products(state):
    """Return the session's deltas as matrices, in one order."""
    held = state.deltas
    names = sorted({name.removesuffix(".left").removesuffix(".right") for name in held})
    return [held[n] if n in held else held[f"{n}.left"] @ held[f"{n}.right"] for n in names]


def logits_of(model, state, token=101):
    x = model.embed(torch.tensor([[token]]))
    with torch.no_grad():
        read = model.run(x, torch.tensor([0]), model.nothing(1), [state.deltas])
        return model.logits(read.hidden)


def norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def assert_same(one: State, other: State):
    assert one.levels.keys() == other.levels.keys()
    for name, level in one.levels.items():
        twin = other.levels[name]
        assert level.tensors.keys() == twin.tensors.keys()
        assert all(torch.equal(t, twin.tensors[key]) for key, t in level.tensors.items())
        bare = {"delta": {}, "start": {}, "moments": None}
        assert replace(level, **bare) == replace(twin, **bare)


# --- whatever a level is, a restart changes nothing ---------------------------------------------

KINDS = {
    "plain": tiny(FAST, SLOW),
    "momentum": tiny(replace(FAST, optimiser="momentum"), SLOW),
    "adam": tiny(replace(FAST, optimiser="adam"), replace(SLOW, optimiser="adamw")),
    "m3": tiny(replace(FAST, optimiser="m3"), SLOW),
    "muon and deep momentum": tiny(
        replace(FAST, optimiser="muon"), replace(SLOW, optimiser="deep_momentum")
    ),
    "low rank": tiny(replace(FAST, rank=3), replace(SLOW, rank=1000)),
    "gated": tiny(replace(FAST, gate=2.0), replace(SLOW, gate=1.0)),
    "staggered": tiny(FAST, replace(SLOW, offset=5)),
    "nested": tiny(replace(FAST, start_rate=0.3), SLOW, variant=Variant.NESTED),
    "nested without a learned start": tiny(FAST, SLOW, variant=Variant.NESTED),
    "nested, of low rank": tiny(
        replace(FAST, start_rate=0.3, rank=4), replace(SLOW, rank=4), variant=Variant.NESTED
    ),
    "nested, with moments": tiny(
        replace(FAST, start_rate=0.3, optimiser="adam"), SLOW, variant=Variant.NESTED
    ),
    "native, side by side": tiny_native(variant=Variant.INDEPENDENT),
    "native, nested, staggered": tiny_native(
        variant=Variant.NESTED,
        levels=tuple(
            replace(level, offset=3, start_rate=0.5 * (level.mlp == 0))
            for level in tiny_native().levels
        ),
    ),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_session_stored_and_read_again_goes_on_as_if_never_interrupted(config):
    """The store is visited before a boundary, at a shared one, and with a chunk due."""
    model, tokens = model_of(config), tokens_of(60)
    whole = broken = State()
    for part in (tokens[:13], tokens[13:32], tokens[32:37], tokens[37:]):
        whole, _ = learn(model, whole, part)
        broken, _ = learn(model, again(broken, config), part)
        assert_same(whole, broken)
        assert again(broken, config).bytes == broken.bytes
    assert whole.levels["fast"].updates >= 6
    assert whole.levels["slow"].updates >= 2


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_how_a_stream_is_split_into_turns_changes_nothing(config):
    """In float64: Adam and a truncation can make much of a last bit."""
    model = Hope(config, random_checkpoint(config).weights, dtype=torch.float64)
    tokens = tokens_of(49)
    whole, _ = learn(model, State(), tokens)
    state = State()
    for start in range(0, 49, 7):
        state, _ = learn(model, state, tokens[start : start + 7])

    assert whole.deltas.keys() == state.deltas.keys()
    for one, other in zip(products(whole), products(state), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    for name, level in whole.levels.items():
        assert level.updates == state.levels[name].updates


def test_later_tokens_change_nothing_that_was_learned_before():
    for config in KINDS.values():
        model, tokens = model_of(config), tokens_of(24)
        _, one = learn(model, State(), [*tokens[:21], 98, 98, 98])
        _, other = learn(model, State(), [*tokens[:21], 121, 98, 121])
        seen = [each for each in one if each.end <= 21]
        assert len(seen) >= 3
        assert other[: len(seen)] == seen


# --- nested (eq. 72) ----------------------------------------------------------------------------


def test_a_nested_level_begins_again_when_its_context_ends():
    config = tiny(FAST, replace(SLOW, chunk=24), variant=Variant.NESTED)
    model, tokens = model_of(config), tokens_of(32)

    before, steps = learn(model, State(), tokens[:23])
    after, last = learn(model, before, tokens[23:24])
    later, _ = learn(model, after, tokens[24:])

    assert [s.level for s in steps] == ["fast", "fast"]
    assert [s.level for s in last] == ["fast", "slow"]  # its third step is its last
    assert before.levels["fast"].delta
    assert after.levels["fast"].delta == {}
    assert (after.levels["fast"].updates, after.levels["fast"].movement) == (3, 0.0)
    assert after.levels["slow"].delta
    assert later.levels["fast"].movement == pytest.approx(0.01, rel=1e-3)  # one step from the base


def test_the_start_of_a_nested_level_moves_toward_where_it_ended():
    sequential = tiny(FAST, SLOW)
    alone = tiny(FAST)
    nested = tiny(replace(FAST, start_rate=0.25), SLOW, variant=Variant.NESTED)
    tokens = tokens_of(32)

    ended, _ = learn(model_of(alone), State(), tokens[:16])
    first, _ = learn(model_of(nested), State(), tokens[:16])
    plain, _ = learn(model_of(sequential), State(), tokens[:16])

    for name, delta in ended.levels["fast"].delta.items():
        torch.testing.assert_close(first.levels["fast"].start[name], 0.25 * delta)
        assert torch.equal(first.levels["fast"].delta[name], first.levels["fast"].start[name])
        assert not torch.allclose(plain.levels["fast"].delta[name], 0.25 * delta)
    quarter = 0.25 * ended.levels["fast"].movement
    assert first.levels["fast"].movement == pytest.approx(quarter, rel=1e-4)


def test_of_three_nested_levels_each_begins_again_with_the_next_slower_one():
    levels = [
        LevelConfig(name, chunk, (block,), rate=0.01, retain=0.99, start_rate=rate)
        for name, chunk, block, rate in (("a", 4, 3, 0.5), ("b", 8, 2, 0.0), ("c", 16, 1, 0.0))
    ]
    config = tiny(*levels, variant=Variant.NESTED)
    model, tokens = model_of(config), tokens_of(16)

    eight, _ = learn(model, State(), tokens[:8])
    sixteen, order = learn(model, eight, tokens[8:])

    assert eight.levels["a"].start
    assert eight.levels["b"].delta
    assert sixteen.levels["b"].delta == {}
    assert [(done.level, done.end) for done in order] == [
        ("a", 12), ("a", 16), ("b", 16), ("c", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((FAST, replace(SLOW, chunk=12)), "cannot be nested"),
        ((FAST, replace(SLOW, chunk=8)), "cannot be nested"),
        ((FAST, replace(SLOW, offset=4)), "cannot be nested"),
        ((FAST, replace(SLOW, start_rate=0.5)), "lives in no slower level"),
    ],
)
def test_levels_that_do_not_nest_are_refused(levels, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*levels, variant=Variant.NESTED)


def test_a_start_rate_outside_a_nest_is_refused():
    with pytest.raises(ConfigError, match="lives in no slower level"):
        tiny(replace(FAST, start_rate=0.5), SLOW)


def test_what_a_nested_level_hands_back_stays_within_its_bound():
    config = tiny(
        replace(FAST, start_rate=1.0, rate=0.02, bound=0.05), SLOW, variant=Variant.NESTED
    )
    state, done = learn(model_of(config), State(), tokens_of(8, seed=3) * 25)

    assert max(each.movement for each in done) <= 0.05
    assert any(each.outcome is Outcome.REJECTED for each in done)
    assert state.levels["fast"].movement <= 0.05


# --- low rank -----------------------------------------------------------------------------------


def test_factors_are_the_nearest_of_their_rank():
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 7), (7, 12), (5, 5)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)

        left, right = truncated(matrix, 3)

        assert (left.shape, right.shape) == ((shape[0], 3), (3, shape[1]))
        torch.testing.assert_close(left @ right, u[:, :3] * s[:3] @ v[:3])
        torch.testing.assert_close(torch.matmul(*truncated(matrix, min(shape))), matrix)


def test_a_delta_of_full_rank_in_factors_is_the_whole_one():
    tokens = tokens_of(32)
    whole, _ = learn(model_of(tiny(FAST, SLOW)), State(), tokens)
    factors, _ = learn(model_of(tiny(replace(FAST, rank=99), SLOW)), State(), tokens)

    held = factors.levels["fast"].delta
    for name, delta in whole.levels["fast"].delta.items():
        size = float(delta.abs().max())
        product = held[f"{name}.left"] @ held[f"{name}.right"]
        torch.testing.assert_close(product, delta, rtol=1e-3, atol=1e-3 * size)


def test_a_step_of_low_rank_is_the_nearest_to_the_whole_step():
    tokens = tokens_of(8)
    whole, _ = learn(model_of(tiny(FAST)), State(), tokens)
    model = model_of(tiny(replace(FAST, rank=2)))
    thin, (done,) = learn(model, State(), tokens)

    held, kept = thin.levels["fast"].delta, 0.0
    for name, delta in whole.levels["fast"].delta.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        near = u[:, :2] * s[:2] @ v[:2]
        product = held[f"{name}.left"] @ held[f"{name}.right"]
        torch.testing.assert_close(product, near, rtol=1e-3, atol=1e-4 * float(s[0]))
        kept += float(near.square().sum())
    assert done.movement < whole.levels["fast"].movement
    assert done.movement == pytest.approx(done.step)
    config = model.config
    assert thin.levels["fast"].bytes == 4 * 2 * (3 * config.hidden + 2 * config.width)


def test_factors_are_read_as_their_product(plain):
    """The batch never multiplies them out; the definition does."""
    config = tiny(replace(FAST, rank=3), replace(SLOW, rank=5))
    checkpoint = random_checkpoint(config)
    state, _ = learn(model_of(config), State(), tokens_of(40))
    held = state.deltas
    names = {name.rpartition(".")[0] for name in held}
    products = {name: held[f"{name}.left"] @ held[f"{name}.right"] for name in names}
    reference = plain(config, checkpoint.weights)

    expected = reference.read([101], products)

    found = logits_of(Hope(config, checkpoint.weights), state)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 4, "optimiser": "adam"}, "as large as the delta"),
        ({"optimiser": "delta_gradient_descent"}, "needs the inputs"),
        ({"optimiser": "newton"}, "no optimiser 'newton'"),
        ({"offset": 8}, "not one of 0..7"),
        ({"offset": -1}, "not one of 0..7"),
        ({"gate": -1.0}, "must not be negative"),
        ({"start_rate": 1.5}, "not in"),
    ],
)
def test_what_a_level_cannot_be_is_refused_with_the_reason(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(FAST, **change)


# --- gate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("usual", [1.0, 3.0, 9.0, 30.0])
def test_a_gate_shortens_the_step_of_a_chunk_that_surprises_less_than_usual(usual):
    level = replace(FAST, retain=1.0)
    free, gated = model_of(tiny(level)), model_of(tiny(replace(level, gate=3.0)))
    state, _ = learn(free, State(), tokens_of(8))
    _, (whole,) = learn(free, state, tokens_of(8, seed=1))
    levels = {"fast": replace(state.levels["fast"], usual=usual)}

    after, (done,) = learn(gated, replace(state, levels=levels), tokens_of(8, seed=1))

    share = min(1.0, done.loss / usual) ** 3
    assert done.loss == whole.loss
    assert done.step == pytest.approx(whole.step * share, rel=1e-3)
    assert after.levels["fast"].usual == pytest.approx(usual + (done.loss - usual) / 10)


def test_the_first_surprise_of_a_gated_level_is_the_usual_one():
    free, (whole,) = learn(model_of(tiny(FAST)), State(), tokens_of(8))
    state, (done,) = learn(model_of(tiny(replace(FAST, gate=3.0))), State(), tokens_of(8))

    assert done == whole
    assert state.levels["fast"].usual == done.loss
    assert free.levels["fast"].usual is None


# --- optimisers ---------------------------------------------------------------------------------


def test_momentum_goes_on_where_the_last_steps_went():
    """By hand: the same gradient twice, since the rate is too small to change it."""
    level = replace(FAST, rate=1e-9, retain=1.0, clip=1e9)
    plain, _ = learn(model_of(tiny(level)), State(), tokens_of(8))
    config = tiny(replace(level, optimiser="momentum"))
    model = model_of(config)
    once, _ = learn(model, State(), tokens_of(8))

    name = "blocks.3.down"
    g = plain.levels["fast"].delta[name]
    torch.testing.assert_close(once.levels["fast"].delta[name], g)
    moments = once.levels["fast"].moments
    assert moments is not None
    assert int(moments.step) == 1
    torch.testing.assert_close(moments.memories["momentum"][name], g)
    rule = optimisers.named("momentum")
    expected, _ = rule.update({name: -g / 1.0}, _only(moments, name), rate=1.0)
    twice, _ = learn(model, once, tokens_of(8))
    moved = twice.levels["fast"].delta[name] - once.levels["fast"].delta[name]
    size = norm([moved])
    assert size > 0
    assert expected[name].shape == moved.shape


def _only(state, name):
    memories = {kind: {name: memory[name]} for kind, memory in state.memories.items()}
    return state._replace(memories=memories)


@pytest.mark.parametrize("rule", ["adam", "muon", "m3", "momentum", "preconditioned_momentum"])
def test_no_rule_steps_further_than_gradient_descent_may(rule):
    level = replace(FAST, optimiser=rule, clip=0.3)
    state, done = learn(model_of(tiny(level)), State(), tokens_of(80))

    most = level.rate * level.clip
    assert len(done) == 10
    for each in done:  # a step and what was forgotten
        assert each.step <= most + (1 - level.retain) * most * 10
    assert done[0].step == pytest.approx(most, rel=1e-4)
    assert state.levels["fast"].movement <= most * 10


def test_moments_are_part_of_the_size_of_a_session():
    plain, _ = learn(model_of(tiny(FAST)), State(), tokens_of(16))
    adam, _ = learn(model_of(tiny(replace(FAST, optimiser="adam"))), State(), tokens_of(16))

    size = plain.levels["fast"].bytes
    assert adam.levels["fast"].bytes == 3 * size + 8  # and the count of its steps
    assert adam.bytes - plain.bytes == 2 * size + 8


def test_moments_of_another_shape_are_named():
    config = tiny(replace(FAST, optimiser="adam"))
    state, _ = learn(model_of(config), State(), tokens_of(16))
    facts, blobs, _ = dump(state, None)
    other = tiny(replace(FAST, optimiser="momentum"))

    with pytest.raises(StateError, match="moments/momentum"):
        restore(facts, blobs, other, torch.float32)


# --- a session's own levels ---------------------------------------------------------------------

WIDE = tiny(FAST, replace(SLOW, blocks=(1,)))
MIDDLE = LevelConfig("middle", 12, (2,), rate=0.01, retain=0.99)


def test_a_new_level_changes_no_bit_and_learns_from_its_first_whole_chunk():
    model = model_of(WIDE)
    state, _ = learn(model, State(), tokens_of(20))

    more = add_level(state, MIDDLE, WIDE)
    after, done = learn(model, again(more, WIDE), tokens_of(30, seed=1))

    assert torch.equal(logits_of(model, more), logits_of(model, state))
    assert more.deltas.keys() == state.deltas.keys()
    ours = [(each.start, each.end) for each in done if each.level == "middle"]
    assert ours == [(24, 36), (36, 48)]
    assert after.levels["middle"].updates == 2
    assert again(after, WIDE).own == (*WIDE.levels, MIDDLE)
    assert {name for name in after.deltas if "blocks.2" in name}


def test_a_session_with_a_level_from_the_start_learns_as_a_model_that_has_it():
    with_it = replace(WIDE, levels=(*WIDE.levels, MIDDLE))
    checkpoint = random_checkpoint(WIDE)
    tokens = tokens_of(40)
    theirs, _ = learn(Hope(with_it, checkpoint.weights), State(), tokens)
    ours, _ = learn(Hope(WIDE, checkpoint.weights), add_level(State(), MIDDLE, WIDE), tokens)

    assert_same(ours, theirs)


def test_a_native_session_can_get_a_level_anywhere_in_a_chunk():
    lone = tiny_native(levels=tiny_native().levels[1:])
    model, new = model_of(lone), tiny_native().levels[0]
    for position in (7, 8, 9, 15, 16, 17):
        state, _ = learn(model, State(), tokens_of(position))
        more = again(add_level(state, new, lone), lone)
        after, done = learn(model, more, tokens_of(20, seed=2))

        ends = [each.end for each in done if each.level == new.name]
        assert ends == [n for n in range(8, position + 21, 8) if n - 8 > position + 1]
        assert_same(again(after, lone), after)


def test_sessions_with_different_levels_learn_together_as_each_would_alone():
    thin = LevelConfig("middle", 12, (2,), rate=0.01, retain=0.99, rank=3)
    model, tokens = model_of(WIDE), tokens_of(40)
    states = [
        State(),
        add_level(State(), MIDDLE, WIDE),
        add_level(State(), thin, WIDE),
        remove_level(State(), "fast", WIDE),
    ]
    alone = [learn(model, state, tokens)[0] for state in states]

    facts = run(model, *((state, tokens) for state in states), said=5)

    ended = {fact.job: fact.state for fact in facts if isinstance(fact, Finished)}
    assert ended.keys() == {"0", "1", "2", "3"}
    for job, one in enumerate(alone):
        other = ended[str(job)]
        assert one.levels.keys() == other.levels.keys()
        for a, b in zip(products(one), products(other), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_a_level_that_is_removed_frees_what_it_learned():
    model = model_of(WIDE)
    state, _ = learn(model, State(), tokens_of(20))

    less = remove_level(state, "fast", WIDE)
    after, done = learn(model, again(less, WIDE), tokens_of(20, seed=1))

    assert not any("blocks.3" in name for name in less.deltas)
    assert less.bytes < state.bytes
    assert {each.level for each in done} == {"slow"}
    assert after.levels.keys() == {"slow"}


def test_chunks_due_go_with_their_level():
    state, _ = learn(model_of(WIDE), State(), tokens_of(6), said=6)
    assert [due.level for due in state.due] == ["fast"]

    assert remove_level(state, "fast", WIDE).due == ()


def test_a_level_folded_into_another_goes_on_at_its_pace_and_changes_no_bit():
    config = tiny(FAST, SLOW)
    model = model_of(config)
    state, _ = learn(model, State(), tokens_of(20))

    one = remove_level(state, "fast", config, into="slow")
    after, done = learn(model, again(one, config), tokens_of(20, seed=1))

    assert torch.equal(logits_of(model, one), logits_of(model, state))
    assert one.own == (replace(SLOW, blocks=(2, 3)),)
    assert [(each.level, each.end) for each in done] == [("slow", 32)]
    moved = after.levels["slow"].delta
    assert all(not torch.equal(moved[name], delta) for name, delta in state.deltas.items())


def test_a_level_that_never_moved_can_take_over_one_that_did():
    config = tiny(FAST, SLOW)
    state, _ = learn(model_of(config), State(), tokens_of(9))
    assert state.levels.keys() == {"fast"}

    one = again(remove_level(state, "fast", config, into="slow"), config)

    assert {name: float(d.abs().sum()) > 0 for name, d in one.deltas.items()} == {
        "blocks.2.gate_up": False,
        "blocks.2.down": False,
        "blocks.3.gate_up": True,
        "blocks.3.down": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: add_level(s, replace(MIDDLE, blocks=(0,)), WIDE), "block 0 is below 1"),
        (lambda s: add_level(s, replace(MIDDLE, blocks=(3,)), WIDE), "is in level 'fast'"),
        (lambda s: add_level(s, replace(MIDDLE, name="fast"), WIDE), "same name"),
        (lambda s: add_level(s, replace(MIDDLE, chunk=99), WIDE), "longer than the window"),
        (lambda s: remove_level(s, "other", WIDE), "no level 'other'"),
        (lambda s: remove_level(s, "fast", WIDE, into="other"), "no level 'other'"),
        (lambda s: remove_level(s, "fast", WIDE, into="fast"), "no level 'fast'|cannot take over"),
    ],
)
def test_a_change_of_levels_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change(State())


def test_factors_cannot_be_taken_over_by_a_level_of_whole_matrices():
    config = tiny(replace(FAST, rank=2), SLOW)

    with pytest.raises(ConfigError, match="same rank"):
        remove_level(State(), "fast", config, into="slow")


def test_own_levels_that_do_not_suit_the_model_are_named():
    state, _ = learn(model_of(WIDE), add_level(State(), MIDDLE, WIDE), tokens_of(20))
    facts, blobs, _ = dump(state, None)
    facts["own"][0]["blocks"] = [77]

    with pytest.raises(StateError, match="block 77"):
        restore(facts, blobs, WIDE, torch.float32)


# --- configurations -----------------------------------------------------------------------------


def test_a_configuration_comes_back_from_json_and_an_old_one_is_understood():
    for config in KINDS.values():
        assert HopeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    old = tiny_native().to_json()
    del old["variant"]

    assert HopeConfig.from_json({**old, "independent": False}) == tiny_native()
    assert HopeConfig.from_json({**old, "independent": True}).variant is Variant.INDEPENDENT


def test_a_stored_session_fits_only_levels_of_its_kind():
    digests = {name: config.learning_digest for name, config in KINDS.items()}
    base = tiny(FAST, SLOW)

    assert digests["plain"] == digests["gated"] == base.learning_digest == "55bf4dd4"
    different = ("plain", "momentum", "adam", "m3", "low rank", "staggered", "nested")
    assert len({digests[name] for name in different}) == len(different)


def test_a_session_stored_before_levels_could_be_more_is_read_and_goes_on():
    """The file was written by the version before: a state, then what it had after more tokens."""
    config = tiny_config(width=8, heads=2, key_heads=1, head_width=4, hidden=8)
    with safe_open(VECTORS / "session_format_1.safetensors", "pt") as file:
        about = {key: json.loads(file.metadata()[key]) for key in ("facts", "more")}
        digest = file.metadata()["digest"]
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    blobs = {n.removeprefix("blob/"): bytes(t.numpy()) for n, t in found.items() if "blob/" in n}

    state = restore(about["facts"], blobs, config, torch.float32)
    facts, written, _ = dump(state, None)
    after, _ = learn(model_of(config), state, about["more"])

    assert digest == config.learning_digest
    assert json.loads(json.dumps(facts)) == {**about["facts"], "format": FORMAT}
    assert written == blobs
    for name, delta in after.deltas.items():
        torch.testing.assert_close(delta, found[f"after/{name}"], rtol=1e-4, atol=1e-7)
