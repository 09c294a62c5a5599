"""Rows and cells that tables share: which methods have one, who competes in a column, and how a number is written.

Every accuracy is in %, mean ± sample deviation over seeds; a single seed has no deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedlscl.analysis.comparison import Comparison, Variant, named
from fedlscl.analysis.formats import MISSING, Cell, Mark
from fedlscl.analysis.results import Run
from fedlscl.evaluation import MASKS

COMPONENTS = {
    "fed_lscl": (True, True, True),
    "fed_lscl_without_o2d": (True, True, False),
    "fed_lscl_without_replay": (True, False, True),
    "fed_lscl_collaboration_only": (True, False, False),
    "small_fedavg": (False, False, False),
}
"""Rows of Table 2: large-small collaboration, small-model continual fine-tuning, one-by-one distillation."""

ABLATIONS = tuple(name for name, parts in COMPONENTS.items() if not all(parts))

RELATIVES = (
    *ABLATIONS,
    *("fed_lscl_ewc", "fed_lscl_lwf", "fed_lscl_iterative", "fed_lscl_sums", "fed_lscl_auto"),
    *("fed_lscl_static", "fed_lscl_fedavg"),
    *("pilora_own_rate", "lorm_published"),
)
"""Fed-LSCL without one of its parts or otherwise solved, and a method at other rates: they take no mark from others."""

ROUNDING = {"trainer.precision"}
"""Fields that make other numbers but no other experiment."""

MARKS = "The best of each column is bold, the second best in italics."
COMPETING = (
    f"{MARKS} Bounds, what is derived from another method, and rows that name a field in brackets, but for the "
    "precision, do not compete; under all masks but task neither do methods with a star."
)
KEPT = (
    'Under "images kept" is how many training images of each class a client keeps at most after their task, to replay '
    "them or to answer the server with."
)
PROMISED = (
    'Under "epsilon" is the differential privacy of what clients have sent, over all tasks and rounds; in brackets to '
    'whom it is promised, and delta. With noise from the run\'s "seed", which the server knows, nothing is.'
)
BELOW = "best first, the bounds, which see the images of all clients and tasks at once, in a group below the others."
STAR = "A star: the task of each test image, which had to be known, chose the parameters that classified it."
MASK_NAMES = {
    "task": "only the classes of the image's task compete",
    "seen": "all classes that the client has learned so far compete",
    "federation": "all classes that any client has learned so far compete",
    "none": "all classes of the data set compete",
}

Named = tuple[str, Variant | None]
"""A row: its name, and what was run; None where nothing was."""


def ordered(
    variants: Sequence[Variant], by: Callable[[Run], float | None], required: Sequence[str] = ()
) -> list[Named]:
    """Rows, best first: all that compete, those without a number behind them, the bounds, and what was not run.

    Args:
        variants: what was run.
        by: the value that decides, of which more is better; the mean over seeds counts.
        required: methods that have a row even where there is no run.
    """

    def place(variant: Variant) -> tuple[bool, bool, float, str]:
        found = known(variant, by)
        return (variant.pooled, not found, -statistics.mean(found or [0.0]), variant.method)

    there = {variant.method for variant in variants}
    rows: list[Named] = [(variant.label, variant) for variant in sorted(variants, key=place)]
    return [*rows, *((method, None) for method in required if method not in there)]


def method_of(name: str, variant: Variant | None) -> str:
    """The method of a row."""
    return variant.method if variant else name


def masks_of(variants: Sequence[Named]) -> list[str]:
    """The masks under which any of these variants was measured."""
    runs = [run for _, variant in variants if variant for run in variant.runs]
    return [mask for mask in MASKS if any(not math.isnan(run.final_average[mask]) for run in runs)]


def number_of_tasks(comparison: Comparison) -> int:
    """The most tasks that a run has."""
    return max(len(run.over_tasks("task")) for variant in comparison.variants for run in variant.runs)


def final(mask: str) -> Callable[[Run], float]:
    """What gives a run's final average under a mask, in %."""
    return lambda run: run.final_average[mask]


