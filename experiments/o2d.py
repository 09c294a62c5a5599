"""When does one-by-one distillation (O2D) help? Fed-LSCL with it, without it, and with the mean of phi in its place.

    python experiments/o2d.py FOLDER [--seeds 42 1999 2024]

Each case changes one thing of the first: digits in random colours (`coloured_digits.yaml`), on which weights for each
image count, learned in one task, so that nothing is forgotten, by five clients with one class of their own and five in
common. Accuracy is that of images held out of training, in %, under `seen` on the classes that a client has, and under
`federation` among the classes of all. What is finished in the folder is not run again, and seeds are run one after
another. Written to FOLDER are o2d.csv, every number, and o2d.svg, what O2D adds; the table goes to the standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from fedlscl.analysis.captions import Picture
from fedlscl.analysis.drawing import COLOURS, MARKERS, TYPE, frame, settle
from fedlscl.analysis.figures import save
from fedlscl.analysis.formats import csv_text
from fedlscl.files import write_atomically
from fedlscl.run.configuration import Configuration
from fedlscl.run.folder import SUMMARY
from fedlscl.run.summary import Summary

HERE = Path(__file__).resolve().parent
METHODS = {"fed_lscl": "O2D", "fed_lscl_without_o2d": "without", "fed_lscl_fedavg": "mean of phi"}
BASE = {
    "data.source.source": "HeldOut",
    "data.source.source.source": "Digits",
    "data.split.clients": 5,
    "data.split.tasks": 1,
    "data.split.private_classes": 1,
    "data.split.public_classes": 5,
    "data.split.classes_per_task": 6,
    "data.source.copies": 4,
    "federation.rounds": 4,
    "tracking.wandb_mode": "disabled",
}
ALL_IN_COMMON = {"data.split.private_classes": 0, "data.split.public_classes": 10, "data.split.classes_per_task": 10}
CNNS = ("resnet18", "resnet10t", "resnet14t", "seresnet18", "skresnet18")
CNN = {"channels": [16, 32, 64, 128], "norm_layer": "groupnorm1"}


class Case(NamedTuple):
    """What is changed, in words and in fields."""

    meaning: str
    fields: Mapping[str, object]
    methods: Sequence[str] = tuple(METHODS)


CASES = {
    "base": Case("5 of 6 classes in common", {}),
    "none": Case(
        "no class in common",
        {"data.split.private_classes": 2, "data.split.public_classes": 0, "data.split.classes_per_task": 2},
    ),
    "all": Case("all 10 classes in common", ALL_IN_COMMON),
    "ten": Case("the same, 10 clients", {**ALL_IN_COMMON, "data.split.clients": 10}),
    "cnns": Case("five different CNNs", {"cnn.name": [*CNNS], "cnn.model_args": {cnn: CNN for cnn in CNNS}}),
    "few": Case("a quarter of the images", {"data.source.copies": 1}),
    "weak": Case("lambda 0.05 (of 0.5)", {"server.strength": 0.05}, ("fed_lscl",)),
    "strong": Case("lambda 5", {"server.strength": 5}, ("fed_lscl",)),
}
UNCHANGED = {"weak": "base", "strong": "base"}
"""Whose runs without O2D a case shares, since lambda is O2D's alone."""


class Key(NamedTuple):
    """A run."""

    case: str
    method: str
    seed: int


Accuracy = dict[str, float]
MASKS = {"seen": "classes of the client", "federation": "classes of all clients"}


def run(folder: Path, key: Key) -> Accuracy:
    """Final averages in % by mask, of a run that is made unless the folder has it."""
    path = folder / f"{key.case}-{key.method}-{key.seed}"
    if not (path / SUMMARY).exists():
        fields = {**BASE, **CASES[key.case].fields, "seed_everything": key.seed, "run_dir": path}
        given = [f"--config={HERE / 'coloured_digits.yaml'}", f"--config={HERE / 'methods' / f'{key.method}.yaml'}"]
        experiment = Configuration([*given, *(f"--{name}={_word(value)}" for name, value in fields.items())]).build()
        experiment.load()
        experiment.run(Console(quiet=True))
    summary = Summary.read(path / SUMMARY)
    return {mask: summary.under(mask).final_average for mask in MASKS}


