"""The paper's tables, and what a comparison needs besides, from finished runs.

Every accuracy is in %, mean ± sample deviation over seeds; a single seed has no deviation.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tabulate import tabulate

from fedlscl import paper
from fedlscl.console import human_bytes
from fedlscl.evaluation import MASKS
from fedlscl.results import Comparison, Run, Variant

Mark = Literal["best", "second", ""]

COMPONENTS = {
    "fed_lscl": (True, True, True),
    "fed_lscl_without_o2d": (True, True, False),
    "fed_lscl_without_replay": (True, False, True),
    "fed_lscl_collaboration_only": (True, False, False),
    "small_fedavg": (False, False, False),
}
"""Rows of Table 2: large-small collaboration, small-model continual fine-tuning, one-by-one distillation."""

COMPARED = tuple(paper.TABLE1["cifar100"])
"""Rows of Table 1, shown as missing where there is no run."""

BOUNDS = ("joint", "local", "local_vit")
"""Not federated, or not continual: they stand below the others and are never marked as best."""

MISSING = "–"
MARKS = "The best of each column is bold, the second best in italics, bounds left out."
STAR = "A star: the task of each test image, which had to be known, chose the parameters that classified it."
MASK_NAMES = {
    "task": "only the classes of the image's task compete",
    "seen": "all classes that the client has learned so far compete",
    "none": "all classes of the federation compete",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: plain text, and whether it is the best or second best of its column."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table, ready to be written in any format.

    Args:
        name: a short name, fit for a file.
        title: what it shows.
        note: what its numbers are, in sentences.
        header: the names of the columns.
        rows: the cells, row by row.
    """

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def tables(comparison: Comparison, masks: Sequence[str] = ("task",)) -> list[Table]:
    """All tables for which there are runs.

    Args:
        comparison: runs that may stand side by side.
        masks: the masks to show Table 1 under; `task` is that of the paper.

    Returns:
        Table 1 under each mask, an overview under all masks, Table 2 if there is an ablation, the costs, a table for
        each field of the sensitivity studies that was varied, and one of all other variants.

    Raises:
        ValueError: if a mask is unknown.
    """
    if unknown := [mask for mask in masks if mask not in MASKS]:
        raise ValueError(f"mask is '{unknown[0]}', must be one of {', '.join(MASKS)}")
    found = [table1(comparison, mask) for mask in masks]
    found.append(overview("overview", "Every method under all masks", comparison.usual))
    if {variant.method for variant in comparison.usual} & (set(COMPONENTS) - {"fed_lscl"}):
        found.append(table2(comparison))
    found.append(costs(comparison))
    shown = [id(variant) for variant in comparison.usual]
    for name, field, what in (
        ("blocks", "model.block", "block of the ViT that is adapted (Fig. 3)"),
        ("buffers", "model.buffer_size", "images kept of each class (Fig. 5)"),
    ):
        if varying := comparison.varying(field):
            found.append(_sensitivity(name, what, varying))
            shown += map(id, varying.values())
    if others := [variant for variant in comparison.variants if id(variant) not in shown]:
        found.append(overview("variants", "What was varied besides, under all masks", others))
    return found


def table1(comparison: Comparison, mask: str = "task") -> Table:
    """Accuracy on each task right after it was learned, for every method (the paper's Table 1).

    Args:
        comparison: runs that may stand side by side.
        mask: the classes that compete.

    Returns:
        A row for each method of the paper, missing or not, then for the others, and the bounds last. In the paper's
        settings and under its mask the paper's numbers follow in columns of their own.
    """
    its_own = mask == "task" and _tasks(comparison) == paper.TASKS
    reported = paper.TABLE1.get(comparison.setting, {}) if its_own else {}
    variants = _ordered([variant for variant in comparison.usual if variant.method not in _ABLATIONS], COMPARED)
    tasks = _tasks(comparison)

    def on_task(n: int) -> Callable[[Run], float | None]:
        return lambda run: next(iter(run.summary["accuracy"][mask]["table1"][n:]), None)

    def average(run: Run) -> float:
        return float(statistics.mean(run.summary["accuracy"][mask]["table1"]))

    columns = [_accuracies(variants, value, mask) for value in [*map(on_task, range(tasks)), average]]
    rows = []
    for place, (name, variant) in enumerate(variants):
        cells = [Cell(name), Cell(_seeds(variant)), *(column[place] for column in columns)]
        if reported:
            cells += [Cell(f"{x:.1f}") for x in reported.get(_method(name, variant), ())] or [Cell(MISSING)] * tasks
        rows.append(tuple(cells))
    header = ("method", "seeds", *(f"task {n + 1}" for n in range(tasks)), "mean")
    if reported:
        header += tuple(f"paper: task {n + 1}" for n in range(tasks))
    return Table(
        f"table1_{mask}",
        f"Accuracy on each task right after it was learned (Table 1), mask {mask}",
        f"Accuracy in %, mean over clients, ± deviation over seeds; {MASK_NAMES[mask]}. {MARKS} {STAR}",
        header,
        tuple(rows),
    )


