"""The data of a federated run: one source of images, split over clients and tasks, served as batches.

The data sets that come packed, Digits and CIFAR100, are here; those made of image files are in `datasets`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from fedlscl import seeds
from fedlscl.datasets import (
    Dataset,
    ImageFolder,
    ImageNetR,
    ImageSet,
    Source,
    cut_test,
    decode_image,
    unpack,
)
from fedlscl.resident import Resident
from fedlscl.splits import Split, SplitSpec, make_split

__all__ = [
    "CIFAR100",
    "Dataset",
    "Digits",
    "FederatedDataModule",
    "ImageFolder",
    "ImageNetR",
    "ImageSet",
    "Source",
    "decode_image",
]

CPU = torch.device("cpu")


class Digits(Source):
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels: real images without a download.

    There is no official split; a random 30 % of each digit, the same in every run, is the test set.
    """

    def load(self, cache_dir: Path) -> Dataset:
        """Return the digits: grey values 0..16 spread over 0..255 in three equal channels."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        images = np.repeat(grey[:, None], 3, axis=1)
        labels = digits.target.astype(np.int64)
        is_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            found = np.flatnonzero(labels == label)
            is_test[found[cut_test(len(found), 0.3, label, "digits")]] = True
        train, test = (ImageSet(images[mask], labels[mask]) for mask in (~is_test, is_test))
        return Dataset("digits", train, test, tuple(str(label) for label in range(10)))


class CIFAR100(Source):
    """CIFAR-100 in its binary version, 50,000 training and 10,000 test images of 32x32 pixels.

    The pickles of the Python version are never read. Records are memory-mapped from the files as published.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    md5 = "03b5dce01913d631647c71ecec9e9cb8"  # as published beside the download

    def __init__(self, root: str | None = None, download: bool = True) -> None:
        """Name what to read.

        Args:
            root: folder with ``cifar-100-binary/`` or ``cifar-100-binary.tar.gz``; None = the cache folder.
            download: fetch the archive (161 MB) when neither is there.
        """
        self.root = root
        self.download = download

    def load(self, cache_dir: Path) -> Dataset:
        """Return CIFAR-100; a downloaded or given archive is checked by MD5 before it is unpacked.

        Raises:
            FileNotFoundError: neither folder nor archive is there, and it may not or cannot be downloaded.
            ValueError: the archive or a file in it is damaged.
        """
        root = Path(self.root).expanduser() if self.root is not None else cache_dir
        folder = root / "cifar-100-binary"
        if not folder.is_dir():
            self._fetch(root / "cifar-100-binary.tar.gz")
            unpack(root / "cifar-100-binary.tar.gz", "cifar-100-binary", folder)
        names = folder / "fine_label_names.txt"
        if not names.is_file():
            raise FileNotFoundError(f"{names} is missing; delete {folder} to have it unpacked again")
        classes = tuple(names.read_text(encoding="utf-8").split())
        return Dataset("cifar100", self._read(folder / "train.bin"), self._read(folder / "test.bin"), classes)

    def _fetch(self, archive: Path) -> None:
        from torchvision.datasets.utils import check_integrity, download_url

        if check_integrity(archive, self.md5):
            return
        if not self.download:
            raise FileNotFoundError(
                f"{archive} is missing or damaged (its MD5 must be {self.md5}); "
                f"fetch it from {self.url} or set CIFAR100.download to true"
            )
        try:
            download_url(self.url, archive.parent, archive.name, self.md5)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{error}: fetch {self.url} elsewhere and put it at {archive}") from error

    @staticmethod
    def _read(path: Path) -> ImageSet:
        # One record: coarse class, fine class, then 32x32 pixels of red, of green, of blue.
        record = 2 + 3 * 32 * 32
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % record:
            raise ValueError(
                f"{path} has {size} bytes, expected a multiple of {record}; "
                f"delete {path.parent} to have it unpacked again"
            )
        records = np.memmap(path, dtype=np.uint8, mode="r", shape=(size // record, record))
        return ImageSet(records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1].astype(np.int64))


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
        if not device_mib >= 0:
            raise ValueError(f"data.device_mib is {device_mib}, must not be negative")
        self.source = source
        self.split_spec = split
        self.seed = seed
        self.cache_dir = cache_dir
        self.device_mib = device_mib
        self._resident: Resident | None = None

    def prepare_data(self) -> None:
        """Download, unpack and decode what the cache does not hold yet."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load the data set and split it; a second call changes nothing.

        Raises:
            ValueError: no seed, or the data set does not allow the split.
        """
        if hasattr(self, "split"):
            return
        if self.seed is None:
            raise ValueError("data.seed is not set; give the seed of the split, a whole number from 0 on")
        self.dataset = self._load()
        self.split = make_split(self.dataset.train.labels, self.dataset.test.labels, self.split_spec, self.seed)

    @property
    def split_sha256(self) -> str:
        """What tells splits apart, the same in every place that has a part of one."""
        return self.split.sha256

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, whether the split uses them or not."""
        return len(self.dataset.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by class id."""
        return self.dataset.classes

    def batch(
        self, part: Literal["train", "test"], indices: NDArray[np.int64] | Tensor, device: torch.device = CPU
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
            self._resident = Resident(self._gather, sizes, self.device_mib, device)
        return self._resident(part, positions)

    def public(self, per_class: int) -> tuple[Tensor, Tensor]:
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

    def _gather(self, part: str, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        chosen = self.dataset.train if part == "train" else self.dataset.test
        return torch.from_numpy(chosen.images[positions]), torch.from_numpy(chosen.labels[positions])

    def _load(self) -> Dataset:
        folder = self.cache_dir or os.environ.get("FEDLSCL_CACHE") or "~/.cache/fedlscl"
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return self.source.load(path)