def _word(value: object) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def added(found: Mapping[Key, Accuracy], case: str, method: str, mask: str) -> list[float]:
    """What a method adds to Fed-LSCL without O2D, in points, seed by seed."""
    seeds = [key.seed for key in found if key[:2] == (case, method)]
    plain = UNCHANGED.get(case, case)
    return [
        found[Key(case, method, seed)][mask] - found[Key(plain, "fed_lscl_without_o2d", seed)][mask] for seed in seeds
    ]


def rows(found: Mapping[Key, Accuracy]) -> Iterator[str]:
    """The table in Markdown: means over seeds, and what is added with each seed."""
    columns = ("case", "mask", *METHODS.values(), "O2D adds", "mean of phi adds")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for (name, case), mask in product(CASES.items(), MASKS):
        cells = [case.meaning, mask]
        for method in METHODS:
            values = [accuracy[mask] for key, accuracy in found.items() if key[:2] == (name, method)]
            cells.append(f"{np.mean(values):.1f}" if values else "")
        for method in ("fed_lscl", "fed_lscl_fedavg"):
            cells.append(", ".join(f"{value:+.1f}" for value in added(found, name, method, mask)))
        yield f"| {' | '.join(cells)} |"


def drawn(found: Mapping[Key, Accuracy]) -> Picture:
    """A row for each case: what O2D and the mean of phi add with each seed, and a line at their means."""
    with mpl.rc_context(TYPE):
        figure = Figure((7, 0.4 + 0.32 * len(CASES)), layout="constrained")
        panels = figure.subplots(1, len(MASKS), sharey=True)
        for axes, (mask, meaning) in zip(panels, MASKS.items(), strict=True):
            frame(axes)
            axes.axvline(0, color="0.35", linewidth=0.8)
            for shift, (method, name) in enumerate((m, n) for m, n in METHODS.items() if m != "fed_lscl_without_o2d"):
                style = {"color": COLOURS[shift], "marker": MARKERS[shift], "linestyle": "none"}
                for at, case in enumerate(CASES):
                    values = added(found, case, method, mask)
                    places = [at - 0.15 + 0.3 * shift] * len(values)
                    axes.plot(values, places, label=name if at == 0 else None, alpha=0.6, **style)
                    if values:
                        axes.plot([np.mean(values)], places[:1], marker="|", markersize=11, color=style["color"])
            axes.set(xlabel=f"points added, among the {meaning}")
            axes.set_yticks(range(len(CASES)), [case.meaning for case in CASES.values()])
        panels[0].invert_yaxis()
        panels[0].legend(frameon=False)
        settle(figure)
    seeds = sorted({key.seed for key in found})
    caption = (
        "What one-by-one distillation, and the mean of phi in its place, add to Fed-LSCL without either: points of "
        f"accuracy on held-out images, a mark for each of the seeds {', '.join(map(str, seeds))}, a line at their mean."
    )
    return Picture("o2d", "When does O2D help?", caption, figure)


def main() -> None:
    """Run what is missing, and write the table, the numbers and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1999, 2024])
    options = parser.parse_args()
    keys = [
        Key(name, method, seed) for seed in options.seeds for name, case in CASES.items() for method in case.methods
    ]
    found = {key: run(options.folder, key) for key in keys}
    lines = [("case", "method", "seed", *MASKS)]
    lines += [(*map(str, key), *(f"{accuracy[mask]:.2f}" for mask in MASKS)) for key, accuracy in found.items()]
    write_atomically(options.folder / "o2d.csv", csv_text(lines).encode())
    save(drawn(found), options.folder)
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