def table2(comparison: Comparison) -> Table:
    """Accuracy of the final model over all tasks without one or several components (the paper's Table 2).

    Args:
        comparison: runs that may stand side by side.

    Returns:
        A row for each combination of components that the method offers; the paper's numbers in its settings.
    """
    reported = paper.TABLE2.get(comparison.setting, {}) if _tasks(comparison) == paper.TASKS else {}
    variants = _ordered([variant for variant in comparison.usual if variant.method in COMPONENTS], tuple(COMPONENTS))
    columns = [_accuracies(variants, _final(mask), mask) for mask in MASKS]
    rows = []
    for place, (name, variant) in enumerate(variants):
        method = _method(name, variant)
        parts = ["✓" if there else "×" for there in COMPONENTS[method]]
        cells = [name, *parts, _seeds(variant)]
        paper_cell = [f"{reported[method]:.1f}" if method in reported else MISSING] if reported else []
        rows.append((*map(Cell, cells), *(column[place] for column in columns), *map(Cell, paper_cell)))
    return Table(
        "table2",
        "Ablation (Table 2): accuracy of the final model over all tasks",
        "L-S: large-small collaboration; SM-CF: small-model continual fine-tuning; O2D: one-by-one distillation. "
        "Final average in %, ± deviation over seeds, under each mask; the paper does not say which is its own. "
        f"{MARKS}",
        ("method", "L-S", "SM-CF", "O2D", "seeds", *MASKS, *(["paper"] if reported else [])),
        tuple(rows),
    )


def overview(name: str, title: str, shown: Sequence[Variant]) -> Table:
    """The main metrics under all masks.

    Args:
        name: the table's name.
        title: its title.
        shown: the variants to show.

    Returns:
        A row for each variant.
    """
    variants = _ordered(shown, ())

    def metric(mask: str, key: str) -> Callable[[Run], float | None]:
        return lambda run: run.summary["accuracy"][mask][key]

    columns = [
        _accuracies(variants, lambda run: statistics.mean(run.summary["accuracy"]["task"]["table1"]), "task"),
        *(_accuracies(variants, _final(mask), mask) for mask in MASKS),
        _accuracies(variants, metric("seen", "average_incremental"), "seen"),
        _accuracies(variants, metric("seen", "forgetting"), "seen", least=True),
    ]
    return Table(
        name,
        title,
        '"new" is the accuracy on each task right after it was learned, averaged over the tasks; "final" that of the '
        'last model over all tasks, "average" the average incremental accuracy, "forgetting" in points. In %, '
        f"± deviation over seeds. {MARKS} {STAR}",
        ("method", "seeds", "new, task", *(f"final, {m}" for m in MASKS), "average, seen", "forgetting, seen"),
        tuple(
            (Cell(label), Cell(_seeds(variant)), *(column[place] for column in columns))
            for place, (label, variant) in enumerate(variants)
        ),
    )


def costs(comparison: Comparison) -> Table:
    """What each method sends, trains and computes (extends the paper's section 5.3).

    Args:
        comparison: runs that may stand side by side.

    Returns:
        A row for each method in its usual configuration.
    """
    rows = []
    for name, variant in _ordered(comparison.usual, ()):
        assert variant is not None  # nothing is missing where no method is required
        summaries = [run.summary for run in variant.runs]
        compute = summaries[0].get("compute")
        rows.append(
            [
                name,
                *(human_bytes(_mean(summaries, f"bytes_{way}", "per_client_round")) for way in ("up", "down")),
                human_bytes(_mean(summaries, "bytes_up", "total") + _mean(summaries, "bytes_down", "total")),
                _range(compute, "trained_parameters", 1e6, "{:.2f}"),
                _range(compute, "flops_frozen", 1e9, "{:.3f}"),
                _range(compute, "flops", 1e9, "{:.3f}"),
                f"{_mean(summaries, 'seconds', 'total'):.0f}",
                f"{statistics.mean(summary['peak_memory_mib'] for summary in summaries):.0f}",
            ]
        )
    machines = sorted({str(run.summary["machine"]) for variant in comparison.usual for run in variant.runs})
    return Table(
        "costs",
        "Communication and computation",
        "Bytes are those of the serialised messages of a client and round, and of a whole run. Parameters (millions) "
        "are those that a client trains; GFLOP are counted by torch's FlopCounterMode for one test image: what depends "
        "on nothing trained and is computed once per image, and the rest. A range where clients have different CNNs. "
        f"Seconds and MiB are of a whole run, all clients in turn on one machine ({'; '.join(machines)}).",
        (
            "method",
            "up",
            "down",
            "whole run",
            "trained, M",
            "GFLOP once",
            "GFLOP each time",
            "seconds",
            "peak MiB",
        ),
        tuple(tuple(map(Cell, row)) for row in rows),
    )


def _sensitivity(name: str, what: str, varying: Mapping[Any, Variant]) -> Table:
    variants = [(str(value), variant) for value, variant in varying.items()]
    tasks = len(variants[0][1].runs[0].over_tasks("seen"))

    def after(n: int) -> Callable[[Run], float]:
        return lambda run: float(run.over_tasks("seen")[n])

    columns = [_accuracies(variants, after(n), "seen") for n in range(tasks)]
    columns.append(_accuracies(variants, _final("task"), "task"))
    return Table(
        name,
        f"Fed-LSCL by {what}",
        "Accuracy in % over the clients and tasks learned so far, ± deviation over seeds, all learned classes "
        f"competing; in the last column only those of the image's task. {MARKS}",
        (
            what.split(" (")[0],
            "seeds",
            *(f"after task {n + 1}" for n in range(tasks)),
            "at the end, mask task",
        ),
        tuple(
            (Cell(value), Cell(_seeds(variant)), *(column[place] for column in columns))
            for place, (value, variant) in enumerate(variants)
        ),
    )


_ABLATIONS = tuple(name for name in COMPONENTS if name != "fed_lscl")

Named = tuple[str, Variant | None]


def _ordered(variants: Sequence[Variant], required: Sequence[str]) -> list[Named]:
    """The required methods first, None where there is no run, then the others by name, the bounds last."""
    by_method: dict[str, list[Variant]] = {}
    for variant in variants:
        by_method.setdefault(variant.method, []).append(variant)
    others = sorted(set(by_method) - set(required), key=lambda name: (name in BOUNDS, name))
    named: list[Named] = []
    for method in (*required, *others):
        named += [(variant.label, variant) for variant in by_method.get(method, [])] or [(method, None)]
    return named


def _method(name: str, variant: Variant | None) -> str:
    """The method of a row."""
    return variant.method if variant else name


def _tasks(comparison: Comparison) -> int:
    return max(len(run.over_tasks("task")) for variant in comparison.variants for run in variant.runs)


def _final(mask: str) -> Callable[[Run], float]:
    return lambda run: float(run.summary["accuracy"][mask]["final_average"])


def _accuracies(
    variants: Sequence[tuple[str, Variant | None]], value: Callable[[Run], float | None], mask: str, least: bool = False
) -> list[Cell]:
    """A column: mean and deviation of a value over each variant's seeds, the two best marked, a star where due."""
    cells, means = [], []
    for _, variant in variants:
        known = [x for x in map(value, variant.runs if variant else ()) if x is not None and not math.isnan(x)]
        mean = statistics.mean(known) if known else None
        text = MISSING if mean is None else f"{mean:.1f}"
        if len(known) > 1:
            text += f" ± {statistics.stdev(known):.1f}"
        if variant and known and mask in variant.task_aware:
            text += "*"
        cells.append(Cell(text))
        means.append(mean if variant and variant.method not in BOUNDS else None)
    # what reads the same is equally good
    ranking = sorted({round(mean, 1) for mean in means if mean is not None}, reverse=not least)[:2]
    competing = sum(mean is not None for mean in means)
    marks: list[Mark] = ["best", "second"]
    for place, mean in enumerate(means):
        if mean is not None and competing > 1 and round(mean, 1) in ranking:
            cells[place] = replace(cells[place], mark=marks[ranking.index(round(mean, 1))])
    return cells


def _seeds(variant: Variant | None) -> str:
    return str(len(variant.runs)) if variant else "0"


def _mean(summaries: Sequence[Mapping[str, Any]], group: str, name: str) -> float:
    return float(statistics.mean(summary[group][name] for summary in summaries))


def _range(compute: Mapping[str, Mapping[str, float]] | None, name: str, unit: float, form: str) -> str:
    """A number, or the smallest and the largest where the clients' CNNs differ."""
    if not compute:
        return MISSING
    values = sorted({form.format(entry[name] / unit) for entry in compute.values()}, key=float)
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


# ---- formats


def to_markdown(table: Table) -> str:
    """The table as Markdown, with its title and its note."""
    marks = {"best": "**{}**", "second": "_{}_", "": "{}"}
    rows = [
        [marks[cell.mark].format(cell.text.replace("*", "\\*").replace("|", "\\|")) for cell in row]
        for row in table.rows
    ]
    body = tabulate(rows, table.header, tablefmt="github", disable_numparse=True)
    return f"**{table.title}**\n\n{body}\n\n{table.note}\n"


def to_latex(table: Table) -> str:
    """The table as a LaTeX tabular (booktabs not needed), its title and note as comments."""
    marks = {"best": r"\textbf{{{}}}", "second": r"\emph{{{}}}", "": "{}"}
    rows = [[marks[cell.mark].format(_escape_latex(cell.text)) for cell in row] for row in table.rows]
    header = [_escape_latex(name) for name in table.header]
    body = tabulate(rows, header, tablefmt="latex_raw", disable_numparse=True)
    return f"% {table.title}\n% {table.note}\n{body}\n"


def to_csv(table: Table) -> str:
    """The table as CSV; marks are left out."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([cell.text for cell in row] for row in table.rows)
    return out.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
"""How a table is written, by the file's suffix."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "✓": r"$\checkmark$",
    "×": r"$\times$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
