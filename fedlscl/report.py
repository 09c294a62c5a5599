"""One HTML page on finished runs: tables, figures, settings, what differs from the paper, and every run.

The page holds all it shows and asks for nothing from anywhere: no script, no font, no image from outside.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

import fedlscl
from fedlscl.checkpoint import write_atomically
from fedlscl.console import human_bytes
from fedlscl.evaluation import MASKS
from fedlscl.figures import pictures
from fedlscl.results import Comparison, Run, flat
from fedlscl.tables import MASK_NAMES, Table, tables

TEMPLATE = "report.html.jinja"
NUMBER = re.compile(r"[-+]?\d|[-–—]?$")
"""How the text of a cell begins that belongs to a column of numbers; it may be missing."""

Config = Mapping[str, Any]
"""A configuration in one level, with dotted names."""


@dataclass(frozen=True)
class Point:
    """A point of the protocol.

    Args:
        label: what it is.
        here: its text from a configuration; None if the method has no such thing.
        paper: its text in the paper; where the two data sets differ, that of CIFAR-100 and that of ImageNet-R; empty
            if it is not part of the paper's protocol.
        stated: whether the paper states it; otherwise it is assumed, as in the authors' other code.
        why: what it means to differ, and why a setting may.
    """

    label: str
    here: Callable[[Config], str | None]
    paper: tuple[str, ...] = ()
    stated: bool = True
    why: str = ""


@dataclass(frozen=True)
class Difference:
    """A point in which runs differ from the paper.

    Args:
        label: what it is.
        paper: its text in the paper.
        stated: whether the paper states it.
        here: its text in the runs.
        in_part: whether some of the runs are as the paper is.
        why: what it means to differ, and why a setting may.
    """

    label: str
    paper: str
    stated: bool
    here: str
    in_part: bool
    why: str


def write_report(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write one HTML page on all runs of some comparisons.

    Args:
        comparisons: what :func:`fedlscl.results.compare` returns.
        path: the page to write; its folder must exist.

    Raises:
        ValueError: if there is no comparison.
        FileNotFoundError: if the folder of `path` does not exist.
    """
    if not comparisons:
        raise ValueError("comparisons is empty, must hold at least one comparison of finished runs")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "breakable": _breakable}
    names = Counter(comparison.setting for comparison in comparisons)
    page = environment.get_template(TEMPLATE).render(
        version=fedlscl.__version__,
        settings=[
            _setting(c, f"s{n}", c.setting if names[c.setting] == 1 else c.title) for n, c in enumerate(comparisons, 1)
        ],
        masks=MASK_NAMES,
    )
    write_atomically(path, page.encode())


def differences(comparison: Comparison) -> tuple[list[Difference], list[str]]:
    """Compare the configurations of runs with the paper's protocol.

    Args:
        comparison: runs that may stand side by side.

    Returns:
        The points in which some run differs, and the others as texts. A point that no run has is in neither.
    """
    configs = [flat(run.summary["config"]) for run in _runs(comparison)]
    others, same = [], []
    for point in POINTS:
        values = [text for config in configs if (text := point.here(config)) is not None]
        if point.paper and values:
            wanted = _wanted(point, configs[0])
            if set(values) <= set(wanted):
                same.append(f"{point.label} ({_counted(values, 'run')})")
            else:
                in_part = bool(set(values) & set(wanted))
                paper = " or ".join(dict.fromkeys(wanted))
                others.append(Difference(point.label, paper, point.stated, _counted(values, "run"), in_part, point.why))
    seeds = [", ".join(str(run.seed) for run in variant.runs) for variant in comparison.variants]
    if set(seeds) == {SEEDS}:
        same.append(f"seeds ({SEEDS})")
    else:
        why = "Each number is a mean over the seeds of its row; with one seed nothing tells chance from effect."
        others.append(Difference("seeds", SEEDS, True, _counted(seeds, "configuration"), SEEDS in seeds, why))
    return others, same


