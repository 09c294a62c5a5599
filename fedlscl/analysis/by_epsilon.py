"""The picture of what differential privacy costs: final averages over epsilon, beside those without noise."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlscl.analysis.captions import Picture, about_seeds, about_stars, among, over_tasks, ranking, star
from fedlscl.analysis.comparison import PROTECTIONS, Comparison, Variant, named
from fedlscl.analysis.drawing import COLOURS, COLUMN, LINES, MARKERS, bars, filled, frame, over_seeds, within
from fedlscl.evaluation import FloatArray
from fedlscl.run.plots import DPI


def accuracy_by_epsilon(comparison: Comparison, mask: str) -> Picture | None:
    """A line over epsilon for each method with differential privacy, and at the right what it has without noise.

    Args:
        comparison: the runs.
        mask: the classes that a prediction may fall on.

    Returns:
        None where no run has differential privacy, or there would be a single point.
    """
    lines: dict[tuple[str, str], dict[float, Variant]] = {}
    plain: dict[str, Variant] = {}
    for variant in ranking([each for each in comparison.variants if not each.pooled], mask):
        name, promises = _name(variant, mask), [run.summary.privacy for run in variant.runs]
        if (promise := promises[0]) is None:
            plain.setdefault(name, variant)
        else:
            epsilon = max(each.epsilon for each in promises if each)
            noise = ", noise from the seed" if promise.noise == "seed" else ""
            to = f"each {promise.unit}, delta {promise.delta:g}{noise}"
            lines.setdefault((name, to), {}).setdefault(epsilon, variant)
    without = {name for name, _ in lines if name in plain}
    if sum(map(len, lines.values())) + len(without) < 2:
        return None
    promised = list(dict.fromkeys(to for _, to in lines))
    figure = Figure(figsize=(COLUMN, 2.6 + 0.16 * len(lines)), dpi=DPI, layout="constrained")
    widths = [6.0, 1.0] if without else [6.0]
    row = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    over, beside = row[0], row[-1]
    names = list(dict.fromkeys(name for name, _ in lines))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    shown: list[Variant] = []
    for place, ((name, to), variants) in enumerate(lines.items()):
        label = filled(name if len(promised) == 1 else f"{name}: {to}", 60)
        marker, dashes = MARKERS[place % len(MARKERS)], LINES[promised.index(to) % len(LINES)]
        along = dict(sorted(variants.items()))
        ends = [_end(variant, mask) for variant in along.values()]
        _points(over, [*along], ends, colours[name], marker, linestyle=dashes, label=label)
        shown += along.values()
        if name in without:
            _points(beside, [0.0], [_end(plain[name], mask)], colours[name], marker)
            shown.append(plain[name])
    epsilons = sorted({epsilon for variants in lines.values() for epsilon in variants})
    over.set(xscale="log", xlabel="epsilon", ylabel="final average (%)")
    over.set_xlim(epsilons[0] / 1.4, epsilons[-1] * 1.4)
    over.set_xticks(epsilons, labels=[f"{epsilon:.3g}" for epsilon in epsilons])
    over.minorticks_off()
    if without:
        beside.set(xlim=(-1, 1), xlabel="without\nnoise")
        beside.set_xticks([])
        beside.set_facecolor("0.95")
    for axes in row:
        frame(axes)
        axes.margins(y=0.08)
    within(over)
    figure.legend(loc="outside lower center", frameon=False, handlelength=2.6)
    to_whom = f"It is promised to {promised[0]}. " if len(promised) == 1 else ""
    caption = (
        f"Final average in % over epsilon, the differential privacy of all that clients have sent (less is stricter; "
        f"logarithmic){', and at the right without noise' if without else ''}; {among(mask)}. {to_whom}"
        f"{about_seeds(shown, 'bars are')} {about_stars(shown, mask)}"
    )
    return Picture("accuracy_by_epsilon", f"Accuracy against privacy, {comparison.title}", caption.strip(), figure)


def _name(variant: Variant, mask: str) -> str:
    """A method and what differs in it, but for what protects its clients."""
    others = {field: value for field, value in variant.differs.items() if not field.startswith(PROTECTIONS)}
    return f"{variant.method}{f' ({named(others)})' if others else ''}{star(variant, mask)}"


def _end(variant: Variant, mask: str) -> tuple[float, float]:
    mean, deviation = over_seeds(over_tasks(variant, mask)[:, -1])
    return float(mean), float(deviation)


def _points(
    axes: Axes, x: list[float], ends: list[tuple[float, float]], colour: str, marker: str, **style: str
) -> None:
    values: FloatArray = np.array(ends)
    axes.plot(x, values[:, 0], color=colour, marker=marker, **style)  # type: ignore[arg-type]
    bars(axes, x, values[:, 0], values[:, 1], colour)
