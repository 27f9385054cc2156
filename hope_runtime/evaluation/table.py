"""Results side by side: a mean over seeds, from the least to the most, for each probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hope_runtime.evaluation.runner import Result
from hope_runtime.evaluation.tasks import Measure, Task


class Cell(NamedTuple):
    """One contender at one probe; values as they are shown (per cent, or bits)."""

    mean: float
    least: float
    most: float
    seeds: int


class Row(NamedTuple):
    """One probe of one task."""

    task: str
    probe: str
    longer: bool
    measure: Measure
    chance: float
    cells: dict[str, Cell]  # by contender; one that was not run has none


def rows(tasks: Sequence[Task], results: Sequence[Result]) -> list[Row]:
    """Gather results by probe, in the order of the tasks."""
    found = []
    for task in tasks:
        mine = [result for result in results if result.task == task.name]
        scale = 1.0 if task.measure is Measure.BITS else 100.0
        for probe in task.probes:
            cells = {}
            for name in dict.fromkeys(result.contender for result in mine):
                values = [scale * r.found[probe.name].value for r in mine if r.contender == name]
                mean = sum(values) / len(values)
                cells[name] = Cell(mean, min(values), max(values), len(values))
            if cells:
                chance = scale * task.chance
                found.append(Row(task.name, probe.name, probe.longer, task.measure, chance, cells))
    return found


def written(cell: Cell | None, measure: Measure) -> str:
    """Write a cell: the mean, and the range where there are several seeds.

    >>> written(Cell(93.75, 90.0, 97.5, 2), Measure.ANSWERS)
    '93.8 (90.0-97.5)'
    >>> written(Cell(2.345, 2.345, 2.345, 1), Measure.BITS)
    '2.35'
    """
    if cell is None:
        return ""
    digits = 2 if measure is Measure.BITS else 1
    mean = f"{cell.mean:.{digits}f}"
    if cell.seeds == 1:
        return mean
    return f"{mean} ({cell.least:.{digits}f}-{cell.most:.{digits}f})"


def markdown(found: Sequence[Row], contenders: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| task | probe | chance | " + " | ".join(contenders) + " |"
    yield "|---" * (3 + len(contenders)) + "|"
    for row in found:
        probe = f"*{row.probe}*" if row.longer else row.probe
        task = row.task.replace("*", "\\*")
        cells = [written(row.cells.get(name), row.measure) for name in contenders]
        yield "| " + " | ".join([task, probe, f"{row.chance:.1f}", *cells]) + " |"
