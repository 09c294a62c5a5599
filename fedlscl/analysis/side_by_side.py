"""Two runs, or two methods, beside each other: every final number, the fields in which they differ, their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from fedlscl.analysis.comparison import Comparison, Variant, varied_fields
from fedlscl.analysis.formats import MISSING
from fedlscl.analysis.learning import curve, learning
from fedlscl.analysis.results import Run
from fedlscl.analysis.sections import Section, drawn
from fedlscl.evaluation import MASKS
from fedlscl.run.console import human_bytes

METRICS = {
    "final_average": "final average",
    "average_incremental": "average over the tasks",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
}
"""The metrics of a summary, and what the page calls them."""

Number = tuple[str, Callable[[Run], float | None], Callable[[float], str]]
"""A name, what gives the number of a run, and how it is written."""


def sides(comparison: Comparison) -> list[tuple[str, Variant]]:
    """Two things that stand beside each other, with their names; empty where there are not exactly two.

    They are the two variants, or the two runs of one.
    """
    variants = comparison.variants
    if len(variants) == 1 and len(variants[0].runs) == 2:
        one = variants[0]
        return [(f"{one.label}, seed {run.seed}", Variant(one.method, one.differs, (run,))) for run in one.runs]
    return [(variant.label, variant) for variant in variants] if len(variants) == 2 else []


def two_section(comparison: Comparison, key: str) -> Section | None:
    """The two sides, if there are two."""
    if not (both := sides(comparison)):
        return None
    (left, one), (right, other) = both
    common = {run.seed for run in one.runs} & {run.seed for run in other.runs}
    fields = [one.runs[0].fields, other.runs[0].fields]
    varied = [(name, *(_value(of.get(name)) for of in fields)) for name in varied_fields(fields)]
    curves = [
        (name, variant.runs[0].seed, curve(learning(variant.runs[0]), f"Accuracy of {name} in the course of the run"))
        for name, variant in both
    ]
    html = drawn(
        "two",
        key=key,
        names=(left, right),
        rows=[row for number in _numbers() if (row := _row(number, one, other)) is not None],
        paired=len(common),
        fields=[row for row in varied if MISSING not in row],
        only=[
            [(name, left) for name, left, right in varied if right == MISSING],
            [(name, right) for name, left, right in varied if left == MISSING],
        ],
        curves=curves,
    )
    return Section(key, f"{left} and {right}", html)


def _numbers() -> list[Number]:
    """Every number that a run ends with."""

    def metric(mask: str, name: str) -> Number:
        label = f"{METRICS[name]}, {mask}"
        return label, lambda run: getattr(run.summary.under(mask), name), lambda value: f"{value:.1f}"

    found = [metric(mask, name) for name in METRICS for mask in MASKS]
    return [
        *found,
        ("bytes up", lambda run: run.summary.bytes_up.total, human_bytes),
        ("bytes down", lambda run: run.summary.bytes_down.total, human_bytes),
        ("seconds", lambda run: run.seconds, lambda value: f"{value:.1f}"),
        ("peak memory, MiB", lambda run: run.summary.peak_memory_mib, lambda value: f"{value:.0f}"),
        ("parameters trained by a client", _trained, lambda value: f"{value:,.0f}"),
    ]


def _trained(run: Run) -> float | None:
    counts = [compute.trained_parameters for compute in run.summary.compute.values()]
    return statistics.mean(counts) if counts else None


def _row(number: Number, one: Variant, other: Variant) -> tuple[str, str, str, str] | None:
    """Name, both values and their difference, the right one less the left one; None where nobody has the number."""
    name, of, write = number
    left, right = (_by_seed(variant, of) for variant in (one, other))
    if not left and not right:
        return None
    paired = [right[seed] - left[seed] for seed in left if seed in right]
    # with no seed in common, the difference of the means
    apart = paired or ([statistics.mean(right.values()) - statistics.mean(left.values())] if left and right else [])
    return name, _spread([*left.values()], write), _spread([*right.values()], write), _spread(apart, write, sign=True)


def _by_seed(variant: Variant, of: Callable[[Run], float | None]) -> Mapping[int, float]:
    values = {run.seed: of(run) for run in variant.runs}
    return {seed: value for seed, value in values.items() if value is not None and not math.isnan(value)}


def _spread(values: list[float], write: Callable[[float], str], sign: bool = False) -> str:
    """The mean of values, and their deviation where they are not all the same."""
    if not values:
        return MISSING
    mean = statistics.mean(values)
    text = write(abs(mean)) if sign else write(mean)
    if sign:
        text = f"{'-' if mean < 0 else '+'}{text}" if any(digit in text for digit in "123456789") else text
    return f"{text} ±\N{NO-BREAK SPACE}{write(statistics.stdev(values))}" if len(set(values)) > 1 else text


def _value(value: object) -> str:
    return MISSING if value is None else str(value)
