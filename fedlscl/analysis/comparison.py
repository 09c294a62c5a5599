"""Finished runs side by side: grouped into what may be compared, what was varied, and what is repeated over seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlscl.analysis.results import Run
from fedlscl.run.summary import contradictory

FINGERPRINTS = (("data_sha256", "images"), ("weights_sha256", "weights"), ("cnn_weights_sha256", "weights of the CNN"))
"""Of what runs that are repeated must have the same, with what it is called."""

PROTOCOL = ("data.", "backbone.", "cnn.", "federation.", "trainer.", "model.epochs", "model.batch_size")
"""Fields, by their beginning, that are not a method's own: what is usual there, is so for all methods together."""

EPSILON = "model.privacy.epsilon"
PROTECTIONS = ("federation.secure", "federation.threshold", "federation.fraction_bits", "model.privacy.")
"""Fields, by their beginning, of what protects clients: off is usual, however many runs have it on."""


@dataclass(frozen=True)
class Variant:
    """A method in one configuration, repeated over seeds.

    Args:
        method: name of the method.
        differs: the fields in which it differs from what is usual, see :func:`compare`; empty for that itself.
        runs: one for each seed, in rising order.
    """

    method: str
    differs: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The method's name, and in what it differs from its usual configuration."""
        return f"{self.method} ({named(self.differs)})" if self.differs else self.method

    @property
    def pooled(self) -> bool:
        """Whether the method sees the images of all clients and tasks at once."""
        return self.runs[0].pooled

    @property
    def task_aware(self) -> tuple[str, ...]:
        """The masks under which the task of a test image had to be known to choose parameters."""
        return self.runs[0].summary.task_aware


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

    @property
    def usual_values(self) -> dict[str, dict[str, Any]]:
        """What labels leave out: by method, the usual value of each field that a method of the same class varies.

        Those that are not a method's own, see `PROTOCOL`, are under the empty name.
        """
        having = [variant for variant in self.variants if not variant.differs]
        found: dict[str, dict[str, Any]] = {"": {}}
        for variant in self.variants:
            for name in variant.differs:
                shared = name.startswith(PROTOCOL)
                for usual in having:
                    fields = usual.runs[0].fields
                    if name in fields and (shared or _class(fields) == _class(variant.runs[0].fields)):
                        found.setdefault("" if shared else usual.method, {})[name] = fields[name]
        return {method: dict(sorted(values.items())) for method, values in found.items()}

    def of(self, method: str) -> list[Variant]:
        """The variants of a method."""
        return [variant for variant in self.variants if variant.method == method]

    def varying(self, name: str, method: str = "fed_lscl") -> dict[Any, Variant]:
        """The variants of a method that differ from each other in no field but one.

        Args:
            name: the field, such as `model.block`.
            method: the method.

        Returns:
            Variant by the field's value, in rising order; empty if there are less than two. Of several such series the
            longest, and of those of the same length that in which less is unusual.
        """
        series: dict[str, dict[Any, Variant]] = {}
        for variant in self.variants:
            if variant.method == method and name in variant.runs[0].fields:
                others = {field: value for field, value in variant.runs[0].fields.items() if field != name}
                series.setdefault(_key(others), {})[variant.runs[0].fields[name]] = variant
        longest = max(series.values(), key=lambda found: (len(found), -_unusual(found, name)), default={})
        return dict(sorted(longest.items(), key=lambda item: _by_size(item[0]))) if len(longest) > 1 else {}


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs into what may be compared, methods with their configurations, and seeds.

    Usual is, in each field that a method varies, the value that most of its configurations have, each counted once
    however many seeds it was repeated with. Where two values are equally frequent it is the one that all other methods
    of the same class have, if there are two or more of them (a method and its ablations), or else the one that all
    other methods with this field have, be it among others (a common learning rate beside tuned ones), or else the one
    with the most seeds, or else none, and every variant bears its own. Fields in `PROTOCOL` are usual for all methods
    together: the value that most methods have. Without `PROTECTIONS` is usual, and of differential privacy a label has
    epsilon, unless it is the same in all runs, and what is not the same in all of a method's runs that have it.

    Args:
        runs: finished runs.

    Returns:
        A comparison for each setting, backbone and set of test images.

    Raises:
        ValueError: if two runs have the same configuration and are of other images, or have the same seed and other
            numbers.
    """
    comparisons = []
    for conditions in dict.fromkeys(run.conditions for run in runs):
        methods: dict[str, list[tuple[Run, ...]]] = {}
        for group in _repeated([run for run in runs if run.conditions == conditions]):
            methods.setdefault(group[0].method, []).append(group)
        shared = _usual_for_all(list(methods.values()))
        private = EPSILON in varied_fields([group[0].fields for groups in methods.values() for group in groups])
        comparison = Comparison(*conditions)
        for method, groups in methods.items():
            others = [other for name, other in methods.items() if name != method]
            relatives = [other for other in others if _class(other[0][0].fields) == _class(groups[0][0].fields)]
            having = {name for group in groups for name in group[0].fields}
            usual = {name: value for name, value in shared.items() if name in having}
            own = [
                name
                for name in varied_fields([group[0].fields for group in groups])
                if not name.startswith(PROTOCOL) and not _comes_with_epsilon(name, groups)
            ]
            usual |= {name: _usual_value(name, groups, (relatives, others)) for name in own}
            usual |= {EPSILON: _key(None)} if private and EPSILON in having else {}
            usual |= {name: _key(None) for name in usual if name.startswith(PROTECTIONS)}
            variants = [Variant(method, _differs(group[0].fields, usual), group) for group in groups]
            comparison.variants.extend(sorted(variants, key=_order))
        comparisons.append(comparison)
    return comparisons


def named(fields: Mapping[str, Any]) -> str:
    """Fields with their values in a line, as in `block 11, buffer_size 5`, `without privacy.epsilon`."""
    # other CNNs have other arguments, which go without saying
    shown = [name for name in fields if not ("cnn.name" in fields and name.startswith("cnn.model_args"))]
    texts = [(name.removeprefix("model."), fields[name]) for name in shown]
    return ", ".join(f"without {name}" if value is None else f"{name} {value}" for name, value in texts)


def _repeated(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """Runs of one method and configuration together, by seed."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((run.method, _key(run.fields)), {})
        for before in seeds.values():
            for fingerprint, what in FINGERPRINTS:
                if contradictory(*(getattr(of.summary, fingerprint) for of in (run, before))):
                    raise ValueError(
                        f"{before.path} and {run.path} have the same configuration but are of other {what} of the same "
                        "name; name one of them, or run one with another --setting"
                    )
        if (other := seeds.get(run.seed)) and other.summary.accuracy != run.summary.accuracy:
            raise ValueError(
                f"{other.path} and {run.path} have the same configuration and seed {run.seed} but other numbers; "
                "name one of them"
            )
        seeds[run.seed] = run
    return [tuple(run for _, run in sorted(seeds.items())) for seeds in groups.values()]


