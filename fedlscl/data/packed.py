"""The data sets that come packed: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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


class _CIFAR(Source):
    """CIFAR in its binary version; the pickles of the Python version are never read.

    A record is some labels, the last of them the class, and 32x32 pixels of red, of green, of blue.
    """

    url: str
    md5: str  # as published beside the download
    folder: str  # in the archive
    names: str  # the file of the classes' names
    labels: int  # of a record
    number: int  # of classes

    def __init__(self, root: str | None = None, download: bool = True) -> None:
        self.root = root
        self.download = download

    def count(self) -> int:
        """As published."""
        return self.number

    def _unpacked(self, cache_dir: Path) -> Path:
        """The folder of the archive, which is fetched, checked by MD5 and unpacked where it is not there."""
        root = Path(self.root).expanduser() if self.root is not None else cache_dir
        folder, archive = root / self.folder, root / self.url.rpartition("/")[2]
        if not folder.is_dir():
            self._fetch(archive)
            unpack(archive, self.folder, folder)
        return folder

    def _classes(self, folder: Path) -> tuple[str, ...]:
        names = folder / self.names
        if not names.is_file():
            raise FileNotFoundError(f"{names} is missing; delete {folder} to have it unpacked again")
        return tuple(names.read_text(encoding="utf-8").split())

    def _fetch(self, archive: Path) -> None:
        from torchvision.datasets.utils import check_integrity, download_url

        if check_integrity(archive, self.md5):
            return
        if not self.download:
            raise FileNotFoundError(
                f"{archive} is missing or damaged (its MD5 must be {self.md5}); "
                f"fetch it from {self.url} or set {type(self).__name__}.download to true"
            )
        try:
            download_url(self.url, archive.parent, archive.name, self.md5)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{error}: fetch {self.url} elsewhere and put it at {archive}") from error

    def _records(self, path: Path) -> NDArray[np.uint8]:
        record = self.labels + 3 * 32 * 32
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % record:
            raise ValueError(
                f"{path} has {size} bytes, expected a multiple of {record}; "
                f"delete {path.parent} to have it unpacked again"
            )
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(size // record, record))

    def _images(self, records: NDArray[np.uint8]) -> ImageSet:
        pixels, label = records[:, self.labels :], records[:, self.labels - 1]
        return ImageSet(pixels.reshape(-1, 3, 32, 32), label.astype(np.int64))


class CIFAR100(_CIFAR):
    """CIFAR-100 in its binary version, 50,000 training and 10,000 test images of 32x32 pixels.

    The pickles of the Python version are never read. Records are memory-mapped from the files as published.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    md5 = "03b5dce01913d631647c71ecec9e9cb8"
    folder = "cifar-100-binary"
    names = "fine_label_names.txt"
    number = 100
    labels = 2  # coarse, fine

    def __init__(self, root: str | None = None, download: bool = True) -> None:
        """Name what to read.

        Args:
            root: folder with ``cifar-100-binary/`` or ``cifar-100-binary.tar.gz``; None = the cache folder.
            download: fetch the archive (161 MB) when neither is there.
        """
        super().__init__(root, download)

    def load(self, cache_dir: Path) -> Dataset:
        """Return CIFAR-100; a downloaded or given archive is checked by MD5 before it is unpacked.

        Raises:
            FileNotFoundError: neither folder nor archive is there, and it may not or cannot be downloaded.
            ValueError: the archive or a file in it is damaged.
        """
        folder = self._unpacked(cache_dir)
        train, test = (self._images(self._records(folder / f"{part}.bin")) for part in ("train", "test"))
        return Dataset("cifar100", train, test, self._classes(folder))


class CIFAR10(_CIFAR):
    """CIFAR-10 in its binary version, 50,000 training and 10,000 test images of 32x32 pixels.

    The pickles of the Python version are never read.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5 = "c32a1d4ab5d03f1284b67883e8d87530"
    folder = "cifar-10-batches-bin"
    names = "batches.meta.txt"
    number = 10
    labels = 1

    def __init__(self, root: str | None = None, download: bool = True) -> None:
        """Name what to read.

        Args:
            root: folder with ``cifar-10-batches-bin/`` or ``cifar-10-binary.tar.gz``; None = the cache folder.
            download: fetch the archive (162 MB) when neither is there.
        """
        super().__init__(root, download)

    def load(self, cache_dir: Path) -> Dataset:
        """Return CIFAR-10; a downloaded or given archive is checked by MD5 before it is unpacked.

        Raises:
            FileNotFoundError: neither folder nor archive is there, and it may not or cannot be downloaded.
            ValueError: the archive or a file in it is damaged.
        """
        folder = self._unpacked(cache_dir)
        train = np.concatenate([self._records(folder / f"data_batch_{n}.bin") for n in range(1, 6)])
        test = self._records(folder / "test_batch.bin")
        return Dataset("cifar10", self._images(train), self._images(test), self._classes(folder))
