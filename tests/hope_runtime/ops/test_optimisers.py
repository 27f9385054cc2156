"""Optimisers as memories: each rule is its equation, and torch's where torch has it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from hope_runtime.ops import optimisers
from hope_runtime.ops.optimisers import (
    M3,
    RULES,
    Adam,
    Decayed,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    FactoredDescent,
    Factors,
    GradientDescent,
    Momentum,
    Muon,
    OptimiserState,
    PreconditionedMomentum,
    PrintedM3,
    apply,
    clip_by_norm,
    flatten,
    naive,
    named,
    newton_schulz,
    restore,
)

DOUBLE = torch.float64
SHAPES = {"square": (5, 5), "tall": (9, 4), "wide": (3, 8), "heads": (2, 4, 6)}
EVERY = [*RULES]


def random(*shape, seed=0, dtype=DOUBLE, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=DOUBLE) * scale).to(dtype)


def params_of(dtype=DOUBLE, seed=0):
    return {name: random(*shape, seed=seed, dtype=dtype) for name, shape in SHAPES.items()}


def factors_of(dtype=DOUBLE, seed=0, tokens=3):
    """Return one gradient a parameter, as every rule takes it."""
    return {
        name: Factors(
            random(*shape[:-2], tokens, shape[-2], seed=seed, dtype=dtype, scale=0.3),
            random(*shape[:-2], tokens, shape[-1], seed=seed + 1, dtype=dtype, scale=0.3),
        )
        for name, shape in SHAPES.items()
    }


def run(rule, gradients, params, rate=0.1, state=None):
    """Return the parameters after a row of gradients, the state, and all updates."""
    state = rule.init(params) if state is None else state
    made = []
    for gradient in gradients:
        updates, state = rule.update(gradient, state, params, rate=rate)
        params = apply(params, updates)
        made.append(updates)
    return params, state, made


def run_torch(optimiser_of, gradients, params):
    """Return the parameters after the same gradients under an optimiser of torch."""
    own = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimiser = optimiser_of(own.values())
    for gradient in gradients:
        for name, p in own.items():
            p.grad = gradient[name].clone()
        optimiser.step()
    return {name: p.detach() for name, p in own.items()}


def plain(gradients):
    return {name: gradient.dense for name, gradient in gradients.items()}


# what every rule keeps


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", EVERY)
def test_the_same_inputs_twice_give_the_same_outputs_and_stay_as_they_were(name, dtype):
    rule, params, gradients = named(name), params_of(dtype), factors_of(dtype)
    _, state, _ = run(rule, [factors_of(dtype, seed=7)], params)
    before = [each.clone() for each in (*params.values(), *flatten(state).values())]
    given_before = [part.clone() for gradient in gradients.values() for part in gradient]

    first, after = rule.update(gradients, state, params, rate=0.1)
    second, after_too = rule.update(gradients, state, params, rate=0.1)

    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(flatten(after_too), flatten(after), rtol=0, atol=0)
    now = [*params.values(), *flatten(state).values()]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    given_now = [part for gradient in gradients.values() for part in gradient]
    torch.testing.assert_close(given_now, given_before, rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_restart_from_the_saved_state_continues_exactly(name):
    hyper = {"chunk": 3} if name.startswith("m3") else {}
    rule, gradients = named(name, **hyper), [factors_of(torch.float32, seed=i) for i in range(9)]
    whole, end, _ = run(rule, gradients, params_of(torch.float32))

    half, state, _ = run(rule, gradients[:4], params_of(torch.float32))
    stored = load(save(flatten(state)))
    rest, end_too, _ = run(rule, gradients[4:], half, state=restore(stored))

    torch.testing.assert_close(rest, whole, rtol=0, atol=0)
    torch.testing.assert_close(flatten(end_too), flatten(end), rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_single_precision_follows_double_precision(name):
    gradients = [factors_of(seed=i) for i in range(5)]
    single = [
        {n: Factors(*(part.float() for part in f)) for n, f in each.items()} for each in gradients
    ]

    exact, _, _ = run(named(name), gradients, params_of(), rate=0.01)
    found, _, _ = run(named(name), single, params_of(torch.float32), rate=0.01)

    for key, parameter in found.items():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.double(), exact[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_remembered_in_single(name):
    params = params_of(torch.bfloat16)

    found, state, updates = run(named(name), [factors_of(torch.bfloat16)], params)

    kept = {t.dtype for memory in state.memories.values() for t in memory.values()}
    assert kept <= {torch.float32}
    assert {u.dtype for u in updates[0].values()} == {torch.float32}
    assert {p.dtype for p in found.values()} == {torch.bfloat16}


# a rate for each rule, and what may be left of the loss after 200 steps
LEARNS = {
    "gradient_descent": (0.5, 0.02),
    "factored_descent": (0.02, 0.05),  # steps of one size come no nearer than their size
    "delta_gradient_descent": (0.5, 0.3),  # half-way: what it erases balances what it writes
    "momentum": (0.1, 0.02),
    "preconditioned_momentum": (0.003, 0.02),
    "delta_momentum": (0.1, 0.02),
    "deep_momentum": (0.5, 0.02),
    "muon": (0.02, 0.02),
    "m3": (0.01, 0.1),  # steps of one size come no nearer than their size
    "m3_printed": (0.1, 0.2),  # swings: what forgets nothing must overshoot to turn round
    "adam": (0.02, 0.02),
    "adamw": (0.02, 0.02),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", EVERY)
def test_every_rule_learns_a_small_regression(name, dtype):
    tokens, inputs, outputs = 32, 6, 4
    x = random(tokens, inputs, dtype=dtype)
    y = x @ random(outputs, inputs, seed=1, dtype=dtype).mT
    params = {"w": torch.zeros(outputs, inputs, dtype=dtype)}
    rule = named(name, **({"chunk": 10} if name.startswith("m3") else {}))
    state, share, (rate, left) = rule.init(params), math.sqrt(tokens), LEARNS[name]

    def loss():
        return float((x @ params["w"].mT - y).square().sum(-1).mean() / 2)

    start = loss()
    for _ in range(200):
        # the mean over tokens: both factors divided by the root of their number
        error = Factors((x @ params["w"].mT - y) / share, x / share)
        updates, state = rule.update({"w": error}, state, params, rate=rate)
        params = apply(params, updates)

    assert loss() < left * start


def test_nothing_stops_a_gradient_through_the_update():
    start = random(3, 4).requires_grad_()
    rule = Adam()

    updates, _ = rule.update({"w": start * 2.0}, rule.init({"w": start}), rate=1.0)
    updates["w"].sum().backward()

    assert start.grad is not None


# gradient descent and the delta rule


def test_factored_descent_moves_every_row_and_column_alike():
    old, gradient = random(5, 7, dtype=DOUBLE), random(5, 7, seed=1, dtype=DOUBLE)
    uneven = gradient * torch.logspace(-2, 0, 5, dtype=DOUBLE)[:, None]
    rule = FactoredDescent()
    updates, _ = rule.update({"w": uneven}, rule.init({"w": old}), rate=0.3)

    assert torch.allclose(old + updates["w"], naive.factored_descent(old, uneven, 0.3))
    square = uneven.square()
    fit = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    assert torch.allclose(0.09 * square / updates["w"].square(), fit)
    assert torch.allclose(fit.mean(1), square.mean(1))
    assert torch.allclose(fit.mean(0), square.mean(0))
    rows = updates["w"].square().mean(1).sqrt()
    assert float(rows.max() / rows.min()) < 1.7  # the gradient's differ a hundredfold
    for still in ({"w": 0.0 * gradient}, {"b": torch.zeros(3)}):
        updates, _ = rule.update(still, rule.init({}), rate=0.3)
        assert not any(update.any() for update in updates.values())


def test_gradient_descent_is_the_minimum_near_the_old_weights():
    old, gradient = random(3, 4), random(3, 4, seed=1)

    new, _, _ = run(GradientDescent(), [{"w": gradient}], {"w": old}, rate=0.3)

    at = new["w"].requires_grad_()
    naive.proximal_objective(at, old, gradient, 0.3).backward()
    torch.testing.assert_close(at.grad, torch.zeros_like(at))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    rate=st.floats(1e-3, 50.0),
    length=st.floats(0.01, 10.0),
    seed=st.integers(0, 2**16),
)
def test_delta_gradient_descent_is_the_minimum_for_any_inputs(tokens, size, rate, length, seed):
    old = random(*size, seed=seed)
    outputs = random(tokens, size[0], seed=seed + 1)
    inputs = random(tokens, size[1], seed=seed + 2, scale=length)

    new, _, _ = run(
        DeltaGradientDescent(), [{"w": Factors(outputs, inputs)}], {"w": old}, rate=rate
    )

    closed = naive.delta_descent(old, inputs, -outputs, rate)
    torch.testing.assert_close(new["w"], closed, rtol=1e-8, atol=1e-8)


def test_delta_gradient_descent_is_where_a_minimiser_ends():
    old, outputs, inputs = random(3, 4), random(2, 3, seed=1), random(2, 4, seed=2)
    found = old.clone().requires_grad_()
    search = torch.optim.LBFGS([found], lr=1.0, max_iter=200, tolerance_grad=1e-14)

    def objective():
        search.zero_grad()
        loss = naive.delta_objective(found, old, inputs, -outputs, 0.7)
        loss.backward()
        return loss

    search.step(objective)
    gradients = [{"w": Factors(outputs, inputs)}]
    new, _, _ = run(DeltaGradientDescent(), gradients, {"w": old}, rate=0.7)

    torch.testing.assert_close(new["w"], found.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("length", "right"), [(1.0, True), (2.0, False)])
def test_the_printed_delta_step_is_right_for_inputs_of_length_one_only(length, right):
    old, error, x = random(3, 4), random(3, seed=1), random(4, seed=2)
    x = length * x / x.norm()

    gradients = [{"w": Factors(error[None], x[None])}]
    new, _, _ = run(DeltaGradientDescent(), gradients, {"w": old}, rate=0.3)
    printed = naive.printed_delta_descent(old, x, error, 0.3)

    assert torch.allclose(new["w"], printed) is right


@pytest.mark.parametrize("rate", [0.1, 10.0, 1e6])
def test_delta_gradient_descent_goes_half_way_and_no_rate_makes_it_diverge(rate):
    x, target = random(9, 4), random(3, 4, seed=1)
    params, rule, sizes = {"w": torch.zeros(3, 4, dtype=DOUBLE)}, DeltaGradientDescent(), []

    for _ in range(300):
        error = Factors(x @ (params["w"] - target).mT, x)
        params, _, _ = run(rule, [{"w": error}], params, rate=rate)
        sizes.append(float(params["w"].norm()))

    assert max(sizes) < 1.01 * float(target.norm())
    if rate < 1.0:
        torch.testing.assert_close(params["w"], target / 2)


def test_delta_gradient_descent_says_what_it_lacks():
    rule, old = DeltaGradientDescent(), {"w": random(3, 4)}
    factors = {"w": Factors(random(1, 3), random(1, 4))}

    with pytest.raises(ValueError, match="needs the inputs of 'w'"):
        rule.update(plain(factors), rule.init(old), old, rate=0.1)
    with pytest.raises(ValueError, match="pass params"):
        rule.update(factors, rule.init(old), rate=0.1)


# momentum


def test_momentum_is_a_memory_that_descends_on_its_dot_product_with_gradients():
    gradients = [random(3, 4, seed=i) for i in range(5)]
    memory, total = torch.zeros(3, 4, dtype=DOUBLE), random(3, 4, seed=9)
    new, _, _ = run(Momentum(0.8), [{"w": g} for g in gradients], {"w": total}, rate=0.1)

    for gradient in gradients:

        def objective(m, gradient=gradient):
            return naive.momentum_objective(m, gradient)

        memory = naive.write(memory, objective, 0.1, 0.8)
        total = total + memory

    torch.testing.assert_close(new["w"], total)


def test_preconditioned_momentum_is_a_memory_of_keys_and_values():
    memory, gradient, value = random(3, 4), random(3, 4, seed=1), random(3, 3, seed=2)

    written = naive.write(
        memory, lambda m: naive.preconditioned_objective(m, gradient, value), 0.1, 0.8
    )

    torch.testing.assert_close(written, 0.8 * memory - 0.1 * value @ gradient)


def test_diagonal_preconditioning_is_that_memory_with_the_gradient_as_a_column():
    rule, params = PreconditionedMomentum(0.8, 0.9, 1e-8), {"w": random(3, 4)}
    gradient = {"w": random(3, 4, seed=1)}
    _, state, _ = run(rule, [{"w": random(3, 4, seed=2)}], params)

    updates, after = rule.update(gradient, state, rate=0.1)

    column = gradient["w"].reshape(-1, 1)
    value = torch.diag(1 / (after.memories["square"]["w"].sqrt() + 1e-8).flatten())
    before = state.memories["momentum"]["w"].reshape(-1, 1)
    written = naive.write(
        before, lambda m: naive.preconditioned_objective(m, column, value), 0.1, 0.8
    )
    torch.testing.assert_close(updates["w"], written.reshape(3, 4))


def test_delta_momentum_is_a_memory_that_descends_on_its_error():
    identity = torch.eye(3, dtype=DOUBLE)
    gradients = [random(3, 4, seed=i, scale=0.5) for i in range(5)]
    memory = torch.zeros(3, 4, dtype=DOUBLE)
    _, state, _ = run(
        DeltaMomentum(0.8), [{"w": g} for g in gradients], {"w": random(3, 4)}, rate=0.1
    )

    for gradient in gradients:

        def objective(m, gradient=gradient):
            return naive.delta_momentum_objective(m, gradient, identity)

        memory = naive.write(memory, objective, 0.1, 0.8)

    torch.testing.assert_close(state.memories["momentum"]["w"], memory)


def test_the_printed_erase_of_delta_momentum_is_the_consistent_one_at_rate_one():
    identity, before, gradient = torch.eye(3, dtype=DOUBLE), random(3, 4), random(3, 4, seed=1)
    state = OptimiserState(torch.tensor(3), {"momentum": {"w": before}})

    at_one, _ = DeltaMomentum(0.8).update({"w": gradient}, state, rate=1.0)
    slower, _ = DeltaMomentum(0.8).update({"w": gradient}, state, rate=0.1)

    printed = naive.printed_delta_momentum(before, gradient, identity, 1.0, 0.8)
    torch.testing.assert_close(at_one["w"], printed)
    printed = naive.printed_delta_momentum(before, gradient, identity, 0.1, 0.8)
    assert not torch.allclose(slower["w"], printed)


def test_a_vector_counts_as_one_row():
    gradient = random(6)
    for rule in (DeltaMomentum(), DeepMomentum(width=4)):
        flat, _, _ = run(rule, [{"w": gradient}, {"w": gradient}], {"w": random(6, seed=1)})
        row = {"w": gradient[None]}
        matrix, _, _ = run(rule, [row, row], {"w": random(6, seed=1)[None]})

        torch.testing.assert_close(flat["w"], matrix["w"][0])


# deep momentum


def test_the_deep_memory_is_trained_on_its_own_error():
    rule = DeepMomentum(retain=0.99, learning=0.7, width=5)
    gradients = [{"w": random(3, 4, seed=i, scale=4.0)} for i in range(4)]
    _, state, _ = run(rule, gradients[:3], {"w": random(3, 4)})
    inner, outer = state.memories["inner"]["w"], state.memories["outer"]["w"]

    updates, after = rule.update(gradients[3], state, rate=0.2)

    size = gradients[3]["w"].norm() / math.sqrt(3)
    keys = gradients[3]["w"] / size
    first = naive.write(inner, lambda m: naive.deep_objective(m, outer, keys), 0.7, 0.99)
    second = naive.write(outer, lambda m: naive.deep_objective(inner, m, keys), 0.7, 0.99)
    torch.testing.assert_close(after.memories["inner"]["w"], first)
    torch.testing.assert_close(after.memories["outer"]["w"], second)
    read = torch.tanh(keys @ first.mT) @ second.mT
    torch.testing.assert_close(updates["w"], 0.2 * size * read)


def test_the_deep_memory_learns_to_hand_on_a_gradient_that_comes_back():
    gradient = {"w": random(3, 40, scale=5.0)}

    _, _, updates = run(DeepMomentum(), [gradient] * 300, {"w": random(3, 40)}, rate=1.0)

    first, last = updates[0]["w"], updates[-1]["w"]
    assert first.norm() < 0.7 * gradient["w"].norm()
    torch.testing.assert_close(last, -gradient["w"], rtol=0.1, atol=0.1)


def test_a_deep_memory_hands_on_less_of_what_it_has_not_seen():
    seen, new = {"w": random(1, 40)}, {"w": random(1, 40, seed=1)}
    rule = DeepMomentum()
    _, state, _ = run(rule, [seen] * 300, {"w": random(1, 40)}, rate=1.0)

    updates, _ = rule.update(new, state, rate=1.0)

    assert -(updates["w"] * new["w"]).sum() < 0.8 * new["w"].square().sum()


def test_an_update_turns_round_with_its_gradient_only_under_our_reading_of_the_value():
    keys, inner = random(3, 4), random(5, 4, seed=1)
    start = torch.zeros(4, 5, dtype=DOUBLE)

    def update(objective, keys):
        outer = naive.write(start, lambda m: objective(inner, m, keys), 0.5)
        return torch.tanh(keys @ inner.mT) @ outer.mT

    ours, printed = naive.deep_objective, naive.printed_deep_objective
    torch.testing.assert_close(update(ours, -keys), -update(ours, keys))
    torch.testing.assert_close(update(printed, -keys), update(printed, keys))
    assert (update(ours, keys) * keys).sum() < 0


# Newton-Schulz, Muon, M3


@settings(deadline=None, max_examples=40)
@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 2**16))
def test_newton_schulz_keeps_directions_and_evens_lengths(size, seed):
    # singular values far below the largest would need more steps
    left, _, right = torch.linalg.svd(random(*size, seed=seed), full_matrices=False)
    lengths = random(min(size), seed=seed + 1).abs() + 0.1
    matrix = left * lengths @ right

    found = newton_schulz(matrix)

    _, values, _ = torch.linalg.svd(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    inside = left.mT @ found @ right.mT  # diagonal: the directions are the matrix's own
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)


def test_newton_schulz_of_a_tall_matrix_is_that_of_the_wide_one():
    matrix = random(9, 4)

    torch.testing.assert_close(newton_schulz(matrix), newton_schulz(matrix.mT).mT)


def test_newton_schulz_of_heads_is_that_of_each_head():
    heads = random(3, 4, 6)

    each = torch.stack([newton_schulz(head) for head in heads])

    torch.testing.assert_close(newton_schulz(heads), each)


def test_the_cubic_step_is_gradient_descent_towards_orthogonality():
    matrix = random(3, 5)

    stepped = naive.write(matrix, naive.orthogonal_objective, 1.0)

    torch.testing.assert_close(stepped, 1.5 * matrix - 0.5 * matrix @ matrix.mT @ matrix)


def test_muon_knows_no_scale():
    gradients = [plain(factors_of(seed=i)) for i in range(3)]
    larger = [{name: 1000.0 * g for name, g in each.items()} for each in gradients]

    one, _, _ = run(Muon(), gradients, params_of())
    other, _, _ = run(Muon(), larger, params_of())

    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("rule", [Muon(), M3(), PrintedM3()], ids=lambda r: type(r).__name__)
def test_rules_for_matrices_refuse_a_vector_by_name(rule):
    norm = {"norm": random(4)}

    with pytest.raises(ValueError, match=r"'norm' is \(4,\)"):
        rule.update(norm, rule.init(norm), rate=0.1)


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7, 9], ids=lambda n: f"{n}_steps")
def test_m3_as_printed_is_its_two_loops(steps):
    gradients = [random(4, 6, seed=i) for i in range(steps)]
    rule = PrintedM3(0.9, 0.99, 0.8, slow_weight=0.7, chunk=3)

    _, _, updates = run(rule, [{"w": g} for g in gradients], {"w": random(4, 6)}, rate=0.1)

    loops = naive.printed_m3(gradients, 0.1, (0.9, 0.99, 0.8), weight=0.7, chunk=3)
    torch.testing.assert_close([u["w"] for u in updates], loops)


@pytest.mark.parametrize("rule", [M3(chunk=3), PrintedM3(chunk=3)], ids=["stable", "printed"])
def test_the_slow_momentum_moves_at_the_end_of_a_chunk_only(rule):
    params = {"w": random(4, 6)}
    state, slow = rule.init(params), []

    for i in range(7):
        _, state = rule.update({"w": random(4, 6, seed=i)}, state, rate=0.1)
        slow.append(state.memories["slow"]["w"])

    moved = [bool((after != before).any()) for before, after in pairwise(slow)]
    assert not slow[0].any()
    assert moved == [False, True, False, False, True, False]


def test_the_slow_momentum_counts_from_the_step_after_its_chunk():
    gradients = [{"w": random(4, 6, seed=i)} for i in range(4)]

    _, _, without = run(M3(chunk=3, slow_weight=0.0), gradients, {"w": random(4, 6)})
    _, _, updates = run(M3(chunk=3), gradients, {"w": random(4, 6)})

    torch.testing.assert_close(updates[:3], without[:3])
    assert not torch.allclose(updates[3]["w"], without[3]["w"])


def test_printed_m3_slows_for_ever_where_the_stable_form_keeps_its_pace():
    gradients = [{"w": random(4, 6, seed=i)} for i in range(400)]

    _, printed_end, printed = run(PrintedM3(chunk=20), gradients, {"w": random(4, 6)})
    _, stable_end, stable = run(M3(chunk=20, square_retain=0.95), gradients, {"w": random(4, 6)})

    def pace(updates):
        late = torch.stack([u["w"].norm() for u in updates[300:]]).mean()
        return float(late / torch.stack([u["w"].norm() for u in updates[30:60]]).mean())

    assert pace(printed) == pytest.approx(math.sqrt(45 / 350), rel=0.15)
    assert pace(stable) == pytest.approx(1.0, rel=0.15)
    assert printed_end.memories["square"]["w"].min() > 300
    assert stable_end.memories["square"]["w"].max() < 3


@pytest.mark.parametrize("rule", [M3(), PrintedM3()], ids=["stable", "printed"])
def test_half_the_gradient_doubles_the_steps_of_m3(rule):
    """The numerator has no scale and the denominator has: a property of the paper's form."""
    gradients = [{"w": random(4, 6, seed=i)} for i in range(3)]
    half = [{"w": each["w"] / 2} for each in gradients]

    _, _, whole = run(rule, gradients, {"w": random(4, 6)})
    _, _, other = run(rule, half, {"w": random(4, 6)})

    torch.testing.assert_close(
        [u["w"] for u in other], [2 * u["w"] for u in whole], rtol=1e-5, atol=1e-6
    )


