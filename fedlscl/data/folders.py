"""The data sets made of image files: any folder, and ImageNet-R.

Image files are decoded once, to one size, into a cache that is memory-mapped from then on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fedlscl.data.source import Dataset, ImageSet, Source, cut_test
from fedlscl.files import replacing, unpack

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


_CACHE_FORMAT = 1  # raise it when decoding changes, so that images decoded before are not used any more


_PROGRESS_FROM = 2000  # images; fewer are decoded before a progress bar is worth reading


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
            with replacing(record) as part:
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
        with replacing(cached) as part:
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
