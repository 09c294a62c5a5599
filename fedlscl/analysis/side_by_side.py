"""Two runs, or two methods, beside each other: every final number, the fields in which they differ, their curves.

Two that are not of one setting stand there too, with what nobody may conclude from them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

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
    both = sides(comparison)
    return _section(both, key, _of_one_setting(*(side for _, side in both))) if both else None


def across_section(comparisons: Sequence[Comparison], key: str) -> Section | None:
    """A variant of each of two comparisons, if they have no others: beside each other, with a warning."""
    if len(comparisons) != 2 or any(len(comparison.variants) != 1 for comparison in comparisons):
        return None
    one, other = (comparison.variants[0] for comparison in comparisons)
    conditions = [(each.setting, each.backbone, each.evaluated_on) for each in comparisons]
    # the first that tells them apart
    ends = [
        next(name for name, of in zip(names, rest, strict=True) if name != of)
        for names, rest in (conditions, conditions[::-1])
    ]
    both = [(f"{each.label} on {end}", each) for each, end in zip((one, other), ends, strict=True)]
    return _section(both, key, _of_two_settings(*comparisons))


def _of_one_setting(one: Variant, other: Variant) -> str:
    """What to know before two variants of one setting are compared."""
    if _alike(one, other, "split_sha256"):
        return ""
    why = "" if {run.seed for run in one.runs} & {run.seed for run in other.runs} else ", since seeds draw splits"
    return (
        f"Who has which images is not the same in both{why}: a difference between accuracies is one of the split as "
        "well."
    )


def _of_two_settings(one: Comparison, other: Comparison) -> str:
    """What to know before two variants of two settings are compared."""
    named = {
        "setting": (one.setting, other.setting),
        "frozen model": (one.backbone, other.backbone),
        "images that accuracies are of": (one.evaluated_on, other.evaluated_on),
    }
    differ = [f"{name} ({left} and {right})" for name, (left, right) in named.items() if left != right]
    text = f"These two differ in {', '.join(differ)}."
    variants = one.variants[0], other.variants[0]
    same = one.evaluated_on == other.evaluated_on
    if same and all(_alike(*variants, fingerprint) for fingerprint in ("data_sha256", "split_sha256")):
        return f"{text} Images and split are the same, so that accuracies may be compared."
    return (
        f"{text} Their images, or who has which of them, are not known to be the same: accuracies are of other "
        "questions, and a difference between them says nothing of the methods."
    )


def _alike(one: Variant, other: Variant, fingerprint: str) -> bool:
    """Whether runs with the same seed, or else the first ones, are known to have the same images or split."""
    by_seed = {run.seed: run for run in other.runs}
    pairs = [(run, by_seed[run.seed]) for run in one.runs if run.seed in by_seed] or [(one.runs[0], other.runs[0])]
    found = [[getattr(run.summary, fingerprint) for run in pair] for pair in pairs]
    return all(left is not None and left == right for left, right in found)


def _section(both: Sequence[tuple[str, Variant]], key: str, warning: str) -> Section:
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
        warning=warning,
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
