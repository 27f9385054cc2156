"""`hope eval native`, as a person types it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from server.cli import app

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def typed(*args):
    return CliRunner().invoke(app, ["eval", "native", *map(str, args)], env=WIDE)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--task", "nonsense"), ("--task 'nonsense' is none", "associations", "parity")),
        (("--contender", "gpt"), ("--contender 'gpt' is none", "hope", "transformer")),
        (("--task", "shakespeare"), ("--task 'shakespeare' needs its text", "--data")),
    ],
    ids=["task", "contender", "text"],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, args, parts):
    done = typed(*args, "--out", tmp_path)

    assert done.exit_code == 1
    assert done.stderr.startswith("hope: ")
    assert len(done.stderr.splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_the_text_is_refused(tmp_path):
    done = typed("--task", "wikitext", "--data", tmp_path)

    assert done.exit_code == 1
    assert str(tmp_path) in done.stderr


def test_help_names_what_there_is():
    done = typed("--help")

    assert done.exit_code == 0
    for flag in ("--task", "--contender", "--seeds", "--short", "--out", "--data", "--plot"):
        assert flag in done.stdout


def test_results_are_kept_and_shown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from hope_runtime.evaluation import tasks

    short = replace(tasks.language(tasks.languages.LANGUAGES[1]), steps=2)
    monkeypatch.setattr(tasks, "named", lambda data: {"(aa)*": lambda: short})
    args = ("--contender", "frozen", "--out", tmp_path, "--plot", tmp_path / "plot.png")

    done = typed(*args)

    assert done.exit_code == 0, done.stderr
    assert "(aa)*" in done.stdout
    assert "Bin0: 2 to 40" in done.stdout
    assert "step 2/2" in done.stderr
    [kept] = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(kept)["contender"] == "frozen"
    assert "frozen" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000
    again = typed(*args)
    assert "step 2/2" not in again.stderr
    assert again.stdout == done.stdout


def test_a_stop_says_how_to_go_on(tmp_path, monkeypatch):
    from hope_runtime.evaluation import runner

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", stopped)
    done = typed("--task", "parity", "--out", tmp_path)

    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr
