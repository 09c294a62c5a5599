"""What a data set is, and the data sets made of image files: any folder, and ImageNet-R.

Image files are decoded once, to one size, into a cache that is memory-mapped from then on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import shutil
import tarfile
import tempfile
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_CUT_SEED = 20240  # of `cut_test`: not the run's seed, so that all runs share a test set
_CACHE_FORMAT = 1  # raise it when decoding changes, so that images decoded before are not used any more
_FINGERPRINTED = 64  # images of a set that are read to tell it from others
_PROGRESS_FROM = 2000  # images; fewer are decoded before a progress bar is worth reading


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, 3, H, W) in uint8, possibly memory-mapped, and their class ids (N,) in int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set over the same classes; class id c is called ``classes[c]``.

    `complete` says that every class has images in both sets; in a part of a data set not every class needs to.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    complete: bool = True

    @property
    def sha256(self) -> str:
        """What tells data sets apart: the classes, all labels, and some images from all over both sets."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (self.train, self.test):
            digest.update(part.labels.tobytes())
            some = np.unique(np.linspace(0, len(part.labels) - 1, _FINGERPRINTED).astype(np.int64))
            digest.update(part.images[some].tobytes())
        return digest.hexdigest()

    def __post_init__(self) -> None:
        """Check shapes and types, and the classes.

        Raises:
            ValueError: names the data set, the part and what is wrong.
        """
        for part, images, labels in (
            ("train", self.train.images, self.train.labels),
            ("test", self.test.images, self.test.labels),
        ):
            where = f"{self.name}: {part}"
            if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
                raise ValueError(f"{where} images are {images.shape} {images.dtype}, not (N, 3, H, W) uint8")
            if labels.shape != images.shape[:1] or labels.dtype != np.int64:
                raise ValueError(f"{where} labels are {labels.shape} {labels.dtype}, not one int64 per image")
            found, named = set(labels.tolist()), set(range(len(self.classes)))
            if not found <= named or (self.complete and found != named):
                raise ValueError(
                    f"{where} labels must be all of 0..{len(named) - 1}: {sorted(named - found)[:5]} have no "
                    f"image, {sorted(found - named)[:5]} have no name"
                )


class Source(ABC):
    """Where a data set comes from."""

    @abstractmethod
    def load(self, cache_dir: Path) -> Dataset:
        """Return the data set, after building in `cache_dir` what is not there yet.

        Args:
            cache_dir: existing folder for files that may be deleted at any time.

        Raises:
            FileNotFoundError: something the source reads is missing.
            ValueError: something it reads is not what it should be.
        """


class ImageFolder(Source):
    """Any images in ``train/<class>/`` and ``test/<class>/``; class ids follow the sorted class names."""

    def __init__(self, root: str, size: int, name: str | None = None, expected_classes: int | None = None) -> None:
        """Name what to read.

        Args:
            root: the folder that holds ``train`` and ``test``.
            size: side in pixels that images are decoded to (see `decode_image`).
            name: name of the data set; None = the folder's.
            expected_classes: refuse any other number of classes; None = any.
        """
        self.root = Path(root).expanduser()
        self.size = _checked_size(size)
        self.name = name
        self.expected_classes = expected_classes

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images of the folder, decoded or from the cache.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a class is empty or not in both parts, or an image cannot be read.
        """
        train, test = (_list_classes(self.root / part, self.expected_classes) for part in ("train", "test"))
        if unpaired := sorted(train.keys() ^ test.keys()):
            lacking = "test" if unpaired[0] in train else "train"
            raise FileNotFoundError(
                f"{self.root / lacking / unpaired[0]} is not there, nor are {len(unpaired) - 1} others; "
                f"train and test need images of the same classes"
            )
        return Dataset(
            self.name or self.root.resolve().name,
            _load_images(self, self.root, list(train.values()), cache_dir),
            _load_images(self, self.root, list(test.values()), cache_dir),
            tuple(train),
        )


class ImageNetR(Source):
    """ImageNet-R, 30,000 renditions of 200 ImageNet classes.

    There is no official split. A random 20 % of each class, the same in every run, is the test set; the names
    of the test images are kept in the cache folder, so that they outlive changes of the random generator.
    """

    def __init__(self, root: str, size: int = 224, expected_classes: int = 200) -> None:
        """Name what to read.

        Args:
            root: the unpacked ``imagenet-r`` folder, or ``imagenet-r.tar``, then unpacked into the cache.
            size: side in pixels that images are decoded to (see `decode_image`).
            expected_classes: refuse any other number of classes.
        """
        self.root = Path(root).expanduser()
        self.size = _checked_size(size)
        self.expected_classes = expected_classes

    def load(self, cache_dir: Path) -> Dataset:
        """Return ImageNet-R, decoded or from the cache.

        Raises:
            FileNotFoundError: root is missing.
            ValueError: not the expected classes, too few images of one, or an image cannot be read.
        """
        root = self.root
        if root.is_file():
            root = cache_dir / f"imagenet-r-{_key(self.root.stat().st_size, self.root.stat().st_mtime_ns)}"
            if not root.is_dir():
                unpack(self.root, "imagenet-r", root)
        found = _list_classes(root, self.expected_classes)
        test_names = self._test_names(root, found, cache_dir)
        train = [[path for path in paths if _name(path) not in test_names] for paths in found.values()]
        test = [[path for path in paths if _name(path) in test_names] for paths in found.values()]
        return Dataset(
            "imagenet-r",
            _load_images(self, root, train, cache_dir),
            _load_images(self, root, test, cache_dir),
            tuple(found),
        )

    @staticmethod
    def _test_names(root: Path, found: dict[str, list[Path]], cache_dir: Path) -> set[str]:
        """Names of the test images, from the cache or drawn now; other file names are another split."""
        names = [[_name(path) for path in paths] for paths in found.values()]
        record = cache_dir / f"imagenet-r-test-{_key(names)}.json"
        if not record.is_file():
            cuts = [cut_test(len(paths), 0.2, c, root / name) for c, (name, paths) in enumerate(found.items())]
            drawn = [files[k] for files, cut in zip(names, cuts, strict=True) for k in cut]
            with _replacing(record) as part:
                part.write_text(json.dumps(drawn, indent=0), encoding="utf-8")
        try:
            kept = set(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            kept = set()
        if any(not 0 < len(kept.intersection(files)) < len(files) for files in names):
            raise ValueError(f"{record} is damaged; delete it to have the split drawn again")
        return kept


def decode_image(path: str | Path, size: int) -> NDArray[np.uint8]:
    """Read one image file as RGB, resized and cut to a square.

    The shorter side is resized to `size` (bicubic, antialiased) and the centre is cut out; an image that is
    size x size already keeps its pixels. Transparency is dropped and 16-bit grey is reduced to 8 bits.

    Args:
        path: any file that Pillow reads.
        size: side in pixels, above 0.

    Returns:
        Pixels of shape (3, size, size).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as an image.
    """
    _checked_size(size)
    try:
        with Image.open(path) as file:
            image = _to_rgb(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except Exception as error:  # broken files make Pillow's decoders raise almost anything
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or delete it") from error
    shorter = min(image.size)
    if shorter != size:
        width, height = (size * side // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    square = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # a palette with transparency converts to RGB only with a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _checked_size(size: int) -> int:
    if size <= 0:
        raise ValueError(f"size is {size}; it must be a number of pixels above 0")
    return size


def cut_test(count: int, fraction: float, label: int, where: str | Path) -> NDArray[np.int64]:
    """Sorted positions of the test images among `count` images of a class without official split."""
    if count < 2:
        raise ValueError(f"{where} has {count} image; a training and a test image are needed")
    rng = np.random.default_rng(np.random.SeedSequence(_CUT_SEED, spawn_key=(label,)))
    tests = min(max(1, math.floor(fraction * count + 0.5)), count - 1)
    return np.sort(rng.permutation(count)[:tests])


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _list_classes(folder: Path, expected: int | None) -> dict[str, list[Path]]:
    """Sorted image files of every class folder, in the order of the sorted class names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; it must be a folder with one folder of images per class")
    found = {
        entry.name: sorted(
            path for path in entry.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
        )
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and entry.name[0] != "."
    }
    if not found or (expected is not None and len(found) != expected):
        wanted = "at least 1" if expected is None else expected
        raise ValueError(f"{folder} holds {len(found)} class folders, expected {wanted}; is the root right?")
    for name, paths in found.items():
        if not paths:
            raise ValueError(
                f"{folder / name} holds no image ({', '.join(IMAGE_SUFFIXES)}); add some or delete the folder"
            )
    return found


