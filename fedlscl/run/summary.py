"""What is left of a finished run: `summary.json`, as one class that is written, read and checked here alone."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from fedlscl.evaluation import MASKS, FloatArray, summarise
from fedlscl.files import Damaged, write_atomically
from fedlscl.run.folder import SUMMARY, RunFolder

log = logging.getLogger(__name__)


def contradictory(*fingerprints: str | None) -> bool:
    """Whether fingerprints are of other things: two of one kind differ. The kind is what stands before a colon."""
    known = {fingerprint for fingerprint in fingerprints if fingerprint is not None}
    return len({fingerprint.rpartition(":")[0] for fingerprint in known}) < len(known)


def checked(path: Path) -> bytes | None:
    """What is in a summary's file, None if it is missing; in its run's folder it is what the run wrote, or refused.

    Raises:
        OSError: if the file cannot be read.
        Damaged: if its checksum in the run's checkpoint is another.
    """
    folder, sums = RunFolder(path.parent), {}
    if path.name == SUMMARY:
        try:
            sums = folder.sums()
        except Damaged as error:
            log.warning("%s; '%s' cannot be checked", error, path)
        except ValueError:  # a checkpoint of an older version, which has no checksums
            pass
    return folder.read(path.name, sums)


class NotASummary(ValueError):
    """A file that was never meant to be a summary."""


ADDED_MASK = "federation"
"""A mask that older summaries lack."""


@dataclass(frozen=True)
class Accuracy:
    """The metrics of one mask, see :func:`fedlscl.evaluation.summarise`; accuracies in %, NaN if nothing was measured.

    Args:
        table1: accuracy on each task just after it was learned.
        final_average: accuracy after the last task over all tasks.
        average_incremental: mean over the tasks of the accuracy over all tasks learned by then.
        forgetting: percentage points; None with one task.
        backward_transfer: percentage points; None with one task.
        matrix: accuracy by client, after task, on task; None where nothing was measured.
    """

    table1: tuple[float, ...]
    final_average: float
    average_incremental: float
    forgetting: float | None
    backward_transfer: float | None
    matrix: tuple[tuple[tuple[float | None, ...], ...], ...]

    @classmethod
    def of(cls, acc: FloatArray) -> Accuracy:
        """The metrics of an accuracy array (clients, after task, on task).

        Raises:
            ValueError: if it is none with at least one finished task.
        """
        found = summarise(acc)
        matrix = tuple(tuple(map(tuple, rows)) for rows in found["matrix"])
        return cls(**{**found, "table1": tuple(found["table1"]), "matrix": matrix})

    def unknown(self) -> Accuracy:
        """The metrics of another mask, under which nothing was measured in the same run."""
        matrix = tuple(tuple((None,) * len(row) for row in rows) for rows in self.matrix)
        return Accuracy((math.nan,) * len(self.table1), math.nan, math.nan, None, None, matrix)

    @property
    def array(self) -> FloatArray:
        """`matrix` as an array (clients, after task, on task), NaN where nothing was measured."""
        return np.array(self.matrix, dtype=np.float64)

    @property
    def scalars(self) -> dict[str, float]:
        """The single numbers by name, with the newest entry of `table1`."""
        names = ("final_average", "average_incremental", "forgetting", "backward_transfer")
        numbers = {name: value for name in names if (value := getattr(self, name)) is not None}
        return numbers | {"table1": self.table1[-1]}


@dataclass(frozen=True)
class Traffic:
    """Bytes of serialised messages in one direction.

    Args:
        per_client_round: mean over the messages that were sent.
        total: sum over the run.
        by_client: sum for each client.
        by_round: for each round each client's, None where nothing was sent.
    """

    per_client_round: float
    total: int
    by_client: tuple[int, ...]
    by_round: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, by_round: Sequence[Sequence[int | None]]) -> Traffic:
        """What was sent, from the bytes of each round and client, None where nothing was."""
        sent = [count for row in by_round for count in row if count is not None]
        return cls(
            per_client_round=sum(sent) / len(sent) if sent else 0.0,
            total=sum(sent),
            by_client=tuple(sum(count or 0 for count in column) for column in zip(*by_round, strict=True)),
            by_round=tuple(map(tuple, by_round)),
        )


@dataclass(frozen=True)
class Compute:
    """What a client with one kind of CNN trains and computes.

    Args:
        trained_parameters: numbers that it trains.
        flops_frozen: floating-point operations for one test image that depend on nothing trained, done once.
        flops: all others that classify it.
    """

    trained_parameters: int
    flops_frozen: int
    flops: int


@dataclass(frozen=True)
class Promise:
    """The differential privacy of what clients have sent, over all tasks and rounds, see `fedlscl.privacy`.

    Args:
        epsilon: what was spent; more than was asked for where something was released again.
        delta: the probability with which it does not hold.
        unit: to whom it is promised: each image, or each client.
        noise: `system`, or `seed`: the server can then take it off, and nothing is promised.
        of: what has so much noise: a `sum`, or each `upload`.
        multiplier: of the noise, beside what a unit adds to one release.
        releases: in how many releases a unit is at most.
    """

    epsilon: float
    delta: float
    unit: str
    noise: str
    of: str
    multiplier: float
    releases: int

    @property
    def text(self) -> str:
        """All of it in a line."""
        void = " (noise from the run's seed, which the server knows: for measuring, it protects nobody)"
        return (
            f"differential privacy of each {self.unit}: epsilon {self.epsilon:.3g}, delta {self.delta:g} over "
            f"{self.releases} release{'s' * (self.releases > 1)} with noise on each {self.of}"
            f"{void if self.noise == 'seed' else ''}"
        )


@dataclass(frozen=True)
class Skipped:
    """A client that was left out of a round.

    Args:
        round: the running number of the round, from 1.
        client: the client.
        reason: what happened.
    """

    round: int
    client: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `summary.json` holds, in this order. Fields with a default are those that older summaries lack.

    Args:
        method: name of the method.
        setting: name of the setting.
        seed: the seed.
        backbone: name, weights and image size of the ViT.
        cnn: name of the CNN, or one for each client.
        task_aware: the masks under which the task of a test image had to be known to choose parameters.
        evaluated_on: the images that accuracies are of.
        split_sha256: fingerprint of the split.
        data_sha256: fingerprint of the images; None where only a part of them was there. It begins with "all:" if every
            pixel counts; earlier versions looked at 64 images.
        weights_sha256: fingerprint of the ViT's weights; None where they are of no file.
        cnn_weights_sha256: likewise of those that the CNN begins with.
        accuracy: the metrics under each of `MASKS`, but for `ADDED_MASK` in older summaries; see `under`.
        bytes_up: what clients sent.
        bytes_down: what they were sent.
        bytes_setup_per_client: what a client needs beforehand besides its own data.
        compute: what a client trains and computes, by the name of its CNN; empty if nobody counted.
        tested_pairs: on how many pairs of a client and a class the accuracies are, None where nobody counted.
        untrained_pairs: in how many of these the client has no training image of the class.
        images_kept: how many training images of each class, at most, a client keeps after their task; None where the
            question has no meaning or nobody said.
        privacy: what is promised to the images or clients; None for nothing.
        skipped: the clients that were left out of a round.
        unanswered: the clients that kept their model in a round, since no answer could be used, likewise.
        nodes: by client the fingerprint of the key that its node had; empty where clients had none of their own.
        seconds: wall time, `total` and by phase.
        peak_memory_mib: the most memory that the process had.
        threads: torch's threads.
        machine: what it ran on.
        versions: version by package.
        config: the whole configuration as plain values; empty in the oldest summaries.
        overrides: what the command line gave beyond its configuration files, by dotted name.
    """

    method: str
    setting: str
    seed: int
    backbone: str
    cnn: str | tuple[str, ...]
    task_aware: tuple[str, ...] = ()
    evaluated_on: str
    split_sha256: str
    data_sha256: str | None = None
    weights_sha256: str | None = None
    cnn_weights_sha256: str | None = None
    accuracy: Mapping[str, Accuracy]
    bytes_up: Traffic
    bytes_down: Traffic
    bytes_setup_per_client: int
    compute: Mapping[str, Compute] = field(default_factory=dict)
    tested_pairs: int | None = None
    untrained_pairs: int | None = None
    images_kept: int | None = None
    privacy: Promise | None = None
    skipped: tuple[Skipped, ...]
    unanswered: tuple[Skipped, ...] = ()
    nodes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float]
    peak_memory_mib: float
    threads: int
    machine: str
    versions: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read a summary; in the folder of its run it is checked against the checksum in the checkpoint.

        Raises:
            OSError: if the file cannot be read.
            Damaged: if it is not what the run wrote.
            NotASummary: if it is JSON, but nothing like a summary.
            ValueError: if it is no JSON, lacks a field, or a field has a value of another type; naming both.
        """
        if (found := cls.read_if_there(path)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return found

    @classmethod
    def read_if_there(cls, path: Path) -> Summary | None:
        """As `read`, and None if there is no such file."""
        content = checked(path)
        return None if content is None else cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "summary") -> Summary:
        """Read what `to_json` wrote. Fields that only a later version knows are passed over.

        Args:
            text: the JSON.
            source: what errors call it.

        Raises:
            NotASummary: if it is JSON, but nothing like a summary.
            ValueError: if it is no JSON, lacks a field, or a field has a value of another type; naming both.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        if not isinstance(content, dict) or not {"method", "accuracy"} <= set(content):
            raise NotASummary(f"{source} is not the summary.json of a finished run")
        if content.get("task_aware") is False:  # before it named masks
            content["task_aware"] = []
        accuracy = content["accuracy"]
        needed = [mask for mask in MASKS if mask != ADDED_MASK]
        if isinstance(accuracy, dict) and (missing := [mask for mask in needed if mask not in accuracy]):
            raise ValueError(f"{source} lacks accuracy under mask {', '.join(missing)}; it was made by another version")
        summary: Summary = _made(cls, content, "", source)
        if "total" not in summary.seconds:
            raise ValueError(_lacks(source, ["seconds.total"]))
        return summary

    def under(self, mask: str) -> Accuracy:
        """The metrics of a mask, NaN where the run was made before there was such a mask."""
        return self.accuracy.get(mask) or self.accuracy["none"].unknown()

    def to_json(self) -> str:
        """The text of `summary.json`."""
        return json.dumps(asdict(self), indent=1)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_atomically(path, self.to_json().encode())


