"""How accuracy grew from round to round in a finished run, read from its folder.

Shapes: C clients, N tasks, R rounds of a task.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlscl.batches import split_evenly
from fedlscl.data.splits import Split
from fedlscl.evaluation import MASKS, FloatArray, measured_mean
from fedlscl.files import content_of
from fedlscl.run.folder import METRICS, SPLIT, SUMMARY

log = logging.getLogger(__name__)

_EVALUATION = re.compile(r"eval/(\w+)/client/(\d+)/task/(\d+)")


@dataclass(frozen=True)
class Growth:
    """The accuracy in % after each round of a task, by mask; the mean over clients and then over the N tasks.

    Args:
        new: (R,) on the task that is being learned.
        learned: (R,) on all tasks learned so far, that one included.
        chance: what guessing among the mask's classes would give in the place of `new`, and of `learned`.
        steps: optimizer steps that a client takes in a round on the images of the task, mean over clients and tasks:
            its epochs in batches. Those on images of earlier tasks are not counted; 0 for a client without epochs.
    """

    new: Mapping[str, FloatArray]
    learned: Mapping[str, FloatArray]
    chance: Mapping[str, tuple[float, float]]
    steps: float


def read_growth(summary: Path, fields: Mapping[str, Any]) -> Growth | None:
    """How a finished run's accuracy grew.

    Args:
        summary: the file of its summary, in its folder.
        fields: its configuration by dotted names, as :func:`fedlscl.run.fields.flat` gives it.

    Returns:
        None where the folder does not tell: the summary alone was kept, or nothing of single clients was recorded. With
        a warning in the log where it should: a file beside the summary is damaged, or of another run.
    """
    if summary.name != SUMMARY:  # one of many in a folder
        return None
    try:
        metrics, stored = content_of(summary.parent / METRICS), content_of(summary.parent / SPLIT)
        if not metrics or not stored or b"/client/" not in metrics:
            return None
        parsed = json.loads(stored)
        split, classes = Split.from_json(json.dumps(parsed["split"])), len(parsed["classes"])
        accuracy = _accuracy(metrics.decode(), split, int(fields["federation.rounds"]))
        epochs, size = (int(fields.get(f"model.{name}", least)) for name, least in (("epochs", 0), ("batch_size", 1)))
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        log.warning("%s: how accuracy grew in this run is left out, for %s", summary.parent, error)
        return None
    newest = np.arange(split.spec.tasks)
    batches = [len(split_evenly(torch.arange(len(task.train)), size)) for c in split.present for task in c.tasks]
    taking_part = int(fields.get("federation.clients_per_round", split.spec.clients)) / split.spec.clients
    return Growth(
        new={mask: _over_tasks(values[newest, :, :, newest]) for mask, values in accuracy.items()},
        learned={mask: _over_tasks(measured_mean(values, 3)) for mask, values in accuracy.items()},
        chance=_chance(split, classes),
        steps=taking_part * epochs * float(np.mean(batches)),
    )


def _over_tasks(values: FloatArray) -> FloatArray:
    """(N, R, C) to (R,): the mean over clients, and then over tasks."""
    return measured_mean(measured_mean(values, 2), 0)


def _accuracy(metrics: str, split: Split, rounds: int) -> dict[str, FloatArray]:
    """By mask the accuracy (N, R, C, N) in % after each round of each task; NaN where nothing was measured.

    Raises:
        ValueError: if there is none of a round, or the numbers are no accuracies of this split.
        IndexError: likewise.
    """
    tasks = split.spec.tasks
    found = {mask: np.full((tasks, rounds, len(split.clients), tasks), np.nan) for mask in MASKS}
    for mask, task, number, client, on, value in _evaluations(metrics):
        if not (1 <= on <= task and (number - 1) // rounds + 1 == task and 0 <= value <= 100):
            raise ValueError(f"{METRICS} has {value} in round {number} of task {task} on task {on}")
        if mask in found:
            found[mask][task - 1, (number - 1) % rounds, client, on - 1] = value
    there = {mask: values for mask, values in found.items() if not np.isnan(values).all()}
    for values in there.values():
        if missing := np.argwhere(np.isnan(values).all(axis=(2, 3))).tolist():
            task, number = missing[0]
            raise ValueError(f"{METRICS} lacks round {number + 1} of task {task + 1}")
    return there


def _evaluations(metrics: str) -> Iterator[tuple[str, int, int, int, int, float]]:
    """Mask, task, round, client, on task, and accuracy in % of every evaluation, in the order of the file."""
    for row in csv.reader(io.StringIO(metrics)):
        if len(row) == 4 and (named := _EVALUATION.fullmatch(row[2])):
            yield named[1], int(row[0]), int(row[1]), int(named[2]), int(named[3]), float(row[3])


def _chance(split: Split, classes: int) -> dict[str, tuple[float, float]]:
    """By mask the accuracy in % of a guess on the newest task, and on all tasks learned so far."""
    sizes = np.array(split.task_sizes)  # (C, N)
    seen = float(np.mean(100 / sizes.cumsum(1)))
    anybody = [len(set().union(*split.federation[: n + 1])) for n in range(split.spec.tasks)]
    federation = float(np.mean([100 / count for count in anybody]))
    learned = float(np.mean((100 / sizes).cumsum(1) / np.arange(1, split.spec.tasks + 1)))
    return {
        "task": (float(np.mean(100 / sizes)), learned),
        "seen": (seen, seen),
        "federation": (federation, federation),
        "none": (100 / classes, 100 / classes),
    }