def _load_images(source: ImageFolder | ImageNetR, root: Path, by_class: list[list[Path]], cache_dir: Path) -> ImageSet:
    """Decode images into the cache unless they are there unchanged, and map them into memory."""
    paths = [path for paths in by_class for path in paths]
    labels = np.repeat(np.arange(len(by_class), dtype=np.int64), [len(paths) for paths in by_class])
    stats = [path.stat() for path in paths]
    names = [path.relative_to(root).as_posix() for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    kind = type(source).__name__
    cached = cache_dir / f"{kind.lower()}-{source.size}-{_key(_CACHE_FORMAT, kind, source.size, files)}.npy"
    shape = (len(paths), 3, source.size, source.size)
    images = _open_images(cached, shape)
    if images is None:
        with _replacing(cached) as part:
            _decode_all(paths, source.size, np.lib.format.open_memmap(part, "w+", np.uint8, shape))
        images = np.lib.format.open_memmap(cached, "r")
    return ImageSet(images, labels)


def _open_images(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Map a cached array of this shape; None if there is none or it is damaged."""
    try:
        images = np.lib.format.open_memmap(path, "r")  # refuses pickled content
    except (OSError, ValueError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _decode_all(paths: Sequence[Path], size: int, images: np.memmap[Any, np.dtype[np.uint8]]) -> None:
    chunk = 64

    def decode(start: int) -> int:
        for k, path in enumerate(paths[start : start + chunk], start):
            images[k] = decode_image(path, size)
        return len(paths[start : start + chunk])

    hidden = len(paths) < _PROGRESS_FROM
    progress = Progress(console=Console(stderr=True), transient=True, disable=hidden)
    with progress, ThreadPoolExecutor() as pool:
        bar = progress.add_task(f"decoding {len(paths)} images", total=len(paths))
        for done in pool.map(decode, range(0, len(paths), chunk)):  # an error cancels what has not begun
            progress.advance(bar, done)
    images.flush()


def unpack(archive: Path, inner: str, folder: Path) -> None:
    """Unpack the folder `inner` of a tar archive as `folder`, whole or not at all; plain files and folders only."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as temporary:
        root = Path(temporary).resolve()
        try:
            with tarfile.open(archive) as tar:
                for member in tar:  # not extractall: Python before 3.11.4 has no safe form of it
                    path = (root / member.name).resolve()
                    if not path.is_relative_to(root):
                        raise tarfile.ExtractError(f"{member.name} would be outside the folder")
                    if member.isdir():
                        continue
                    content = tar.extractfile(member) if member.isfile() else None
                    if content is None:
                        raise tarfile.ExtractError(f"{member.name} is a link or a device, no file or folder")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}); fetch it again") from error
        unpacked = Path(temporary) / inner
        if not unpacked.is_dir():
            raise ValueError(f"{archive} has no folder {inner}; is it the right archive?")
        if not folder.is_dir():  # another process may have been faster
            os.replace(unpacked, folder)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Name a temporary file beside `path` that takes its place if the block succeeds."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