def inline_svg(figure: Figure, prefix: str, label: str, described_by: str) -> Markup:
    """Draw a figure as an SVG element to stand inside an HTML page.

    Args:
        figure: the figure; it is not changed.
        prefix: put before every id, so that several figures can share a page.
        label: what it shows, for those who do not see it.
        described_by: id of the element that describes it.

    Returns:
        The element without a size; its style property `--drawn` is the width that it was drawn for.
    """
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
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _prefixed(_local(name), value, prefix) for name, value in element.items()}
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.set("style", f"--drawn: {width:.0f}pt")
    root.attrib |= {"role": "img", "aria-label": label, "aria-describedby": described_by}
    return Markup(ET.tostring(root, encoding="unicode"))


def _breakable(text: str) -> Markup:
    """The text, which may be broken behind an underscore."""
    return Markup(escape(text).replace("_", Markup("_<wbr>")))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _prefixed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")


def _setting(comparison: Comparison, key: str, name: str) -> dict[str, Any]:
    """What the template shows of one comparison; `key` begins every id, `name` is its heading."""
    runs = _runs(comparison)
    configs = [flat(run.summary["config"]) for run in runs]
    methods = {variant.method for variant in comparison.variants}
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package, version in run.summary["versions"].items():
            versions.setdefault(package, []).append(str(version))
    figures = []
    for n, picture in enumerate(pictures(comparison), 1):
        figure_key = f"{key}-figure{n}"
        title = picture.title.removesuffix(f", {comparison.title}")  # the section's heading says it
        svg = inline_svg(picture.figure, f"{figure_key}-", title, f"{figure_key}-caption")
        figures.append({"key": figure_key, "title": title, "caption": picture.caption, "svg": svg})
    different, same = differences(comparison)
    return {
        "key": key,
        "name": name,
        "facts": {
            "Setting": comparison.setting,
            "Backbone": comparison.backbone,
            "Accuracies on": comparison.evaluated_on,
            "Runs": f"{_count(len(runs), 'run')} of {_count(len(methods), 'method')}",
            "Seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
            "Machines": "; ".join(dict.fromkeys(str(run.summary["machine"]) for run in runs)),
            "Versions": ", ".join(
                f"{package} {' and '.join(dict.fromkeys(each))}" for package, each in versions.items()
            ),
        },
        "points": _texts(POINTS, configs),
        "tables": [_table(table, f"{key}-table{n}") for n, table in enumerate(tables(comparison), 1)],
        "figures": figures,
        "differences": different,
        "same": same,
        "open": _texts(OPEN, configs),
        "runs": [
            _run(run, variant.label, variant.task_aware) for variant in comparison.variants for run in variant.runs
        ],
    }


def _table(table: Table, key: str) -> dict[str, Any]:
    columns = zip(*table.rows, strict=True)
    return {
        "key": key,
        "title": table.title,
        "note": table.note,
        "header": table.header,
        "rows": table.rows,
        "numeric": [n > 0 and all(NUMBER.match(cell.text) for cell in column) for n, column in enumerate(columns)]
        or [False] * len(table.header),
    }


def _run(run: Run, label: str, task_aware: Sequence[str]) -> dict[str, Any]:
    summary = run.summary
    seconds = {name: float(value) for name, value in summary["seconds"].items()}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    return {
        "label": label,
        "seed": run.seed,
        "averages": {
            mask: f"{summary['accuracy'][mask]['final_average']:.1f}{'*' if mask in task_aware else ''}"
            for mask in MASKS
        },
        "facts": {
            "Small model": _text(summary["cnn"]),
            "Seconds": f"{seconds['total']:.1f} ({parts})" if parts else f"{seconds['total']:.1f}",
            "Peak memory": f"{summary['peak_memory_mib']:.0f} MiB",
            "Machine": summary["machine"],
            "Summary": str(run.path),
        },
        "bytes": {"up": summary["bytes_up"], "down": summary["bytes_down"]},
        "skipped": summary["skipped"],
        "config": yaml.safe_dump(dict(summary["config"]), sort_keys=False, allow_unicode=True),
    }


