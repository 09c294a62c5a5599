"""A figure over many runs with what is said of it: whose line it is, under which mask, and over how many seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from fedlscl.analysis.comparison import Variant
from fedlscl.analysis.drawing import over_seeds
from fedlscl.evaluation import FloatArray
from fedlscl.run.plots import STYLES


@dataclass(frozen=True)
class Picture:
    """A figure, drawn but not yet written.

    Args:
        name: a short name, fit for a file.
        title: what it shows.
        caption: what is shown, the mask, units, seeds, and what bands are, in sentences.
        figure: the figure itself.
        names: what its numbers 1, 2, ... stand for, where the figure itself does not say it.
        pieces: the figure in pieces that are no wider than a column, the key last; empty where it is so itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    names: tuple[str, ...] = ()
    pieces: tuple[Figure, ...] = ()


def over_tasks(variant: Variant, mask: str) -> FloatArray:
    """Mean over clients and learned tasks after each task, (seeds, tasks) in %."""
    return np.stack([run.over_tasks(mask) for run in variant.runs])


def ranking(variants: Sequence[Variant], mask: str) -> list[Variant]:
    """The variants by their final average, the best first; those without one come last."""

    def final(variant: Variant) -> float:
        mean = float(over_seeds(over_tasks(variant, mask)[:, -1])[0])
        return -np.inf if np.isnan(mean) else mean

    return sorted(variants, key=final, reverse=True)


def star(variant: Variant, mask: str) -> str:
    """A star for a method that is told the task of a test image where others are not."""
    return "*" if mask in variant.task_aware else ""


def starred_name(variant: Variant, mask: str) -> str:
    """The label of a line, with its star."""
    return f"{variant.label}{star(variant, mask)}"


def about_stars(variants: Sequence[Variant], mask: str) -> str:
    """What a star means, if any of these has one."""
    return "* is told the task of a test image." if any(star(variant, mask) for variant in variants) else ""


def among(mask: str) -> str:
    """A mask in words."""
    return f'mask "{mask}", prediction among {STYLES[mask]["label"]}'


def about_seeds(variants: Sequence[Variant], spread: str | None = "bands and bars are") -> str:
    """How many seeds there are, and what is drawn of their spread; None if nothing is."""
    least, most = (pick(len(variant.runs) for variant in variants) for pick in (min, max))
    count = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    if spread is None:
        return f"Mean over {count}."
    if most == 1:
        return "One seed, hence no bands."
    where = " where there are two or more" if least == 1 else ""
    return f"Mean over {count}; {spread} ± one sample standard deviation{where}."
