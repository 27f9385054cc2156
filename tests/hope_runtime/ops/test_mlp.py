"""Memories that are MLPs: slopes are gradients, updates are the printed ones, a port agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.func import grad, vmap

from hope_runtime.ops import mlp

DOUBLE = torch.float64
BOXES = ("key", "value", "memory", "rate", "retain")
VECTORS = Path(__file__).parent / "vectors" / "nested_learning.safetensors"


@pytest.fixture
def weights():
    source = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=DOUBLE) / 2

    start = mlp.Layers(normal(2, 5, 5, 4), normal(2, 3, 4, 5), normal(2, 2, 1, 5))
    return mlp.Weights(start, normal(2), normal(2))


def pair(layers, head, box):
    """Return W2 and W1 of one memory of a session's, and whether it has a skip."""
    outer = layers.outer[head, box] if box < 3 else layers.gates[head, box - 3]
    return layers.inner[head, box], outer, box < 3


def apply(w2, w1, skip, z, rule):
    return w1 @ rule.activation(w2 @ z) + (z if skip else 0.0)


@pytest.mark.parametrize("activation", mlp.Activation)
def test_the_slope_of_an_activation_is_its_derivative(activation):
    x = torch.linspace(-6, 6, 41, dtype=DOUBLE)

    torch.testing.assert_close(activation.slope(x), vmap(grad(activation))(x))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_slopes_are_the_gradients_of_each_memorys_loss(weights, stream, factor):
    rule = mlp.Rule(gradient=factor, error_norm=None)
    x, _ = stream(1, 3, 4)
    anchor = mlp.Layers(*(0.3 * torch.randn_like(w)[None] for w in weights.start))
    layers = mlp.Layers(*(way + w for way, w in zip(anchor, weights.start, strict=True)))
    made = mlp.project(anchor, weights, x, rule)
    values = mlp.unit(mlp.applied(layers, x[:, :, None], rule)[1][:, :, 1])

    for head in range(2):
        for box in range(5):
            w2, w1, skip = pair(mlp.Layers(*(w[0] for w in layers)), head, box)
            for t in range(3):
                key, value = made.keys[0, head, 0, t], values[0, head, t]
                target = apply(w2, w1, skip, value, rule)

                def loss(w2, w1, key=key, target=target, skip=skip):
                    return (apply(w2, w1, skip, key, rule) - target).square().sum() * factor / 2

                by_inner, by_outer = grad(loss, argnums=(0, 1))(w2, w1)
                slope = (
                    made.slopes.outer[0, head, box]
                    if box < 3
                    else made.slopes.gates[0, head, box - 3]
                )
                torch.testing.assert_close(
                    torch.outer(made.slopes.inner[0, head, box, t], key), by_inner
                )
                torch.testing.assert_close(
                    torch.outer(slope[t], made.hidden[0, head, box, t]), by_outer
                )


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize(
    ("erases_outer", "proximal"), [(False, False), (True, False), (True, True)]
)
def test_the_layers_follow_the_rule_token_by_token(
    weights, stream, to_zero, erases_outer, proximal
):
    """Whole matrices of one head, straight from the equations, two chunks of three tokens."""
    rule = mlp.Rule(
        chunk=3,
        error_norm=None,
        memory_norm=None,
        decay_to_zero=to_zero,
        erases_outer=erases_outer,
        proximal=proximal,
    )
    (x, q), head = stream(1, 6, 5), 1
    found, after = mlp.naive(mlp.empty(1, weights), weights, x, q, torch.tensor([0]), rule)

    start = [pair(weights.start, head, box) for box in range(5)]
    live, anchor = list(start), list(start)
    for t in range(6):
        x_t, q_t = x[0, head, t], q[0, head, t]
        torch.testing.assert_close(found[0, head, t], apply(*live[2], q_t, rule))
        k, v, _, rate, forget = (apply(*box, x_t, rule) for box in anchor)
        k, v = k / k.norm(), v / v.norm()
        eta = 0.5 * torch.sigmoid(rate + weights.rate_bias[head])
        alpha = 1 - 0.1 * torch.sigmoid(forget + weights.retain_bias[head])
        for box in range(5):
            w2, w1, skip = anchor[box]
            h, error = rule.activation(w2 @ k), apply(*anchor[box], k, rule)
            error = error - apply(*anchor[box], v, rule)
            back = (w1.mT @ error) * rule.activation.slope(w2 @ k)
            slowed = eta / (1 + eta * h @ h)
            own, pace = slowed * erases_outer, slowed if proximal else eta
            w2, w1, _ = live[box]
            w2 = w2 @ (alpha * torch.eye(4) - eta * torch.outer(k, k)) - eta * torch.outer(back, k)
            w1 = w1 @ (alpha * torch.eye(5) - own * torch.outer(h, h)) - pace * torch.outer(
                error, h
            )
            if not to_zero:
                w2, w1 = w2 + (1 - alpha) * start[box][0], w1 + (1 - alpha) * start[box][1]
            live[box] = (w2, w1, skip)
        anchor = list(live) if t == 2 else anchor

    ways = mlp.Layers(*(w[0] + s for w, s in zip(after.live, weights.start, strict=True)))
    for box in range(5):
        for matrix, expected in zip(pair(ways, head, box)[:2], live[box][:2], strict=True):
            torch.testing.assert_close(matrix, expected)


def test_errors_are_clipped_before_anything_is_made_of_them(weights, stream):
    x, _ = stream(1, 20, 1)
    made = mlp.project(mlp.empty(1, weights).live, weights, x, mlp.Rule(error_norm=0.2))

    assert made.slopes.outer.norm(dim=-1).max() <= 0.2 + 1e-12
    assert made.slopes.gates.abs().max() <= 0.2 + 1e-12


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_port_of_the_paper_computes_the_same(chunk):
    """nested-learning 0.2.0; its alpha is a sigmoid of what our gate is the negative of."""
    port = load_file(VECTORS)
    rule = replace(mlp.NESTED_LEARNING, chunk=chunk, rate_max=float(port["eta_scale"]))
    turned = {"alpha": -1.0}

    def layers(prefix):
        names = ("k", "v", "memory", "eta", "alpha")
        inner = torch.stack([port[f"{prefix}.{name}.w2"] for name in names], -3)
        outer = [turned.get(name, 1.0) * port[f"{prefix}.{name}.w1"] for name in names]
        return mlp.Layers(inner, torch.stack(outer[:3], -3), torch.stack(outer[3:], -3))

    start = mlp.Layers(*(w[None] for w in layers("start")))
    nothing = torch.zeros(1)
    weights = mlp.Weights(start, nothing, nothing)
    x = port["x"][:, None]
    q = mlp.unit(x @ port["w_q"].mT)

    y, after = mlp.scan(
        mlp.empty(len(x), weights), weights, x, q, torch.zeros(len(x), dtype=torch.int64), rule
    )

    for way, first, expected in zip(after.live, start, layers(f"after.{chunk}"), strict=True):
        torch.testing.assert_close((way + first)[:, 0], expected, atol=1e-5, rtol=1e-5)
        moved = (expected - first[0]).abs().max()
        assert moved > 1e-2  # so that agreement says something
    if chunk == 1:  # in longer chunks the port reads the memory of the chunk's start
        torch.testing.assert_close(y[:, 0], port["y.1"], atol=1e-5, rtol=1e-5)
