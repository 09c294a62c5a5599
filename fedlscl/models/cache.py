"""What the frozen model computes for an image never changes: it is computed once, for all epochs, rounds and tests.

Shapes: B batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.data.device import send
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Part

GROUP = 64  # images computed at a time

log = logging.getLogger(__name__)

Lookup = Callable[[Part, NDArray[np.int64], torch.device], dict[str, Tensor]]
"""Gives the outputs for images of one part, (B, ...) each by name, on a device."""


class FrozenCache:
    """The outputs of `compute` for the images of a federation, each computed when it is first asked for.

    What is kept is computed in groups that the split alone determines, not in the batches that ask for it: the
    training images of a client's task, the test images of a class. A kernel may round differently in a batch of
    another size, and no number may depend on what a run, resumed or not, has computed before, or on which other
    clients live here. The outputs live in the memory of the device that asks, no longer than the process, so they
    cannot be older than the model and the images they were computed from, and are computed anew under another
    precision.

    Args:
        data: the images and their split, set up.
        compute: uint8 images (B, 3, H, W) to outputs (B, ...) by name, depending on the images alone.
        limit_mib: memory that the outputs may take. Where it is too small for all, it goes to the images that the
            current task trains on, then to the test images of the tasks until now, then to the others; what has no
            room is computed whenever it is asked for, in the batch that asks. A limit above 0 that is too small is
            told of in the log.
    """

    def __init__(
        self, data: FederatedDataModule, compute: Callable[[Tensor], dict[str, Tensor]], limit_mib: float
    ) -> None:
        self._data, self._compute, self._limit = data, compute, limit_mib * 2**20
        sizes = {"train": len(data.dataset.train.labels), "test": len(data.dataset.test.labels)}
        self._group = {part: np.full(size, -1) for part, size in sizes.items()}  # of each image
        self._offset = {part: np.zeros(size, dtype=np.int64) for part, size in sizes.items()}  # within its group
        self._groups: list[_Group] = []
        for task, tested, part, indices in _in_order(data):
            new = indices[self._group[part][indices] < 0]  # the test images of a public class are everyone's
            for images in np.split(new, range(GROUP, len(new), GROUP)) if len(new) else []:
                self._group[part][images], self._offset[part][images] = len(self._groups), np.arange(len(images))
                self._groups.append(_Group(task, tested, part, images))
        self._sizes = np.array([len(group.images) for group in self._groups])
        self._task = 1
        self._kept: dict[str, Tensor] = {}
        self._belongs_to: object = None

    def begin_task(self, task: int) -> None:
        """Make room for what a task, from 1, trains and is tested on, where there is not room for all."""
        if task != self._task:
            self._task = task
            if self._kept:
                self._place()

    def __call__(self, part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """The outputs for images of one part, (B, ...) each by name, on `device`."""
        self._begin(device)
        if not self._kept:
            return {}
        groups = self._group[part][indices]
        beyond = (groups < 0) | (self._start[groups] < 0)
        rows = self._start[groups] + self._offset[part][indices]
        if not (whole := not beyond.any()):
            groups, rows = groups[~beyond], rows[~beyond]
        if not self._done[groups].all():
            for number in np.unique(groups[~self._done[groups]]):
                self._fill(number, device)
        place = send(torch.from_numpy(rows), device)
        found = {name: kept[place] for name, kept in self._kept.items()}
        if whole:
            return found
        fresh = self._outputs(part, indices[beyond], device)
        # gathered, not written by index: on a GPU that would wait for the indices to be checked
        order = send(torch.from_numpy(np.argsort(np.argsort(beyond, kind="stable"))), device)
        return {name: torch.cat([kept, fresh[name]])[order] for name, kept in found.items()}

    def _begin(self, device: torch.device) -> None:
        """Make room, or make it anew where what is kept belongs to another device or precision."""
        belongs_to = (device, _autocast_dtype(device))
        if belongs_to == self._belongs_to:
            return
        self._belongs_to, self._kept = belongs_to, {}
        like = self._outputs(self._groups[0].part, self._groups[0].images[:1], device)
        size, images = max(1, sum(outputs[0].nbytes for outputs in like.values())), int(self._sizes.sum())
        self._capacity = min(images, int(self._limit / size))
        if self._capacity < images and self._limit:
            log.warning(
                "backbone.cache_mib is %g, enough for %d of %d images: what the frozen blocks make of the others is "
                "computed again in every epoch and test; %d keeps all",
                self._limit / 2**20,
                self._capacity,
                images,
                math.ceil(images * size / 2**20),
            )
        with torch.inference_mode(False):  # training uses what a test has computed
            self._kept = {
                name: outputs.new_empty((self._capacity, *outputs.shape[1:])) for name, outputs in like.items()
            }
        self._start = np.full(len(self._groups), -1)  # the row of each group's first image; below 0 it has no room
        self._done = np.zeros(len(self._groups), dtype=bool)
        self._place()

    def _place(self) -> None:
        """Choose the groups that have room, each as a whole; those that had it and are computed move up."""
        ranks = np.array([group.rank(self._task) for group in self._groups])
        order = np.argsort(ranks, kind="stable")
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order] = np.cumsum(self._sizes[order]) <= self._capacity
        self._done &= chosen
        before, self._start = self._start, np.full(len(order), -1)
        end = 0
        there = np.flatnonzero(self._done)
        for number in [*there[np.argsort(before[there])], *np.flatnonzero(chosen & ~self._done)]:
            size = int(self._sizes[number])
            if self._done[number] and before[number] != end:
                for kept in self._kept.values():
                    kept[end : end + size] = kept[before[number] : before[number] + size].clone()  # they may overlap
            self._start[number], end = end, end + size

    def _fill(self, number: int, device: torch.device) -> None:
        group, start = self._groups[number], self._start[number]
        for name, outputs in self._outputs(group.part, group.images, device).items():
            self._kept[name][start : start + len(outputs)] = outputs
        self._done[number] = True

    def _outputs(self, part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        images, _ = self._data.batch(part, indices, device)
        with torch.no_grad():
            return self._compute(images)


class _Group(NamedTuple):
    """Images whose outputs are computed and kept together."""

    task: int  # the first that has use for them, from 1
    tested: bool  # whether they are for the test
    part: Part
    images: NDArray[np.int64]

    def rank(self, now: int) -> int:
        """How soon these images are wanted while a task is learned, 0 first."""
        if self.tested:
            return 1 if self.task <= now else 3
        return 0 if self.task == now else 2


def _in_order(data: FederatedDataModule) -> Iterator[tuple[int, bool, Part, NDArray[np.int64]]]:
    """All images of a split: the task, from 1, whether they are tested on, and the part that they are of."""
    split = data.split
    by_task = list(enumerate(zip(*(client.tasks for client in split.present), strict=True), 1))
    tasks = [(number, task) for number, by_client in by_task for task in by_client]
    yield from ((number, False, "train", task.train) for number, task in tasks)
    labels = (data.dataset.test if split.evaluate_on == "test" else data.dataset.train).labels
    for number, task in tasks:
        for label in task.classes:
            yield number, True, split.evaluate_on, task.test[labels[task.test] == label]


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
