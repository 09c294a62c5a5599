"""Data sets of Hugging Face and of MedMNIST by their names; each needs a package of its own, an extra of this one."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlscl.data.cache import Files, key, load_images
from fedlscl.data.cutting import cut_parts, test_part
from fedlscl.data.decoding import MAX_BYTES
from fedlscl.data.folders import ImageFiles
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.data.temporary import sweep, temporary_folder

BUILDERS = ("Parquet", "Arrow", "ImageFolder")
"""Kinds of files that are read: columns and images, none of which is run or unpickled."""

LEAST = 4
"""Major version of `datasets` from which it runs no code of a data set's author."""


class HuggingFace(ImageFiles):
    """A data set of Hugging Face's hub, or a folder of such files, with a column of images and one of classes.

    Its images are written as they are into the cache folder, and decoded from there as any image files. Where it has
    no part for testing, a random part of each class, the same in every run, is; see `cut_parts`.
    """

    def __init__(
        self,
        name: str,
        size: int,
        config: str | None = None,
        revision: str | None = None,
        image: str = "image",
        label: str = "label",
        train: str = "train",
        test: str | None = "test",
        background: str | tuple[int, int, int] = "white",
        test_fraction: float | None = None,
    ) -> None:
        """Name what to read.

        Args:
            name: OWNER/NAME on the hub, or a folder of parquet files.
            size: side in pixels that images are decoded to.
            config: of several configurations of the data set, which; None = its only or default one.
            revision: branch, tag or commit; a commit is the same for ever. None = the newest.
            image: the column of images.
            label: the column of classes, whole numbers or texts.
            train: the part for training.
            test: the part for testing; None = it is cut from the training part.
            background: colour behind transparent images. See ImageFolder.
            test_fraction: the part of each class that is for testing where `test` is None, above 0 and below 1; None =
                0.2.
        """
        super().__init__(".", size, None, background, None)
        self.name, self.config, self.revision = name, config, revision
        self.image, self.label, self.train, self.test = image, label, train, test
        self.test_fraction = test_part("test_fraction", test_fraction)

    def load(self, cache_dir: Path) -> Dataset:
        """Return the data set, decoded or from the cache.

        Raises:
            ImportError: the package `datasets` is not installed.
            FileNotFoundError: there is no such data set, or it cannot be fetched.
            ValueError: it has other parts or columns, or is of a kind that is not read.
        """
        sweep(cache_dir)
        try:
            import datasets
        except ImportError as error:
            raise missing("datasets", "huggingface", error) from error
        if int(datasets.__version__.partition(".")[0]) < LEAST:
            raise ImportError(f"datasets is {datasets.__version__}, must be {LEAST} or newer: pip install -U datasets")
        parts = {part: self._part(datasets, part) for part in (self.train, self.test) if part is not None}
        labels = {part: self._labels(rows) for part, rows in parts.items()}
        classes = self._classes(parts[self.train], labels)
        # what `datasets` says of the content, so that another revision has a folder of its own
        prints = [rows._fingerprint for rows in parts.values()]
        folder = cache_dir / f"huggingface-{key(self.name, self.config, self.image, prints)}"
        if not folder.is_dir():
            self._write(parts, folder)
        files = []
        for part, rows in parts.items():
            by_class: dict[str, list[Path]] = {name: [] for name in classes}
            for n in range(len(rows)):
                by_class[labels[part][n]].append(folder / part / f"{n:08d}")
            files.append(Files(part, by_class))
        if self.test is None:
            files = [*cut_parts("huggingface", files[0].by_class, folder, self.test_fraction, cache_dir)]
        train, test = load_images("huggingface", self.decoder, folder, files, cache_dir)
        return Dataset(self.name.rstrip("/").rpartition("/")[2], train, test, classes)

    def _part(self, datasets: Any, part: str) -> Any:
        """The rows of a part, images as the bytes of their files."""
        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
            kinds = [kind.__name__ for kind in type(builder).__mro__]  # of a data set's own class, and those above
            if not {*kinds} & {*BUILDERS}:
                raise ValueError(
                    f"data.source.name: '{self.name}' is made of {kinds[0]} files, none of {', '.join(BUILDERS)}"
                )
            rows = datasets.load_dataset(self.name, self.config, split=part, revision=self.revision)
        except ValueError as error:
            if part in str(error) and "split" in str(error).lower():
                raise ValueError(f"data.source: '{self.name}' has no part '{part}' ({error})") from error
            raise
        except (OSError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise FileNotFoundError(f"data.source.name: '{self.name}' cannot be fetched ({text})") from error
        for column in (self.image, self.label):
            if column not in rows.column_names:
                raise ValueError(
                    f"data.source: '{self.name}' has no column '{column}', but {', '.join(rows.column_names)}; name "
                    "them as data.source.image and data.source.label"
                )
        if not isinstance(rows.features[self.image], datasets.Image):
            raise ValueError(f"data.source.image: column '{self.image}' of '{self.name}' holds no images")
        return rows.cast_column(self.image, datasets.Image(decode=False))

    def _labels(self, rows: Any) -> list[str]:
        """The name of each row's class."""
        names = getattr(rows.features[self.label], "names", None)
        found = rows[self.label][:]
        if any(not isinstance(label, int | str) or (names and not 0 <= int(label) < len(names)) for label in found):
            raise ValueError(f"data.source.label: column '{self.label}' of '{self.name}' holds rows without a class")
        return [str(names[label] if names else label) for label in found]

    def _classes(self, rows: Any, labels: dict[str, list[str]]) -> tuple[str, ...]:
        names = getattr(rows.features[self.label], "names", None)
        found = set().union(*labels.values())
        if names:
            return tuple(str(name) for name in names if str(name) in found)
        return tuple(sorted(found, key=lambda name: (len(name), name) if name.isdigit() else (0, name)))

    def _write(self, parts: dict[str, Any], folder: Path) -> None:
        """Write the images' files, all or none."""
        with temporary_folder(folder.parent) as temporary:
            for part, rows in parts.items():
                (temporary / "all" / part).mkdir(parents=True)
                for n, row in enumerate(rows):
                    stored = row[self.image] or {}
                    content = stored.get("bytes")
                    if content is None and stored.get("path"):
                        path = Path(stored["path"])
                        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
                    if not content:
                        raise ValueError(f"data.source.name: row {n} of '{self.name}', {part}, has no image")
                    (temporary / "all" / part / f"{n:08d}").write_bytes(content)
            if not folder.is_dir():  # another process may have been faster
                (temporary / "all").rename(folder)


class MedMNIST(Source):
    """A set of MedMNIST v2 with two-dimensional images and one class each, as its NPZ file; nothing is unpickled."""

    def __init__(
        self, name: str, size: Literal[28, 64, 128, 224] = 28, root: str | None = None, download: bool = True
    ) -> None:
        """Name what to read.

        Args:
            name: name of the set, such as bloodmnist or pathmnist.
            size: side in pixels of the images, each of which is a file of its own.
            root: folder with the NPZ file; None = medmnist/ in the cache folder.
            download: fetch the file where it is not there.
        """
        self.name, self.size, self.root, self.download = name.lower(), size, root, download

    def load(self, cache_dir: Path) -> Dataset:
        """Return the set; training and validation images are for training.

        Raises:
            ImportError: the package `medmnist` is not installed.
            FileNotFoundError: the file is not there, and may not or cannot be fetched.
            ValueError: there is no such set, it has several classes an image or volumes, or the file is damaged.
        """
        sweep(cache_dir)
        try:
            from medmnist import INFO
        except ImportError as error:
            raise missing("medmnist", "medmnist", error) from error
        known: Any = INFO
        usable = [name for name, info in known.items() if "3d" not in name and "multi-label" not in info["task"]]
        if self.name not in usable:
            raise ValueError(
                f"data.source.name is '{self.name}'; the sets of MedMNIST that are read, of plain images with one "
                f"class each: {', '.join(usable)}"
            )
        info = known[self.name]
        suffix = "" if self.size == 28 else f"_{self.size}"
        root = Path(self.root).expanduser() if self.root is not None else cache_dir / "medmnist"
        file = root / f"{self.name}{suffix}.npz"
        if not file.is_file():
            self._fetch(file, info[f"url{suffix}"], info[f"MD5{suffix}"])
        try:
            train, test = (self._part(file, parts, cache_dir) for parts in (("train", "val"), ("test",)))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"{file} is damaged ({error}); fetch it again") from error
        names = [info["label"][str(n)] for n in range(len(info["label"]))]
        return Dataset(self.name, train, test, tuple(names))

    def _fetch(self, file: Path, url: str, md5: str) -> None:
        from torchvision.datasets.utils import download_url

        if not self.download:
            raise FileNotFoundError(f"{file} is missing; fetch it from {url} or set data.source.download to true")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url(url, file.parent, file.name, md5)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{error}: fetch {url} elsewhere and put it at {file}") from error

    def _part(self, file: Path, parts: Sequence[str], cache_dir: Path) -> ImageSet:
        images, labels = [], []
        for part in parts:
            pixels = _array(file, f"{part}_images", cache_dir)
            if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[1:3] != (self.size, self.size):
                raise ValueError(
                    f"{file}: {part}_images is {pixels.shape} {pixels.dtype}, not (N, {self.size}, ...) uint8"
                )
            images.append(np.repeat(pixels[..., None], 3, axis=3) if pixels.ndim == 3 else pixels)
            labels.append(_array(file, f"{part}_labels", cache_dir).astype(np.int64).reshape(len(pixels)))
        together = images[0] if len(images) == 1 else np.concatenate(images)
        return ImageSet(together.transpose(0, 3, 1, 2), np.concatenate(labels))


def _array(file: Path, name: str, cache_dir: Path) -> NDArray[Any]:
    """An array of an NPZ file, unpacked beside and then mapped into memory, since it may be larger than that."""
    with zipfile.ZipFile(file) as archive, temporary_folder(cache_dir) as folder:
        info = archive.getinfo(f"{name}.npy")
        if info.file_size > shutil.disk_usage(folder).free:
            raise ValueError(f"{file}: {name} takes {info.file_size:,} bytes, more than are free in {cache_dir}")
        with archive.open(info) as packed, (folder / "array.npy").open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        array: NDArray[Any] = np.load(folder / "array.npy", mmap_mode="r", allow_pickle=False)
        return array  # the mapping outlives the file's name


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """What to say of a package that is an extra of this one and not installed."""
    return ImportError(f"the package {package} is not installed ({error}): pip install 'fedlscl[{extra}]'")