def varied_fields(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields in which configurations differ."""
    names = dict.fromkeys(name for fields in configurations for name in fields)
    return [name for name in names if len({_key(fields.get(name)) for fields in configurations}) > 1]


def _unusual(series: Mapping[Any, Variant], name: str) -> int:
    """In how many fields but one a series differs from what is usual."""
    return len(set(next(iter(series.values())).differs) - {name})


def _differs(fields: Mapping[str, Any], usual: Mapping[str, str | None]) -> dict[str, Any]:
    return {name: fields.get(name) for name, value in usual.items() if _key(fields.get(name)) != value}


def _order(variant: Variant) -> list[tuple[str, tuple[float, str]]]:
    """The usual configuration first, then by what differs."""
    return [(name, _by_size(value)) for name, value in variant.differs.items()]


def _by_size(value: Any) -> tuple[float, str]:
    """Numbers by their size, anything else by its text."""
    return (float(max(-1e300, min(value, 1e300))) if isinstance(value, int | float) else 0.0, str(value))


def _usual_for_all(methods: Sequence[Sequence[tuple[Run, ...]]]) -> dict[str, str | None]:
    """The usual value, as its key, of each field of the protocol that varies; a method that was swept has one vote."""
    every = [group[0].fields for groups in methods for group in groups]
    found = {}
    for name in varied_fields(every):
        if name.startswith(PROTOCOL):
            # a field that a method never has is none in which it could differ, nor does it have a vote
            having = [groups for groups in methods if any(name in group[0].fields for group in groups)]
            votes = [_most_frequent(_values(name, groups)) for groups in having]
            found[name] = _most_frequent([vote for vote in votes if vote is not None])
    return found


def _usual_value(
    name: str, groups: Sequence[tuple[Run, ...]], circles: Sequence[Sequence[Sequence[tuple[Run, ...]]]]
) -> str | None:
    """The usual value of a method's own field, see :func:`compare`; `circles` are other methods, the nearest first."""
    values = _values(name, groups)
    if (most := _most_frequent(values)) is not None:
        return most
    for circle in circles:
        having = [_values(name, other) for other in circle if name in other[0][0].fields]
        agreed = {_most_frequent(each) for each in having}
        shared = set(values).intersection(*having)
        for common in (agreed & set(values), shared):
            if len(having) > 1 and len(common) == 1 and (common is shared or len(agreed) == 1):
                return common.pop()
    return _most_frequent([value for value, group in zip(values, groups, strict=True) for _ in group])


def _comes_with_epsilon(name: str, groups: Sequence[tuple[Run, ...]]) -> bool:
    """Whether a field of differential privacy is the same wherever a method has it."""
    having = {_key(group[0].fields[name]) for group in groups if name in group[0].fields}
    return name.startswith(EPSILON.removesuffix("epsilon")) and name != EPSILON and len(having) == 1


def _values(name: str, groups: Sequence[tuple[Run, ...]]) -> list[str]:
    return [_key(group[0].fields.get(name)) for group in groups]


def _most_frequent(values: Sequence[str]) -> str | None:
    """The most frequent value; None where two are, or there is none."""
    counts = Counter(values).most_common(2)
    return counts[0][0] if counts and (len(counts) == 1 or counts[0][1] > counts[1][1]) else None


def _class(fields: Mapping[str, Any]) -> Any:
    return fields.get("model.class_path")


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
