"""Accuracy over the training steps of a task, a curve for each method: at which budget it leaves chance and is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fedlscl.analysis.captions import Picture, about_seeds, about_stars, among, ranking, starred_name
from fedlscl.analysis.comparison import Comparison, Variant
from fedlscl.analysis.drawing import (
    COLOURS,
    COLUMN,
    LINES,
    MARKERS,
    MAX_BANDS,
    PAGE,
    filled,
    frame,
    key,
    line,
    over_seeds,
    within,
)
from fedlscl.analysis.formats import Cell, Table
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import (
    BELOW,
    COMPETING,
    STAR,
    accuracies,
    among_methods,
    final,
    number,
    ordered,
    seeds,
    sentences,
    unnamed,
)
from fedlscl.evaluation import FloatArray
from fedlscl.run.growth import Growth
from fedlscl.run.plots import DPI

ROUNDS = (1, 2, 5, 10, 20, 40, 80, 160)
"""The rounds of a task after which a table has a column, as far as there are runs with so many, and the last."""

SHOWN = {"task": "new", "seen": "learned"}
"""The masks of the tables, and what each shows: the task being learned, or all that were learned by then."""


def accuracy_by_steps(comparison: Comparison, mask: str, narrow: bool = False) -> Picture | None:
    """Accuracy on the newest task and on all tasks learned so far against the steps that a client has taken on a task.

    Args:
        comparison: the runs; those whose folders do not tell how their accuracy grew are left out.
        mask: the classes that a prediction may fall on.
        narrow: whether it comes in pieces too, no wider than a column.

    Returns:
        A line for each method in its usual configuration, level for those in which a task has no steps of its own; None
        where no run has two rounds of a task.
    """
    grown = _grown(ranking(comparison.usual, mask), mask)
    trained = _trained(grown)
    if _rounds(trained, mask) < 2:
        return None
    new, learned = over_seeds(np.array([growth.chance[mask] for growth in _growths(trained)]))[0]
    titles = {"new": "on the task that is being learned", "learned": "on all tasks learned so far"}
    chance = {"new": float(new), "learned": float(learned)}
    figure = Figure(figsize=(PAGE, 2.9 + 0.05 * len(grown)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    banded = len(grown) <= MAX_BANDS
    for axes, kind in ((left, "new"), (right, "learned")):
        _draw(axes, grown, trained, kind, mask, chance[kind])
        axes.set(title=titles[kind])
    left.set(ylabel="accuracy (%)")
    within(left)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, handlelength=2.6
    )
    pieces: list[Figure] = []
    if narrow:
        for kind, title in titles.items():
            pieces.append(Figure(figsize=(COLUMN, 2.5), dpi=DPI, layout="constrained"))
            axes = pieces[-1].subplots()
            _draw(axes, grown, trained, kind, mask, chance[kind])
            axes.set(title=title, ylabel="accuracy (%)", ylim=left.get_ylim())
        pieces.append(key(left, 2))
    caption = (
        f"Accuracy in % after each round of a task, against the optimizer steps (logarithmic) that a client has taken "
        f"on the images of that task by then; mean over clients and tasks; {among(mask)}. Dashed and level: what takes "
        f"no steps on a task, or sees all tasks at once. {about_seeds(grown, 'bands are' if banded else None)} "
        f"{about_stars(grown, mask)}"
    )
    title = f"Accuracy over training steps, {comparison.title}"
    return Picture("accuracy_by_steps", title, caption.strip(), figure, pieces=tuple(pieces))


def _draw(
    axes: Axes, grown: Sequence[Variant], trained: Sequence[Variant], kind: str, mask: str, chance: float
) -> None:
    """The lines of one panel, and that of a guess."""
    banded = len(grown) <= MAX_BANDS
    for index, variant in enumerate(grown):
        colour = COLOURS[index % len(COLOURS)]
        label = filled(starred_name(variant, mask), 40)
        values = _values(variant, kind, mask)
        if variant not in trained:
            axes.axhline(float(over_seeds(values[:, -1])[0]), color=colour, linestyle=LINES[1], label=label)
            continue
        rounds = np.arange(1, values.shape[1] + 1)
        style = {
            "color": colour,
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 3.2,
            "markevery": [n - 1 for n in _columns(len(rounds))],
        }
        line(axes, rounds * _steps(variant), values, label, style, band=banded)
    axes.axhline(chance, color="0.5", linewidth=0.8, linestyle=LINES[3], label="a guess")
    frame(axes)
    axes.set(xscale="log", xlabel="optimizer steps of a client on the images of a task")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def growth_tables(comparison: Comparison) -> list[Table]:
    """The same numbers after some of the rounds.

    Args:
        comparison: the runs; those whose folders do not tell how their accuracy grew are left out.

    Returns:
        Accuracy on the newest task under `task`, and on all tasks learned so far under `seen`; a row for each method in
        its usual configuration, the best first. None where no run has two rounds of a task.
    """
    tables = []
    for mask, kind in SHOWN.items():
        grown = _grown(comparison.usual, mask)
        trained = _trained(grown)
        if (most := _rounds(trained, mask)) < 2:
            continue
        rows = ordered(grown, final(mask))
        values = [*(_after(n, kind, mask) for n in _columns(most)), _last(kind, mask)]
        columns = [accuracies(rows, value, mask, competing=among_methods(mask)) for value in values]
        guess = float(np.mean([growth.chance[mask][kind == "learned"] for growth in _growths(trained)]))
        what = "the task that is being learned" if kind == "new" else "all tasks learned so far"
        tables.append(
            Table(
                f"growth_{mask}",
                f"Accuracy on {what} after so many rounds of a task, mask {mask}",
                comparison.title,
                sentences(
                    "In %, mean over clients and tasks, ± deviation over seeds. Steps are those that a client takes in "
                    "a round on the images of the task; methods without train in no steps on a task, or see all tasks "
                    f"at once. A guess would have {guess:.1f}.",
                    f"Rows by their final average under {mask}, {BELOW}",
                    COMPETING,
                    STAR,
                    unnamed(comparison, rows),
                ),
                ("method", "seeds", "steps a round", *(f"round {n}" for n in _columns(most)), "last round"),
                tuple(
                    (
                        Cell(name),
                        seeds(variant),
                        number(_steps(variant) if variant in trained else None),
                        *(column[place] for column in columns),
                    )
                    for place, (name, variant) in enumerate(rows)
                ),
            )
        )
    return tables


def _without_steps(run: Run) -> bool:
    """Whether no number of steps belongs to a task: sums take none, and bounds see all tasks at once."""
    return run.pooled or run.growth is None or run.growth.steps == 0


def _trained(variants: Sequence[Variant]) -> list[Variant]:
    return [variant for variant in variants if not _without_steps(variant.runs[0])]


def _grown(variants: Sequence[Variant], mask: str) -> list[Variant]:
    """The variants of whose every run it is known how its accuracy under a mask grew."""
    return [v for v in variants if all(run.growth is not None and mask in run.growth.new for run in v.runs)]


def _growths(variants: Sequence[Variant]) -> list[Growth]:
    return [run.growth for variant in variants for run in variant.runs if run.growth is not None]


def _values(variant: Variant, kind: str, mask: str) -> FloatArray:
    """(seeds, rounds) in %."""
    return np.stack([getattr(growth, kind)[mask] for growth in _growths([variant])])


def _rounds(variants: Sequence[Variant], mask: str) -> int:
    """The most rounds that a task has."""
    return max((len(growth.new[mask]) for growth in _growths(variants)), default=0)


def _steps(variant: Variant) -> float:
    """Steps a round, mean over seeds, which have different splits."""
    return float(np.mean([growth.steps for growth in _growths([variant])]))


def _columns(most: int) -> list[int]:
    return [rounds for rounds in ROUNDS if rounds <= most]


def _after(rounds: int, kind: str, mask: str) -> Callable[[Run], float | None]:
    """What gives a run's accuracy after so many rounds, None where it has fewer or takes no steps."""

    def value(run: Run) -> float | None:
        values = getattr(run.growth, kind)[mask]
        return None if len(values) < rounds or _without_steps(run) else float(values[rounds - 1])

    return value


def _last(kind: str, mask: str) -> Callable[[Run], float | None]:
    return lambda run: float(getattr(run.growth, kind)[mask][-1])
