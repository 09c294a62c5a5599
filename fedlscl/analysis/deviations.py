"""The paper's protocol (section 5.1), and in what runs differ from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlscl.analysis.comparison import Variant
from fedlscl.run.fields import flat

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


def differences(variants: Sequence[Variant]) -> tuple[list[Difference], list[str]]:
    """Compare the configurations of runs with the paper's protocol.

    Args:
        variants: methods in their configurations, at least one, all on the same data.

    Returns:
        The points in which some run differs, and the others as texts. A point that no run has is in neither.
    """
    configs = [flat(run.config) for variant in variants for run in variant.runs]
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
    seeds = [", ".join(str(run.seed) for run in variant.runs) for variant in variants]
    if set(seeds) == {PAPER_SEEDS}:
        same.append(f"{SEEDS} ({PAPER_SEEDS})")
    else:
        why = "Each number is a mean over the seeds of its row; with one seed nothing tells chance from effect."
        in_part = PAPER_SEEDS in seeds
        others.append(Difference(SEEDS, PAPER_SEEDS, True, _counted(seeds, "configuration"), in_part, why))
    return others, same


def texts(points: Iterable[Point], variants: Sequence[Variant]) -> dict[str, str]:
    """The text of each point that some run has, by its label; where runs differ, how often each text occurs."""
    configs = [flat(run.config) for variant in variants for run in variant.runs]
    found = {point.label: [text for c in configs if (text := point.here(c)) is not None] for point in points}
    return {label: _counted(values, "run") for label, values in found.items() if values}


def data_set(variant: Variant) -> str:
    """The data set, as the paper writes it where it is one of the paper's."""
    return _data(flat(variant.runs[0].config))


def plural(number: int, unit: str) -> str:
    """A number with its unit, as in `1 run` and `2 runs`."""
    return f"{number} {unit}{'' if number == 1 else 's'}"


def in_words(value: Any) -> str:
    """A value of a configuration in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {in_words(entry)}" for name, entry in value.items())
    return "none" if value is None else str(value)


def _counted(values: Sequence[str], unit: str) -> str:
    """The values, and where there are several how often each occurs, in rising order."""
    counts = Counter(values)
    if len(counts) == 1:
        return values[0]
    return "; ".join(f"{value} ({plural(counts[value], unit)})" for value in sorted(counts, key=_rising))


def _rising(text: str) -> tuple[bool, float, str]:
    try:
        return (False, float(text), text)
    except ValueError:
        return (True, 0.0, text)


def _field(name: str, none: str = "none", suffix: str = "") -> Callable[[Config], str | None]:
    """The text of the field `name`, `none` where it is null."""

    def text(config: Config) -> str | None:
        if name not in config:
            return None
        return none if config[name] is None else f"{in_words(config[name])}{suffix}"

    return text


def _fed_lscl(text: Callable[[Config], str | None]) -> Callable[[Config], str | None]:
    """The same for Fed-LSCL and what it is taken apart into; None for other methods, whose fields mean other things."""
    return lambda config: text(config) if _class(config, "model").startswith("FedLSCL") else None


def _class(config: Config, group: str) -> str:
    """The name of a class, which older configurations call by its module as well."""
    return str(config.get(f"{group}.class_path")).rpartition(".")[2]


def _either(*names: str) -> Callable[[Config], str | None]:
    """The text of the first field that is there."""
    return lambda config: next((text for name in names if (text := _field(name)(config)) is not None), None)


def _data(config: Config) -> str:
    """The data set, as the paper writes it where it is one of the paper's."""
    name = str(config.get("data.source.name") or _class(config, "data.source"))
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
        return f"{in_words(name)} ({in_words(changed)})" if changed else in_words(name)

    return describe


def _wanted(point: Point, config: Config) -> tuple[str, ...]:
    """The paper's texts of a point, only that of the data set where the paper has two."""
    data = _data(config)
    if len(point.paper) == 2 and data in DATA and point.label != "data set":
        return (point.paper[DATA.index(data)],)
    return point.paper


DATA = ("CIFAR-100", "ImageNet-R")
PAPER_SEEDS = "42, 1999, 2024"
SEEDS = "seeds"
"""The label of the one difference that is between rows and not between runs."""
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
    Point(
        "order of tasks",
        _field("data.split.task_order"),
        ("own",),
        True,
        "With one order for all clients they learn the same classes at the same time, as in most of the field.",
    ),
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
