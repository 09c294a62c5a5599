"""What the frozen model computes for an image never changes: it is computed once, for all epochs, rounds and tests.

Shapes: B batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

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
        limit_mib: memory that the outputs may take. The images that come first in the split, training before test
            images and task by task, are kept for good; the others are computed whenever they are asked for, in the
            batch that asks. Where a limit above 0 is too small for all, the log says so.
    """

    def __init__(
        self, data: FederatedDataModule, compute: Callable[[Tensor], dict[str, Tensor]], limit_mib: float
    ) -> None:
        self._data, self._compute, self._limit = data, compute, limit_mib * 2**20
        sizes = {"train": len(data.dataset.train.labels), "test": len(data.dataset.test.labels)}
        self._rows = {part: np.full(size, -1) for part, size in sizes.items()}
        self._groups: list[tuple[Part, NDArray[np.int64]]] = []
        ends = [0]
        for part, indices in _in_order(data):
            new = indices[self._rows[part][indices] < 0]  # the test images of a public class are everyone's
            for group in np.split(new, range(GROUP, len(new), GROUP)) if len(new) else []:
                self._rows[part][group] = ends[-1] + np.arange(len(group))
                self._groups.append((part, group))
                ends.append(ends[-1] + len(group))
        self._ends = np.array(ends)
        self._kept: dict[str, Tensor] = {}
        self._belongs_to: object = None

    def __call__(self, part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """The outputs for images of one part, (B, ...) each by name, on `device`."""
        self._begin(device)
        if not self._kept:
            return {}
        rows = self._rows[part][indices]
        beyond = (rows < 0) | (rows >= self._capacity)
        for number in np.unique(np.searchsorted(self._ends, rows[~beyond], side="right") - 1):
            if not self._done[number]:
                self._fill(number, device)
        place = send(torch.from_numpy(rows[~beyond]), device)
        found = {name: kept[place] for name, kept in self._kept.items()}
        if not beyond.any():
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
        part, group = self._groups[0]
        like = self._outputs(part, group[:1], device)
        size = max(1, sum(outputs[0].nbytes for outputs in like.values()))
        whole = self._ends[self._ends * size <= self._limit]  # groups are kept as a whole
        self._capacity, images = int(whole[-1]), int(self._ends[-1])
        if self._capacity < images and self._limit:
            log.warning(
                "backbone.cache_mib is %g, enough for %d of %d images: what the frozen blocks make of the others is "
                "computed again in every epoch and test; %d keeps all",
                self._limit / 2**20,
                self._capacity,
                images,
                math.ceil(images * size / 2**20),
            )
        self._done = np.zeros(len(self._groups), dtype=bool)
        with torch.inference_mode(False):  # training uses what a test has computed
            self._kept = {
                name: outputs.new_empty((self._capacity, *outputs.shape[1:])) for name, outputs in like.items()
            }

    def _fill(self, number: int, device: torch.device) -> None:
        for name, outputs in self._outputs(*self._groups[number], device).items():
            self._kept[name][self._ends[number] : self._ends[number + 1]] = outputs
        self._done[number] = True

    def _outputs(self, part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        images, _ = self._data.batch(part, indices, device)
        with torch.no_grad():
            return self._compute(images)


def _in_order(data: FederatedDataModule) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """All images of a split in the order in which a federation comes to them, those for training first."""
    split = data.split
    tasks = [task for by_client in zip(*(c.tasks for c in split.present), strict=True) for task in by_client]
    yield from (("train", task.train) for task in tasks)
    labels = (data.dataset.test if split.evaluate_on == "test" else data.dataset.train).labels
    for task in tasks:
        yield from ((split.evaluate_on, task.test[labels[task.test] == label]) for label in task.classes)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