def _runs(comparison: Comparison) -> list[Run]:
    return [run for variant in comparison.variants for run in variant.runs]


def _texts(points: Iterable[Point], configs: Sequence[Config]) -> dict[str, str]:
    """The text of each point that some configuration has."""
    found = {point.label: [text for c in configs if (text := point.here(c)) is not None] for point in points}
    return {label: _counted(values, "run") for label, values in found.items() if values}


def _counted(values: Sequence[str], unit: str) -> str:
    """The values, and where there are several how often each occurs, in rising order."""
    counts = Counter(values)
    if len(counts) == 1:
        return values[0]
    return "; ".join(f"{value} ({_count(counts[value], unit)})" for value in sorted(counts, key=_rising))


def _rising(text: str) -> tuple[bool, float, str]:
    try:
        return (False, float(text), text)
    except ValueError:
        return (True, 0.0, text)


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _text(value: Any) -> str:
    """A value of a configuration in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    return "none" if value is None else str(value)


def _field(name: str, none: str = "none", suffix: str = "") -> Callable[[Config], str | None]:
    """The text of the field `name`, `none` where it is null."""

    def text(config: Config) -> str | None:
        if name not in config:
            return None
        return none if config[name] is None else f"{_text(config[name])}{suffix}"

    return text


def _fed_lscl(text: Callable[[Config], str | None]) -> Callable[[Config], str | None]:
    """The same for Fed-LSCL and what it is taken apart into; None for other methods, whose fields mean other things."""
    return lambda config: text(config) if ".fed_lscl" in str(config.get("model.class_path")) else None


def _either(*names: str) -> Callable[[Config], str | None]:
    """The text of the first field that is there."""
    return lambda config: next((text for name in names if (text := _field(name)(config)) is not None), None)


def _data(config: Config) -> str:
    """The data set, as the paper writes it where it is one of the paper's."""
    name = str(config.get("data.source.name") or str(config["data.source.class_path"]).rpartition(".")[2])
    return {"cifar100": "CIFAR-100", "imagenetr": "ImageNet-R"}.get(re.sub(r"[^a-z0-9]", "", name.lower()), name)


def _model(group: str, known: str, text: str) -> Callable[[Config], str | None]:
    """A network: `text` if it is `known` (or a variant of its weights) unchanged, else its name and arguments."""

    def describe(config: Config) -> str | None:
        if (name := config.get(f"{group}.name")) is None:
            return None
        start = f"{group}.model_args."
        changed = {field.removeprefix(start): value for field, value in config.items() if field.startswith(start)}
        if not changed and isinstance(name, str) and name.partition(".")[0] == known:
            return text
        return f"{_text(name)} ({_text(changed)})" if changed else _text(name)

    return describe


def _wanted(point: Point, config: Config) -> tuple[str, ...]:
    """The paper's texts of a point, only that of the data set where the paper has two."""
    data = _data(config)
    if len(point.paper) == 2 and data in DATA and point.label != "data set":
        return (point.paper[DATA.index(data)],)
    return point.paper


