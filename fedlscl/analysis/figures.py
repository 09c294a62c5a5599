"""The paper's figures over many finished runs: what a field changes, what is forgotten, and what accuracy costs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from fedlscl.analysis.by_epsilon import accuracy_by_epsilon
from fedlscl.analysis.by_method import accuracy_by_method
from fedlscl.analysis.captions import (
    Picture,
    about_seeds,
    about_stars,
    among,
    over_tasks,
    ranking,
    star,
    starred_name,
)
from fedlscl.analysis.comparison import Comparison, Variant, named
from fedlscl.analysis.curves import accuracy_by_steps
from fedlscl.analysis.drawing import (
    COLOURS,
    COLUMN,
    LABEL_SIZE,
    MARKERS,
    MAX_BANDS,
    PAGE,
    TICK_SIZE,
    TYPE,
    bars,
    filled,
    frame,
    key,
    line,
    number_points,
    ordered_styles,
    over_seeds,
    settle,
    within,
)
from fedlscl.analysis.schemes import following, name_cells
from fedlscl.evaluation import MASKS, FloatArray, measured_mean
from fedlscl.files import write_atomically
from fedlscl.run.plots import DPI, MAX_NUMBERED, heat_map

METHOD = "fed_lscl"
"""The method whose block, buffer and CNNs vary."""
_MIB = 2.0**20


def pictures(comparison: Comparison, mask: str = "seen", *, narrow: bool = False) -> list[Picture]:
    """Draw every figure for which there are runs.

    Args:
        comparison: the runs.
        mask: the classes that a prediction may fall on, one of `MASKS`.
        narrow: whether what is wider than a column comes in `Picture.pieces` too, and a long key as `Picture.names`.

    Returns:
        Accuracy by method, by block (the paper's Fig. 3) and by buffer (Fig. 5), clients by task (Fig. 4), forgetting,
        accuracy by bytes, by epsilon and by training steps, without those that need runs which are not there.

    Raises:
        ValueError: if there is no such mask, or a run has no accuracy under it.
    """
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    for run in (run for variant in comparison.variants for run in variant.runs):
        if mask not in run.summary.accuracy:
            raise ValueError(f"mask is {mask!r}, under which {run.path} has no accuracy; take another, or run it again")
    with mpl.rc_context(TYPE):
        drawn = (
            accuracy_by_method(comparison, mask),
            _by_field(comparison, mask, "model.block", "accuracy_by_block", "block of the ViT", log=False),
            _by_field(
                comparison, mask, "model.buffer_size", "accuracy_by_buffer", "images kept of each class", log=True
            ),
            _clients_by_task(comparison, mask),
            _forgetting(comparison, mask, narrow),
            _by_bytes(comparison, mask, narrow),
            accuracy_by_epsilon(comparison, mask),
            accuracy_by_steps(comparison, mask, narrow),
        )
        found = [picture for picture in drawn if picture is not None]
        for picture in found:
            for figure in (picture.figure, *picture.pieces):
                settle(figure)
    return found


def save(picture: Picture, folder: Path) -> list[Path]:
    """Write a picture as PNG and as SVG, the same bytes each time; each file appears whole or not at all.

    Args:
        picture: the picture.
        folder: an existing folder.

    Returns:
        The files, named after the picture: the PNG with 150 dots per inch, the SVG with its text as text and in
        colours that follow the scheme of who looks at it.

    Raises:
        OSError: if a file cannot be written.
    """
    about = {"Title": picture.title, "Description": picture.caption}
    name_cells(picture.figure)
    files = []
    for suffix, metadata in (("png", about), ("svg", {**about, "Date": None})):
        content = io.BytesIO()
        # Without a salt of its own an SVG has other identifiers each time.
        with mpl.rc_context({"svg.hashsalt": picture.name, "svg.fonttype": "none"}):
            picture.figure.savefig(content, format=suffix, dpi=DPI, metadata=metadata)
        files.append(folder / f"{picture.name}.{suffix}")
        drawing = content.getvalue()
        write_atomically(files[-1], following(drawing.decode()).encode() if suffix == "svg" else drawing)
    return files


def _by_field(comparison: Comparison, mask: str, field: str, name: str, meaning: str, *, log: bool) -> Picture | None:
    """Accuracy after each task, a line for each value of a field, and the final average against the value."""
    variants = comparison.varying(field, METHOD)
    if not variants:
        return None
    figure = Figure(figsize=(COLUMN, 4.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1.5, 1])
    ends = []
    styles = ordered_styles(len(variants))
    banded = len(variants) <= MAX_BANDS
    for (value, variant), style in zip(variants.items(), styles, strict=True):
        accuracy = over_tasks(variant, mask)
        line(above, np.arange(1, accuracy.shape[1] + 1), accuracy, str(value), style, band=banded)
        ends.append(over_seeds(accuracy[:, -1]))
    values = list(variants)
    below.plot(values, [float(mean) for mean, _ in ends], color="0.7", linewidth=0.8, zorder=1)
    for value, (mean, deviation), style in zip(values, ends, styles, strict=True):
        below.plot([value], [float(mean)], **style)
        bars(below, [value], [mean], [deviation], style["color"])
    if log:
        below.set_xscale("symlog", linthresh=1)  # linear from 0 to 1
    below.set_xticks(values, labels=[str(value) for value in values], minor=False)
    below.minorticks_off()
    above.set(xlabel="after task", ylabel="accuracy over learned tasks (%)")
    above.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.set(xlabel=meaning, ylabel="final average (%)")
    frame(above)
    frame(below)
    methods = list(variants.values())
    label = f"{METHOD}{star(methods[0], mask)}: {meaning}"
    above.legend(
        title=label,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=min(6, len(variants)),
        frameon=False,
        handlelength=2.6,
        columnspacing=1.0,
    )
    spread = "bands and bars are" if banded else "bars are"
    different = {name: value for name, value in methods[0].differs.items() if name != field}
    common = f" All with {named(different)}." if different else ""
    what = f"Accuracy of {METHOD} by {meaning}"
    caption = (
        f"Above, accuracy in % after each task, as the mean over clients and over the tasks learned so far; below, "
        f"its value after the last task; {among(mask)}.{common} {about_seeds(methods, spread)} "
        f"{about_stars(methods, mask)}"
    )
    return Picture(name, f"{what}, {comparison.title}", caption.strip(), figure)


def _clients_by_task(comparison: Comparison, mask: str) -> Picture | None:
    """Accuracy of the final model of each client on each task, for one CNN everywhere and for one of its own each."""
    usual, every = (_by_method(variants).get(METHOD, []) for variants in (comparison.usual, comparison.variants))
    same = [variant for variant in usual if not isinstance(_cnn(variant), list)]
    own = sorted((variant for variant in every if isinstance(_cnn(variant), list)), key=lambda v: len(v.differs))
    # Without a usual configuration every variant is "usual", and none of them speaks for the method.
    shown = [*(same if len(same) == 1 else []), *own[:1]]
    if not shown:
        return None
    finals = [over_seeds(np.stack([run.accuracy[mask][:, -1] for run in variant.runs]))[0] for variant in shown]
    cells = max(final.shape[1] for final in finals), sum(min(len(final), MAX_NUMBERED) for final in finals)
    longest = max(len(str(kind)) for variant in shown for kind in np.atleast_1d(_cnn(variant)))
    width = float(np.clip(0.25 * min(cells[0], MAX_NUMBERED) + 0.06 * longest + 0.6, COLUMN, PAGE))
    size = (width, 0.25 * cells[1] + 0.55 * len(shown) + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(final) for final in finals])[:, 0]
    for axes, variant, final in zip(grid, shown, finals, strict=True):
        cnn = _cnn(variant)
        kinds = [f" {kind}" for kind in cnn] if isinstance(cnn, list) else [""] * len(final)
        names = [f"{client}{kind}" for client, kind in enumerate(kinds)]
        image = heat_map(axes, final, names, [f"{task + 1}" for task in range(final.shape[1])])
        for text in axes.texts:
            text.set_fontsize(LABEL_SIZE)
        each = "a CNN of its own on each client" if isinstance(cnn, list) else f"{cnn} on every client"
        axes.set(title=f"{METHOD}{star(variant, mask)}, {each}", xlabel="accuracy on task", ylabel="client")
        axes.title.set_fontsize(mpl.rcParams["axes.titlesize"])
        axes.tick_params(labelsize=TICK_SIZE)
    bar = figure.colorbar(image, ax=list(grid), location="bottom", aspect=30, shrink=0.8)
    bar.set_label("accuracy (%)")
    bar.ax.tick_params(labelsize=TICK_SIZE)
    caption = (
        f"Accuracy in % of each client's final model on the test images of each task; {among(mask)}. "
        f"{about_seeds(shown, None)} {about_stars(shown, mask)}"
    )
    title = f"Accuracy of {METHOD}'s final models by client and task, {comparison.title}"
    return Picture("clients_by_task", title, caption.strip(), figure)


def _forgetting(comparison: Comparison, mask: str, narrow: bool) -> Picture | None:
    """Accuracy on each task while later ones are learned, a panel for each method."""
    ranked = ranking(comparison.usual, mask)
    # (seeds, after task, on task) for each variant
    accuracies = [np.stack([measured_mean(run.accuracy[mask], 0) for run in variant.runs]) for variant in ranked]
    tasks = max((accuracy.shape[1] for accuracy in accuracies), default=0)
    if tasks < 2:
        return None
    columns = min(len(ranked), 4)
    rows = -(-len(ranked) // columns)
    width = max(COLUMN, PAGE / 4 * columns)
    figure = Figure(figsize=(width, 1.35 * rows + 0.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    styles = ordered_styles(tasks)
    for axes, variant, accuracy in zip(grid, ranked, accuracies, strict=False):
        _forgotten(axes, variant, accuracy, styles, mask)
    within(grid[0])
    for spare in grid[len(ranked) :]:
        spare.remove()
    for axes in grid[max(0, len(ranked) - columns) : len(ranked)]:
        axes.tick_params(labelbottom=True)  # some have a spare place below them
        axes.set_xlabel("after task")
    for axes in grid[: len(ranked) : columns]:
        axes.set_ylabel("accuracy (%)")
    longest = max(range(len(ranked)), key=lambda index: accuracies[index].shape[1])
    title = "accuracy on task"
    figure.legend(
        *grid[longest].get_legend_handles_labels(),
        title=title,
        loc="outside lower center",
        ncols=min(tasks, 5 if width < PAGE else 10),
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )
    caption = (
        f"Accuracy in % on each task after it and after each later task, as the mean over clients; {among(mask)}; "
        f"methods by their final average, which is above each panel. {about_seeds(ranked)} {about_stars(ranked, mask)}"
    )
    pieces: list[Figure] = []
    if narrow and width > COLUMN:
        for first in range(0, len(ranked), 2):
            pieces.append(Figure(figsize=(COLUMN, 1.75), dpi=DPI, layout="constrained"))
            pair = pieces[-1].subplots(1, 2, sharex=True, sharey=True)
            pair[0].set(xlim=grid[0].get_xlim(), ylim=grid[0].get_ylim(), ylabel="accuracy (%)")
            for place, axes in enumerate(pair, first):
                if place < len(ranked):
                    _forgotten(axes, ranked[place], accuracies[place], styles, mask)
                    axes.set_xlabel("after task")
                else:
                    axes.remove()
        pieces.append(key(grid[longest], min(tasks, 5), title))
    about = f"Accuracy on earlier tasks, {comparison.title}"
    return Picture("forgetting", about, caption.strip(), figure, pieces=tuple(pieces))


def _forgotten(axes: Axes, variant: Variant, accuracy: FloatArray, styles: Sequence[dict[str, Any]], mask: str) -> None:
    """The panel of one method: a line for each task, over the tasks after which it was tested."""
    for task in range(accuracy.shape[1]):
        later = np.arange(task, accuracy.shape[1])
        line(axes, later + 1, accuracy[:, later, task], str(task + 1), {**styles[task], "markersize": 3.2})
    final = float(over_seeds(over_tasks(variant, mask)[:, -1])[0])
    axes.set_title(f"{filled(starred_name(variant, mask), 26)}  {final:.1f}", pad=3)
    frame(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _by_bytes(comparison: Comparison, mask: str, key_apart: bool) -> Picture | None:
    """Final average against what a client sends and receives in a round, a numbered point for each method."""
    ranked = ranking([variant for variant in comparison.usual if not variant.pooled], mask)
    if not ranked:
        return None
    sent = [float(np.mean([run.bytes_per_client_round for run in variant.runs])) / _MIB for variant in ranked]
    whole = tuple(starred_name(variant, mask) for variant in ranked)
    names = [filled(name, 48) for name in whole]
    beside = len(names) > 8  # a key of so many lines takes the place beside the picture, not below it
    columns = 1 if beside or max(map(len, names)) > 26 or len(names) < 4 else 2
    height = 0.14 * sum(name.count("\n") + 1 for name in names) / columns
    size = (PAGE, max(3.2, 0.3 + height)) if beside else (COLUMN, 3.0 + height)
    size = (COLUMN, 3.4) if key_apart else size
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    # Zero has no place on a logarithmic axis: methods that send nothing get an axis of their own, left of it.
    kinds = [kind for kind in (True, False) if kind in {mib == 0 for mib in sent}]
    widths = [1.0 if silent else 6.0 for silent in kinds]
    row = figure.subplots(1, len(kinds), sharey=True, squeeze=False, width_ratios=widths)[0]
    panels: dict[bool, Axes] = dict(zip(kinds, row, strict=True))
    handles: list[Line2D] = []
    points: dict[bool, dict[int, tuple[float, float, float]]] = {silent: {} for silent in kinds}
    for index, (variant, mib) in enumerate(zip(ranked, sent, strict=True)):
        mean, deviation = (float(value) for value in over_seeds(over_tasks(variant, mask)[:, -1]))
        colour, axes = COLOURS[index % len(COLOURS)], panels[mib == 0]
        handles += axes.plot(
            [mib],
            [mean],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            linestyle="none",
            label=f"{index + 1}  {names[index]}",
        )
        bars(axes, [mib], [mean], [deviation], colour)
        if not np.isnan(mean):
            points[mib == 0][index + 1] = (mib, mean, deviation)
    for silent, axes in panels.items():
        frame(axes)
        axes.margins(y=0.08)
        if silent:
            axes.set(xlim=(-1, 1), xlabel="nothing\nsent")
            axes.set_xticks([0], labels=["0"])
            axes.set_facecolor("0.95")
        else:
            some = [mib for mib in sent if mib > 0]
            axes.set(
                xscale="log",
                xlim=(min(some) / 1.8, max(some) * 2.2),
                xlabel="sent and received, client and round (MiB)",
            )
            wide = max(some) > 30 * min(some)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    row[0].set_ylabel("final average (%)")
    within(row[0])
    if not key_apart:
        figure.legend(
            handles=handles,
            loc="outside right upper" if beside else "outside lower center",
            ncols=columns,
            frameon=False,
            handletextpad=0.4,
        )
    settle(figure)
    for silent, axes in panels.items():
        number_points(figure, axes, points[silent])
    caption = (
        f"Final average in % against the bytes that a client sends and receives in a round (MiB, logarithmic); "
        f"{among(mask)}; methods are numbered by their final average"
        f"{', and those that send nothing stand at the left' if True in panels else ''}. "
        f"{about_seeds(ranked)} {about_stars(ranked, mask)}"
    )
    title = f"Accuracy against communication, {comparison.title}"
    return Picture("accuracy_by_bytes", title, caption.strip(), figure, whole if key_apart else ())


def _by_method(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    methods: dict[str, list[Variant]] = {}
    for variant in variants:
        methods.setdefault(variant.method, []).append(variant)
    return methods


def _cnn(variant: Variant) -> Any:
    """The CNN of every client: one name, or a list with a name for each."""
    return variant.runs[0].fields.get("cnn.name")
