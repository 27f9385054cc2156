"""A run learns, is kept, and is not run again."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch

from hope_runtime.evaluation import contenders, judging, runner, synthetic
from hope_runtime.evaluation.contenders import contender
from hope_runtime.evaluation.drawn import Drawn
from hope_runtime.evaluation.judging import judge
from hope_runtime.evaluation.runner import ResultError, Run, evaluate, plan
from hope_runtime.evaluation.table import markdown, rows
from hope_runtime.evaluation.tasks import Measure, Probe, Stage, Task
from hope_runtime.model import Hope
from hope_runtime.training.initial import initial


def successor(chance, count_, *, length):
    """Draw rows that count on from where they began: each token follows from the one before."""
    first = chance.integers(0, 16, (count_, 1))
    tokens = (first + np.arange(length + 1)) % 16
    scored = np.ones(tokens.shape, bool)
    scored[:, 0] = False
    return Drawn(tokens.astype(np.int64), scored)


@pytest.fixture
def trivial():
    draw = partial(successor, length=12)
    return Task(
        name="successor",
        about="what comes next when one counts",
        vocabulary=16,
        measure=Measure.ANSWERS,
        chance=1 / 16,
        steps=30,
        stages=(Stage(0.5, 16, draw), Stage(0.5, 16, draw)),
        probes=(Probe("12", 16, draw), Probe("40", 8, partial(successor, length=40), longer=True)),
    )


@pytest.fixture
def clock():
    return partial(next, count())


@pytest.mark.parametrize("name", contenders.USUAL)
def test_a_trivial_task_is_learned(trivial, name, tmp_path, clock):
    stands = []
    [result] = evaluate([Run(trivial, name, 0, 30)], tmp_path / "r.jsonl", stands.append, clock)

    assert result.found["12"].value > 0.8
    assert result.found["12"].counted == 16 * 12
    assert (result.tokens, result.failed) == (30 * 16 * 12, None)
    assert [stand.step for stand in stands] == list(range(1, 31))


def test_what_is_kept_is_not_run_again_and_a_stop_keeps_what_was_done(trivial, tmp_path, clock):
    kept = tmp_path / "deep" / "results.jsonl"
    runs = [Run(trivial, "frozen", seed, 3) for seed in range(3)]

    def stop(stand):
        if stand.run.seed == 1 and stand.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(runs, kept, stop, clock)
    first = kept.read_text()
    assert [json.loads(line)["seed"] for line in first.splitlines()] == [0]

    worked = []
    results = evaluate(runs, kept, worked.append, clock)

    assert {stand.run.seed for stand in worked} == {1, 2}
    assert kept.read_text().startswith(first)
    assert [result.key for result in results] == [run.key for run in runs]
    assert evaluate(runs, kept, pytest.fail, clock) == results


def test_a_broken_file_of_results_is_named(trivial, tmp_path, clock):
    kept = tmp_path / "results.jsonl"
    kept.write_text("{}\n")

    with pytest.raises(ResultError, match=r"results\.jsonl, line 1 .* remove the line"):
        evaluate([Run(trivial, "frozen", 0, 1)], kept, print, clock)


def test_a_plan_goes_seed_by_seed_and_the_full_form_is_longer(trivial):
    keys = [run.key for run in plan([trivial], ["hope", "delta"], 2, full=True)]

    assert keys == [
        ("successor", "hope", 0, 150),
        ("successor", "delta", 0, 150),
        ("successor", "hope", 1, 150),
        ("successor", "delta", 1, 150),
    ]


def test_a_table_has_the_mean_and_the_range_over_seeds(trivial):
    def result(seed, value):
        found = {"12": judging.Found(value, 10), "40": judging.Found(0.5, 10)}
        return runner.Result("successor", "hope", seed, 3, 1, 1, 0.0, 0.0, found)

    table = rows([trivial], [result(0, 0.5), result(1, 1.0)])

    assert list(markdown(table, ["hope", "delta"])) == [
        "| task | probe | chance | hope | delta |",
        "|---|---|---|---|---|",
        "| successor | 12 | 6.2 | 75.0 (50.0-100.0) |  |",
        "| successor | *40* | 6.2 | 50.0 (50.0-50.0) |  |",
    ]


@pytest.mark.parametrize("name", ["hope", "titans", "transformer"])
def test_judging_in_pieces_changes_nothing(name, monkeypatch):
    config = contender(name, synthetic.FACT_VOCABULARY)
    params = {n: t * 3 if "embedding" in n else t for n, t in initial(config).items()}
    model = Hope(config, params)
    draw = partial(synthetic.facts, length=150, count=(4, 4), again=0.5)
    probe = Probe("", 4, draw)

    def bits():
        return judge(model, probe, Measure.BITS, np.random.default_rng(0)).value

    whole = bits()
    monkeypatch.setattr(judging, "_PIECE", 47)

    assert bits() == pytest.approx(whole, rel=1e-4)


def test_a_source_goes_from_stage_to_stage(trivial):
    drawn = []

    def stage(number):
        def draw(chance, count_):
            drawn.append(number)
            return successor(chance, count_, length=4)

        return draw

    task = replace(trivial, stages=(Stage(0.3, 2, stage(0)), Stage(0.7, 2, stage(1))))
    source, chance = task.source(), np.random.default_rng(0)
    for step in range(200):
        batch = source(chance, step / 200)

    assert batch.tokens.dtype is torch.int64
    assert batch.weights[:, 0].sum() == 0
    assert drawn[:60] == [0] * 60
    assert 0.1 < 1 - np.mean(drawn[60:]) < 0.3
