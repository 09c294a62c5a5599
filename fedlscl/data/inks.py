"""Images of another source in colours, of which a frozen ViT that never saw any knows little."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlscl.checks import at_least
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.seeds import numpy_generator

_SEED = 20261  # not the run's: all runs share the images
_APART = 0.3  # of 0..1; closer colours could hide what is drawn

INKS = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""The sixths of the colour wheel, in its order from hue 0 on."""

_SHADE = 0.25  # of a sixth: how far a hue may be from the middle of its own


class _Painted(Source):
    """Images of another source, `source`, with its grey turned to colours."""

    source: Source

    @property
    def tested_on(self) -> str:
        """What the other source's test images are."""
        return self.source.tested_on

    def decode(self, path: Path, size: int) -> NDArray[np.uint8]:
        """Read an image file as the other source does, in the colours that it has."""
        return self.source.decode(path, size)


class Coloured(_Painted):
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

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images in colours, the same in every run; raises what the other source raises."""
        grey = self.source.load(cache_dir)
        train, test = _coloured(grey.train, self.copies, 0), _coloured(grey.test, 1, 1)
        return Dataset(f"coloured {grey.name}", train, test, grey.classes, copies=self.copies * grey.copies)


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


class Inked(_Painted):
    """Grey images of another source in an ink of one of six hues; a class is what is drawn together with its ink.

    A class is called after both, such as '3 in red'. Which shape it is a model that has seen shapes can tell of few
    images, and which ink a small one learns. It is for drawings in white on black, such as digits.
    """

    def __init__(self, source: Source) -> None:
        """Name what to draw in ink.

        Args:
            source: where the images come from. To hold out training images, put `HeldOut` here: around the inks it is
                refused, as is `data.split.local_test holdout30`, since each image is there in each of them.
        """
        self.source = source

    def count(self) -> int | None:
        """Six times as many as in the other source."""
        known = self.source.count()
        return None if known is None else len(INKS) * known

    def load(self, cache_dir: Path) -> Dataset:
        """Return each image in each ink, in the same shades in every run; raises what the other source raises."""
        grey = self.source.load(cache_dir)
        train, test = _inked(grey.train, 2), _inked(grey.test, 3)
        classes = tuple(f"{drawn} in {ink}" for drawn in grey.classes for ink in INKS)
        return Dataset(f"inked {grey.name}", train, test, classes, copies=len(INKS) * grey.copies)


def _inked(part: ImageSet, stream: int) -> ImageSet:
    inks = len(INKS)
    ink = np.repeat(np.arange(inks), len(part.labels))
    rng = numpy_generator(_SEED, stream)
    hues = (ink + rng.uniform(-_SHADE, _SHADE, len(ink))) / inks % 1
    saturations, values = rng.uniform([[0.5], [0.8]], 1, (2, len(ink)))
    colours = np.array([colorsys.hsv_to_rgb(*of) for of in zip(hues, saturations, values, strict=True)])
    grey = np.asarray(part.images[:]).mean(axis=1, keepdims=True)
    drawn = colours[:, :, None, None] * np.tile(grey, (inks, 1, 1, 1))
    return ImageSet(np.rint(drawn).astype(np.uint8), np.tile(part.labels, inks) * inks + ink)
