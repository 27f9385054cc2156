"""Results as a picture: a panel for each task or figure, what is compared side by side in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hope_runtime.evaluation.table import Row
from hope_runtime.evaluation.tasks import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_MARKS = "osD^vPX"


class PlotError(RuntimeError):
    """A picture that cannot be drawn; the message names the remedy."""


class Panel(NamedTuple):
    """What is drawn in one place: lines by their names, each as points."""

    title: str
    along: str
    up: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def curves(panels: Sequence[Panel], file: Path) -> None:
    """Draw lines, one panel beside the other.

    Raises:
        PlotError: matplotlib is missing, or cannot write such a file.
    """
    figure = _figure(3.4 * len(panels), 3.0)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, (name, points) in enumerate(panel.lines.items()):
            mark = f"{_MARKS[number % len(_MARKS)]}-"
            axes.plot(*zip(*points, strict=True), mark, markersize=4, linewidth=1, label=name)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.along, fontsize=7)
        axes.set_ylabel(panel.up, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.92")
        if len(panel.lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    _save(figure, file)


def draw(rows: Sequence[Row], contenders: Sequence[str], file: Path) -> None:
    """Draw the rows of a table.

    Raises:
        PlotError: matplotlib is missing, or cannot write such a file.
    """
    panels = [(task, list(group)) for task, group in groupby(rows, key=lambda row: row.task)]
    across = min(_COLUMNS, len(panels))
    down = -(-len(panels) // across)
    figure = _figure(3.4 * across, 2.7 * down + 0.5)
    from matplotlib.ticker import MaxNLocator

    for place, (task, probes) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        for number, name in enumerate(contenders):
            shift = 0.09 * (number - (len(contenders) - 1) / 2)  # marks at one height stay visible
            here = [(i, row.cells[name]) for i, row in enumerate(probes) if name in row.cells]
            means = [cell.mean for _, cell in here]
            below = [cell.mean - cell.least for _, cell in here]
            above = [cell.most - cell.mean for _, cell in here]
            axes.errorbar(
                [i + shift for i, _ in here],
                means,
                yerr=[below, above],
                fmt=_MARKS[number % len(_MARKS)],
                color=f"C{number}",
                markersize=4.5,
                label=name,
            )
        bits = probes[0].measure is Measure.BITS
        if not bits:
            axes.set_ylim(-4, 104)
            axes.axhline(probes[0].chance, color="0.6", linestyle=":", linewidth=1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xticks(range(len(probes)), [_label(row) for row in probes], fontsize=6.5)
        axes.set_xlim(-0.6, len(probes) - 0.4)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(task.replace("^n", "ⁿ"), fontsize=9)
        axes.set_ylabel("bits per byte" if bits else "% right", fontsize=7)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(contenders),
        fontsize=8,
        frameon=False,
    )
    _save(figure, file)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError(
            "a plot needs matplotlib; install it with  pip install 'hope-server[eval]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> None:
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {file}: {error}; name a .png, .svg or .pdf to write") from error


def _label(row: Row) -> str:
    broken = row.probe.replace(": " if ":" in row.probe else " ", "\n")
    return f"{broken}\n(longer)" if row.longer else broken
