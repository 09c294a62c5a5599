"""The picture that answers which method is best: final averages with their deviations over seeds, the best first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fedlscl.analysis.captions import Picture, about_seeds, about_stars, among, over_tasks, ranking, starred_name
from fedlscl.analysis.comparison import Comparison, Variant
from fedlscl.analysis.drawing import COLOURS, LABEL_SIZE, PAGE, frame, over_seeds
from fedlscl.run.plots import DPI

TITLE = "Final average of every method"
_METHOD, _GREY = COLOURS[0], "0.6"


def ends_of(comparison: Comparison, mask: str) -> list[tuple[Variant, float, float]]:
    """Every method in its usual configuration with its final average in % and the deviation over seeds, best first.

    Those that see all images at once are behind the others; without a number there is no entry, and without two seeds
    the deviation is NaN.
    """
    ranked = ranking(comparison.usual, mask)
    ranked = [v for v in ranked if not v.pooled] + [v for v in ranked if v.pooled]
    found = []
    for variant in ranked:
        mean, deviation = over_seeds(over_tasks(variant, mask)[:, -1])
        if not np.isnan(mean):
            found.append((variant, float(mean), float(deviation)))
    return found


def accuracy_by_method(comparison: Comparison, mask: str) -> Picture | None:
    """A bar for each method in its usual configuration, those that see all images at once below and grey.

    Args:
        comparison: the runs.
        mask: the classes that a prediction may fall on.

    Returns:
        None where no method has a number, or there is one alone.
    """
    ends = ends_of(comparison, mask)
    shown = [variant for variant, _, _ in ends]
    if len(shown) < 2:
        return None
    figure = Figure(figsize=(PAGE, 0.19 * len(shown) + 0.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for place, (variant, mean, deviation) in enumerate(ends):
        colour = _GREY if variant.pooled else _METHOD
        axes.barh(place, mean, height=0.72, color=colour)
        text = f"{mean:.1f}" if np.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"
        end = mean if np.isnan(deviation) else mean + deviation
        if not np.isnan(deviation):
            axes.errorbar(mean, place, xerr=deviation, fmt="none", ecolor="0.15", elinewidth=0.8, capsize=2)
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center_baseline", fontsize=LABEL_SIZE)
    axes.set_yticks(range(len(shown)), [starred_name(variant, mask) for variant in shown])
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 112)  # room for the number behind a full bar
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("final average (%)")
    frame(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    title = f"{TITLE}, {comparison.title}"
    return Picture("accuracy_by_method", title, caption_of(shown, mask), figure)


def caption_of(shown: Sequence[Variant], mask: str) -> str:
    """What the bars of these methods are."""
    grey = " Grey: sees the images of all clients and tasks at once." if shown[-1].pooled else ""
    return (
        f"Final average over clients and tasks in %, the best first; {among(mask)}. "
        f"{about_seeds(shown, 'bars are')} {about_stars(shown, mask)}".strip()
        + grey
    )
