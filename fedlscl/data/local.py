"""What one client sees of a federation's data: its own tasks, and of the others no more than the classes of all.

Shapes: B batch, K classes of the whole federation, n and m images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.data.device import CPU
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Part
from fedlscl.data.splits import TaskSplit


class LocalData:
    """The tasks of one client, their classes, labels and images.

    Tasks are numbered from 1. A range of them is given as in a slice of a list: `first` finished ones are left out, and
    `last` is the last one.

    Args:
        data: the data of the federation, set up.
        client: which client's.
    """

    def __init__(self, data: FederatedDataModule, client: int) -> None:
        self._data = data
        self.tasks: tuple[TaskSplit, ...] = data.split.clients[client].tasks
        self.num_classes = data.num_classes
        self._federation = data.split.federation
        self.evaluate_on: Part = data.split.evaluate_on

    def class_mask(self, first: int, last: int) -> Tensor:
        """(K,) true for the classes of tasks `first` + 1 to `last`."""
        return self._mask([task.classes for task in self.tasks[first:last]])

    def federation_mask(self, last: int) -> Tensor:
        """(K,) true for the classes that any client has in tasks 1 to `last`."""
        return self._mask(self._federation[:last])

    def _mask(self, classes: Iterable[Sequence[int]]) -> Tensor:
        mask = torch.zeros(self.num_classes, dtype=torch.bool)
        for of_task in classes:
            mask[list(of_task)] = True
        return mask

    def train_images(self, first: int, last: int) -> Tensor:
        """(n,) indices of the training images of tasks `first` + 1 to `last`."""
        parts = [torch.as_tensor(task.train) for task in self.tasks[first:last]]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def test_images(self, last: int) -> Tensor:
        """(m,) indices, in the part that is evaluated on, of the test images of tasks 1 to `last`."""
        return torch.cat([torch.as_tensor(task.test) for task in self.tasks[:last]])

    def labels(self, indices: Tensor) -> Tensor:
        """(n,) class numbers of training images (n,)."""
        return torch.as_tensor(self._data.dataset.train.labels[indices.numpy()])

    def batch(
        self, part: Part, indices: NDArray[np.int64] | Tensor, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in uint8 and class numbers (B,) by their indices (B,), on a device."""
        return self._data.batch(part, indices, device)
