"""Small image files for the tests of the data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(seed: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    """(height, width, 3), other pixels for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_folder(root: Path, names: tuple[str, ...] = ("ant", "bee"), train: int = 3, test: int = 2) -> Path:
    """Write PNG files of 8x8 pixels, numbered through: image k of the data set has ``pixels(k)``."""
    seed = 0
    for part, count in (("train", train), ("test", test)):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixels(seed)).save(root / part / name / f"{k}.png")
                seed += 1
    return root
