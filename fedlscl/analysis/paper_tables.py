"""The paper's Tables 1 and 2 from finished runs, with the paper's numbers where they may stand beside."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from fedlscl.analysis import paper
from fedlscl.analysis.comparison import Comparison, Variant
from fedlscl.analysis.deviations import SEEDS, Difference, data_set, differences
from fedlscl.analysis.formats import Cell, Table
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import (
    ABLATIONS,
    BELOW,
    COMPETING,
    COMPONENTS,
    KEPT,
    MARKS,
    MASK_NAMES,
    STAR,
    Named,
    accuracies,
    among_methods,
    final,
    kept,
    masks_of,
    method_of,
    number,
    number_of_tasks,
    ordered,
    seeds,
    sentences,
    unnamed,
    usual,
)

COMPARED = tuple(paper.TABLE1["CIFAR-100"])
"""Rows of Table 1, on the paper's data shown as missing where there is no run."""


def table1(comparison: Comparison, mask: str = "task") -> Table:
    """Accuracy on each task right after it was learned, for every method (the paper's Table 1).

    Args:
        comparison: runs that may stand side by side.
        mask: the classes that compete.

    Returns:
        A row for each method by its mean over the tasks, see `ordered`. On the paper's data those of the paper that
        were not run are shown as missing, and under its mask the paper's numbers follow in columns of their own, see
        :func:`_beside`.
    """

    def average(run: Run) -> float:
        return statistics.mean(run.summary.under(mask).table1)

    shown = [variant for variant in comparison.usual if variant.method not in ABLATIONS]
    papers_data = any(data_set(variant) in paper.TABLE1 for variant in shown)
    variants = ordered(shown, average, COMPARED if papers_data else ())
    reported, note = _beside(comparison, paper.TABLE1, variants) if mask == "task" else ({}, "")
    tasks, papers_tasks = number_of_tasks(comparison), max(map(len, reported.values()), default=0)

    def on_task(n: int) -> Callable[[Run], float | None]:
        return lambda run: next(iter(run.summary.under(mask).table1[n:]), None)

    values = [*map(on_task, range(tasks)), average]
    columns = [accuracies(variants, value, mask, competing=among_methods(mask)) for value in values]
    rows = []
    for place, (name, variant) in enumerate(variants):
        papers = map(number, reported.get(name, (None,) * papers_tasks))
        rows.append((Cell(name), seeds(variant), kept(variant), *(column[place] for column in columns), *papers))
    header = ("method", "seeds", "images kept", *(f"task {n + 1}" for n in range(tasks)), "mean")
    header += tuple(f"paper: task {n + 1}" for n in range(papers_tasks))
    return Table(
        f"table1_{mask}",
        f"Accuracy on each task right after it was learned (Table 1), mask {mask}",
        comparison.title,
        sentences(
            f"Accuracy in %, mean over clients, ± deviation over seeds; {MASK_NAMES[mask]}.",
            f"Rows by the mean, {BELOW}",
            *(COMPETING, STAR, KEPT, unnamed(comparison, variants), note),
        ),
        header,
        tuple(rows),
    )


def table2(comparison: Comparison) -> Table:
    """Accuracy of the final model over all tasks without one or several components (the paper's Table 2).

    Args:
        comparison: runs that may stand side by side.

    Returns:
        A row for each combination of components that the method offers; the paper's numbers as in :func:`table1`.
    """
    there = [variant for variant in comparison.usual if variant.method in COMPONENTS]
    variants: list[Named] = []
    for name in COMPONENTS:
        variants += [(variant.label, variant) for variant in there if variant.method == name] or [(name, None)]
    reported, note = _beside(comparison, paper.TABLE2, variants)
    masks = masks_of(variants)
    columns = [accuracies(variants, final(mask), mask, competing=usual) for mask in masks]
    rows = []
    for place, (name, variant) in enumerate(variants):
        parts = ["✓" if there else "×" for there in COMPONENTS[method_of(name, variant)]]
        paper_cell = [number(*reported.get(name, (None,)))] if reported else []
        counts = (seeds(variant), kept(variant))
        rows.append((*map(Cell, [name, *parts]), *counts, *(column[place] for column in columns), *paper_cell))
    return Table(
        "table2",
        "Ablation (Table 2): accuracy of the final model over all tasks",
        comparison.title,
        sentences(
            "L-S: large-small collaboration; SM-CF: small-model continual fine-tuning; O2D: one-by-one distillation.",
            "Final average in %, ± deviation over seeds, under each mask; the paper does not say which is its own.",
            *(MARKS, KEPT, unnamed(comparison, variants), note),
        ),
        ("method", "L-S", "SM-CF", "O2D", "seeds", "images kept", *masks, *(["paper"] if reported else [])),
        tuple(rows),
    )


def _beside(
    comparison: Comparison, numbers: Mapping[str, Mapping[str, tuple[float, ...]]], variants: Sequence[Named]
) -> tuple[dict[str, tuple[float, ...]], str]:
    """The paper's numbers by the row that they may stand in, and a sentence on it.

    They stand in the rows of runs on one of the paper's data sets that follow what the paper states of its protocol,
    and in those of methods that were not run; what it leaves open and differs here is said. Where no row follows they
    are left out, and it is said why.
    """
    there = [variant for _, variant in variants if variant]
    data = sorted(set(map(data_set, there)))
    if not any(name in numbers for name in data):
        return {}, ""
    if len(data) > 1:
        return {}, f"The paper's numbers are left out: these are runs on {' and '.join(data)}."
    reported = numbers[data[0]]
    if comparison.evaluated_on != "test images":
        return {}, f"The paper's numbers are left out: these are accuracies on {comparison.evaluated_on}."
    stated = {id(variant): any(point.stated for point in _unlike([variant])) for variant in there}
    different = _unlike(there)
    found = {}
    if not all(stated.values()):
        follows = [(name, variant) for name, variant in variants if not (variant and stated[id(variant)])]
        found = {
            name: reported[method] for name, variant in follows if (method := method_of(name, variant)) in reported
        }
    if not found:
        reasons = [point for point in different if point.stated]
        return {}, f"The paper's numbers are left out, for these runs differ from its protocol: {_listed(reasons)}."
    said = f" These runs differ from it: {_listed(different)}." if different else ""
    return found, f"The paper's numbers are those of its own protocol.{said}"


def _unlike(variants: Sequence[Variant]) -> list[Difference]:
    return [difference for difference in differences(variants)[0] if difference.label != SEEDS]


def _listed(found: Sequence[Difference]) -> str:
    return ", ".join(f"{point.label} {point.here} (paper: {point.paper})" for point in found)
