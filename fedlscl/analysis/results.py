"""What finished runs left behind: their summaries, read, as objects and as one table."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlscl.analysis.formats import in_one_line
from fedlscl.checks import path as path_of
from fedlscl.evaluation import MASKS, FloatArray, measured_mean, summarise
from fedlscl.run.fields import flat
from fedlscl.run.growth import Growth, read_growth
from fedlscl.run.summary import NotASummary, Summary, checked

log = logging.getLogger(__name__)

WITHOUT_EFFECT = (
    "seed_everything",
    "threads",
    "data.cache_dir",
    "data.device_mib",
    "data.source.expected_classes",
    "backbone.weights",
    "backbone.cache_mib",
    "setting",
    "method",
)
"""Fields in which the runs of one configuration may differ: the seed, where things lie, and what changes no number."""

ADDED: dict[str, Any] = {
    **{"data.source.background": "white", "data.split.task_order": "own"},
    **{"model.standardise": "none", "model.linear": False, "model.own_loss": 0.0, "model.start": 0.0},
    **{"model.cnn_rate": 1.0, "model.generator_rate": 1.0, "model.head_rate": 1.0, "model.head_hidden": 0},
}
"""Fields that a later version has added and that cannot be null, with what makes no other run."""

POOLED = ("joint", "joint_ridge", "joint_vit")
"""Methods that see all clients' and tasks' images at once: references, for which bytes and a buffer mean nothing."""

SHOWN = 20
"""Runs that are listed where many are printed."""


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Args:
        path: the file of its summary.
        summary: what that file holds; the attributes here are what is asked for most.
    """

    path: Path
    summary: Summary

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.summary.method

    @property
    def pooled(self) -> bool:
        """Whether its method sees the images of all clients and tasks at once."""
        return self.method in POOLED

    @property
    def setting(self) -> str:
        """Name of the setting."""
        return self.summary.setting

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.summary.seed

    @property
    def config(self) -> Mapping[str, Any]:
        """Its whole configuration, nested as in YAML."""
        return self.summary.config

    @cached_property
    def accuracy(self) -> dict[str, FloatArray]:
        """By mask the accuracy (clients, after task, on task) in %, NaN where nothing was measured."""
        return {mask: self.summary.under(mask).array for mask in MASKS}

    @property
    def final_average(self) -> dict[str, float]:
        """By mask the accuracy after the last task over all tasks, in %."""
        return {mask: self.summary.under(mask).final_average for mask in MASKS}

    @property
    def forgetting(self) -> dict[str, float | None]:
        """By mask the forgetting in percentage points, None with one task."""
        return {mask: self.summary.under(mask).forgetting for mask in MASKS}

    @property
    def bytes(self) -> int:
        """Bytes of all messages in both directions."""
        return self.summary.bytes_up.total + self.summary.bytes_down.total

    @property
    def bytes_per_client_round(self) -> float:
        """Bytes that a client sends and receives in a round, on average."""
        return self.summary.bytes_up.per_client_round + self.summary.bytes_down.per_client_round

    @property
    def seconds(self) -> float:
        """Wall time of the whole run."""
        return self.summary.seconds["total"]

    @property
    def images_kept(self) -> int | None:
        """How many training images of each class, at most, a client keeps after their task.

        What the run recorded; of an older one what follows from its configuration, None where nothing does.
        """
        recorded = self.summary.images_kept
        return _images_kept(self.fields) if recorded is None else recorded

    @property
    def conditions(self) -> tuple[str, str, str]:
        """Setting, backbone and the images evaluated on: what runs that are compared must share."""
        return (self.setting, self.summary.backbone, self.summary.evaluated_on)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Every field of its configuration that has an effect, by dotted name.

        Of the paths of data and of a CNN's weights it is the last part, and so it is of a class of this package, which
        older versions called by its module as well. A field that is null is left out: one that a later version has
        added, and that is off, makes no other run.
        """
        flattened = flat(self.config)
        fields = {
            name: value
            for name, value in flattened.items()
            if name not in WITHOUT_EFFECT and value not in (None, ADDED.get(name))
        }
        for name, value in fields.items():
            if name == "data.source.root" or name.startswith("cnn.weights"):
                fields[name] = Path(str(value)).name
            if name.endswith("class_path") and str(value).startswith("fedlscl."):
                fields[name] = value.rpartition(".")[2]
        return fields

    @cached_property
    def growth(self) -> Growth | None:
        """Its accuracy after each round of a task; None where its folder does not tell."""
        return read_growth(self.path, self.fields)

    def over_tasks(self, mask: str) -> FloatArray:
        """Mean over clients and learned tasks after each task (N,), in %, under a mask."""
        return measured_mean(measured_mean(self.accuracy[mask], 2), 0)

    def __repr__(self) -> str:
        known = {mask: average for mask, average in self.final_average.items() if not math.isnan(average)}
        averages = ", ".join(f"{mask} {average:.1f}" for mask, average in known.items())
        return f"<{self.method} on {self.setting}, seed {self.seed}: final average in %: {averages}; {self.path}>"


class Runs(tuple[Run, ...]):
    """Finished runs, in the order of their files."""

    def to_pandas(self) -> Any:
        """One table of all runs.

        Returns:
            A `pandas.DataFrame` with a row for each run: what it is, its metrics under each mask (such as
            `final_average_seen`, in % or points), what it cost, and every field of its configuration by the name that
            it has on the command line, such as `model.block`; missing where a run has no such field.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame([_row(run) for run in self])

    def __repr__(self) -> str:
        lines = [f"{len(self)} finished run{'' if len(self) == 1 else 's'}", *map(repr, self[:SHOWN])]
        return "\n".join([*lines, *([f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else [])])


def read_runs(paths: str | Path | Iterable[str | Path]) -> Runs:
    """Read the summaries of finished runs.

    Args:
        paths: one or several of: run folders, folders that hold such folders or summaries at any depth, or summaries
            (JSON).

    Returns:
        The runs, each once, in the order of their files. What is no run is passed over in folders; with a warning in
        the log where it may have been meant to be one: JSON that does not parse, a summary that lacks something or is
        damaged. A file that was named and is bad is left out with a warning too where there are other runs.

    Raises:
        FileNotFoundError: if a path does not exist, or no finished run is in it.
        OSError: if the only file cannot be read.
        ValueError: if the only file is no summary of a run, or something in it is missing or wrong.
    """
    runs: dict[Path, Run] = {}
    bad: list[Exception] = []
    for path in map(path_of, [paths] if isinstance(paths, str | Path) else paths):
        if not path.is_dir():
            try:
                runs[path.resolve()] = _read(path)
            except FileNotFoundError:
                raise
            except (ValueError, OSError) as error:
                bad.append(error)
            continue
        found = {}
        for file in sorted(file for file in path.rglob("*.json") if file.is_file()):
            try:
                found[file.resolve()] = _read(file)
            except NotASummary:
                continue
            except (ValueError, OSError) as error:
                log.warning("%s; it is left out", error)
        if not found:
            raise FileNotFoundError(f"{path}: no finished run in it, which would have a summary.json")
        runs |= found
    if bad and not runs:
        raise bad[0]
    for each in bad:
        log.warning("%s; it is left out", each)
    return Runs(runs.values())


def _read(path: Path) -> Run:
    """The run whose summary a file is.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no complete summary; naming the file and what is wrong.
    """
    try:
        if (content := checked(path)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        summary = Summary.from_json(json.dumps(_printable(json.loads(content))), str(path))
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{path} holds what no run writes ({error})") from error
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not JSON; it was cut short or changed") from None
    if not summary.config:  # without it nobody can tell what it may be compared with
        raise ValueError(f"{path} lacks config; it was cut short, or made by another version")
    try:
        _check(summary)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds numbers that no run has ({error}); it was changed") from error
    return Run(path, summary)


def _printable(value: Any) -> Any:
    """The same plain values, every text in one line of signs that can be printed."""
    if isinstance(value, Mapping):
        return {in_one_line(key): _printable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return in_one_line(value) if isinstance(value, str) else value


def _check(summary: Summary) -> None:
    """Raise ValueError if the numbers of a summary do not fit one another."""
    shapes = set()
    for mask in summary.accuracy.keys() & set(MASKS):
        accuracy = summary.accuracy[mask]
        found = summarise(accuracy.array)
        shapes.add(accuracy.array.shape)
        one = found["forgetting"] is None
        if len(found["table1"]) != len(accuracy.table1) or one != (accuracy.forgetting is None):
            raise ValueError(f"accuracy.{mask} is of another number of tasks than its matrix")
        single = [accuracy.final_average, accuracy.average_incremental]
        if any(math.isinf(value) or value < 0 or value > 100 for value in [*single, *accuracy.table1]):
            raise ValueError(f"accuracy.{mask} is not in %")
    if len(shapes) > 1:
        raise ValueError(f"the masks have accuracies of different shapes, {sorted(shapes)}")
    for name, value in {**summary.seconds, "peak_memory_mib": summary.peak_memory_mib}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
    for name, sent in (("bytes_up", summary.bytes_up), ("bytes_down", summary.bytes_down)):
        if not (0 <= sent.total < 2**80 and 0 <= sent.per_client_round < 2**80):
            raise ValueError(f"{name} is {sent.total}")
    for counts in summary.compute.values():
        if not all(0 <= value < 2**80 for value in (counts.trained_parameters, counts.flops_frozen, counts.flops)):
            raise ValueError(f"compute is {counts}")
    if summary.images_kept is not None and not 0 <= summary.images_kept < 2**63:
        raise ValueError(f"images_kept is {summary.images_kept}")
    if not -(2**63) <= summary.seed < 2**63:
        raise ValueError(f"seed is {summary.seed}")


def _images_kept(fields: Mapping[str, Any]) -> int | None:
    """What `Client.images_kept` would have said, by the fields of a run of a version without it."""
    client, strategy, server = (
        str(fields.get(f"{part}.class_path", "")) for part in ("model", "model.continual", "server")
    )
    kept: Any = None
    if client == "GLFCClient":
        names = ("model.memory_size", "data.split.tasks", "data.split.classes_per_task")
        numbers = [number for name in names if isinstance(number := fields.get(name), int)]
        kept = numbers[0] // max(1, numbers[1] * numbers[2]) if len(numbers) == len(names) else None
    elif strategy == "Replay" or (client.startswith("FedLSCL") and server != "Isolated"):
        kept = fields.get("model.buffer_size")
    elif client.endswith(("StatisticsClient", "DiscriminantsClient")) or strategy in (
        "NoReplay",
        "EWC",
        "LwF",
        "GeneratedLwF",
    ):
        kept = None if client.startswith("Joint") else 0
    return kept if isinstance(kept, int) else None


def _row(run: Run) -> dict[str, Any]:
    """The run as one row of a table."""
    summary = run.summary
    metrics = ("final_average", "average_incremental", "forgetting", "backward_transfer")
    row = {
        "setting": run.setting,
        "method": run.method,
        "seed": run.seed,
        "backbone": summary.backbone,
        "evaluated_on": summary.evaluated_on,
        **{f"{name}_{mask}": getattr(summary.under(mask), name) for name in metrics for mask in MASKS},
        "images_kept": run.images_kept,
        **({"epsilon": promise.epsilon, "delta": promise.delta} if (promise := summary.privacy) else {}),
        "bytes_up": summary.bytes_up.total,
        "bytes_down": summary.bytes_down.total,
        "bytes_per_client_round": run.bytes_per_client_round,
        "skipped": len(summary.skipped),
        "seconds": run.seconds,
        "peak_memory_mib": summary.peak_memory_mib,
        "machine": summary.machine,
        "path": str(run.path),
    }
    return row | {name: value for name, value in flat(run.config).items() if name not in row}
