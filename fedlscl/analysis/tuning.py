"""What a search found for each method on images held out of training, and what it is worth on the test images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedlscl.analysis.comparison import Comparison, Variant, varied_fields
from fedlscl.analysis.formats import MISSING, Cell, Table
from fedlscl.analysis.rows import KEPT, final, kept, known, number, sentences, spread

HELD_OUT = "images held out of training"
"""What the accuracies of a trial are of."""

MASK = "seen"
"""The mask under which the trials are compared."""


def tuning(comparison: Comparison, beside: Sequence[Comparison] = ()) -> list[Table]:
    """The best trial of each method, as words for the command line, beside the common rate on the test images.

    Args:
        comparison: trials, whose accuracies are of images held out of training.
        beside: other comparisons; that of the same setting and backbone on the test images gives the numbers there.

    Returns:
        A table with a row for each method of which there are several trials, the best first; none where there is no
        such method, or where the accuracies are of test images, on which nothing may be tuned.
    """
    if comparison.evaluated_on != HELD_OUT:
        return []
    searched: list[tuple[Variant, list[Variant]]] = []
    for method in dict.fromkeys(variant.method for variant in comparison.variants):
        trials = comparison.of(method)
        if len(trials) > 1 and (best := max(trials, key=_score)) and known(best, final(MASK)):
            searched.append((best, trials))
    if not searched:
        return []
    same = (comparison.setting, comparison.backbone)
    tested = [variant for other in beside for variant in other.variants if _tests(other, same)]
    rows = []
    for best, trials in sorted(searched, key=lambda pair: -_score(pair[0])):
        tuned = {name: best.runs[0].fields.get(name) for name in varied_fields([one.runs[0].fields for one in trials])}
        # those that differ from the best in nothing but what was tuned
        alike = [
            variant
            for variant in tested
            if variant.method == best.method and _others(variant, tuned) == _others(best, tuned)
        ]
        found = [variant for variant in alike if _others(variant) == _others(best)]
        rest = [variant for variant in alike if variant not in found]
        common = [variant for variant in alike if not variant.differs] or rest * (len(rest) == 1)
        rows.append(
            (
                Cell(best.method),
                kept(best),
                number(len(trials), 0),
                number(sum(run.seconds for trial in trials for run in trial.runs), 0),
                spread(known(best, final(MASK)), 1),
                Cell(" ".join(f"--{name} {value}" for name, value in tuned.items())),
                _of(common),
                _of(found),
            )
        )
    table = Table(
        "tuning",
        "What was tuned, on images held out of training",
        comparison.title,
        sentences(
            f"Final average in % under {MASK}. The best of so many trials on held-out training images, which took so "
            "many seconds in all, and the fields that it found, for the command line of runs on test images. Behind "
            "them the final averages on the test images, ± deviation over seeds: of the method's usual configuration "
            f"(common) and of that with the fields found (tuned); {MISSING} where it was not run.",
            KEPT,
        ),
        ("method", "images kept", "trials", "seconds", "held out", "found", "test, common", "test, tuned"),
        tuple(rows),
    )
    return [table]


def _score(variant: Variant) -> float:
    return statistics.mean(known(variant, final(MASK)) or [-1.0])


def _tests(other: Comparison, same: tuple[str, str]) -> bool:
    return (other.setting, other.backbone) == same and other.evaluated_on != HELD_OUT


def _others(variant: Variant, left_out: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All fields but some, and but the one that says on which images a run is evaluated."""
    names = {"data.split.local_test", *(left_out or {})}
    return {name: value for name, value in variant.runs[0].fields.items() if name not in names}


def _of(variants: Sequence[Variant]) -> Cell:
    return spread(known(variants[0], final(MASK)), 1) if variants else Cell(MISSING)