# Adam


def test_the_diagonal_memory_is_the_minimum_of_its_objective():
    gradients, value = random(6, 3, 4), random(3, 4, seed=1).abs()
    shares = naive.window(6, 0.9)

    best = naive.diagonal_memory(gradients, shares, value, 0.1).requires_grad_()
    naive.diagonal_objective(best, gradients, shares, value, 0.1).sum().backward()

    torch.testing.assert_close(best.grad, torch.zeros_like(best))


def test_adam_with_one_window_is_the_best_diagonal_memory():
    gradients = random(7, 3, 4)
    shares = naive.window(7, 0.9)
    size = torch.tensordot(shares, gradients.square(), 1).sqrt()

    _, _, updates = run(Adam(0.9, 0.9, 1e-300), [{"w": g} for g in gradients], {"w": random(3, 4)})

    memory = naive.diagonal_memory(gradients, shares, size, 0.0)
    torch.testing.assert_close(updates[-1]["w"], -0.1 * memory)


def test_adam_with_two_windows_is_the_closed_form_of_its_past():
    gradients = random(7, 3, 4)

    _, _, updates = run(Adam(epsilon=1e-300), [{"w": g} for g in gradients], {"w": random(3, 4)})

    torch.testing.assert_close(updates[-1]["w"], naive.adam(gradients, 0.1, 0.9, 0.999))


