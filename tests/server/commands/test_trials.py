"""`hope eval adapt`, `forget` and `classes`, as a person types them."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO

import pytest
from typer.testing import CliRunner

from server.cli import app

WIDE = {"COLUMNS": "200", "TERM": "dumb", "HOPE_EVAL_DATA": "", "HOPE_DTYPE": "float32"}
TINY = ("--model", "random", "--threads", "1")
COMMANDS = ("adapt", "forget", "classes")


def typed(*args, **env):
    return CliRunner().invoke(app, ["eval", *map(str, args)], env=WIDE | env)


def refused(done, *parts):
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("hope: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def packed(file, **contents):
    with tarfile.open(file, "w:xz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))


@pytest.fixture
def data(tmp_path):
    """A folder with a little of everything."""
    here = tmp_path / "data"
    here.mkdir()
    text = b"It was the best of times. " * 20
    packed(here / "wikitext2.tar.xz", **{"valid.txt": text, "test.txt": text})
    (here / "lambada_test.txt").write_text("so it goes\nand on it went\n")
    (here / "tinyshakespeare.txt").write_text("KING:\nSpeak, speak.\n\n" * 40)
    words = ["ant", "bee", "cow", "doe", "elk", "fly", "gnu", "hen", "ibis", "jay"]
    rows = [(f"{word} {n}", f"{word}_s") for word in words for n in range(4)]
    intents = json.dumps({"train": rows, "test": rows}).encode()
    packed(here / "clinc150.tar.xz", **{"data_full.json": intents})
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_there_is(command):
    done = typed(command, "--help")

    assert done.exit_code == 0
    for flag in ("--data", "--model", "--threads", "--out"):
        assert flag in done.stdout


def test_reading_is_shown_and_kept(tmp_path):
    (tmp_path / "verse.txt").write_text("so it goes, " * 40)
    args = ("--window", 256, "--window", 512, "--tokens", 150, "--out", tmp_path / "a.json")

    done = typed("adapt", tmp_path / "verse.txt", *args, *TINY)

    assert done.exit_code == 0, done.stderr
    kept = json.loads((tmp_path / "a.json").read_text())
    assert [(row["source"], row["window"]) for row in kept] == [
        ("verse.txt", 256),
        ("chats", 256),
        ("verse.txt", 512),
        ("chats", 512),
    ]
    for row in kept:
        assert f"{row['learning']:.2f}" in done.stdout
    assert "verse.txt, window 256, learning" in done.stderr


def test_a_setting_of_the_levels_can_be_tried(tmp_path):
    args = ("--window", 256, "--tokens", 80, "--level", "rate=0", "--out", tmp_path / "a.json")

    done = typed("adapt", *args, *TINY)

    assert done.exit_code == 0, done.stderr
    [row] = json.loads((tmp_path / "a.json").read_text())
    assert row["change"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("no-such-file.txt",), ("no-such-file.txt", "name a text file")),
        (("--level", "speed=3"), ("--level 'speed=3'", "rate")),
        (("--level", "rate=fast"), ("--level 'rate=fast'",)),
        (("--data", "no-such-folder"), ("no-such-folder", "self_dialogue")),
        (("--out", "no/such/folder.json"), ("no/such/folder.json", "name another file")),
    ],
    ids=["file", "setting", "value", "data", "out"],
)
def test_what_cannot_be_read_is_refused(args, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(typed("adapt", *args, "--tokens", 20, *TINY), *parts)


def test_what_is_lost_is_shown_and_kept(tmp_path, data):
    pytest.importorskip("matplotlib")
    few = ("--sessions", 1, "--tokens", 96, "--text", 50, "--passages", 2)
    kept = ("--out", tmp_path / "f.json", "--plot", tmp_path / "f.png")

    done = typed("forget", "--data", data, *few, *kept, *TINY)

    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [row["sessions"] for row in rows] == [0, 1]
    assert all(row["passages"] == 2 and row["text_tokens"] == 49 for row in rows)
    assert "capital of France" in done.stdout
    assert "judging after 1" in done.stderr
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_learned_class_by_class_is_shown_and_kept(tmp_path, data):
    pytest.importorskip("matplotlib")
    few = ("--contender", "frozen", "--contender", "in-context", "--examples", 2, "--queries", 1)
    kept = ("--out", tmp_path / "c.json", "--plot", tmp_path / "c.svg")

    done = typed("classes", *few, *kept, *TINY, HOPE_EVAL_DATA=str(data))

    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [row["contender"] for row in rows] == ["frozen"] * 10 + ["in-context"] * 10
    assert "first task" in done.stdout
    assert "in-context: task 10" in done.stderr
    assert (tmp_path / "c.svg").stat().st_size > 1000


@pytest.mark.parametrize("command", ["forget", "classes"])
def test_without_data_the_remedy_is_told(command, tmp_path):
    refused(typed(command, *TINY), "--data DIR or HOPE_EVAL_DATA", "docs/evaluation.md")
    refused(typed(command, "--data", tmp_path / "none", *TINY), "no such folder")
    refused(typed(command, "--data", tmp_path, *TINY), str(tmp_path), "has n", "--data")


def test_a_contender_that_is_none_is_refused_by_name(data):
    done = typed("classes", "--data", data, "--contender", "oracle", *TINY)

    refused(done, "--contender 'oracle' is none", "consolidated")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stop_keeps_what_is_done(command, tmp_path, data, monkeypatch):
    from hope_runtime.evaluation import adapt, classes, forget

    def stop_after_one(function):
        def some(*args, **named):
            yield next(iter(function(*args, **named)))
            raise KeyboardInterrupt

        return some

    monkeypatch.setattr(adapt, "adapt", stop_after_one(adapt.adapt))
    monkeypatch.setattr(forget, "forget", stop_after_one(forget.forget))
    monkeypatch.setattr(classes.Study, "run", stop_after_one(classes.Study.run))
    few = {
        "adapt": ("--tokens", 80, "--window", 256),
        "forget": ("--data", data, "--text", 50, "--passages", 1),
        "classes": ("--data", data, "--queries", 1),
    }

    done = typed(command, *few[command], "--out", tmp_path / "kept.json", *TINY)

    assert done.exit_code == 130
    assert "what was done is kept" in done.stderr
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 1
    assert len(done.stdout.splitlines()) >= 2
