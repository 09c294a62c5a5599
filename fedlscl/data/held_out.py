"""Training images alone, some of them held out in the place of the test images: what a choice may be made on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlscl.checks import fraction as check_fraction
from fedlscl.data.source import HELD_OUT_IMAGES, Dataset, ImageSet, Source, cut_test

FRACTION = 0.3


class HeldOut(Source):
    """The training images of another source: of each class some are tested on, the same in every run, and none trained.

    The test images of that source are not in it. As they are, those held out are of all classes alike, whoever has how
    many images of which; `data.split.local_test holdout30` in contrast tests a client on images dealt as its own are.
    """

    def __init__(self, source: Source, fraction: float = FRACTION) -> None:
        """Name what to hold out.

        Args:
            source: where the images come from.
            fraction: of each class's training images, rounded; at least one is held out and one left.
        """
        check_fraction("data.source", fraction=fraction)
        self.source = source
        self.fraction = fraction

    @property
    def tested_on(self) -> str:
        """Training images of the other source, not its test images."""
        return HELD_OUT_IMAGES

    def load(self, cache_dir: Path) -> Dataset:
        """Return the training images in two parts; raises what the other source raises.

        Raises:
            ValueError: a class has a single training image, or images come in copies.
        """
        whole = self.source.load(cache_dir)
        whole.check_held_out("data.source HeldOut")
        held = held_out(whole.train.labels, self.fraction, whole.name)
        train, test = (_part(whole.train, np.flatnonzero(mask)) for mask in (~held, held))
        return Dataset(whole.name, train, test, whole.classes)

    def decode(self, path: Path, size: int) -> NDArray[np.uint8]:
        """Read an image file as the other source does."""
        return self.source.decode(path, size)


def held_out(labels: NDArray[np.int64], fraction: float = FRACTION, name: str = "data") -> NDArray[np.bool_]:
    """Which training images are held out, by their class ids (N,)."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        found = np.flatnonzero(labels == label)
        held[found[cut_test(len(found), fraction, label, f"{name}, class {label}")]] = True
    return held


def _part(images: ImageSet, chosen: NDArray[np.int64]) -> ImageSet:
    view: Any = _Chosen(images.images, chosen)
    return ImageSet(view, images.labels[chosen])


class _Chosen:
    """Some of many images (N, 3, H, W), read from where they are when they are asked for."""

    def __init__(self, images: NDArray[np.uint8], chosen: NDArray[np.int64]) -> None:
        self._images, self._chosen = images, chosen
        self.shape, self.ndim, self.dtype = (len(chosen), *images.shape[1:]), images.ndim, images.dtype

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, positions: Any) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = self._images[self._chosen[positions]]
        return found
