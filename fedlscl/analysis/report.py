"""One HTML page on finished runs: tables, figures, settings, what differs from the paper, and every run.

The page holds all it shows and asks for nothing from anywhere: no script, no font, no image from outside. Its own few
lines of script sort tables; the policy in its head lets no other run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

import fedlscl
from fedlscl.analysis.audit_section import audit_section
from fedlscl.analysis.comparison import Comparison
from fedlscl.analysis.deviations import OPEN, POINTS, data_set, differences, in_words, plural, texts
from fedlscl.analysis.example_images import examples_section
from fedlscl.analysis.figures import pictures
from fedlscl.analysis.formats import Table
from fedlscl.analysis.learning import curve, learning
from fedlscl.analysis.paper import TABLE1
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import MASK_NAMES
from fedlscl.analysis.schemes import ON_COLOUR, both, name_cells
from fedlscl.analysis.sections import environment, ranking_section, small_model_section, split_section
from fedlscl.analysis.side_by_side import across_section, two_section
from fedlscl.analysis.tables import tables
from fedlscl.analysis.tuning import tuning
from fedlscl.files import write_atomically

TEMPLATE, SCRIPT = "report.html.jinja", "report.js"
IN_HTML = "accuracy_by_method"
"""The figure that the page draws by itself, so that it fits a phone: which method is best."""
ANSWERS = ("accuracy_by_bytes", "accuracy_by_epsilon")
"""The figures that stand before all tables: what accuracy costs, and what privacy costs."""
BEHIND = ("seeds", "images kept", "epsilon")
"""The columns that the page puts behind all others: what a phone shows at first is the results."""
NUMBER = re.compile(r"[-+]?\d|[-–—]?$")
"""How the text of a cell begins that belongs to a column of numbers; it may be missing."""


def write_report(comparisons: Sequence[Comparison], path: Path, examples: int = 0, audits: Sequence[Path] = ()) -> None:
    """Write one HTML page on all runs of some comparisons.

    Args:
        comparisons: what :func:`fedlscl.analysis.comparison.compare` returns.
        path: the page to write; its folder must exist.
        examples: how many test images of each of some clients to show, with what these say of them.
        audits: folders that `fedlscl audit` has written, to be shown behind the runs.

    Raises:
        ValueError: if there is no comparison, or an audit is none.
        FileNotFoundError: if the folder of `path` does not exist.
    """
    if not comparisons:
        raise ValueError("comparisons is empty, must hold at least one comparison of finished runs")
    names = Counter(comparison.setting for comparison in comparisons)
    script = (Path(__file__).parent / SCRIPT).read_text(encoding="utf-8")
    page = (
        environment()
        .get_template(TEMPLATE)
        .render(
            version=fedlscl.__version__,
            settings=[
                _setting(c, comparisons, f"s{n}", c.setting if names[c.setting] == 1 else c.title, examples)
                for n, c in enumerate(comparisons, 1)
            ],
            across=across_section(comparisons, "across"),
            masks=MASK_NAMES,
            audit=audit_section(audits),
            script=Markup(script),
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    write_atomically(path, page.encode())


def inline_svg(figure: Figure, prefix: str, label: str, described_by: str) -> Markup:
    """Draw a figure as an SVG element to stand inside an HTML page.

    Args:
        figure: the figure; nothing that is drawn is changed.
        prefix: put before every id, so that several figures can share a page.
        label: what it shows, for those who do not see it.
        described_by: id of the element that describes it.

    Returns:
        The element without a size, in colours for a light and a dark page; its style property `--drawn` is the width
        that it was drawn for.
    """
    name_cells(figure)
    buffer = io.BytesIO()
    # The salt makes the same figure the same text; letters as outlines look alike whatever fonts a reader has.
    with matplotlib.rc_context({"svg.hashsalt": "fedlscl", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # A style inside the drawing would hold for the whole page; the page's own has it for its drawings.
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    on_colour = [element for element in root.iter() if element.get("id", "").startswith(ON_COLOUR)]
    kept = {child for group in on_colour for child in group.iter()}
    for group in on_colour:
        group.set("style", "fill: #000000")
    for element in root.iter():
        if "style" in element.attrib and element not in kept:
            element.set("style", both(element.attrib["style"]))
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _prefixed(_local(name), value, prefix) for name, value in element.items()}
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    # letters without a colour are black
    root.set("style", both(f"--drawn: {width:.0f}pt; fill: #000000"))
    root.attrib |= {"role": "img", "aria-label": label, "aria-describedby": described_by}
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _prefixed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")


def _setting(comparison: Comparison, every: Sequence[Comparison], key: str, name: str, examples: int) -> dict[str, Any]:
    """What the template shows of one of all comparisons; `key` begins every id, `name` is its heading."""
    runs = [run for variant in comparison.variants for run in variant.runs]
    methods = {variant.method for variant in comparison.variants}
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package, version in run.summary.versions.items():
            versions.setdefault(package, []).append(version)
    first: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    # of one method alone a plane with one point would say nothing
    needless = (IN_HTML, *(ANSWERS if len(comparison.variants) == 1 else ()))
    shown = (drawn for drawn in pictures(comparison, narrow=True) if drawn.name not in needless)
    for n, picture in enumerate(shown, 1):
        figure_key = f"{key}-figure{n}"
        title = picture.title.removesuffix(f", {comparison.title}")  # the section's heading says it
        svgs = [
            inline_svg(figure, f"{figure_key}-{place}-" if place else f"{figure_key}-", title, f"{figure_key}-caption")
            for place, figure in enumerate(picture.pieces or [picture.figure])
        ]
        figures = first if picture.name in ANSWERS else later
        about = {"title": title, "caption": picture.caption, "names": picture.names}
        figures.append({"key": figure_key, "svgs": svgs, **about})
    opening = [
        ranking_section(comparison, f"{key}-ranking"),
        *first,
        split_section(comparison, f"{key}-split"),
        small_model_section(comparison, f"{key}-small-model"),
        two_section(comparison, f"{key}-two"),
        examples_section(comparison, f"{key}-examples", examples) if examples else None,
    ]
    different, same = differences(comparison.variants)
    return {
        "key": key,
        "name": name,
        "facts": {
            "Setting": comparison.setting,
            "Backbone": comparison.backbone,
            "Accuracies on": comparison.evaluated_on,
            "Runs": f"{plural(len(runs), 'run')} of {plural(len(methods), 'method')}",
            "Seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
        },
        "machines": {
            "Machines": "; ".join(dict.fromkeys(run.summary.machine for run in runs)),
            "Versions": ", ".join(
                f"{package} {' and '.join(dict.fromkeys(each))}" for package, each in versions.items()
            ),
        },
        "points": texts(POINTS, comparison.variants),
        "tables": [
            _table(table, f"{key}-table{n}")
            for n, table in enumerate([*tables(comparison), *tuning(comparison, every)], 1)
        ],
        "opening": [part for part in opening if part is not None],
        "figures": later,
        "papers": any(data_set(variant) in TABLE1 for variant in comparison.variants),
        "differences": different,
        "same": same,
        "open": texts(OPEN, comparison.variants),
        "runs": [
            _run(run, variant.label, variant.task_aware) for variant in comparison.variants for run in variant.runs
        ],
    }


def _table(table: Table, key: str) -> dict[str, Any]:
    order = sorted(range(len(table.header)), key=lambda column: table.header[column] in BEHIND)
    header = [table.header[column] for column in order]
    rows = [[row[column] for column in order] for row in table.rows]
    # a phone shows the first sentence, and the others when asked
    first, end, more = table.note.partition(". ")
    return {
        "key": key,
        "title": table.title,
        "note": first + end.rstrip(),
        "more": more,
        "header": header,
        "rows": rows,
        "dense": len(header) > 10,
        "numeric": [n > 0 and all(NUMBER.match(row[n].text) for row in rows) for n in range(len(header))],
    }


def _run(run: Run, label: str, task_aware: Sequence[str]) -> dict[str, Any]:
    summary = run.summary
    parts = ", ".join(f"{name} {value:.1f}" for name, value in summary.seconds.items() if name != "total")
    return {
        "label": label,
        "seed": run.seed,
        "averages": {
            mask: f"{average:.1f}{'*' if mask in task_aware else ''}" for mask, average in run.final_average.items()
        },
        "facts": {
            "Small model": in_words(summary.cnn),
            "Seconds": f"{run.seconds:.1f} ({parts})" if parts else f"{run.seconds:.1f}",
            "Peak memory": f"{summary.peak_memory_mib:.0f} MiB",
            "Machine": summary.machine,
            "Summary": str(run.path),
        },
        "bytes": {"up": summary.bytes_up, "down": summary.bytes_down},
        "skipped": summary.skipped,
        "curve": curve(found, f"Accuracy of {label}, seed {run.seed}, in the course of the run")
        if (found := learning(run)).unit == "round"
        else None,
        "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
    }
