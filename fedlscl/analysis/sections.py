"""Sections of the report that show what a run's folder tells besides its summary: split, small model, learning curves.

Each is one function that returns a section, or None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.colors import to_hex

from fedlscl.analysis.by_method import TITLE, caption_of, ends_of
from fedlscl.analysis.captions import about_seeds, starred_name
from fedlscl.analysis.comparison import Comparison
from fedlscl.analysis.deviations import plural
from fedlscl.analysis.results import Run
from fedlscl.evaluation import MASKS
from fedlscl.run.console import human_bytes
from fedlscl.run.contribution import Contribution, lost, read_contribution, share
from fedlscl.run.folder import SUMMARY
from fedlscl.run.splitting import read_map

MACROS = "sections.html.jinja"


@dataclass(frozen=True)
class Section:
    """A part of the report below one setting.

    Args:
        key: the id of its heading.
        title: its heading.
        html: what stands below.
    """

    key: str
    title: str
    html: Markup


def environment() -> Environment:
    """Jinja for the templates of this folder: everything is escaped, and nothing may be missing."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"bytes": human_bytes, "breakable": breakable}
    return made


def breakable(text: str) -> Markup:
    """The text, which may be broken behind an underscore."""
    return Markup(escape(text).replace("_", Markup("_<wbr>")))


@cache
def _macros() -> Any:
    return environment().get_template(MACROS).module


def drawn(macro: str, **values: Any) -> Markup:
    """What a macro of `sections.html.jinja` makes of some values."""
    return Markup(getattr(_macros(), macro)(**values))


def folder_of(run: Run) -> Path | None:
    """The folder of a run, None where its summary alone was kept."""
    return run.path.parent if run.path.name == SUMMARY else None


def ranking_section(comparison: Comparison, key: str, mask: str = "seen") -> Section | None:
    """A bar for each method, the best first; of one method alone a bar for each mask. None where there is no number."""
    ends = ends_of(comparison, mask)
    if not ends:
        return None
    if len(ends) == 1:
        by_mask = [(other, *found[0][1:]) for other in MASKS if (found := ends_of(comparison, other))]
        bars = [_bar(other, mean, deviation) for other, mean, deviation in by_mask]
        caption = f"Final average over clients and tasks in %. {about_seeds([ends[0][0]], 'bars are')}"
        return Section(
            key, f"Final average of {ends[0][0].label} by mask", drawn("ranking", bars=bars, caption=caption)
        )
    bars = [_bar(starred_name(variant, mask), mean, deviation, variant.pooled) for variant, mean, deviation in ends]
    caption = caption_of([variant for variant, _, _ in ends], mask)
    return Section(key, TITLE, drawn("ranking", bars=bars, caption=caption))


def _bar(name: str, mean: float, deviation: float, pooled: bool = False) -> tuple[str, float, float | None, bool]:
    return name, round(mean, 2), None if np.isnan(deviation) else round(deviation, 2), pooled


def split_section(comparison: Comparison, key: str) -> Section | None:
    """Who has which classes and images, of the first run that tells."""
    runs = [run for variant in comparison.variants for run in variant.runs]
    folders = [(run, folder) for run in runs if (folder := folder_of(run)) is not None]
    found = next(((run, of) for run, folder in folders if (of := read_map(folder)) is not None), None)
    if found is None:
        return None
    run, of = found
    others = sorted({other.seed for other in runs if other.summary.split_sha256 != run.summary.split_sha256})
    colours = [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.15, 0.95, max(of.tasks, 1)))]
    html = drawn(
        "split",
        key=key,
        found=of,
        seed=run.seed,
        others=others,
        # white ink on the dark half of the colours
        colours=[(colour, "#fff" if number < of.tasks / 2 else "#000") for number, colour in enumerate(colours)],
        task=of.task.tolist(),
        train=of.train.tolist(),
        test=of.test.tolist(),
        left=of.left_out.tolist(),
        totals=of.train.sum(0).tolist(),
        left_out=of.left_out_text(),
    )
    return Section(key, "Who has which classes", html)


def small_model_section(comparison: Comparison, key: str) -> Section | None:
    """What the small model contributed, in sentences, for each method in whose runs it was measured."""
    told = []
    for variant in comparison.variants:
        measured = [
            each
            for run in variant.runs
            if (folder := folder_of(run)) is not None and (each := read_contribution(folder)) is not None
        ]
        if measured:
            told.append((variant.label, _in_sentences(measured)))
    if not told:
        return None
    return Section(key, "What the small model contributed", drawn("small_model", told=told))


def _in_sentences(found: Sequence[Contribution]) -> str:
    """Over the runs of a variant: what mixing W up costs, and whether W says anything of the image at all."""
    shuffled, mean, differs = (
        float(np.mean([getattr(each, name) for each in found])) for name in ("shuffled", "mean", "differs")
    )
    clients, alike = sum(each.clients for each in found), sum(len(each.alike) for each in found)
    over = f", mean over {plural(len(found), 'run')}" if len(found) > 1 else ""
    first = (
        f"On at most 16 training images of each client, after the last task: {lost(shuffled)} when the generated "
        f"weights W are shuffled over the images, {lost(mean)} when every image has their mean{over}."
    )
    second = (
        f"{share(differs).capitalize()} of the energy of the LoRA that W makes differs between images, and in {alike} "
        f"of {plural(clients, 'client')} the small model says the same of every image."
    )
    third = (
        "So one LoRA for all images seems to do as well here."
        if max(shuffled, mean) < 0.5
        else "So it matters here for which image the weights are made."
    )
    return f"{first} {second} {third}"