READ: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    NoneType: (NoneType, "null"),
    tuple: (list, "a list"),
    Mapping: (dict, "an object"),
    Any: (object, "anything"),
}
"""By the type of a field: what JSON is read as, and its name in words. Dataclasses are objects too."""


def _parsed(kind: Any, value: Any, name: str, source: str) -> Any:
    """A value of JSON as the type that a field declares.

    Args:
        kind: the type: a type in `READ`, a dataclass, or a union of these.
        value: the value.
        name: the field's dotted name.
        source: what errors call the file.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    fitting = [option for option in options if _fits(value, option)]
    if not fitting:
        right = " or ".join(_reading(option)[1] for option in options)
        raise ValueError(f"{source}: {name} is {reprlib.repr(value)}, must be {right}")
    origin, inner = get_origin(fitting[0]) or fitting[0], get_args(fitting[0])
    if origin not in READ:
        return _made(origin, value, f"{name}.", source)
    if origin is tuple:
        return tuple(_parsed(inner[0], entry, f"{name}[{n}]", source) for n, entry in enumerate(value))
    if origin is Mapping:
        return {key: _parsed(inner[1], entry, f"{name}.{key}", source) for key, entry in value.items()}
    return float(value) if origin is float else value


def _made(kind: Any, content: Mapping[str, Any], prefix: str, source: str) -> Any:
    """A dataclass of what an object of JSON holds; `prefix` stands before its fields' names in errors."""
    types, needed = _declared(kind)
    if missing := sorted(needed - set(content)):
        raise ValueError(_lacks(source, [f"{prefix}{name}" for name in missing]))
    there = {name: each for name, each in types.items() if name in content}
    return kind(**{name: _parsed(each, content[name], f"{prefix}{name}", source) for name, each in there.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether JSON's value may stand in a field of type `kind`; true and false are no numbers."""
    return isinstance(value, _reading(kind)[0]) and (kind is Any or not isinstance(value, bool))


def _reading(kind: Any) -> tuple[Any, str]:
    return READ.get(get_origin(kind) or kind, READ[Mapping])


@cache
def _declared(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields, and the fields that have no default."""
    needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return get_type_hints(kind), frozenset(needed)


def _lacks(source: str, names: Sequence[str]) -> str:
    return f"{source} lacks {', '.join(names)}; it was cut short, or made by another version"
