"""The data sets made of image files: any folder, and ImageNet-R.

Image files are decoded once, to one size, into a cache that is memory-mapped from then on.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlscl.data.archives import unpack
from fedlscl.data.cache import Contents, Files, load_images
from fedlscl.data.cutting import cut_parts, test_part
from fedlscl.data.decoding import Decoder, image_suffixes
from fedlscl.data.decoding import decode_image as decode_image
from fedlscl.data.source import Dataset, Source
from fedlscl.data.temporary import sweep

MAX_ARCHIVE = 2**34
"""Bytes of an archive; `imagenet-r.tar` has 2.2e9."""

_NAMED = 5  # files that a warning names
_NO_IMAGES = ("__MACOSX", "Thumbs.db", "desktop.ini")  # what systems leave in folders, besides names with a dot first


TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Names of the folder of test images; the first that is there is taken."""


class ImageFiles(Source):
    """Images in files, which are decoded as the fields say."""

    def __init__(
        self,
        root: str,
        size: int,
        expected_classes: int | None,
        background: str | tuple[int, int, int],
        value_range: tuple[float, float] | None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.decoder = Decoder(size, background, value_range)
        self.expected_classes = expected_classes

    def decode(self, path: Path, size: int) -> NDArray[np.uint8]:
        """Read an image file as those in the folder are read; see `Decoder`."""
        return Decoder(size, self.decoder.background, self.decoder.value_range)(path)


class ImageFolder(ImageFiles):
    """Any images in folders that are called as their classes; class ids follow the sorted class names.

    They are in ``train/<class>/`` and ``test/<class>/`` (or ``val``, ``valid``, ``validation`` where there is no
    ``test``). Where there is ``train/`` alone, or class folders and neither, a random part of each class, the same in
    every run, is the test set; the names of the test images are kept in the cache folder, see `cut_parts`.

    Images in folders inside a class's are of that class. Files without the suffix of an image that Pillow reads, and
    hidden ones, are left out, and a warning counts them.
    """

    def __init__(
        self,
        root: str,
        size: int,
        name: str | None = None,
        expected_classes: int | None = None,
        background: str | tuple[int, int, int] = "white",
        value_range: tuple[float, float] | None = None,
        test_fraction: float | None = None,
    ) -> None:
        """Name what to read.

        Args:
            root: the folder that holds ``train`` and ``test``, ``train`` alone, or the classes' folders.
            size: side in pixels that images are decoded to.
            name: name of the data set; None = the folder's.
            expected_classes: refuse any other number of classes; None = any.
            background: colour behind transparent images, such as white, '#ff8000' (in quotes) or [255, 128, 0].
            value_range: values that are black and white in grey images of more than 8 bits that do not say it
                themselves, such as [0, 4095]; None = such images are refused.
            test_fraction: the part of each class that is for testing where there is no folder of test images, above 0
                and below 1; None = 0.2.
        """
        super().__init__(root, size, expected_classes, background, value_range)
        self.name = name
        self.test_fraction = test_part("test_fraction", test_fraction)
        self._fraction_given = test_fraction is not None

    def count(self) -> int | None:
        """The folders of classes, where they are there."""
        train = self.root / "train"
        return len(class_folders(train if train.is_dir() else self.root)) or None

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images of the folder, decoded or from the cache.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a class is empty or not in both parts, or images cannot be read; `test_fraction` is given and
                there is a folder of test images.
        """
        sweep(cache_dir)
        parts = self.parts(cache_dir)
        images = load_images("imagefolder", self.decoder, self.root, parts, cache_dir)
        return Dataset(self.name or self.root.resolve().name, images[0], images[1], tuple(parts[0].by_class))

    def parts(self, cache_dir: Path) -> tuple[Files, Files]:
        """The files of training and of test images by class, as `load` reads them; raises what it raises of them."""
        train, test = self.folders()
        listing = list_classes(train, self.expected_classes)
        if test is None:
            warn_of_left_out(train, listing.left_out)
            return cut_parts("imagefolder", listing.classes, train, self.test_fraction, cache_dir)
        if self._fraction_given:
            raise ValueError(
                f"data.source.test_fraction is {self.test_fraction:g}, but {test} is there and has the test images; "
                "leave the field out"
            )
        others = list_classes(test, self.expected_classes)
        warn_of_left_out(self.root, [*listing.left_out, *others.left_out])
        check_same_classes(train, listing.classes, test, others.classes)
        return Files("train", listing.classes), Files("test", others.classes)

    def folders(self) -> tuple[Path, Path | None]:
        """The folder of the training images' classes, and that of the test images; None where there is none.

        Raises:
            FileNotFoundError: there is a folder of test images, and none of training images.
        """
        tests = [self.root / name for name in TEST_FOLDERS if (self.root / name).is_dir()]
        train = self.root / "train"
        if train.is_dir():
            if others := [folder.name for folder in tests[1:]]:
                warnings.warn(f"{self.root}: {', '.join(others)} left out; {tests[0].name} is tested on", stacklevel=2)
            return train, (tests[0] if tests else None)
        if tests[:1] == [self.root / "test"] or not self.root.is_dir():
            raise FileNotFoundError(
                f"{train} is not there; it must be a folder with one folder of images per class, or {self.root} itself "
                "must be one"
            )
        return self.root, None


class ImageArchive(ImageFiles):
    """A known set of images of 200 classes, in a folder or in the archive that it is published as."""

    inner: str
    """The folder in the archive."""

    def __init__(
        self,
        root: str,
        size: int = 224,
        expected_classes: int = 200,
        background: str | tuple[int, int, int] = "white",
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Name what to read.

        Args:
            root: the unpacked folder, or the archive, then unpacked into the cache.
            size: side in pixels that images are decoded to.
            expected_classes: refuse any other number of classes.
            background: colour behind transparent images. See ImageFolder.
            value_range: values that are black and white in images that do not say it themselves. See ImageFolder.
        """
        super().__init__(root, size, expected_classes, background, value_range)

    def folder(self, cache_dir: Path) -> Path:
        """The folder `root`, or that of the archive in the cache, unpacked now or before.

        Raises:
            ValueError: the archive cannot be read, is too large, or has no such folder.
        """
        if not self.root.is_file():
            return self.root
        contents = Contents(self.root, cache_dir)
        (digest,) = contents.of([self.root], MAX_ARCHIVE)
        if not digest:
            size = self.root.stat().st_size
            raise ValueError(f"{self.root} ({size:,} bytes) cannot be read, or has more than {MAX_ARCHIVE:,} bytes")
        folder = cache_dir / f"{self.inner}-{digest[:20]}"
        if not folder.is_dir():
            unpack(self.root, self.inner, folder)
        contents.save()
        return folder


class ImageNetR(ImageArchive):
    """ImageNet-R, 30,000 renditions of 200 ImageNet classes.

    There is no official split. A random 20 % of each class, the same in every run, is the test set; the names
    of the test images are kept in the cache folder, so that they outlive changes of the random generator.

    Args:
        root: the unpacked ``imagenet-r`` folder, or ``imagenet-r.tar``, then unpacked into the cache.
    """

    inner = "imagenet-r"

    def load(self, cache_dir: Path) -> Dataset:
        """Return ImageNet-R, decoded or from the cache.

        Raises:
            FileNotFoundError: root is missing.
            ValueError: not the expected classes, too few images of one, or images cannot be read.
        """
        sweep(cache_dir)
        root = self.folder(cache_dir)
        listing = list_classes(root, self.expected_classes)
        warn_of_left_out(root, listing.left_out)
        parts = cut_parts("imagenet-r", listing.classes, root, 0.2, cache_dir)
        train, test = load_images("imagenetr", self.decoder, root, parts, cache_dir)
        return Dataset("imagenet-r", train, test, tuple(listing.classes))


class _Listing(NamedTuple):
    """What a folder of class folders holds.

    Args:
        classes: sorted image files by class, in the order of the sorted class names.
        left_out: files in class folders that are none of these, and images beside the folders.
    """

    classes: dict[str, list[Path]]
    left_out: list[Path]


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, each of which is of a class; none where it is not there."""
    return (
        sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
        if folder.is_dir()
        else []
    )


def list_classes(folder: Path, expected: int | None) -> _Listing:
    """The images of a folder with a folder for each class.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class, another number of them than `expected`, one without images, or two that look alike.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; it must be a folder with one folder of images per class")
    found = _Listing({}, [])
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            found.left_out.extend([entry] if _has_image_suffix(entry) else [])
            continue
        images = found.left_out if _hidden(entry.name) else found.classes.setdefault(entry.name, [])
        for path, used in sorted(_files(entry, frozenset(), _hidden(entry.name))):
            (images if used else found.left_out).append(Path(*path))
    if not found.classes or (expected is not None and len(found.classes) != expected):
        wanted = "at least 1" if expected is None else expected
        raise ValueError(f"{folder} holds {len(found.classes)} class folders, expected {wanted}; is the root right?")
    for name, paths in found.classes.items():
        if not paths:
            suffixes = ", ".join(sorted(image_suffixes()))
            raise ValueError(f"{folder / name} holds no image ({suffixes}); add some or delete the folder")
    _check_looks(folder, found.classes)
    return found


def _files(folder: Path, above: frozenset[Path], hidden: bool) -> Iterator[tuple[tuple[str, ...], bool]]:
    """All files at any depth by the parts of their paths, and whether they are images.

    A link to a folder that this one is in is left alone.
    """
    above |= {folder.resolve()}
    with os.scandir(folder) as entries:
        for entry in entries:
            path, hides = Path(entry.path), hidden or _hidden(entry.name)
            if not entry.is_dir():
                yield path.parts, not hides and entry.is_file() and _has_image_suffix(path)
            elif path.resolve() not in above:
                yield from _files(path, above, hides)


def _has_image_suffix(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _NO_IMAGES


def warn_of_left_out(root: Path, left_out: list[Path]) -> None:
    """Warn of files that are no images that can be used, if there are any."""
    if not left_out:
        return
    names = ", ".join(path.relative_to(root).as_posix() for path in left_out[:_NAMED])
    more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    files = "1 file is" if len(left_out) == 1 else f"{len(left_out)} files are"
    warnings.warn(
        f"{root}: {files} left out, which are hidden, in no class's folder, or without the suffix of an image that can "
        f"be read: {names}{more}",
        stacklevel=3,
    )


def _looks(name: str) -> str:
    """The same for names that look the same: composed or not, of another width, with invisible characters."""
    plain = unicodedata.normalize("NFKC", name)
    return " ".join("".join(c for c in plain if unicodedata.category(c) not in ("Cf", "Cc")).split())


def _check_looks(folder: Path, names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(_looks(name), name)) != name:
            raise ValueError(
                f"{folder} holds two classes that look alike, {other!a} and {name!a}; rename one, or put their images "
                "together"
            )


def check_same_classes(train_in: Path, train: Iterable[str], test_in: Path, test: Iterable[str]) -> None:
    """Raise FileNotFoundError where a class has a folder in one of two places alone."""
    unpaired = sorted(set(train) ^ set(test))
    if not unpaired:
        return
    name = unpaired[0]
    there, lacking = (train_in, test_in) if name in set(train) else (test_in, train_in)
    for other in unpaired[1:]:
        if _looks(other).casefold() == _looks(name).casefold():
            raise FileNotFoundError(
                f"{lacking / name} is not there, but one that looks like it: {name!a} in {there.name}, "
                f"{other!a} in {lacking.name}; rename one"
            )
    others = {1: "", 2: " nor is 1 other,"}.get(len(unpaired), f" nor are {len(unpaired) - 1} others,")
    raise FileNotFoundError(
        f"{lacking / name} is not there,{others} and train and test need images of the same classes"
    )
