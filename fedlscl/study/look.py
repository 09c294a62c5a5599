"""What a data set is like: classes, counts, sizes, and files that somebody should look at."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedlscl.checks import path as path_of
from fedlscl.data.cache import Contents, Files
from fedlscl.data.decoding import MAX_BYTES, readable
from fedlscl.data.folders import ImageFolder
from fedlscl.data.listed import ImageTable
from fedlscl.data.source import Dataset
from fedlscl.data.torchvision_sets import SETS

SMALLEST = 16
"""Side in pixels below which an image shows hardly anything."""

KINDS = ("torchvision", "huggingface", "medmnist")
"""What may stand before the name of a data set, with a colon."""

PACKED = {"digits": "Digits", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Data sets that take no fields, by the names that a person would write."""


class Doubt(NamedTuple):
    """A file that somebody should look at, and why."""

    path: str
    why: str


@dataclass(frozen=True)
class Look:
    """What a data set is like.

    Args:
        classes: names by class id.
        train: training images of each class.
        test: test images of each class.
        sizes: (width, height) of the images that were looked at.
        doubts: files that somebody should look at.
        notes: what reading it was warned of.
    """

    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    doubts: tuple[Doubt, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """In words."""
        few, many = int(np.argmin(self.train)), int(np.argmax(self.train))
        lines = [
            f"{len(self.classes)} classes, {sum(self.train):,} training and {sum(self.test):,} test images",
            f"training images of a class: {self.train[few]:,} ({self.classes[few]}) to {self.train[many]:,} "
            f"({self.classes[many]}), median {np.median(self.train):,.0f}",
        ]
        if self.sizes:
            shorter = [min(size) for size in self.sizes]
            common, count = Counter(self.sizes).most_common(1)[0]
            lines.append(
                f"shorter side: {min(shorter)} to {max(shorter)} px; most frequent: {common[0]} x {common[1]} "
                f"({100 * count / len(self.sizes):.0f} %)"
            )
        kinds = Counter(doubt.why.partition(":")[0] for doubt in self.doubts)
        lines += [f"doubtful: {count} x {why}" for why, count in kinds.items()]
        return [*lines, *self.notes]

    def table(self) -> str:
        """The doubtful files as CSV."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("path", "why"), *self.doubts])
        return text.getvalue()


def source_of(given: str) -> dict[str, object]:
    """The fields of the source that a person names; without the size of its images.

    Args:
        given: a folder, a CSV file, torchvision:NAME, huggingface:OWNER/NAME, medmnist:NAME, digits or cifar100.

    Raises:
        ValueError: if it is none of these.
    """
    kind, colon, name = given.partition(":")
    path = path_of(given)
    if path.is_dir():
        return {"class_path": "ImageFolder", "init_args": {"root": str(path.resolve())}}
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise ValueError(f"source is '{given}', a file; it must be a folder of images or a CSV file of paths")
        return {"class_path": "ImageTable", "init_args": {"root": str(path.resolve())}}
    if colon and kind in KINDS and name:
        classes = dict(zip(KINDS, ("Torchvision", "HuggingFace", "MedMNIST"), strict=True))
        return {"class_path": classes[kind], "init_args": {"name": name}}
    if given.lower() in PACKED:
        return {"class_path": PACKED[given.lower()]}
    if given in SETS:
        return {"class_path": "Torchvision", "init_args": {"name": given}}
    raise ValueError(
        f"source is '{given}', no folder or CSV file that is there; it may also be torchvision:NAME, "
        f"huggingface:OWNER/NAME, medmnist:NAME, {', '.join(PACKED)}"
    )


def look_at_files(source: ImageFolder | ImageTable, cache_dir: Path) -> Look:
    """Look at image files without decoding them: their headers and the hashes of their content.

    Raises what `source.load` raises of missing and impossible files.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train, test = source.parts(cache_dir)
    contents = Contents(source.root, cache_dir)
    files = [(part, name, path) for part in (train, test) for name, paths in part.by_class.items() for path in paths]
    paths = [path for _, _, path in files]
    hashes = contents.of(paths, MAX_BYTES)
    contents.save()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_size, paths))
    doubts = [Doubt(str(path), why) for path, why in zip(paths, found, strict=True) if isinstance(why, str)]
    sizes = tuple(size for size in found if not isinstance(size, str))
    for path, size in zip(paths, found, strict=True):
        if not isinstance(size, str) and min(size) < SMALLEST:
            doubts.append(Doubt(str(path), f"smaller than {SMALLEST} px: {size[0]} x {size[1]}"))
    return Look(
        tuple(train.by_class),
        _counts(train),
        _counts(test),
        sizes,
        (*doubts, *_repeated([(part.name, name, path) for part, name, path in files], hashes)),
        tuple(str(warning.message) for warning in warned),
    )


def look_at_images(dataset: Dataset) -> Look:
    """Look at a data set that is none of image files."""
    count = len(dataset.classes)
    train, test = (np.bincount(part.labels, minlength=count).tolist() for part in (dataset.train, dataset.test))
    height, width = dataset.train.images.shape[2:]
    return Look(dataset.classes, tuple(train), tuple(test), ((width, height),))


def _counts(part: Files) -> tuple[int, ...]:
    return tuple(len(paths) for paths in part.by_class.values())


def _size(path: Path) -> tuple[int, int] | str:
    """Width and height, or what is the matter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=readable()) as image:
                return image.size
    except UnidentifiedImageError:
        return "no image: of no format that is known"
    except Exception as error:  # broken files make Pillow raise almost anything
        return f"no image: {' '.join(str(error).split()) or type(error).__name__}"


def _repeated(files: Sequence[tuple[str, str, Path]], hashes: Sequence[str]) -> list[Doubt]:
    """Files with the content of another, by how much harm that does."""
    first: dict[str, tuple[str, str, Path]] = {}
    doubts = []
    for (part, name, path), digest in zip(files, hashes, strict=True):
        other_part, other_name, other = first.setdefault(digest, (part, name, path))
        if not digest or other == path:
            continue
        if other_name != name:
            doubts.append(Doubt(str(path), f"the same file in two classes: {other}"))
        elif other_part != part:
            doubts.append(Doubt(str(path), f"the same file for training and for testing: {other}"))
        else:
            doubts.append(Doubt(str(path), f"the same file twice in a class: {other}"))
    return doubts


def with_size(source: Mapping[str, object], size: int, takes_size: bool) -> dict[str, object]:
    """The fields of a source whose images are to be decoded to a size."""
    fields = dict(source)
    if takes_size:
        init = fields.get("init_args")
        fields["init_args"] = {**(init if isinstance(init, dict) else {}), "size": size}
    return fields
