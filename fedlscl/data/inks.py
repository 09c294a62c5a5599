"""Images of another source in random colours: what a frozen ViT that never saw colours does not see through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlscl.checks import at_least
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.seeds import numpy_generator

_SEED = 20261  # not the run's: all runs share the images
_APART = 0.3  # of 0..1; closer colours could hide what is drawn


class Coloured(Source):
    """Grey images of another source, each with an ink in the place of white and a paper in the place of black.

    Ink and paper are random colours, which say nothing of an image's class, and either may be the darker. It is for
    drawings on an even ground, such as digits.
    """

    def __init__(self, source: Source, copies: int = 1) -> None:
        """Name what to colour.

        Args:
            source: where the images come from. To hold out training images, put `HeldOut` here: around copies it is
                refused, as is `data.split.local_test holdout30`.
            copies: how often each training image comes, in other colours each time. A test image comes once.
        """
        at_least(1, "data.source", copies=copies)
        self.source = source
        self.copies = copies

    def count(self) -> int | None:
        """As in the other source."""
        return self.source.count()

    @property
    def tested_on(self) -> str:
        """What the other source's are."""
        return self.source.tested_on

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images in colours, the same in every run; raises what the other source raises."""
        grey = self.source.load(cache_dir)
        train, test = _coloured(grey.train, self.copies, 0), _coloured(grey.test, 1, 1)
        return Dataset(f"coloured {grey.name}", train, test, grey.classes, copies=self.copies * grey.copies)

    def decode(self, path: Path, size: int) -> NDArray[np.uint8]:
        """Read an image file as the other source does, in the colours that it has."""
        return self.source.decode(path, size)


def _coloured(part: ImageSet, copies: int, stream: int) -> ImageSet:
    labels = np.tile(part.labels, copies)
    rng = numpy_generator(_SEED, stream)
    ink, paper = rng.random((2, len(labels), 3))
    while (close := np.abs(ink - paper).mean(axis=1) < _APART).any():
        ink[close], paper[close] = rng.random((2, int(close.sum()), 3))
    grey = np.asarray(part.images[:]).mean(axis=1, keepdims=True) / 255
    shades = np.tile(grey, (copies, 1, 1, 1))
    mixed = paper[:, :, None, None] + (ink - paper)[:, :, None, None] * shades
    return ImageSet(np.rint(255 * mixed).astype(np.uint8), labels)