# torch


def _sgd(momentum):
    return lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (GradientDescent(), _sgd(0.0)),
        (Momentum(0.9), _sgd(0.9)),
        (
            PreconditionedMomentum(0.9, 0.99, 1e-8),
            lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.99, eps=1e-8, momentum=0.9),
        ),
        (Adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
        (named("adamw"), lambda p: torch.optim.AdamW(p, lr=0.1)),
        (
            named("adamw", retain=0.8, square_retain=0.95, epsilon=1e-4, decay=0.3),
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-4, weight_decay=0.3),
        ),
    ],
    ids=["sgd", "sgd_momentum", "rmsprop_momentum", "adam", "adamw", "adamw_options"],
)
def test_a_rule_moves_as_its_namesake_in_torch(rule, theirs, dtype):
    gradients = [plain(factors_of(dtype, seed=i)) for i in range(12)]

    found, _, _ = run(rule, gradients, params_of(dtype))

    torch.testing.assert_close(found, run_torch(theirs, gradients, params_of(dtype)))


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["fp32", "fp64"])
def test_muon_moves_as_torch_does_with_its_bfloat16(dtype, nesterov):
    params = {name: p for name, p in params_of(dtype).items() if p.ndim == 2}
    gradients = [plain(factors_of(dtype, seed=i)) for i in range(4)]
    gradients = [{name: each[name] for name in params} for each in gradients]
    rule = named("muon", nesterov=nesterov, precision=torch.bfloat16, decay=0.1)

    found, _, _ = run(rule, gradients, params, rate=0.1)
    theirs = run_torch(lambda p: torch.optim.Muon(p, lr=0.1, nesterov=nesterov), gradients, params)

    torch.testing.assert_close(found, theirs)


