"""The paper's tables, and what a comparison needs besides, from finished runs.

Every accuracy is in %, mean ± sample deviation over seeds; a single seed has no deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.ticker import EngFormatter

from fedlscl.analysis import paper
from fedlscl.analysis.deviations import SEEDS, Difference, data_set, differences
from fedlscl.analysis.formats import MISSING, Cell, Mark, Table
from fedlscl.analysis.results import POOLED, Comparison, Run, Variant, named
from fedlscl.evaluation import MASKS
from fedlscl.run.console import human_bytes

COMPONENTS = {
    "fed_lscl": (True, True, True),
    "fed_lscl_without_o2d": (True, True, False),
    "fed_lscl_without_replay": (True, False, True),
    "fed_lscl_collaboration_only": (True, False, False),
    "small_fedavg": (False, False, False),
}
"""Rows of Table 2: large-small collaboration, small-model continual fine-tuning, one-by-one distillation."""

ABLATIONS = tuple(name for name, parts in COMPONENTS.items() if not all(parts))

COMPARED = tuple(paper.TABLE1["CIFAR-100"])
"""Rows of Table 1, shown as missing where there is no run."""

RELATIVES = (
    *ABLATIONS,
    *("fed_lscl_ewc", "fed_lscl_lwf", "fed_lscl_iterative", "fed_lscl_sums", "fed_lscl_auto"),
    *("pilora_own_rate", "fedvit_rows"),
)
"""What a method is without one of its parts, or otherwise solved or set: they take no mark from other methods."""

ROUNDING = {"trainer.precision"}
"""Fields that make other numbers but no other experiment."""

BOUNDS = ("joint", "local", "local_vit")
"""Not federated, or not continual: they stand below the others and are never marked as best."""

MARKS = "The best of each column is bold, the second best in italics."
COMPETING = (
    f"{MARKS} Bounds, what is derived from another method, and rows that name a field in brackets, but for the "
    "precision, do not compete; under the masks seen and none neither do methods with a star."
)
STAR = "A star: the task of each test image, which had to be known, chose the parameters that classified it."
COUNTS = EngFormatter(places=1)
"""How counts are written: with k, M and G."""
MASK_NAMES = {
    "task": "only the classes of the image's task compete",
    "seen": "all classes that the client has learned so far compete",
    "none": "all classes of the federation compete",
}


def tables(comparison: Comparison, masks: Sequence[str] = ("task",)) -> list[Table]:
    """All tables for which there are runs.

    Args:
        comparison: runs that may stand side by side.
        masks: the masks to show Table 1 under; `task` is that of the paper.

    Returns:
        Table 1 under each mask, an overview under all masks, Table 2 if there is an ablation, a table for each field of
        the sensitivity studies that was varied, one of all other variants, and the costs.

    Raises:
        ValueError: if a mask is unknown.
    """
    if unknown := [mask for mask in masks if mask not in MASKS]:
        raise ValueError(f"mask is '{unknown[0]}', must be one of {', '.join(MASKS)}")
    found = [table1(comparison, mask) for mask in masks]
    found.append(overview(comparison))
    if {variant.method for variant in comparison.usual} & set(ABLATIONS):
        found.append(table2(comparison))
    shown = [id(variant) for variant in comparison.usual]
    for name, varied_field, what in (
        ("blocks", "model.block", "block of the ViT that is adapted (Fig. 3)"),
        ("buffers", "model.buffer_size", "images kept of each class (Fig. 5)"),
    ):
        if varying := comparison.varying(varied_field):
            found.append(_sensitivity(comparison, name, varied_field, what, varying))
            shown += map(id, varying.values())
    others = [variant for variant in comparison.variants if id(variant) not in shown]
    if others:
        found.append(varied(comparison, others))
    found.append(costs(comparison, [*comparison.usual, *others]))
    return found


def table1(comparison: Comparison, mask: str = "task") -> Table:
    """Accuracy on each task right after it was learned, for every method (the paper's Table 1).

    Args:
        comparison: runs that may stand side by side.
        mask: the classes that compete.

    Returns:
        A row for each method of the paper, missing or not, then for the others, and the bounds last. On the paper's
        data and under its mask the paper's numbers follow in columns of their own, see :func:`_beside`.
    """
    variants = _ordered([variant for variant in comparison.usual if variant.method not in ABLATIONS], COMPARED)
    reported, note = _beside(comparison, paper.TABLE1, variants) if mask == "task" else ({}, "")
    tasks, papers_tasks = _tasks(comparison), max(map(len, reported.values()), default=0)

    def on_task(n: int) -> Callable[[Run], float | None]:
        return lambda run: next(iter(run.summary["accuracy"][mask]["table1"][n:]), None)

    def average(run: Run) -> float:
        return float(statistics.mean(run.summary["accuracy"][mask]["table1"]))

    values = [*map(on_task, range(tasks)), average]
    columns = [_accuracies(variants, value, mask, competing=_usual_methods(mask)) for value in values]
    rows = []
    for place, (name, variant) in enumerate(variants):
        papers = map(_number, reported.get(name, (None,) * papers_tasks))
        rows.append((Cell(name), _seeds(variant), *(column[place] for column in columns), *papers))
    header = ("method", "seeds", *(f"task {n + 1}" for n in range(tasks)), "mean")
    header += tuple(f"paper: task {n + 1}" for n in range(papers_tasks))
    return Table(
        f"table1_{mask}",
        f"Accuracy on each task right after it was learned (Table 1), mask {mask}",
        comparison.title,
        _note(
            f"Accuracy in %, mean over clients, ± deviation over seeds; {MASK_NAMES[mask]}.",
            *(COMPETING, STAR, _unnamed(comparison, variants), note),
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
    variants = _ordered([variant for variant in comparison.usual if variant.method in COMPONENTS], tuple(COMPONENTS))
    reported, note = _beside(comparison, paper.TABLE2, variants)
    columns = [_accuracies(variants, _final(mask), mask, competing=_usual) for mask in MASKS]
    rows = []
    for place, (name, variant) in enumerate(variants):
        parts = ["✓" if there else "×" for there in COMPONENTS[_method(name, variant)]]
        paper_cell = [_number(*reported.get(name, (None,)))] if reported else []
        rows.append((*map(Cell, [name, *parts]), _seeds(variant), *(column[place] for column in columns), *paper_cell))
    return Table(
        "table2",
        "Ablation (Table 2): accuracy of the final model over all tasks",
        comparison.title,
        _note(
            "L-S: large-small collaboration; SM-CF: small-model continual fine-tuning; O2D: one-by-one distillation.",
            "Final average in %, ± deviation over seeds, under each mask; the paper does not say which is its own.",
            *(MARKS, _unnamed(comparison, variants), note),
        ),
        ("method", "L-S", "SM-CF", "O2D", "seeds", *MASKS, *(["paper"] if reported else [])),
        tuple(rows),
    )


def overview(comparison: Comparison) -> Table:
    """The main metrics of every method under all masks.

    Args:
        comparison: runs that may stand side by side.

    Returns:
        A row for each method in its usual configuration, the bounds last.
    """
    variants = _ordered(comparison.usual, ())
    return Table(
        "overview",
        "Every method under all masks",
        comparison.title,
        _note(_METRICS, COMPETING, STAR, _unnamed(comparison, variants)),
        _METRICS_HEADER,
        _metrics(variants, _usual_methods),
    )


def varied(comparison: Comparison, shown: Sequence[Variant]) -> Table:
    """The main metrics of what differs from the usual configurations.

    Args:
        comparison: runs that may stand side by side.
        shown: those of its variants to show.

    Returns:
        A row for each variant; none is marked, for they differ in more than in their method.
    """
    variants = _ordered(shown, ())
    return Table(
        "variants",
        "What was varied besides, under all masks",
        comparison.title,
        _note(_METRICS, STAR, _unnamed(comparison, variants)),
        _METRICS_HEADER,
        _metrics(variants, lambda mask: lambda variant: False),
    )


def costs(comparison: Comparison, shown: Sequence[Variant]) -> Table:
    """What each method sends, trains and computes (extends the paper's section 5.3).

    Args:
        comparison: runs that may stand side by side.
        shown: those of its variants to show.

    Returns:
        A row for each variant.
    """
    rows = []
    variants = _ordered(shown, ())
    for name, variant in variants:
        assert variant is not None  # nothing is missing where no method is required
        summaries = [run.summary for run in variant.runs]
        # runs of older versions did not count, and a seed changes no count
        compute = next((counted for summary in summaries if (counted := summary.get("compute"))), None)
        seconds = _spread([summary["seconds"]["total"] for summary in summaries], 0)
        memory = _number(statistics.mean(summary["peak_memory_mib"] for summary in summaries), 0)
        rows.append(
            (
                Cell(name),
                *_traffic(variant.method, summaries),
                *(_range(compute, name) for name in ("trained_parameters", "flops_frozen", "flops")),
                seconds,
                memory,
            )
        )
    machines = sorted({str(run.summary["machine"]) for variant in shown for run in variant.runs})
    return Table(
        "costs",
        "Communication and computation",
        comparison.title,
        _note(
            "Bytes are those of the serialised messages of a client and round, and of a whole run; no message is sent "
            "where all images lie in one place. Parameters are those that a client trains; FLOP are counted"
            " by torch's FlopCounterMode for one test image: what depends on nothing trained and is computed once per "
            f"image, and the rest. A range where clients have different CNNs; {MISSING} where no run counted. Seconds, "
            "± deviation over seeds, and MiB are of a whole run, all clients in turn on one machine, whatever else it "
            f"did and in whatever precision ({'; '.join(machines)}).",
            _unnamed(comparison, variants),
        ),
        (
            "method",
            "up",
            "down",
            "whole run",
            "parameters",
            "FLOP once",
            "FLOP each time",
            "seconds",
            "peak MiB",
        ),
        tuple(rows),
    )


def _sensitivity(
    comparison: Comparison, name: str, varied_field: str, what: str, varying: Mapping[Any, Variant]
) -> Table:
    variants = [(str(value), variant) for value, variant in varying.items()]
    tasks = _tasks(comparison)

    def after(n: int) -> Callable[[Run], float | None]:
        return lambda run: next(iter(run.over_tasks("seen")[n:].tolist()), None)

    different = {key: value for key, value in variants[0][1].differs.items() if key != varied_field}
    common = f"All with {named(different)}." if different else ""
    columns = [_accuracies(variants, after(n), "seen") for n in range(tasks)]
    columns.append(_accuracies(variants, _final("task"), "task"))
    return Table(
        name,
        f"Fed-LSCL by {what}",
        comparison.title,
        _note(
            "Accuracy in % over the clients and tasks learned so far, ± deviation over seeds, all learned classes "
            "competing; in the last column only those of the image's task.",
            *(MARKS, common, _unnamed(comparison, variants)),
        ),
        (
            what.split(" (")[0],
            "seeds",
            *(f"after task {n + 1}" for n in range(tasks)),
            "at the end, mask task",
        ),
        tuple(
            (Cell(value), _seeds(variant), *(column[place] for column in columns))
            for place, (value, variant) in enumerate(variants)
        ),
    )


Named = tuple[str, Variant | None]


def _ordered(variants: Sequence[Variant], required: Sequence[str]) -> list[Named]:
    """The required methods first, None where there is no run, then the others by name, the bounds last."""
    by_method: dict[str, list[Variant]] = {}
    for variant in variants:
        by_method.setdefault(variant.method, []).append(variant)
    others = sorted(set(by_method) - set(required), key=lambda name: (name in BOUNDS, name))
    rows: list[Named] = []
    for method in (*required, *others):
        rows += [(variant.label, variant) for variant in by_method.get(method, [])] or [(method, None)]
    return rows


def _method(name: str, variant: Variant | None) -> str:
    """The method of a row."""
    return variant.method if variant else name


def _tasks(comparison: Comparison) -> int:
    return max(len(run.over_tasks("task")) for variant in comparison.variants for run in variant.runs)


def _final(mask: str) -> Callable[[Run], float]:
    return lambda run: float(run.summary["accuracy"][mask]["final_average"])


# ---- what the rows are


def _usual(variant: Variant) -> bool:
    return set(variant.differs) <= ROUNDING


def _usual_methods(mask: str) -> Callable[[Variant], bool]:
    """Whether a variant competes with the other methods: what is told the task has it easier where others are not."""
    return lambda variant: (
        _usual(variant)
        and variant.method not in (*BOUNDS, *RELATIVES)
        and (mask == "task" or mask not in variant.task_aware)
    )


def _note(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _unnamed(comparison: Comparison, variants: Sequence[Named]) -> str:
    """The usual values, which no row bears in its name."""
    shown = {variant.method for _, variant in variants if variant}
    groups: dict[str, list[str]] = {}
    for method, values in comparison.usual_values.items():
        if values and method in {"", *shown}:
            groups.setdefault(named(values), []).append(method)
    texts = [f"{', '.join(methods)}: {values}" if any(methods) else values for values, methods in groups.items()]
    return f"Where a row does not name it: {'; '.join(texts)}." if texts else ""


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
        found = {name: reported[method] for name, variant in follows if (method := _method(name, variant)) in reported}
    if not found:
        reasons = [point for point in different if point.stated]
        return {}, f"The paper's numbers are left out, for these runs differ from its protocol: {_listed(reasons)}."
    said = f" These runs differ from it: {_listed(different)}." if different else ""
    return found, f"The paper's numbers are those of its own protocol.{said}"


def _unlike(variants: Sequence[Variant]) -> list[Difference]:
    return [difference for difference in differences(variants)[0] if difference.label != SEEDS]


def _listed(found: Sequence[Difference]) -> str:
    return ", ".join(f"{point.label} {point.here} (paper: {point.paper})" for point in found)


_METRICS = (
    '"new" is the accuracy on each task right after it was learned, averaged over the tasks; "final" that of the last '
    'model over all tasks, "average" the average incremental accuracy, "forgetting" in points. In %, ± deviation over '
    "seeds."
)
_METRICS_HEADER = (
    *("method", "seeds", "new, task", *(f"final, {mask}" for mask in MASKS)),
    *("average, seen", "forgetting, seen"),
)


def _metrics(
    variants: Sequence[Named], competing: Callable[[str], Callable[[Variant], bool]]
) -> tuple[tuple[Cell, ...], ...]:
    def metric(mask: str, key: str) -> Callable[[Run], float | None]:
        return lambda run: run.summary["accuracy"][mask][key]

    def new(run: Run) -> float:
        return float(statistics.mean(run.summary["accuracy"]["task"]["table1"]))

    def column(value: Callable[[Run], float | None], mask: str, *, least: bool = False) -> list[Cell]:
        return _accuracies(variants, value, mask, competing=competing(mask), least=least)

    columns = [
        column(new, "task"),
        *(column(_final(mask), mask) for mask in MASKS),
        column(metric("seen", "average_incremental"), "seen"),
        column(metric("seen", "forgetting"), "seen", least=True),
    ]
    return tuple(
        (Cell(label), _seeds(variant), *(cells[place] for cells in columns))
        for place, (label, variant) in enumerate(variants)
    )


# ---- cells


def _accuracies(
    variants: Sequence[tuple[str, Variant | None]],
    value: Callable[[Run], float | None],
    mask: str,
    *,
    competing: Callable[[Variant], bool] = lambda variant: True,
    least: bool = False,
) -> list[Cell]:
    """A column: mean and deviation of a value over each variant's seeds, a star where due, the two best marked."""
    cells, means = [], []
    for _, variant in variants:
        known = [x for x in map(value, variant.runs if variant else ()) if x is not None and not math.isnan(x)]
        cell = _spread(known, 1)
        if variant and known and mask in variant.task_aware:
            cell = replace(cell, text=f"{cell.text}*", numbers={**cell.numbers, "task known": 1})
        cells.append(cell)
        means.append(statistics.mean(known) if variant and known and competing(variant) else None)
    # what reads the same is equally good
    ranking = sorted({round(mean, 1) for mean in means if mean is not None}, reverse=not least)[:2]
    marks: list[Mark] = ["best", "second"]
    if sum(mean is not None for mean in means) > 1:
        for place, mean in enumerate(means):
            if mean is not None and round(mean, 1) in ranking:
                cells[place] = replace(cells[place], mark=marks[ranking.index(round(mean, 1))])
    return cells


def _spread(values: Sequence[float], digits: int) -> Cell:
    """Mean ± sample deviation; a single value has no deviation."""
    if not values:
        return Cell(MISSING)
    cell = _number(statistics.mean(values), digits)
    if len(values) == 1:
        return cell
    deviation = statistics.stdev(values)
    return Cell(f"{cell.text} ± {deviation:.{digits}f}", numbers={**cell.numbers, "sd": deviation})


def _number(value: float | None, digits: int = 1) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:.{digits}f}", numbers={"": value})


def _seeds(variant: Variant | None) -> Cell:
    return _number(len(variant.runs) if variant else 0, 0)


def _traffic(method: str, summaries: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Bytes up and down of a client and round, and of the whole run."""
    if method in POOLED:
        return [Cell(MISSING)] * 3

    def mean(group: str, name: str) -> float:
        return float(statistics.mean(summary[group][name] for summary in summaries))

    sent = [mean(f"bytes_{way}", "per_client_round") for way in ("up", "down")]
    sent.append(mean("bytes_up", "total") + mean("bytes_down", "total"))
    return [Cell(human_bytes(value), numbers={"": value}) for value in sent]


def _range(compute: Mapping[str, Mapping[str, float]] | None, name: str) -> Cell:
    """A count, or the smallest and the largest where the clients' CNNs differ."""
    if not compute:
        return Cell(MISSING)
    values = [float(entry[name]) for entry in compute.values()]
    least, most = min(values), max(values)
    if COUNTS(least) == COUNTS(most):
        return Cell(COUNTS(least), numbers={"": least})
    return Cell(f"{COUNTS(least)} to {COUNTS(most)}", numbers={"least": least, "most": most})
