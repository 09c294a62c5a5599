"""Colours as a screen shows them: sRGB, whatever a file's profile or gamma says."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

_SAME_COLOUR = 3
"""Of 255: a colour profile that changes nothing by more is sRGB, which profiles of many makers say in other words."""


def rgb(background: str | Sequence[int]) -> tuple[int, int, int]:
    """A colour's red, green and blue of 0..255.

    Raises:
        ValueError: it is none.
    """
    problem = ValueError(
        f"background is {background!r}; it must be a colour such as white or '#ff8000', which YAML wants in quotes, or "
        "[red, green, blue] of 0..255"
    )
    if isinstance(background, str):
        try:
            found: tuple[int, ...] = ImageColor.getrgb(background)
        except ValueError:
            raise problem from None
    else:
        found = tuple(background or ())  # None, of what YAML takes for a comment
    if len(found) != 3 or any(type(value) is not int or not 0 <= value <= 255 for value in found):
        raise problem
    red, green, blue = found
    return red, green, blue


def to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Colours without transparency as sRGB, mode RGB, by what `info` has of Pillow's: a profile, or a gamma."""
    if image.mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        return transform.apply(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    image = image.convert("RGB")
    if not profile and "srgb" not in info and isinstance(gamma, float) and 0 < gamma <= 10:
        exponent = 1 / (2.2 * gamma)
        if abs(exponent - 1) > 0.05:  # less nobody sees, and programs write 1 / 2.2 in many ways
            image = image.point([round(255 * (value / 255) ** exponent) for value in range(256)] * 3)
    return image


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where it is sRGB already, is broken, or of other colours than `mode`."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode in ("L", "RGB"):
            steps = np.arange(0, 256, 15, dtype=np.uint8)
            grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
            same = Image.fromarray(grid if mode == "RGB" else steps[None])
            changed = np.asarray(transform.apply(same), dtype=int) - np.asarray(same.convert("RGB"), dtype=int)
            if np.abs(changed).max() <= _SAME_COLOUR:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform
