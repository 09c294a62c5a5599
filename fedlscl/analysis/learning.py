"""The learning curve of one run, as a small drawing that follows the colours of the page it stands in."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fedlscl.analysis.results import Run
from fedlscl.analysis.sections import drawn, folder_of
from fedlscl.evaluation import MASKS
from fedlscl.files import content_of
from fedlscl.run.folder import METRICS

log = logging.getLogger(__name__)

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340.0, 190.0, 30.0, 30.0, 16.0
"""Of the drawing, and of its margins, in pixels; the margin on the right is 8."""


@dataclass(frozen=True)
class Learning:
    """Accuracy in the course of a run.

    Args:
        unit: what is counted on the axis: communication rounds, or tasks where the folder does not tell more.
        lines: by mask the accuracy in % after each; mean over clients and the tasks learned by then.
        starts: the number of the first round of each task, from 1.
    """

    unit: str
    lines: Mapping[str, Sequence[float]]
    starts: Sequence[int]


def learning(run: Run) -> Learning:
    """The accuracy of a run after each round, by its metrics, or after each task, by its summary."""
    folder = folder_of(run)
    try:
        content = None if folder is None else content_of(folder / METRICS)
        found = None if content is None else _rounds(content.decode())
    except (ValueError, OSError) as error:
        log.warning("%s: the curve of this run is that of its summary, for %s", folder, error)
        found = None
    if found is not None:
        return found
    lines = {mask: run.over_tasks(mask).tolist() for mask in MASKS}
    tasks = len(lines["task"])
    return Learning(
        "task", {mask: line for mask, line in lines.items() if not np.isnan(line).all()}, range(1, tasks + 1)
    )


def _rounds(metrics: str) -> Learning | None:
    """What `metrics.csv` has, None if that is nothing, or not of all rounds.

    Raises:
        ValueError: if a number is none.
    """
    values: dict[str, dict[int, float]] = {}
    tasks: dict[int, int] = {}
    for row in csv.reader(io.StringIO(metrics)):
        if len(row) == 4 and row[2].startswith("eval/") and row[2].endswith("/mean"):
            number = int(row[1])
            values.setdefault(row[2].split("/")[1], {})[number] = float(row[3])
            tasks.setdefault(int(row[0]), number)
    lines = {mask: of for mask, of in values.items() if mask in MASKS}
    if not lines or any(set(of) != set(range(1, len(of) + 1)) for of in lines.values()):
        return None
    ordered = {mask: [lines[mask][n + 1] for n in range(len(lines[mask]))] for mask in MASKS if mask in lines}
    return Learning("round", ordered, [tasks[task] for task in sorted(tasks)])


def curve(found: Learning, label: str) -> Markup:
    """Draw accuracy under each mask over the rounds.

    Args:
        found: the numbers.
        label: what it shows, for those who do not see it.
    """
    count = max(len(line) for line in found.lines.values())
    right, floor = WIDTH - 8, HEIGHT - BOTTOM
    step = (right - LEFT) / max(count - 1, 1)

    def x(number: float) -> float:
        return round(LEFT + (number - 1) * step if count > 1 else (LEFT + right) / 2, 1)

    def y(value: float) -> float:
        return round(floor - (floor - TOP) * value / 100, 1)

    lines = [
        (mask, [(x(n), y(value)) for n, value in enumerate(line, 1) if not np.isnan(value)], f"{line[-1]:.1f}")
        for mask, line in found.lines.items()
    ]
    every = -(-count // 10)
    return drawn(
        "curve",
        label=label,
        size=(WIDTH, HEIGHT),
        box=(LEFT, right, TOP, floor),
        lines=lines,
        levels=[(value, y(value)) for value in range(0, 101, 25)],
        numbers=[(n, x(n)) for n in range(1, count + 1) if n % every == 0 or n == 1],
        starts=[(number, round(x(start) - step / 2, 1)) for number, start in enumerate(found.starts, 1) if start > 1],
        unit=found.unit,
    )
