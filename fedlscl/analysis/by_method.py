"""The picture that answers which method is best: final averages with their deviations over seeds, the best first."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from fedlscl.analysis.captions import Picture, about_seeds, about_stars, among, over_tasks, ranking, starred_name
from fedlscl.analysis.comparison import POOLED, Comparison
from fedlscl.analysis.drawing import COLOURS, LABEL_SIZE, PAGE, frame, over_seeds
from fedlscl.run.plots import DPI

_METHOD, _POOLED = COLOURS[0], "0.6"


def accuracy_by_method(comparison: Comparison, mask: str) -> Picture | None:
    """A bar for each method in its usual configuration, those that see all images at once below and grey.

    Args:
        comparison: the runs.
        mask: the classes that a prediction may fall on.

    Returns:
        None where no method has a number, or there is one alone.
    """
    ranked = ranking(comparison.usual, mask)
    ranked = [v for v in ranked if v.method not in POOLED] + [v for v in ranked if v.method in POOLED]
    ends = {variant.label: [float(v) for v in over_seeds(over_tasks(variant, mask)[:, -1])] for variant in ranked}
    shown = [variant for variant in ranked if not np.isnan(ends[variant.label][0])]
    if len(shown) < 2:
        return None
    figure = Figure(figsize=(PAGE, 0.19 * len(shown) + 0.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for place, variant in enumerate(shown):
        mean, deviation = ends[variant.label]
        colour = _POOLED if variant.method in POOLED else _METHOD
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
    grey = " Grey: sees the images of all clients and tasks at once." if shown[-1].method in POOLED else ""
    caption = (
        f"Final average over clients and tasks in %, the best first; {among(mask)}. "
        f"{about_seeds(shown, 'bars are')} {about_stars(shown, mask)}".strip()
        + grey
    )
    return Picture("accuracy_by_method", f"Final average of every method, {comparison.title}", caption, figure)
