"""`hope train native`, as a person types it: to a model that is served, through interruptions."""

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

from hope_runtime import weights
from server.cli import app
from server.loading import load
from server.settings import Settings

SMALL = [
    "--width",
    "32",
    "--blocks",
    "2",
    "--heads",
    "2",
    "--head-width",
    "16",
    "--hidden",
    "48",
    "--vocabulary",
    "400",
    "--chunk",
    "8",
    "--threads",
    "1",
    "--dtype",
    "float32",
]
CHAT = [
    {"role": "user", "content": "Did you see the new film about the sea?"},
    {"role": "assistant", "content": "I did. The music was lovely."},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "I do not remember."},
]


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("It was a dark and stormy night, and the rain fell in torrents. " * 400)
    return file


def typed(*args):
    kept = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, ["train", "native", *map(str, args)])
    finally:
        signal.signal(signal.SIGTERM, kept)


def curve(path):
    return [json.loads(line) for line in (path / "curve.jsonl").read_text().splitlines()]


def text_run(story, to, steps, *more):
    args = (story, "--out", to, "--steps", steps, "--tokens", 512, "--length", 64, *SMALL, *more)
    return typed(*args)


def test_a_text_becomes_a_model_that_is_served(story, tmp_path):
    to = tmp_path / "stormy"

    done = text_run(story, to, 30)

    assert done.exit_code == 0, done.output
    assert f"hope serve --model {to}" in done.output
    first, *_, last = curve(to)
    assert last["kept"] < first["kept"]
    card, _, tokenizer, _ = load(Settings(model=str(to), dtype="float32"), lambda said: None)
    assert card.name == "stormy"
    assert [level.mlp for level in card.config.levels] == [0, 1]
    assert tokenizer.decode(tokenizer.encode("a dark night")) == "a dark night"


def test_chats_are_mixed_with_facts_that_are_told_and_asked_for(tmp_path):
    chats = tmp_path / "chats.jsonl"
    other = [{**message, "content": message["content"] + " Really."} for message in CHAT]
    chats.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (CHAT, other)))

    done = typed(chats, "--out", tmp_path / "m", "--steps", 2, "--tokens", 512, *SMALL)

    assert done.exit_code == 0, done.output
    assert weights.read(tmp_path / "m").config.mixers == ("memory", "memory")


def test_any_mixture_of_mixers_is_trained(story, tmp_path):
    done = text_run(
        story, tmp_path / "m", 2, "--mixers", "attention,memory", "--optimiser", "adamw"
    )

    assert done.exit_code == 0, done.output
    assert weights.read(tmp_path / "m").config.mixers == ("attention", "memory")


def test_levels_may_learn_while_rows_are_read(story, tmp_path):
    args = (story, "--out", tmp_path / "m", "--steps", 2, "--tokens", 320, "--length", 160)

    done = typed(*args, "--levels", *SMALL)

    assert done.exit_code == 0, done.output
    assert [level.chunk for level in weights.read(tmp_path / "m").config.levels] == [128, 512]


def test_a_run_that_was_killed_ends_as_one_that_was_not(story, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert text_run(story, whole, 60).exit_code == 0
    command = [sys.executable, "-m", "server", "train", "native", story, "--out", broken]
    command += ["--steps", 60, "--tokens", 512, "--length", 64, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), env=environment) as process:
        while not (broken / "curve.jsonl").exists() or len(curve(broken)) < 1:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130

    again = text_run(story, broken, 60)

    assert again.exit_code == 0, again.output
    assert "going on from step" in again.output
    one, other = (load_file(path / "model.safetensors") for path in (whole, broken))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("nowhere.txt",), ("nowhere.txt: does not exist",)),
        (("--optimiser", "hope"), ("no optimiser 'hope'", "muon")),
        (("--optimiser", "momentum"), ("no default rate",)),
        (("--mixers", "dream"), ("--mixers 'dream'", "memory")),
        (("--mixers", "memory,memory,memory"), ("3 mixers do not suit 2 blocks",)),
        (("--length", "100000"), ("100001", "--length")),
        (("--device", "cuda"), ("no CUDA device",)),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(story, tmp_path, args, parts):
    given = [tmp_path / args[0]] if args[0].endswith(".txt") else [story, *args]

    done = typed(*given, "--out", tmp_path / "m", "--steps", 1, *SMALL)

    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("hope: ")
    for part in parts:
        assert part in done.stderr


def test_a_run_with_another_recipe_is_not_overwritten(story, tmp_path):
    assert text_run(story, tmp_path / "m", 2).exit_code == 0

    other = text_run(story, tmp_path / "m", 4, "--seed", 5)

    assert other.exit_code == 1
    assert "another recipe; choose another --out" in other.stderr