def usual(variant: Variant) -> bool:
    """Whether a variant is its method in the usual configuration, however it is rounded."""
    return set(variant.differs) <= ROUNDING


def among_methods(mask: str) -> Callable[[Variant], bool]:
    """Whether a variant competes with the other methods: what is told the task has it easier where others are not."""
    return lambda variant: (
        usual(variant)
        and not variant.pooled
        and variant.method not in RELATIVES
        and (mask == "task" or mask not in variant.task_aware)
    )


def sentences(*each: str) -> str:
    """Sentences in a line, without those that are empty."""
    return " ".join(filter(None, each))


def unnamed(comparison: Comparison, variants: Sequence[Named]) -> str:
    """The usual values, which no row bears in its name."""
    shown = {variant.method for _, variant in variants if variant}
    groups: dict[str, list[str]] = {}
    for method, values in comparison.usual_values.items():
        if values and method in {"", *shown}:
            groups.setdefault(named(values), []).append(method)
    texts = [f"{', '.join(methods)}: {values}" if any(methods) else values for values, methods in groups.items()]
    return f"Where a row does not name it: {'; '.join(texts)}." if texts else ""


def accuracies(
    variants: Sequence[Named],
    value: Callable[[Run], float | None],
    mask: str,
    *,
    competing: Callable[[Variant], bool] = lambda variant: True,
    least: bool = False,
) -> list[Cell]:
    """A column: mean and deviation of a value over each variant's seeds, a star where due, the two best marked."""
    cells, means = [], []
    for _, variant in variants:
        found = known(variant, value) if variant else []
        cell = spread(found, 1)
        if variant and found and mask in variant.task_aware:
            cell = replace(cell, text=f"{cell.text}*", numbers={**cell.numbers, "task known": 1})
        cells.append(cell)
        means.append(statistics.mean(found) if variant and found and competing(variant) else None)
    # what reads the same is equally good
    ranking = sorted({round(mean, 1) for mean in means if mean is not None}, reverse=not least)[:2]
    marks: list[Mark] = ["best", "second"]
    if sum(mean is not None for mean in means) > 1:
        for place, mean in enumerate(means):
            if mean is not None and round(mean, 1) in ranking:
                cells[place] = replace(cells[place], mark=marks[ranking.index(round(mean, 1))])
    return cells


def known(variant: Variant, value: Callable[[Run], float | None]) -> list[float]:
    """A value of each of a variant's runs that has it."""
    return [x for x in map(value, variant.runs) if x is not None and not math.isnan(x)]


def kept(variant: Variant | None) -> Cell:
    """The images of each class that a client keeps after their task."""
    return number(variant.runs[0].images_kept if variant else None, 0)


def promised(variant: Variant | None) -> Cell:
    """The epsilon of differential privacy, the largest over the seeds, and its delta."""
    promises = [run.summary.privacy for run in variant.runs if run.summary.privacy] if variant else []
    if not promises:
        return Cell(MISSING)
    most = max(promises, key=lambda promise: promise.epsilon)
    seed = ", seed" if most.noise == "seed" else ""
    text = f"{most.epsilon:.3g} ({most.unit}, {most.delta:g}{seed})"
    return Cell(text, numbers={"": most.epsilon, "delta": most.delta})


def spread(values: Sequence[float], digits: int) -> Cell:
    """Mean ± sample deviation; a single value has no deviation."""
    if not values:
        return Cell(MISSING)
    cell = number(statistics.mean(values), digits)
    if len(values) == 1:
        return cell
    deviation = statistics.stdev(values)
    return Cell(f"{cell.text} ± {deviation:.{digits}f}", numbers={**cell.numbers, "sd": deviation})


def number(value: float | None, digits: int = 1) -> Cell:
    """A number with so many digits behind the point, or what is missing."""
    return Cell(MISSING) if value is None else Cell(f"{value:.{digits}f}", numbers={"": value})


def seeds(variant: Variant | None) -> Cell:
    """How many seeds were run."""
    return number(len(variant.runs) if variant else 0, 0)
