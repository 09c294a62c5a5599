"""The data of a federated run: one source of images, split over clients and tasks, served as batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from fedlscl import seeds
from fedlscl.checks import at_least
from fedlscl.data.dealing import make_split
from fedlscl.data.device import CPU, DeviceImages
from fedlscl.data.source import Dataset, Part, Source
from fedlscl.data.split_map import SplitMap
from fedlscl.data.splits import Split, SplitSpec


def cache_folder(given: str | None = None) -> Path:
    """Where decoded and downloaded images are kept; it need not be there yet."""
    return Path(given or os.environ.get("FEDLSCL_CACHE") or "~/.cache/fedlscl").expanduser()


class TestedPair(NamedTuple):
    """A client and a class that it is tested on; `trained` if it has training images of that class."""

    client: int
    label: int
    trained: bool


class FederatedDataModule(LightningDataModule):
    """Images and their split over clients and tasks.

    After `setup`: `dataset`, `split`, `num_classes` and `class_names`.
    """

    dataset: Dataset
    split: Split

    def __init__(
        self,
        source: Source,
        split: SplitSpec,
        seed: int | None = None,
        cache_dir: str | None = None,
        device_mib: float = 8192,
    ) -> None:
        """Name what to load; nothing is read yet.

        Args:
            source: where the images come from.
            split: how they are dealt out.
            seed: seed of the split; the command line links it to the run's seed.
            cache_dir: folder for decoded and downloaded images; None = $FEDLSCL_CACHE or ~/.cache/fedlscl.
            device_mib: memory of an accelerator for images, which then stay there; those beyond are sent batch by
                batch. On a CPU none is needed.
        """
        super().__init__()
        at_least(0, "data", device_mib=device_mib)
        self.source = source
        self.split_spec = split
        self.seed = seed
        self.cache_dir = cache_dir
        self.device_mib = device_mib
        self._resident: DeviceImages | None = None
        self._loaded: Dataset | None = None

    def prepare_data(self) -> None:
        """Download, unpack and decode what the cache does not hold yet, which `setup` then has."""
        self._loaded = self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load the data set and split it; a second call changes nothing.

        Raises:
            ValueError: no seed, or the data set does not allow the split.
        """
        if hasattr(self, "split"):
            return
        if self.seed is None:
            raise ValueError("data.seed is not set; give the seed of the split, a whole number from 0 on")
        self.dataset, self._loaded = self._loaded or self._load(), None
        if self.split_spec.local_test == "holdout30":
            self.dataset.check_held_out("data.split.local_test holdout30")
        labels = self.dataset.train.labels, self.dataset.test.labels
        owners = self.dataset.owners
        self.split = make_split(*labels, self.split_spec, self.seed, self.dataset.classes, owners)

    @property
    def split_sha256(self) -> str:
        """What tells splits apart, the same in every place that has a part of one."""
        return self.split.sha256

    @property
    def split_map(self) -> SplitMap:
        """Who has which images, as far as they are here."""
        return SplitMap.of(self.split, self.dataset.train.labels, self.dataset.test.labels, self.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, whether the split uses them or not."""
        return len(self.dataset.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by class id."""
        return self.dataset.classes

    @property
    def tested_pairs(self) -> list[TestedPair]:
        """Every client with every class that it is tested on.

        Its share of a public class may be no training image at all, see `SplitSpec.min_public_images`.
        """
        train = self.dataset.train.labels
        tested = (self.dataset.train if self.split.evaluate_on == "train" else self.dataset.test).labels
        pairs = []
        for client, own in enumerate(self.split.clients):
            learned = {int(label) for task in own.tasks for label in np.unique(train[task.train])}
            asked = {int(label) for task in own.tasks for label in np.unique(tested[task.test])}
            pairs += [TestedPair(client, label, label in learned) for label in sorted(asked)]
        return pairs

    def batch(
        self, part: Part, indices: NDArray[np.int64] | Tensor, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor]:
        """Gather images of one part.

        Args:
            part: which of the two image sets.
            indices: positions in it, shape (B,), in any order.
            device: where they are wanted.

        Returns:
            Images (B, 3, H, W) in uint8 and class ids (B,) in int64, copied to the memory of `device`.

        Raises:
            ValueError: `part` is neither.
            IndexError: an index is outside the set.
        """
        if part not in ("train", "test"):
            raise ValueError(f"part is {part!r}; it must be 'train' or 'test'")
        positions = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
        if device.type == "cpu":
            return self._gather(part, positions)
        if self._resident is None or self._resident.device != device:
            sizes = {"train": len(self.dataset.train.labels), "test": len(self.dataset.test.labels)}
            self._resident = DeviceImages(self._gather, sizes, self.device_mib, device)
        return self._resident(part, positions)

    def server_images(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Training images that a server may hold, of each class up to `per_class`, drawn from the run's seed.

        Images that no client has come first. Where the split leaves too few, as when all images are dealt out, clients
        have the others too. Images that are held out for evaluation are never among them.

        Returns:
            Images (n, 3, H, W) in uint8 and class ids (n,), ascending.
        """
        assert self.seed is not None  # or there would be no split
        labels, parts = self.dataset.train.labels, [part for client in self.split.clients for part in client.tasks]
        held, evaluated = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
        for part in parts:
            held[part.train] = True
            if self.split.evaluate_on == "train":
                evaluated[part.test] = True
        chosen = []
        for label in range(self.num_classes):
            members = np.flatnonzero((labels == label) & ~evaluated)
            order = np.random.default_rng(seeds.derive(self.seed, "public", label)).permutation(members)
            chosen.append(order[np.argsort(held[order], kind="stable")][:per_class])
        return self.batch("train", np.concatenate(chosen))

    def samples_of(self, client: int) -> tuple[int, ...]:
        """How many training images a client has in each task, as all have agreed; empty where nobody knows that."""
        return tuple(len(task.train) for task in self.split.clients[client].tasks)

    def _gather(self, part: str, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        chosen = self.dataset.train if part == "train" else self.dataset.test
        return torch.from_numpy(chosen.images[positions]), torch.from_numpy(chosen.labels[positions])

    def _load(self) -> Dataset:
        path = cache_folder(self.cache_dir)
        path.mkdir(parents=True, exist_ok=True)
        return self.source.load(path)
