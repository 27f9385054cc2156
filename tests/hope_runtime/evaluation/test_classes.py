"""Names are compared whole and exactly, tasks are split once, and contenders learn."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from hope_runtime.evaluation import classes
from hope_runtime.evaluation.classes import (
    CONTENDERS,
    Mind,
    Names,
    Setting,
    Study,
    answers,
    drawn,
    read_intents,
)
from hope_runtime.evaluation.reading import Reader
from hope_runtime.evaluation.text import TextError
from hope_runtime.model import Hope
from hope_runtime.state import State
from hope_runtime.weights.random import random_checkpoint, tiny_config, tiny_native

SHARED = Path(__file__).parents[4] / "shared" / "data"
WORDS = ["ant", "bee", "cow", "doe", "elk", "fly", "gnu", "hen", "ibis", "jay"]
ROWS = [(f"{word} {n}", f"{word}_s") for word in WORDS for n in range(6)]
SMALL = Setting(examples=3, queries=2, epochs=1, rate=1e-2, batch=2)


def reader(config):
    found = random_checkpoint(config)
    return Reader(Hope(found.config, found.weights), found.tokenizer)


@pytest.fixture(scope="module")
def tiny():
    return reader(tiny_config(window=512))


@pytest.fixture
def study(tiny):
    return Study(tiny, drawn(ROWS, ROWS, SMALL), SMALL)


def exactly(study, prefix, prompt, nothing, names):
    """Return the best name by reading every one of them whole."""

    def likelihood(prompt, name):
        ids = study.tokenizer.encode(classes.named(name))
        judged = study.reader.judge(State(), [*prefix, *prompt, *ids])
        return float(judged.losses[-len(ids) :].sum())

    scores = [likelihood(nothing, name) - likelihood(prompt, name) for name in names]
    return max(range(len(names)), key=scores.__getitem__)


@pytest.mark.parametrize("config", [tiny_config(window=512), tiny_native()], ids=["a", "m"])
def test_the_answer_is_the_name_that_the_query_makes_likelier_than_any_other(config, monkeypatch):
    monkeypatch.setattr(classes, "BEAM", 99)
    study = Study(reader(config), drawn(ROWS, ROWS, SMALL), SMALL)
    names = ["ant", "ants", "an apple", "bee", "beehive"]  # one begins like another
    prompts = [study.tokenizer.encode(classes.asked(t)) for t in ("an ant", "b", "x y z", "")]
    nothing = study.tokenizer.encode(classes.asked("N/A"))
    mind = Mind(study.model, study.header, {})

    found = answers(mind, Names(study.tokenizer, names), prompts, nothing)

    assert found == [exactly(study, study.header, p, nothing, names) for p in prompts]


def test_how_queries_share_a_pass_changes_no_answer(study, monkeypatch):
    names = Names(study.tokenizer, study.intents.names)
    prompts = [study.tokenizer.encode(classes.asked(text)) for text, _ in ROWS[::5]]
    nothing = study.tokenizer.encode(classes.asked("N/A"))
    mind = Mind(study.model, study.header, {})

    together = answers(mind, names, prompts, nothing)
    monkeypatch.setattr(classes, "ROWS", 1)

    assert answers(mind, names, prompts, nothing) == together


def test_tasks_hold_every_intent_once(study):
    seen = [i for task in range(classes.TASKS) for i in study.intents.task(task)]

    assert seen == list(range(10))
    assert sorted(study.intents.names) == [f"{word} s" for word in WORDS]
    assert all(len(set(texts)) == 3 for texts in study.intents.train)
    assert all(len(set(texts)) == 2 for texts in study.intents.test)


def test_another_seed_draws_other_examples_of_the_same_tasks():
    one, two = (drawn(ROWS, ROWS, Setting(examples=3, seed=seed)) for seed in (0, 1))

    assert one.names == two.names
    assert one.train != two.train


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_judged_after_every_task(study, name):
    heard = []
    scores = list(study.run(name, lambda text, tasks: heard.append((text, tasks))))

    assert [score.task for score in scores] == list(range(1, 11))
    assert [score.asked for score in scores] == [*range(1, 10), 20]
    assert all(0 <= score.right <= score.asked for score in scores)
    assert heard[-1][1] == 10
    assert json.dumps(scores[-1].to_json())


def test_fine_tuning_changes_the_levels_and_nothing_else(study):
    before = [mlp.down.clone() for block in study.model.blocks for mlp in block.mlps]

    *_, mind = study._fine_tuned()

    for i, (was, block) in enumerate(zip(before, mind.model.blocks, strict=True)):
        assert torch.equal(was, study.model.blocks[i].mlps[0].down)
        assert torch.equal(was, block.mlps[0].down) is (i < 2)


def test_the_loss_of_fine_tuning_is_that_of_the_names(study):
    tuned = classes._Tuned(study.model)
    lines = [(study.header, *study.line(example)) for example in study.lines(0)]

    found = tuned.loss([tuned.lesson(*line) for line in lines]).item()

    losses = [
        study.reader.judge(State(), [*header, *before, *name]).losses[-len(name) :]
        for header, before, name in lines
    ]
    assert found == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_fine_tuning_learns_what_it_is_shown(tiny):
    setting = replace(SMALL, epochs=8)
    study = Study(tiny, drawn(ROWS, ROWS, setting), setting)
    tuned = classes._Tuned(study.model)
    lessons = [tuned.lesson(study.header, *study.line(e)) for e in study.lines(0)]
    first = tuned.loss(lessons).item()
    optimiser = torch.optim.Adam(tuned.weights, lr=1e-2)
    for _ in range(8):
        optimiser.zero_grad()
        tuned.loss(lessons).backward()
        optimiser.step()

    assert tuned.loss(lessons).item() < 0.5 * first


def test_the_window_holds_one_example_of_each_of_the_newest_classes(tiny):
    setting = replace(SMALL, examples=6)
    study = Study(reader(tiny_config(window=256)), drawn(ROWS, ROWS, setting), setting)

    *_, mind = study._in_context()

    held = bytes(mind.prefix).decode()
    assert len(mind.prefix) <= 256 - classes.ROOM
    assert f"Intent: {study.intents.names[-1]}\n" in held
    assert f"Intent: {study.intents.names[0]}\n" not in held
    assert held.count("Intent:") == len(set(held.split("Intent: ")[1:])) > 1


def test_a_consolidated_session_has_learned_and_its_window_is_empty(study):
    first, *_, last = study._consolidated()

    assert first.prefix == last.prefix == study.header
    assert last.deltas.keys() == first.deltas.keys() != set()
    assert any(not torch.equal(last.deltas[name], first.deltas[name]) for name in last.deltas)


def packed(folder, name, content):
    with tarfile.open(folder / "clinc150.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, BytesIO(content))


def test_the_archive_is_read(tmp_path):
    rows = json.dumps({"train": ROWS, "test": ROWS}).encode()
    packed(tmp_path, "clinc150/data_full.json", rows)

    assert read_intents(tmp_path, SMALL) == drawn(ROWS, ROWS, SMALL)


def test_a_missing_archive_names_the_remedy(tmp_path):
    with pytest.raises(TextError, match=r"no clinc150\.tar\.xz; name its folder with --data"):
        read_intents(tmp_path, SMALL)


@pytest.mark.parametrize("inside", ["other.json", "data_full.json"])
def test_an_archive_of_something_else_is_named(tmp_path, inside):
    packed(tmp_path, inside, b"{}")

    with pytest.raises(TextError, match=r"clinc150\.tar\.xz: .*as published"):
        read_intents(tmp_path, SMALL)


@pytest.mark.skipif(not (SHARED / "clinc150.tar.xz").is_file(), reason="no shared data")
def test_clinc150_has_ten_tasks_of_fifteen():
    intents = read_intents(SHARED, Setting())

    assert len(intents.names) == 150
    assert [len(intents.task(task)) for task in range(classes.TASKS)] == [15] * 10
    assert all(len(texts) == 5 for texts in intents.train)