# weight decay, clipping, names, states


@pytest.mark.parametrize("name", ["adamw", "m3", "muon"])
def test_weight_decay_is_apart_from_the_gradient(name):
    gradients, params = factors_of(), params_of()
    rule, bare = named(name, decay=0.5), named(name, decay=0.0)
    state = rule.init(params)

    updates, _ = rule.update(gradients, state, params, rate=0.1)
    alone, _ = bare.update(gradients, state, params, rate=0.1)

    for key, update in updates.items():
        torch.testing.assert_close(update, alone[key] - 0.1 * 0.5 * params[key])
    with pytest.raises(ValueError, match="weight decay looks at the parameters"):
        rule.update(gradients, state, rate=0.1)


@settings(deadline=None, max_examples=40)
@given(
    limit=st.floats(1e-3, 1e3),
    scale=st.floats(1e-3, 1e3),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_clipping_bounds_the_norm_and_keeps_the_direction(limit, scale, tokens, seed):
    given_factors = {
        "a": Factors(random(tokens, 3, seed=seed, scale=scale), random(tokens, 4, seed=seed + 1)),
        "b": Factors(random(tokens, 2, seed=seed + 2), random(tokens, 5, seed=seed + 3)),
    }
    whole = plain(given_factors)
    expected = torch.cat([g.flatten() for g in whole.values()]).norm()

    clipped, norm = clip_by_norm(whole, limit)
    as_factors, norm_too = clip_by_norm(given_factors, limit)

    torch.testing.assert_close([norm, norm_too], [expected, expected], rtol=1e-9, atol=1e-9)
    share = min(1.0, limit / float(expected))
    for name, gradient in clipped.items():
        torch.testing.assert_close(gradient, share * whole[name])
        torch.testing.assert_close(as_factors[name].dense, gradient)
        assert as_factors[name].inputs is given_factors[name].inputs


def test_the_norm_of_no_gradients_is_zero():
    assert clip_by_norm({}, 1.0) == ({}, torch.zeros(()))


names = st.text(st.sampled_from("abz./0_é "), min_size=1, max_size=8)


@given(
    step=st.integers(0, 2**40),
    shapes=st.dictionaries(
        st.text(st.sampled_from("abz_"), min_size=1, max_size=5),
        st.dictionaries(names, st.integers(0, 3), min_size=1, max_size=3),
        max_size=3,
    ),
)
def test_a_state_comes_back_from_its_named_tensors(step, shapes):
    memories = {
        kind: {name: torch.full((size,), 0.5) for name, size in memory.items()}
        for kind, memory in shapes.items()
    }
    state = OptimiserState(torch.tensor(step), memories)

    back = restore(load(save(flatten(state))))

    assert int(back.step) == step
    assert back.memories.keys() == memories.keys()
    for kind, memory in memories.items():
        torch.testing.assert_close(dict(back.memories[kind]), memory)


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="'step' is not among"):
        restore({"momentum/down": torch.zeros(1)})
    with pytest.raises(ValueError, match="'down' is not 'step'"):
        restore({"step": torch.tensor(1), "down": torch.zeros(1)})


def test_gradients_that_the_state_does_not_know_are_named():
    rule = Momentum()

    with pytest.raises(ValueError, match=r"\['down', 'up'\]"):
        rule.update({"up": random(2)}, rule.init({"down": random(2)}), rate=0.1)


def test_a_rule_is_found_by_its_name():
    assert named("m3", chunk=7) == M3(chunk=7)
    assert named("adamw") == Decayed(Adam(), 0.01)
    assert named("adam", decay=0.0) == Adam()


def test_an_unknown_name_or_option_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="no optimiser 'adamm'; known are gradient_descent, "):
        named("adamm")
    with pytest.raises(ValueError, match="momentum has no 'beta'; it has decay, retain"):
        named("momentum", beta=0.9)
    with pytest.raises(ValueError, match=r"retain is 1.5, but must lie in \[0, 1\]"):
        named("momentum", retain=1.5)
    with pytest.raises(ValueError, match="chunk is 0, but must be positive"):
        named("m3", chunk=0)


def test_every_rule_is_offered():
    assert {rule.__name__ for rule in RULES.values()} <= set(optimisers.__all__)
