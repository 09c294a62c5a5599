"""From logits to every published number: the four class masks, and the metrics over an accuracy array.

Accuracy is kept as ``acc[client, after task, on task]`` in %, NaN where nothing was measured. Shapes:
C clients, N tasks of the federation, T <= N tasks finished so far. A metric of an unfinished federation is
that of its first T tasks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

MASKS = ("task", "seen", "federation", "none")
"""Classes a prediction may fall on: those of the image's task, all the client has seen, all that any client has seen,
all there are."""

ALIKE = 0.02
"""Mean distance of features of unit length, a degree, below which a small model says the same of every image."""

FloatArray = npt.NDArray[np.float64]


class MaskedAccuracy(Metric):
    """The accuracy of one client on each task under each of the masks.

    Shapes: B batch, K classes, N tasks.

    Args:
        task_masks: (N, K) true for the client's classes of each task; no class is of two tasks.
        federation_mask: (K,) true for the classes of any client in these tasks.
    """

    full_state_update = False
    task_masks: Tensor  # (N, K)
    seen_mask: Tensor  # (K,) true for the classes of any of the tasks
    federation_mask: Tensor  # (K,)
    task_of_class: Tensor  # (K,) number of the task that has a class, from 0
    hits: Tensor  # (masks, N) correct predictions
    tested: Tensor  # (N,) images

    def __init__(self, task_masks: Tensor, federation_mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("task_masks", task_masks, persistent=False)
        self.register_buffer("seen_mask", task_masks.any(dim=0), persistent=False)
        self.register_buffer("federation_mask", federation_mask, persistent=False)
        self.register_buffer("task_of_class", task_masks.int().argmax(dim=0), persistent=False)
        self.add_state("hits", torch.zeros(len(MASKS), len(task_masks)), dist_reduce_fx="sum")
        self.add_state("tested", torch.zeros(len(task_masks)), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count the hits in each task under each mask.

        Args:
            logits: (B, K) scores over all K classes.
            labels: (B,) class numbers, each among the classes of a task.
        """
        tasks = self.task_of_class[labels]
        hits = masked_correct(logits, labels, self.task_masks[tasks], self.seen_mask, self.federation_mask)
        # not index_add_, which on a GPU would wait for the indices to be checked
        of_task = tasks.unsqueeze(1) == torch.arange(len(self.tested), device=tasks.device)
        self.tested += of_task.sum(dim=0)
        self.hits += (torch.stack([hits[mask] for mask in MASKS]).unsqueeze(2) & of_task).sum(dim=1)

    def compute(self) -> dict[str, list[float]]:
        """For each mask the accuracy in % on every task; NaN for one without images."""
        percent = 100 * self.hits.double() / self.tested.double()
        return dict(zip(MASKS, percent.tolist(), strict=True))


def masked_correct(
    logits: Tensor, labels: Tensor, task_masks: Tensor, seen_mask: Tensor, federation_mask: Tensor
) -> dict[str, Tensor]:
    """Tell, under each of the masks, which samples are classified correctly.

    Args:
        logits: (B, K) scores over all K classes.
        labels: (B,) class ids.
        task_masks: (B, K) true for the client's classes of the task that each sample belongs to.
        seen_mask: (K,) true for the client's classes of every task learned so far.
        federation_mask: (K,) true for every client's classes of these tasks.

    Returns:
        For each of `MASKS` a bool tensor (B,): whether the best class within the mask is the label.
    """
    every = torch.ones_like(seen_mask)
    masks = dict(zip(MASKS, (task_masks, seen_mask, federation_mask, every), strict=True))
    return {name: logits.masked_fill(~mask, -torch.inf).argmax(1) == labels for name, mask in masks.items()}


