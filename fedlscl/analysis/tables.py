"""Every table of a comparison of finished runs: the paper's, and what a comparison needs besides.

Every accuracy is in %, mean ± sample deviation over seeds; a single seed has no deviation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter

from fedlscl.analysis.comparison import Comparison, Variant, named
from fedlscl.analysis.curves import growth_tables
from fedlscl.analysis.formats import MISSING, Cell, Table
from fedlscl.analysis.paper_tables import table1, table2
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import (
    ABLATIONS,
    BELOW,
    COMPETING,
    KEPT,
    MARKS,
    PROMISED,
    STAR,
    Named,
    accuracies,
    among_methods,
    final,
    kept,
    masks_of,
    number,
    number_of_tasks,
    ordered,
    promised,
    seeds,
    sentences,
    spread,
    unnamed,
)
from fedlscl.evaluation import MASKS
from fedlscl.run.console import human_bytes
from fedlscl.run.summary import Compute

COUNTS = EngFormatter(places=1)
"""How counts are written: with k, M and G."""


def tables(comparison: Comparison, masks: Sequence[str] = ("task",)) -> list[Table]:
    """All tables for which there are runs.

    Args:
        comparison: runs that may stand side by side.
        masks: the masks to show Table 1 under; `task` is that of the paper.

    Returns:
        Table 1 under each mask, an overview under all masks, Table 2 if there is an ablation, a table for each field of
        the sensitivity studies that was varied, one of all other variants, how accuracy grew where the runs' folders
        tell, and the costs.

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
    found += growth_tables(comparison)
    found.append(costs(comparison, [*comparison.usual, *others]))
    return found


def overview(comparison: Comparison) -> Table:
    """The main metrics of every method under all masks.

    Args:
        comparison: runs that may stand side by side.

    Returns:
        A row for each method in its usual configuration, best first, see `ordered`.
    """
    variants = ordered(comparison.usual, final("seen"))
    return Table(
        "overview",
        "Every method under all masks",
        comparison.title,
        sentences(_METRICS, _ORDER, COMPETING, STAR, KEPT, _promised(variants), unnamed(comparison, variants)),
        _metrics_header(variants),
        _metrics(variants, among_methods),
    )


def varied(comparison: Comparison, shown: Sequence[Variant]) -> Table:
    """The main metrics of what differs from the usual configurations.

    Args:
        comparison: runs that may stand side by side.
        shown: those of its variants to show.

    Returns:
        A row for each variant; none is marked, for they differ in more than in their method.
    """
    variants = ordered(shown, final("seen"))
    return Table(
        "variants",
        "What was varied besides, under all masks",
        comparison.title,
        sentences(_METRICS, _ORDER, STAR, KEPT, _promised(variants), unnamed(comparison, variants)),
        _metrics_header(variants),
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
    variants = ordered(shown, final("seen"))
    for name, variant in variants:
        assert variant is not None  # nothing is missing where no method is required
        summaries = [run.summary for run in variant.runs]
        # runs of older versions did not count, and a seed changes no count
        compute: Mapping[str, Compute] = next((counted for summary in summaries if (counted := summary.compute)), {})
        seconds = spread([run.seconds for run in variant.runs], 0)
        memory = number(statistics.mean(summary.peak_memory_mib for summary in summaries), 0)
        rows.append(
            (
                Cell(name),
                kept(variant),
                *_traffic(variant),
                *(_range(compute, name) for name in ("trained_parameters", "flops_frozen", "flops")),
                seconds,
                memory,
            )
        )
    machines = sorted({run.summary.machine for variant in shown for run in variant.runs})
    return Table(
        "costs",
        "Communication and computation",
        comparison.title,
        sentences(
            "Bytes are those of the serialised messages of a client and round, and of a whole run; no message is sent "
            "where all images lie in one place. Parameters are those that a client trains; FLOP are counted"
            " by torch's FlopCounterMode for one test image: what depends on nothing trained and is computed once per "
            f"image, and the rest. A range where clients have different CNNs; {MISSING} where no run counted. Seconds, "
            "± deviation over seeds, and MiB are of a whole run, all clients in turn on one machine, whatever else it "
            f"did and in whatever precision ({'; '.join(machines)}).",
            _ORDER,
            KEPT,
            unnamed(comparison, variants),
        ),
        (
            "method",
            "images kept",
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
    tasks = number_of_tasks(comparison)

    def after(n: int) -> Callable[[Run], float | None]:
        return lambda run: next(iter(run.over_tasks("seen")[n:].tolist()), None)

    different = {key: value for key, value in variants[0][1].differs.items() if key != varied_field}
    common = f"All with {named(different)}." if different else ""
    columns = [accuracies(variants, after(n), "seen") for n in range(tasks)]
    columns.append(accuracies(variants, final("task"), "task"))
    return Table(
        name,
        f"Fed-LSCL by {what}",
        comparison.title,
        sentences(
            "Accuracy in % over the clients and tasks learned so far, ± deviation over seeds, all learned classes "
            "competing; in the last column only those of the image's task.",
            *(MARKS, common, unnamed(comparison, variants)),
        ),
        (
            what.split(" (")[0],
            "seeds",
            *(f"after task {n + 1}" for n in range(tasks)),
            "at the end, mask task",
        ),
        tuple(
            (Cell(value), seeds(variant), *(column[place] for column in columns))
            for place, (value, variant) in enumerate(variants)
        ),
    )


_METRICS = (
    '"new" is the accuracy on each task right after it was learned, averaged over the tasks; "final" that of the last '
    'model over all tasks, "average" the average incremental accuracy, "forgetting" in points. In %, ± deviation over '
    "seeds."
)
_ORDER = f"Rows by their final average under seen, {BELOW}"


def _metrics_header(variants: Sequence[Named]) -> tuple[str, ...]:
    finals = (f"final, {mask}" for mask in masks_of(variants))
    own = ("epsilon",) if _promised(variants) else ()
    return ("method", "seeds", "images kept", *own, "new, task", *finals, "average, seen", "forgetting, seen")


def _promised(variants: Sequence[Named]) -> str:
    """What the column of epsilon means, where one of these has any."""
    return PROMISED if any(promised(variant).numbers for _, variant in variants) else ""


def _metrics(
    variants: Sequence[Named], competing: Callable[[str], Callable[[Variant], bool]]
) -> tuple[tuple[Cell, ...], ...]:
    def metric(mask: str, key: str) -> Callable[[Run], float | None]:
        return lambda run: getattr(run.summary.under(mask), key)

    def new(run: Run) -> float:
        return statistics.mean(run.summary.under("task").table1)

    def column(value: Callable[[Run], float | None], mask: str, *, least: bool = False) -> list[Cell]:
        return accuracies(variants, value, mask, competing=competing(mask), least=least)

    columns = [
        column(new, "task"),
        *(column(final(mask), mask) for mask in masks_of(variants)),
        column(metric("seen", "average_incremental"), "seen"),
        column(metric("seen", "forgetting"), "seen", least=True),
    ]
    with_epsilon = bool(_promised(variants))
    return tuple(
        (
            *(Cell(label), seeds(variant), kept(variant)),
            *([promised(variant)] if with_epsilon else []),
            *(cells[place] for cells in columns),
        )
        for place, (label, variant) in enumerate(variants)
    )


def _traffic(variant: Variant) -> list[Cell]:
    """Bytes up and down of a client and round, and of the whole run."""
    if variant.pooled:
        return [Cell(MISSING)] * 3
    summaries = [run.summary for run in variant.runs]
    sent = [
        statistics.mean(summary.bytes_up.per_client_round for summary in summaries),
        statistics.mean(summary.bytes_down.per_client_round for summary in summaries),
        statistics.mean(float(summary.bytes_up.total) for summary in summaries)
        + statistics.mean(float(summary.bytes_down.total) for summary in summaries),
    ]
    return [Cell(human_bytes(value), numbers={"": value}) for value in sent]


def _range(compute: Mapping[str, Compute], name: str) -> Cell:
    """A count, or the smallest and the largest where the clients' CNNs differ."""
    if not compute:
        return Cell(MISSING)
    values = [float(getattr(entry, name)) for entry in compute.values()]
    least, most = min(values), max(values)
    if COUNTS(least) == COUNTS(most):
        return Cell(COUNTS(least), numbers={"": least})
    return Cell(f"{COUNTS(least)} to {COUNTS(most)}", numbers={"least": least, "most": most})
