"""What a data set is, and where one comes from."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from fedlscl.data.decoding import decode_image
from fedlscl.seeds import numpy_generator

Part = Literal["train", "test"]
"""Which of the two image sets of a data set."""

_CUT_SEED = 20240  # of `cut_test`: not the run's seed, so that all runs share a test set


FINGERPRINT = "all:"
"""What fingerprints of data begin with; those of earlier versions, without it, were of 64 images."""

_HASHED_AT_ONCE = 256  # images


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, 3, H, W) in uint8, possibly memory-mapped, and their class ids (N,) in int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @classmethod
    def hashed(cls, images: NDArray[np.uint8], labels: NDArray[np.int64], digest: str) -> ImageSet:
        """Images whose `digest` somebody has computed; no field, so that a copy with other images has its own."""
        made = cls(images, labels)
        made.__dict__["digest"] = digest
        return made

    @cached_property
    def digest(self) -> str:
        """128-bit XXH3 of every pixel, in hexadecimal."""
        digest = xxhash.xxh3_128()
        for start in range(0, len(self.images), _HASHED_AT_ONCE):
            digest.update(self.images[start : start + _HASHED_AT_ONCE].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Owners:
    """Whose each image is: numbers of clients, of the training images (N,) and of the test images (M,), in int64."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def clients(self) -> int:
        """How many there are."""
        return int(self.train.max()) + 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set over the same classes; class id c is called ``classes[c]``.

    `complete` says that every class has images in both sets; in a part of a data set not every class needs to.
    `owners` says whose each image is, where it is somebody's; `copies` how often each training image comes, changed.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    complete: bool = True
    owners: Owners | None = None
    copies: int = 1

    def check_held_out(self, asked: str) -> None:
        """That training images can be held out.

        Args:
            asked: what asks for it.

        Raises:
            ValueError: copies of what is held out would be trained on.
        """
        if self.copies > 1:
            raise ValueError(
                f"{asked} holds out training images, but each image of {self.name} comes {self.copies} times: other "
                "copies of it would be trained on; hold out before copying (source HeldOut inside), or make 1 copy"
            )

    @property
    def sha256(self) -> str:
        """What tells data sets apart, whatever their names: the classes, all labels, and every pixel of both sets."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (self.train, self.test):
            digest.update(part.labels.tobytes())
            digest.update(json.dumps([part.images.shape, part.digest]).encode())
        return FINGERPRINT + digest.hexdigest()

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


TEST_IMAGES, HELD_OUT_IMAGES = "test images", "images held out of training"
"""What accuracies are of, as summaries say it."""


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

    @property
    def tested_on(self) -> str:
        """What its test images are."""
        return TEST_IMAGES

    def count(self) -> int | None:
        """How many classes there are, where that is known before an image is read."""
        return None

    def decode(self, path: Path, size: int) -> NDArray[np.uint8]:
        """Read an image file as the images of this source were read.

        Args:
            path: the file.
            size: side in pixels of the source's images.

        Returns:
            Pixels of shape (3, size, size).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be used as an image; see `decode_image`, which reads it by default.
        """
        return decode_image(path, size)


def cut_test(count: int, fraction: float, label: int, where: str | Path) -> NDArray[np.int64]:
    """Sorted positions of the test images among `count` images of a class without official split."""
    if count < 2:
        raise ValueError(f"{where} has {count} image; a training and a test image are needed")
    rng = numpy_generator(_CUT_SEED, label)
    tests = min(max(1, math.floor(fraction * count + 0.5)), count - 1)
    return np.sort(rng.permutation(count)[:tests])
