"""The data sets that come packed: scikit-learn's digits, and CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedlscl.data.archives import unpack
from fedlscl.data.source import Dataset, ImageSet, Source, cut_test


class Digits(Source):
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels: real images without a download.

    There is no official split; a random 30 % of each digit, the same in every run, is the test set.
    """

    def count(self) -> int:
        """Ten."""
        return 10

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

    def count(self) -> int:
        """A hundred."""
        return 100

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
