"""The pictures of a federation: accuracy over the rounds, and accuracy after each task on each task."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedlscl.data.split_map import SplitMap
from fedlscl.evaluation import MASKS, measured_mean
from fedlscl.files import write_atomically

# Okabe and Ito's colours, told apart by colour-blind readers too; the line styles survive a grey print.
STYLES: dict[str, dict[str, Any]] = {
    "task": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "the task's classes"},
    "seen": {"color": "#D55E00", "linestyle": "-", "marker": "s", "label": "classes seen so far"},
    "federation": {"color": "#CC79A7", "linestyle": "-.", "marker": "D", "label": "classes any client has seen"},
    "none": {"color": "#009E73", "linestyle": "--", "marker": "^", "label": "all classes"},
}
DPI = 150
AS_WRITTEN: dict[Any, Any] = {"text.parse_math": False}
"""Settings of matplotlib under which a name may hold any sign: a $ begins no formula."""

LONGEST = 24
"""Characters of a class's name that a picture shows."""

MAX_CLASSES = 100
"""Rows of a split's picture bear the name of their class, and its numbers, up to this many."""

MAX_NUMBERED = 20
"""Cells of a heat map bear their number up to this many rows and columns."""


@matplotlib.rc_context(AS_WRITTEN)
def accuracy_over_rounds(
    history: Sequence[Mapping[str, Any]], path: Path, *, title: str = "", clients: bool = True
) -> None:
    """Draw the accuracy over all tasks learned so far against the communication round, under each mask.

    Args:
        history: one entry per evaluated round: ``task`` (from 1), ``round`` (running number, from 1) and
            ``accuracy``, for each mask [client][on task] in % with None for tasks not yet learned.
        path: the PNG to write.
        title: put above the picture.
        clients: whether each client gets a thin line of its own, under the mask "seen".

    Raises:
        ValueError: if `history` is empty or holds rounds out of order.
    """
    rounds = [int(entry["round"]) for entry in history]
    if not rounds or sorted(set(rounds)) != rounds:
        raise ValueError(f"history must hold rounds in rising order, got {rounds}")
    axes = _axes(figure := Figure(figsize=(7.2, 4.3), dpi=DPI), 0.6, 1.15, 6.5, 2.65)
    for mask in MASKS:
        # Each client's mean over its learned tasks, (rounds, clients); the curve is the mean over clients.
        by_client = np.array([measured_mean(entry["accuracy"][mask], 1) for entry in history])
        if mask == "seen" and clients:
            axes.plot(rounds, by_client, color=STYLES[mask]["color"], linewidth=0.7, alpha=0.35)
        mean = measured_mean(by_client, 1)
        axes.plot(rounds, mean, linewidth=1.8, markersize=4, clip_on=False, zorder=3, **STYLES[mask])
    for before, entry in zip([None, *history], history, strict=False):
        if before is None or before["task"] != entry["task"]:
            start = entry["round"] - 0.5
            if before is not None:
                axes.axvline(start, color="0.6", linewidth=0.9, linestyle=":")
            axes.annotate(
                f"task {entry['task']}",
                (start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, 3),
                textcoords="offset points",
                color="0.35",
                fontsize=8,
            )
    axes.set(xlabel="communication round", ylabel="accuracy over learned tasks (%)", ylim=(0, 100))
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if clients:
        handles += axes.plot([], [], color=STYLES["seen"]["color"], linewidth=0.7, label="one client")
    figure.legend(
        handles=handles,
        title="prediction among",
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    _save(figure, path)


@matplotlib.rc_context(AS_WRITTEN)
def accuracy_matrix(matrix: Sequence[Sequence[Sequence[float | None]]], path: Path, title: str) -> None:
    """Draw what remains of each task: client mean after each task, and each client after the last one.

    Args:
        matrix: accuracy in % as [client][after task][on task], None where nothing was measured.
        path: the PNG to write.
        title: put above the picture.

    Raises:
        ValueError: if `matrix` is not clients x tasks x tasks or holds no accuracy.
    """
    acc = np.array(matrix, dtype=np.float64)
    if acc.ndim != 3 or acc.shape[1] != acc.shape[2] or np.isnan(acc).all():
        raise ValueError(f"matrix must be [client][after task][on task] with numbers, got shape {acc.shape}")
    clients, tasks, _ = acc.shape
    after = np.flatnonzero(~np.isnan(acc).all(axis=(0, 2)))[-1]
    # With 0.42 inch a cell, three digits fit; the floor keeps the titles apart, the roof the file small.
    rows = max(tasks, min(clients, MAX_NUMBERED))
    width, height = (float(np.clip(0.42 * cells, 2.3, 9.0)) for cells in (tasks, rows))
    figure = Figure(figsize=(2 * width + 2.3, height + 1.25), dpi=DPI)
    left, right = (_axes(figure, x, 0.5, width, height) for x in (0.55, width + 1.2))
    names = [f"{task + 1}" for task in range(tasks)]
    heat_map(left, measured_mean(acc, 0), names, names)
    left.set(title="mean over clients", xlabel="accuracy on task", ylabel="after task")
    image = heat_map(right, acc[:, after], [f"{client}" for client in range(clients)], names)
    right.set(title=f"after task {after + 1}", xlabel="accuracy on task", ylabel="client")
    bar = _axes(figure, 2 * width + 1.4, 0.5 + 0.05 * height, 0.12, 0.9 * height)
    figure.colorbar(image, cax=bar, label="accuracy (%)")
    figure.suptitle(title, fontsize=11, parse_math=False)
    _save(figure, path)


def heat_map(axes: Axes, values: npt.NDArray[np.float64], rows: list[str], columns: list[str]) -> AxesImage:
    """Draw `values` (rows, columns) in % as coloured cells, with numbers while they are readable."""
    readable = max(values.shape) <= MAX_NUMBERED
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="equal" if readable else "auto")
    axes.set_anchor("N")
    for labels, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        if len(labels) <= MAX_NUMBERED:
            axis.set_ticks(range(len(labels)), labels=labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.title.set_fontsize(10)
    if readable:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value < 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    return image


@matplotlib.rc_context(AS_WRITTEN)
def split_picture(found: SplitMap, path: Path, title: str) -> None:
    """Draw who has which classes: see `draw_split`.

    Args:
        found: the map of the split.
        path: the PNG to write.
        title: put above the picture.
    """
    classes, columns = len(found.names), found.clients + 1
    # as tall as its rows need, within what a page takes
    label = 0.45 + 0.07 * min(max(map(len, found.names)), LONGEST) if classes <= MAX_CLASSES else 0.5
    width, height = float(np.clip(0.62 * columns + 1.5 + label, 5.5, 16)), float(np.clip(0.24 * classes + 1.6, 2.8, 24))
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = _axes(figure, label, 0.55, width - label - 0.15, height - 1.4)
    draw_split(axes, found)
    figure.suptitle(title, fontsize=11, parse_math=False, y=1 - 0.2 / height)
    _save(figure, path)


def draw_split(axes: Axes, found: SplitMap) -> None:
    """Draw a row for each class and a column for each client, coloured by the task in which it learns the class.

    While they are readable, cells bear the number of training images. The last column has the images that nobody gets.

    Args:
        axes: where to draw.
        found: the map of the split.
    """
    tasks = max(found.tasks, 1)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.95, tasks))
    rest = bool(found.left_out.any())
    image = np.ones((len(found.names), found.clients + rest, 4))
    for task in range(1, tasks + 1):
        image[:, : found.clients][found.task == task] = colours[task - 1]
    image[:, found.clients :][found.left_out > 0] = (0.85, 0.85, 0.85, 1)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    if len(found.names) <= MAX_CLASSES:
        axes.set_yticks(range(len(found.names)), labels=[name[:LONGEST] for name in found.names], fontsize=7)
        axes.set_yticks(np.arange(0.5, len(found.names) - 1), minor=True)
    axes.set_ylabel("class" if len(found.names) <= MAX_CLASSES else f"{len(found.names)} classes")
    every = -(-found.clients // MAX_NUMBERED)
    shown = range(0, found.clients, every)
    labels = [*map(str, shown), *(["left out"] if rest else [])]
    axes.set_xticks([*shown, *([found.clients] if rest else [])], labels=labels, fontsize=8)
    axes.set_xticks(np.arange(0.5, image.shape[1] - 1), minor=True)
    axes.set_xlabel("client; in the cells, training images")
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if len(found.names) <= MAX_CLASSES and found.clients <= MAX_NUMBERED:
        for label, client in np.argwhere(found.task).tolist():
            ink = "white" if found.task[label, client] <= tasks / 2 else "black"
            axes.text(client, label, f"{found.train[label, client]}", ha="center", va="center", color=ink, fontsize=7)
        for (label,) in np.argwhere(found.left_out).tolist():
            axes.text(found.clients, label, f"{found.left_out[label]}", ha="center", va="center", fontsize=7)
    if tasks <= MAX_NUMBERED:
        handles = [Patch(color=colour, label=f"task {number}") for number, colour in enumerate(colours, 1)]
        axes.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(tasks, 6), frameon=False, fontsize=8
        )


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches: a layout that is computed takes longer than the drawing."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG under a temporary name first, so that no reader meets half a picture."""
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