def measured_mean(values: npt.ArrayLike, axis: int) -> FloatArray:
    """Average what was measured; a client without test images of a task counts only where it has some.

    Args:
        values: numbers of any shape, NaN or None where nothing was measured.
        axis: the axis to average over.

    Returns:
        `values` without that axis, NaN where nothing was measured along it.
    """
    values = np.asarray(values, dtype=np.float64)
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def _finished(acc: FloatArray) -> FloatArray:
    """Check `acc` (C, N, N) and cut it to the T tasks finished so far: (C, T, T), NaN above the diagonal."""
    acc = np.asarray(acc, dtype=np.float64)
    if acc.ndim != 3 or 0 in acc.shape or acc.shape[1] != acc.shape[2]:
        raise ValueError(f"acc must be (clients, N after task, N on task), got shape {acc.shape}")
    measured = ~np.isnan(acc)
    if bool(np.any((acc < 0) | (acc > 100))):
        raise ValueError(f"acc must be in %, 0 to 100, got {np.nanmin(acc):g} to {np.nanmax(acc):g}")
    if bool((measured & np.triu(np.ones(acc.shape[1:], dtype=bool), 1)).any()):
        raise ValueError("acc must be NaN on tasks later than the one just learned (on task > after task)")
    rows = np.asarray(measured.any(axis=(0, 2)))
    finished = int(rows.sum())
    if finished == 0 or not rows[:finished].all():
        raise ValueError(f"acc must have its first tasks evaluated without a gap, got rows {rows.tolist()}")
    return acc[:, :finished, :finished]


def table1(acc: FloatArray) -> list[float]:
    """Accuracy on each task just after learning it: T1_n = mean_i a^i_{n,n} (Fed-LSCL, Table 1).

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        T numbers in %, one per finished task.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    diagonal = np.diagonal(_finished(acc), axis1=1, axis2=2)
    return [float(mean) for mean in measured_mean(diagonal, 0)]


def final_average(acc: FloatArray) -> float:
    """Accuracy after the last task over all tasks: mean_i mean_{m<=T} a^i_{T,m} (Fed-LSCL, Table 2).

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        The mean in %.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    return float(measured_mean(measured_mean(_finished(acc)[:, -1], 1), 0))


def average_incremental(acc: FloatArray) -> float:
    """Average incremental accuracy: mean_i mean_n mean_{m<=n} a^i_{n,m}.

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        The mean in %.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    return float(measured_mean(measured_mean(measured_mean(_finished(acc), 2), 1), 0))


def forgetting(acc: FloatArray) -> float | None:
    """Forgetting (Chaudhry et al., 2018): mean_i 1/(T-1) sum_{m<T} [max_{m<=l<T} a^i_{l,m} - a^i_{T,m}].

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        Percentage points, negative where the last task helped the earlier ones; None with one finished task.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    done = _finished(acc)
    if done.shape[1] == 1:
        return None
    best = np.fmax.reduce(done[:, :-1, :-1], axis=1)
    return float(measured_mean(measured_mean(best - done[:, -1, :-1], 1), 0))


def backward_transfer(acc: FloatArray) -> float | None:
    """Backward transfer (Lopez-Paz and Ranzato, 2017): mean_i 1/(T-1) sum_{m<T} (a^i_{T,m} - a^i_{m,m}).

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        Percentage points, negative where earlier tasks suffered; None with one finished task.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    done = _finished(acc)
    if done.shape[1] == 1:
        return None
    learned = np.diagonal(done, axis1=1, axis2=2)[:, :-1]
    return float(measured_mean(measured_mean(done[:, -1, :-1] - learned, 1), 0))


def summarise(acc: FloatArray) -> dict[str, Any]:
    """Compute every metric of one mask, ready to be written as JSON.

    Args:
        acc: (C, N, N) accuracy in %.

    Returns:
        `table1`, `final_average`, `average_incremental`, `forgetting`, `backward_transfer`, and `matrix`:
        `acc` itself as nested lists [client][after task][on task] with None for NaN.

    Raises:
        ValueError: if `acc` is not an accuracy array with at least one finished task.
    """
    values = np.asarray(acc, dtype=np.float64)
    return {
        "table1": table1(values),
        "final_average": final_average(values),
        "average_incremental": average_incremental(values),
        "forgetting": forgetting(values),
        "backward_transfer": backward_transfer(values),
        "matrix": [[[None if math.isnan(a) else a for a in row] for row in rows] for rows in values.tolist()],
    }
