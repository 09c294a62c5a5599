"""How the figures over many runs are drawn: sizes, styles, means with bands, and numbers beside points."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fedlscl.evaluation import FloatArray, measured_mean

COLUMN, PAGE = 3.5, 7.0
"""Widths in inches of a column and of a page with two of them; sizes of type are meant for these."""
# Okabe and Ito's colours but for yellow, too pale on white. Seven colours and twelve markers make 84 pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LINES = ("-", "--", "-.", ":")
TYPE: dict[Any, Any] = {
    "text.parse_math": False,  # names may hold any sign: a $ begins no formula
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
}
MAX_BANDS = 6
"""Lines that may have bands in one panel; those of more hide each other."""
LABEL_SIZE, TICK_SIZE = 6.5, 7.0


def over_seeds(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and sample deviation over the first axis; the deviation is NaN where less than two were measured."""
    count = (~np.isnan(values)).sum(0)
    mean = measured_mean(values, 0)
    variance = np.nansum((values - mean) ** 2, 0) / np.maximum(count - 1, 1)
    return mean, np.where(count > 1, np.sqrt(variance), np.nan)


def filled(text: str, width: int) -> str:
    """The text in lines, which may end behind an underscore too."""
    return textwrap.fill(text.replace("_", "_ "), width).replace("_ ", "_")


def ordered_styles(count: int) -> list[dict[str, Any]]:
    """Styles of `count` lines in an order: colours that also darken in print, and markers and dashes beside them."""
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, count))
    return [
        {
            "color": to_hex(colour),
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[index % len(LINES)],
        }
        for index, colour in enumerate(colours)
    ]


def line(
    axes: Axes, x: npt.NDArray[Any], values: FloatArray, label: str, style: dict[str, Any], *, band: bool = True
) -> None:
    """Draw the mean of `values` (seeds, points) with a band of +- the sample deviation, where there is one."""
    mean, deviation = over_seeds(values)
    axes.plot(x, mean, label=label, **style)
    if len(x) == 1:  # a band without width would not be seen
        bars(axes, x, mean, deviation, style["color"])
    elif band and not np.isnan(deviation).all():
        axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.13, linewidth=0)


def bars(axes: Axes, x: npt.ArrayLike, mean: npt.ArrayLike, deviation: npt.ArrayLike, colour: str) -> None:
    """Draw error bars of +- the sample deviation, where there is one."""
    if not np.isnan(deviation).all():
        axes.errorbar(x, mean, deviation, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2)


def frame(axes: Axes) -> None:
    """Give axes fine lines behind what is drawn, and no frame above and at the right."""
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK_SIZE, length=2.5, width=0.7)


def key(axes: Axes, columns: int, title: str | None = None) -> Figure:
    """The key of what is drawn, as a figure as wide as a column and no taller than it must be."""
    figure = Figure(figsize=(COLUMN, COLUMN), dpi=axes.figure.dpi)
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        title=title,
        loc="upper center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
        borderaxespad=0.3,
    )
    figure.draw_without_rendering()
    figure.set_figheight(legend.get_window_extent().height / figure.dpi + 0.08)
    return figure


def settle(figure: Figure) -> None:
    """Give everything its final place; otherwise each time a figure is drawn moves it by a hair."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def within(axes: Axes) -> None:
    """Show nothing that no accuracy can be, but for the room that a marker takes."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -3), min(high, 103))


def number_points(figure: Figure, axes: Axes, points: Mapping[int, tuple[float, float, float]]) -> None:
    """Write each number beside its point (x, y, deviation), the nearest place that nothing else takes.

    The figure must be settled.
    """
    dots = figure.dpi / 72
    places = {number: axes.transData.transform((x, y)) for number, (x, y, _) in points.items()}
    taken = [_box(place, 6.4 * dots, 6.4 * dots) for place in places.values()]
    for x, y, deviation in points.values():
        if not np.isnan(deviation):
            ends = axes.transData.transform([(x, y - deviation), (x, y + deviation)])
            taken.append(_box(ends.mean(0), 5 * dots, ends[1, 1] - ends[0, 1]))
    # Right and left before above and below, where the bars are.
    angles = np.pi * np.array([0, 1, 1 / 6, -1 / 6, 5 / 6, -5 / 6, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 0.5, -0.5])
    around = np.stack([np.cos(angles), np.sin(angles)], 1)
    for number, place in places.items():
        size = np.array([4.8 * len(str(number)) * dots, 7 * dots])
        shifts = [(distance * dots + size / 2) * direction for distance in range(4, 60) for direction in around]
        clear = (
            shift
            for shift in shifts
            if not any(_box(place + shift, *size).overlaps(other) for other in taken)
            and all(axes.bbox.contains(*corner) for corner in _box(place + shift, *size).corners())
        )
        shift = next(clear, shifts[0])
        taken.append(_box(place + shift, *size))
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.35", "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            str(number),
            points[number][:2],
            xytext=(float(shift[0]) / dots, float(shift[1]) / dots),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=LABEL_SIZE,
            arrowprops=line if np.hypot(*shift) > np.hypot(*size) / 2 + 7 * dots else None,
            annotation_clip=False,
        )


def _box(centre: npt.NDArray[np.float64], width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)
