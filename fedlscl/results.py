"""What finished runs left behind: their summaries, read, and grouped into what is repeated over seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlscl.evaluation import FloatArray, measured_mean

WITHOUT_EFFECT = (
    "seed_everything",
    "data.seed",
    "threads",
    "data.cache_dir",
    "data.source.root",
    "backbone.weights",
    "backbone.cache_mib",
    "setting",
    "method",
)
"""Fields in which the runs of one configuration may differ: the seed, where things lie, and what changes no number."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: the file of its summary.
        summary: what `summary.json` holds.
    """

    path: Path
    summary: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.summary["method"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.summary["seed"])

    @property
    def conditions(self) -> tuple[str, str, str]:
        """Setting, backbone and the images evaluated on: what runs that are compared must share."""
        return (str(self.summary["setting"]), str(self.summary["backbone"]), str(self.summary["evaluated_on"]))

    @property
    def fields(self) -> dict[str, Any]:
        """Every field of its configuration that has an effect, by dotted name."""
        return {name: value for name, value in flat(self.summary["config"]).items() if name not in WITHOUT_EFFECT}

    def accuracy(self, mask: str) -> FloatArray:
        """Accuracy (clients, after task, on task) in %, NaN where nothing was measured, under a mask."""
        return np.array(self.summary["accuracy"][mask]["matrix"], dtype=np.float64)

    def over_tasks(self, mask: str) -> FloatArray:
        """Mean over clients and learned tasks after each task (N,), in %."""
        return measured_mean(measured_mean(self.accuracy(mask), 2), 0)


@dataclass(frozen=True)
class Variant:
    """A method in one configuration, repeated over seeds.

    Args:
        method: name of the method.
        differs: the fields in which it differs from the method's usual configuration; empty for that itself.
        runs: one for each seed, in rising order.
    """

    method: str
    differs: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The method's name, and in what it differs from its usual configuration."""
        fields = ", ".join(f"{name.removeprefix('model.')} {value}" for name, value in self.differs.items())
        return f"{self.method} ({fields})" if fields else self.method

    @property
    def task_aware(self) -> tuple[str, ...]:
        """The masks under which the task of a test image had to be known to choose parameters."""
        return tuple(self.runs[0].summary.get("task_aware") or ())


@dataclass(frozen=True)
class Comparison:
    """Runs that may stand side by side: one setting, one backbone, one set of test images."""

    setting: str
    backbone: str
    evaluated_on: str
    variants: list[Variant] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the runs share, in a line."""
        return f"{self.setting} ({self.backbone}; {self.evaluated_on})"

    @property
    def usual(self) -> list[Variant]:
        """Every method in its usual configuration; all variants of a method that has none."""
        having = {variant.method for variant in self.variants if not variant.differs}
        return [variant for variant in self.variants if not variant.differs or variant.method not in having]

    def varying(self, name: str, method: str = "fed_lscl") -> dict[Any, Variant]:
        """The variants of a method that differ from its usual configuration in no field but one.

        Args:
            name: the field, such as `model.block`.
            method: the method.

        Returns:
            Variant by the field's value, in rising order; empty if there are less than two.
        """
        found = {
            variant.runs[0].fields.get(name): variant
            for variant in self.variants
            if variant.method == method and set(variant.differs) <= {name}
        }
        return dict(sorted(found.items())) if len(found) > 1 else {}


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read the summaries of finished runs.

    Args:
        paths: run folders, folders that hold such folders or summaries at any depth, or summaries (JSON).

    Returns:
        The runs, each once, in the order of their files.

    Raises:
        FileNotFoundError: if a path does not exist, or no finished run is in it.
        ValueError: if a file that was named is no summary of a run, or lacks its configuration.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if path.is_dir():
            found = {file: read for file in sorted(path.rglob("*.json")) if (read := _read(file)) is not None}
            if not found:
                raise FileNotFoundError(f"{path}: no finished run in it, which would have a summary.json")
        elif (read := _read(path)) is not None:
            found = {path: read}
        else:
            raise ValueError(f"{path} is not the summary.json of a finished run")
        runs |= {file.resolve(): run for file, run in found.items()}
    if old := [run.path for run in runs.values() if "config" not in run.summary]:
        raise ValueError(f"{old[0]} does not hold the configuration of its run; it was made by an older version")
    return list(runs.values())


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs into what may be compared, methods with their configurations, and seeds.

    A method's usual configuration has in each field the value that most of its configurations have. Where no run
    has all of these values, or two values are equally frequent, it has none, and every variant bears all fields in
    which the variants differ.

    Args:
        runs: finished runs.

    Returns:
        A comparison for each setting, backbone and set of test images.

    Raises:
        ValueError: if two runs have the same configuration and seed but other numbers.
    """
    comparisons: dict[tuple[str, str, str], Comparison] = {}
    for conditions in dict.fromkeys(run.conditions for run in runs):
        comparison = comparisons[conditions] = Comparison(*conditions)
        together = [run for run in runs if run.conditions == conditions]
        for method in dict.fromkeys(run.method for run in together):
            comparison.variants.extend(_variants(method, [run for run in together if run.method == method]))
    return list(comparisons.values())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level with dotted names, as fields are named on the command line."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix.rstrip(".") if key == "init_args" else f"{prefix}{key}"
        fields |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return fields


def _variants(method: str, runs: Sequence[Run]) -> list[Variant]:
    by_fields: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = by_fields.setdefault(_key(run.fields), {})
        if (other := seeds.get(run.seed)) and other.summary["accuracy"] != run.summary["accuracy"]:
            raise ValueError(
                f"{other.path} and {run.path} have the same configuration and seed {run.seed} but other numbers; "
                "name one of them"
            )
        seeds[run.seed] = run
    fields = [next(iter(seeds.values())).fields for seeds in by_fields.values()]
    names = list(dict.fromkeys(name for one in fields for name in one))
    differing = [name for name in names if len({_key(one.get(name)) for one in fields}) > 1]
    usual = {name: _most_frequent([_key(one.get(name)) for one in fields]) for name in differing}
    has_usual = any(all(_key(one.get(name)) == usual[name] for name in differing) for one in fields)
    variants = [
        Variant(
            method,
            {name: one.get(name) for name in differing if not has_usual or _key(one.get(name)) != usual[name]},
            tuple(run for _, run in sorted(seeds.items())),
        )
        for one, seeds in zip(fields, by_fields.values(), strict=True)
    ]
    return sorted(variants, key=_order)


def _order(variant: Variant) -> list[tuple[str, float, str]]:
    """The usual configuration first, then by what differs, numbers by their size."""
    return [(name, v if isinstance(v, int | float) else 0.0, str(v)) for name, v in variant.differs.items()]


def _most_frequent(values: Sequence[str]) -> str | None:
    (first, count), *others = Counter(values).most_common()
    return None if others and others[0][1] == count else first


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _read(path: Path) -> Run | None:
    """The run whose summary a file is; None for any other file."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        return None
    needed = {"method", "setting", "seed", "accuracy", "bytes_up", "bytes_down", "seconds"}
    return Run(path, content) if isinstance(content, dict) and needed <= set(content) else None
