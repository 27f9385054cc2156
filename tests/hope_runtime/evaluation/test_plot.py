"""Pictures are drawn where matplotlib is, and its absence is told with the remedy."""

from __future__ import annotations

import sys

import pytest

from hope_runtime.evaluation.plot import Panel, PlotError, curves, draw
from hope_runtime.evaluation.table import Cell, Row
from hope_runtime.evaluation.tasks import Measure

ROWS = [
    Row("facts", "4 facts", False, Measure.ANSWERS, 3.1, {"hope": Cell(90.0, 80.0, 99.0, 2)}),
    Row("facts", "8 facts", True, Measure.ANSWERS, 3.1, {"hope": Cell(50.0, 50.0, 50.0, 1)}),
    Row("text", "256 bytes", False, Measure.BITS, 8.0, {"delta": Cell(2.5, 2.5, 2.5, 1)}),
]


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw(ROWS, ["hope", "delta"], tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    pytest.importorskip("matplotlib")

    with pytest.raises(PlotError, match=r"plot\.nonsense.*\.png"):
        draw(ROWS, ["hope", "delta"], tmp_path / "plot.nonsense")


def test_without_matplotlib_the_remedy_is_told(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(PlotError, match=r"pip install 'hope-server\[eval\]'"):
        draw(ROWS, ["hope"], tmp_path / "plot.png")


def test_curves_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    lines = {"kept": [(0, 100.0), (20, 90.0)], "lost": [(0, 0.0)]}
    curves([Panel("words", "sessions", "%", lines), Panel("none", "", "", {})], tmp_path / "c.png")

    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
