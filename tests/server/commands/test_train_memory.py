"""`hope train memory` and `hope eval memory`, as a person types them, for a tiny random base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from clients.errors import Unreachable
from hope_runtime.evaluation.forget import common_knowledge
from hope_runtime.weights.memory_layer import read_layer
from server.cli import app
from server.commands import memory as command
from server.commands.demo import ASKED
from server.commands.terminal import Refusal
from server.loading import load
from server.settings import Settings

ENV = {"COLUMNS": "200", "TERM": "dumb", "HOPE_DTYPE": "float32", "HOPE_EVAL_DATA": ""}
KIND = """
[[kind]]
name = "{name}"
values = ["Rex", "Max", "Bella", "Luna", "Oscar", "Zorro", "Ada", "Bob", "Fay", "Gus"]
tells = ["My {name} is {{}}.", "{{}} is my {name}.", "I call my {name} {{}}.", "{{}}, my {name}."]
updates = ["Now my {name} is {{}}."]
asks = ["Who is my {name}?", "My {name}?", "Tell me about my {name}.", "{name}?"]
answers = ["Your {name} is {{}}."]
"""


def typed(*args):
    kept = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, [*map(str, args)], env=ENV)
    finally:
        signal.signal(signal.SIGTERM, kept)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    file = tmp_path_factory.mktemp("kinds") / "kinds.toml"
    names = ("dog", "cat", "boss", "boat", "town", "aunt", "song", "hero")
    file.write_text("".join(KIND.format(name=name) for name in names))
    return file


@pytest.fixture(scope="module")
def trained(kinds, tmp_path_factory):
    to = tmp_path_factory.mktemp("layer") / "made"
    done = trains(to, kinds)
    assert done.exit_code == 0, done.output
    assert f"--memory-layer {to}" in done.stdout
    return to


def trains(to, kinds, *more, steps=3):
    small = ("--rounds", "1", "--sessions", "2", "--threads", "1", "--steps", steps)
    usual = ("train", "memory", "--base", "random", "--kinds", kinds, "--out", to)
    return typed(*usual, *small, *more)


def test_a_layer_is_made_that_serves(trained):
    asked = {"model": "random", "threads": 1, "memory_layer": str(trained)}
    card, model, _, _ = load(Settings(**asked), lambda said: None)
    assert model.recall is not None
    assert model.config.recall.digest == read_layer(trained).config.digest
    assert card.fingerprint.startswith(read_layer(trained).base)
    [note] = [json.loads(line) for line in (trained / "curve.jsonl").read_text().splitlines()]
    assert note["step"] == 3
    assert 0.0 <= note["held_out"]["apart"] <= 1.0


def test_a_run_goes_on_from_where_it_was_to_the_same_layer(trained, kinds, tmp_path):
    assert trains(tmp_path / "made", kinds, steps=3).exit_code == 0
    ours = load_file(tmp_path / "made" / "layer.safetensors")
    theirs = load_file(trained / "layer.safetensors")
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    again = trains(tmp_path / "made", kinds, "--rate", "0.5")
    assert again.exit_code == 1
    assert "a run with another recipe" in again.stderr
    less = trains(tmp_path / "made", kinds, steps=2)
    assert less.exit_code == 1
    assert "at step 3 already, beyond --steps 2" in less.stderr


def test_a_base_that_remembers_by_itself_is_refused(kinds, tmp_path):
    done = typed("train", "memory", "--base", "random-native", "--kinds", kinds, "--out", tmp_path)
    assert done.exit_code == 1
    assert "--base random-native: its blocks remember by themselves" in done.stderr


def test_what_is_no_file_of_kinds_is_refused(tmp_path):
    (tmp_path / "kinds.toml").write_text("[[kind]]\n")
    done = trains(tmp_path / "made", tmp_path / "kinds.toml")
    assert done.exit_code == 1
    assert "kinds.toml: not a file of kinds of facts" in done.stderr


def test_people_are_asked_through_a_server_that_was_killed(trained, kinds, tmp_path):
    to = tmp_path / "memory.json"
    done = typed(
        *("eval", "memory", "--model", "random", "--memory-layer", trained, "--kinds", kinds),
        *("--part", "fresh", "--users", 2, "--facts", 2, "--filler", 60, "--changing"),
        *("--serve", "--threads", "--serve", "1", "--out", to, "--show", 1),
    )
    assert done.exit_code == 0, done.output
    [row] = json.loads(to.read_text())
    assert {answer["contender"] for answer in row["answers"]} == {
        "memory", "nothing", "context", "retrieval",
    }  # fmt: skip
    assert len(row["answers"]) == 4 * 2 * 4
    assert "2 facts, half of them changed, 60 tokens later, fresh" in done.stdout


def test_common_knowledge_is_asked_for_beside_the_base(trained, kinds, tmp_path):
    to = tmp_path / "memory.json"
    done = typed(
        *("eval", "memory", "--model", "random", "--memory-layer", trained, "--kinds", kinds),
        *("--part", "fresh", "--users", 1, "--facts", 2, "--filler", 0, "--common"),
        *("--serve", "--threads", "--serve", "1", "--out", to),
    )
    assert done.exit_code == 0, done.output
    [row] = json.loads(to.read_text())
    by = {
        contender: [each["question"] for each in row["answers"] if each["contender"] == contender]
        for contender in ("memory", "nothing")
    }
    assert by["memory"] == by["nothing"] == [known.text for known in common_knowledge()]
    assert "of the base's kept" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--part", "all"], "--part 'all': there are phrasings"),
        (["--contender", "mem0"], "--contender 'mem0': there are memory"),
        (["--common", "--contender", "memory"], "name --contender nothing as well"),
        (["--kinds", "nowhere.toml"], "nowhere.toml"),
        (["--facts", "1000"], "1000 facts cannot be drawn"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_started(args, said):
    done = typed("eval", "memory", "--model", "random", *args)
    assert done.exit_code == 1
    assert said in done.stderr


@pytest.mark.long
def test_the_demo_tells_kills_and_asks(trained):
    done = typed("demo", "--model", "random", "--memory-layer", trained)
    assert done.exit_code == 0, done.output
    for words in ("tell", "read", "kill", "restart", "with its memory", "s in all"):
        assert words in done.stdout
    for question in ASKED:
        assert question in done.stdout


def test_who_breaks_an_evaluation_off_waits_for_no_answer(trained, kinds, tmp_path):
    command = [sys.executable, "-m", "server", "eval", "memory", "--model", "random"]
    command += ["--memory-layer", trained, "--kinds", kinds, "--part", "fresh", "--facts", "2"]
    command += ["--users", "400", "--filler", "400", "--contender", "memory"]
    command += ["--out", tmp_path / "memory.json", "--serve", "--threads", "--serve", "1"]
    environment = {**os.environ, **ENV, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while not any(tmp_path.glob("hope-eval-*/data/*")):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)  # some talk by now
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()

    assert process.returncode == 130
    assert "stopped; what was done is kept" in said
    assert not list(tmp_path.glob("hope-eval-*"))


def test_a_turn_that_fails_ends_an_evaluation_with_a_sentence(monkeypatch):
    def fails(*_):
        raise Unreachable("nobody answers")

    monkeypatch.setattr(command, "_row", fails)
    asked = ["fresh"], [1], [0], False, False, ["memory"], 1, 0, None, "random", "none", [], None, 0
    with pytest.raises(Refusal, match="this row with it: nobody answers"):
        command.memory(None, *asked)