DATA = ("CIFAR-100", "ImageNet-R")
SEEDS = "42, 1999, 2024"
TRAINING = "With less training, methods that average whole networks are the first to fall behind."
CHANCE = "The fewer classes compete, the higher are chance and all accuracies, and the less can be forgotten."
SHARED = "What clients have in common decides what an exchange between them can give."
RESIZED = "Small images gain little from being enlarged, and the cost grows with the square of the side."
POINTS = (
    Point("data set", _data, DATA, True, "Other images: no number can be set beside one of the paper's."),
    Point(
        "training images per class",
        _field("data.split.train_per_class", "all"),
        ("all",),
        False,
        "A part of the data keeps a run short; a client then sees few images of a class.",
    ),
    Point("test images", _field("data.split.local_test"), ("official",), False, "Held-out images serve for tuning."),
    Point(
        "test images per class",
        _field("data.split.test_per_class", "all"),
        ("all",),
        False,
        "A part of the data keeps a run short; accuracies are measured less exactly.",
    ),
    Point("clients", _field("data.split.clients"), ("5",), True, "More clients share out the public images further."),
    Point(
        "clients in a round",
        _field("federation.clients_per_round", "all"),
        ("all",),
        False,
        "A client that does not take part keeps its last answer, and the others do without it.",
    ),
    Point("tasks", _field("data.split.tasks"), ("5",), True, "Forgetting grows with the number of tasks."),
    Point("classes per task", _field("data.split.classes_per_task"), ("8",), True, CHANCE),
    Point("private classes per client", _field("data.split.private_classes"), ("15", "40"), True, SHARED),
    Point("public classes", _field("data.split.public_classes"), ("25", "0"), True, SHARED),
    Point("rounds per task", _field("federation.rounds"), ("5",), True, TRAINING),
    Point("epochs per round", _field("model.epochs"), ("5",), False, TRAINING),
    Point("batch size", _field("model.batch_size"), ("16",), False, "Other batches make other numbers of steps."),
    Point(
        "learning rate (Adam)",
        _field("model.learning_rate"),
        ("0.001",),
        True,
        "A step of Adam is about as long as its rate, whatever the gradient.",
    ),
    Point(
        "images kept of each class",
        _field("model.buffer_size"),
        ("20",),
        True,
        "Varied in the study of Fig. 5, or small where there are few images; replay hangs on it.",
    ),
    Point(
        "foundation model",
        _model("backbone", "vit_base_patch16_224", "ViT-B/16"),
        ("ViT-B/16",),
        False,
        "A small one runs on a CPU; how well its frozen features fit the data bounds all methods that use it.",
    ),
    Point("image size of the ViT", _field("backbone.image_size", "224 px", " px"), ("224 px",), True, RESIZED),
    Point(
        "small model",
        _model("cnn", "resnet18", "ResNet-18"),
        ("ResNet-18",),
        True,
        "Group normalisation where clients take too few steps for the running statistics of batch normalisation; "
        "fewer channels where images are small; several networks in the study of section 5.2.4.",
    ),
    Point("image size of the CNN", _field("cnn.image_size", "224 px", " px"), ("224 px",), True, RESIZED),
    Point(
        "adapted block of the ViT",
        _fed_lscl(_field("model.block")),
        ("3",),
        False,
        "Varied in the study of Fig. 3, which calls block 3 the stable one.",
    ),
    Point(
        "rank of its LoRA",
        _fed_lscl(_field("model.rank")),
        ("4",),
        False,
        "More numbers are generated and sent, or fewer.",
    ),
    Point(
        "precision",
        _field("trainer.precision"),
        ("32-true",),
        False,
        "Faster where the hardware has units for it; rounding is coarser.",
    ),
)
"""The settings that matter most, with the paper's protocol (section 5.1)."""

OPEN = (
    Point("the linear map that gets the LoRA pair", _fed_lscl(lambda _: "fused qkv")),
    Point("the scale of the features E", _fed_lscl(lambda _: "unit length")),
    Point("classes that compete in training", _field("model.train_mask")),
    Point("the model of the snapshot in Eq. 4", _field("model.snapshot")),
    Point("λ of Eq. 5, the pull to a client's own generator", _fed_lscl(_either("server.strength", "model.strength"))),
    Point("λ_E of Eq. 4, the pull of the features", _field("model.continual.lambda_e")),
    Point("λ_W of Eq. 4, the pull of the generated weights", _field("model.continual.lambda_w")),
    Point("current samples beside the buffer in replay", _field("model.continual.current")),
    Point(
        "concentration of the Dirichlet distribution that shares out public classes",
        _field("data.split.dirichlet_alpha"),
    ),
)
"""What the paper leaves open, and the field that settles it here."""
