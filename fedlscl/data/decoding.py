"""Image files as arrays, with the colours and the orientation that a viewer shows."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from fedlscl.data.colours import rgb, to_srgb

MAX_PIXELS = 89_478_485
"""Pixels of an image; Pillow warns of a decompression bomb above. As RGB they take 350 MB."""

MAX_BYTES = 2**30
"""Bytes of a file; `MAX_PIXELS` of four colours with 16 bits each, uncompressed, take less."""

LARGE = 2**24
"""Pixels of an image beyond which only one is decoded at a time, lest many take the memory together."""

LONG = 4
"""Of an image with a longer side more than so many times the shorter one, only the middle is resized."""

_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Of Pillow's formats: stubs without a decoder, containers, and a program that Ghostscript would run."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""

_LARGE_ONE = threading.Lock()

_FEW_BITS = 2**14
"""16-bit values all below this may be of 10, 12 or 14 bits."""


class Decoded(NamedTuple):
    """An image, and whether it is of one colour though the file's pixels differ."""

    pixels: NDArray[np.uint8]
    vanished: bool


class Decoder:
    """Reads image files as RGB squares, as a viewer shows them.

    - The EXIF orientation is applied, in whatever way the format carries it. Of several frames or pages the first is
      taken. The format is known by the content, whatever the suffix.
    - Transparent parts show the background.
    - An embedded colour profile is applied (to sRGB, perceptual intent) and so is a PNG's gamma where there is no
      profile. As viewers do, a profile that is broken or of another kind of colours is ignored.
    - 16-bit values keep their upper 8 bits. Values of more than 8 bits without a certain scale (floating point, 32
      bits, signed, or 16-bit ones that are all below 16384 and so may have 10, 12 or 14 bits) need `value_range`.
    - The shorter side is resized to `size` (bicubic, antialiased) and the centre is cut out; an image that is
      size x size already keeps its pixels. Where one side is more than 4 times the other, only the middle is looked at.

    Args:
        size: side in pixels, above 0.
        background: what transparent parts show: a name or #rrggbb as in CSS, or [red, green, blue] of 0..255. Most
            viewers take white; others take a pattern of squares, which nobody wants to be learned.
        value_range: the values that are black and white in grey images that do not say it themselves; None = such
            images are refused.

    Raises:
        ValueError: for an impossible value, named.
    """

    def __init__(
        self,
        size: int,
        background: str | Sequence[int] = "white",
        value_range: Sequence[float] | None = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"size is {size!r}; it must be a number of pixels above 0")
        self.size = size
        self.background = rgb(background)
        self.value_range = _range(value_range)

    @property
    def settings(self) -> tuple[object, ...]:
        """What tells decoders apart."""
        return self.size, self.background, self.value_range

    def decode(self, content: bytes, name: str | Path) -> Decoded:
        """Decode the content of a file.

        Args:
            content: all of it.
            name: what errors call it.

        Returns:
            Pixels of shape (3, size, size).

        Raises:
            ValueError: the content is no image, a damaged one, too large, or of values without a certain scale.
        """
        try:
            with Image.open(io.BytesIO(content), formats=readable()) as image:
                if (pixels := math.prod(image.size)) > MAX_PIXELS:
                    raise _Refused(f"has {pixels:,} pixels, more than {MAX_PIXELS:,}; scale it down")
                with _LARGE_ONE if pixels > LARGE else nullcontext():
                    return self._decoded(image)
        except MemoryError:
            raise
        except _Refused as error:
            raise ValueError(f"{name} {error}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels; scale it down") from None
        except Exception as error:  # broken files make Pillow's decoders raise almost anything
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no format that is known" if unknown else " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{name} cannot be read as an image ({reason}); replace or delete it") from error

    def __call__(self, path: str | Path) -> NDArray[np.uint8]:
        """Pixels (3, size, size) of a file; see `decode` and `content_of`."""
        return self.decode(content_of(Path(path)), path).pixels

    def _decoded(self, image: Image.Image) -> Decoded:
        stored = _stored(image)
        image.load()
        shown = self._rgb(image, stored)
        if (turn := _TURNS.get(_orientation(image))) is not None:
            shown = shown.transpose(turn)
        square = _square(shown, self.size)
        pixels = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
        return Decoded(pixels, _one_colour(square) and _one_colour(shown) and not _one_colour(image))

    def _rgb(self, image: Image.Image, stored: _Stored) -> Image.Image:
        """The image in sRGB, turned as it is stored."""
        colours, alpha = image, None
        if image.mode.startswith("I;16") or image.mode in ("I", "F") or stored.signed:
            values = np.asarray(image).view(np.int8) if stored.signed else np.asarray(image)
            if (clear := image.info.get("transparency")) is not None:
                alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
            colours = Image.fromarray(self._grey(values, image.mode, stored))
        elif image.has_transparency_data:
            if image.mode == "L" and stored.grey_step > 1:  # Pillow scales the pixels of 2 and 4 bits, not this value
                image.info["transparency"] *= stored.grey_step
            if image.mode == "RGB" and stored.wide:  # of which Pillow reads the upper byte alone
                image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
            grey = image.mode in ("1", "L", "LA", "La")
            both = image.convert("LA" if grey else "RGBA")
            alpha, colours = both.getchannel("A"), both.convert("L" if grey else "RGB")
        elif image.mode in ("1", "P", "PA"):
            colours = image.convert("L" if image.mode == "1" else "RGB")
        if stored.wide:
            self._check_wide(colours)
        colours = to_srgb(colours, image.info)
        if alpha is not None and alpha.getextrema() != (255, 255):
            flat = Image.new("RGB", image.size, self.background)
            flat.paste(colours, mask=alpha)
            colours = flat
        return colours

    def _grey(self, values: NDArray[Any], mode: str, stored: _Stored) -> NDArray[np.uint8]:
        """Grey values of more than 8 bits as 8 bits."""
        low, high = stored.value_range or self.value_range or (0.0, 65535.0)
        found = (float(values.min()), float(values.max()))
        if not stored.value_range and not self.value_range:
            if not mode.startswith("I;16") or stored.scale_unknown:
                kind = "floating-point" if mode == "F" else "signed or 32-bit"
                raise _Refused(
                    f"has {kind} values ({found[0]:g} to {found[1]:g}), which have no certain black and white; set "
                    "value_range to them, such as [0, 1], or convert the file to 8 bits"
                )
            if 0 < found[1] < _FEW_BITS:
                bits = max(10, int(found[1]).bit_length() + int(found[1]).bit_length() % 2)
                raise _Refused(
                    f"has 16-bit values up to {found[1]:.0f} only, which may be of {bits} bits; set value_range to "
                    f"black and white, such as [0, {2**bits - 1}], or [0, 65535] if it is as dark as that"
                )
        grey = np.empty(values.shape, np.uint8)
        for rows in np.array_split(np.arange(len(values)), math.ceil(values.size / LARGE)):  # in blocks, for memory
            block = _scaled(values[rows], low, high)
            if not (block.min() >= 0 and block.max() <= 255):  # NaN is neither
                raise _Refused(f"has values from {found[0]:g} to {found[1]:g}, outside value_range [{low:g}, {high:g}]")
            grey[rows] = block
        return 255 - grey if stored.white_is_zero else grey

    def _check_wide(self, colours: Image.Image) -> None:
        """Refuse colours of 16 bits that may have fewer; Pillow has dropped the lower 8."""
        highest = int(max(high for _, high in _extrema(colours)))
        if 0 < highest < _FEW_BITS >> 8 and self.value_range != (0, 65535):
            raise _Refused(
                f"has 16-bit colours up to {highest * 256 + 255} only, which may be of fewer bits; convert the file to "
                "8 bits, or set value_range to [0, 65535] if it is as dark as that"
            )


def decode_image(
    path: str | Path,
    size: int,
    background: str | Sequence[int] = "white",
    value_range: Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Read one image file, see `Decoder`.

    Returns:
        Pixels of shape (3, size, size).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as an image.
    """
    return Decoder(size, background, value_range)(path)


def content_of(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, larger than `MAX_BYTES`, or may not be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file; name an image file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, more than {MAX_BYTES:,}; scale it down")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {path}") from None
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read as an image ({error.strerror}); replace or delete it") from error


@cache
def readable() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NO_PICTURES)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes that files of these formats have, in lower case with the dot."""
    formats = set(readable())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


class _Refused(ValueError):
    """An image that is not damaged, but of no use; the text goes on after the file's name."""


class _Stored(NamedTuple):
    """What a file says of its values and Pillow does not hand on with the pixels.

    Args:
        value_range: black and white, where the file states them.
        wide: colours of 16 bits, of which Pillow reads the upper 8.
        scale_unknown: 16-bit values that are signed or counts.
        signed: 8-bit values, of -128..127, which Pillow reads as those of 0..255.
        white_is_zero: and black is the highest value.
        grey_step: distance of two greys after Pillow has scaled those of 1, 2 or 4 bits.
    """

    value_range: tuple[float, float] | None = None
    wide: bool = False
    scale_unknown: bool = False
    signed: bool = False
    white_is_zero: bool = False
    grey_step: int = 1


def _stored(image: Image.Image) -> _Stored:
    tile: Any = getattr(image, "tile", None) or [None]
    arguments = tile[0][-1] if tile[0] else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    raw = raw if isinstance(raw, str) else ""
    value_range = None
    white_is_zero = signed = False
    if (image.format == "PPM" and image.mode == "I") or image.format == "JPEG2000":  # which Pillow scales
        value_range = (0.0, 65535.0)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        if bits == (12,):
            value_range = (0.0, 4095.0)
        white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        signed = image.mode == "L" and 2 in image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    return _Stored(
        value_range=value_range,
        wide=";16" in raw and not image.mode.startswith("I"),
        scale_unknown=image.format in ("FITS", "MCIDAS"),
        signed=signed,
        white_is_zero=white_is_zero,
        grey_step={"L;2": 85, "L;4": 17}.get(raw, 1),
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or none that can be read, which viewers pass over."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF makes Pillow raise almost anything
        return 1
    return found if isinstance(found, int) else 1


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Values as greys of 0..255, whole numbers."""
    if values.dtype.kind in "iu" and low.is_integer() and high.is_integer() and high - low >= 255:
        # as many values for each grey: of 0..65535 these are the upper 8 bits, as Pillow takes them of colours
        return (values.astype(np.int64) - int(low)) * 256 // (int(high) - int(low) + 1)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low)))


def _square(image: Image.Image, size: int) -> Image.Image:
    """Resized, and cut to the centre."""
    shorter, longer = sorted(image.size)
    if longer > LONG * shorter:  # all of it, resized, could take gigabytes
        left, top = ((side - min(side, LONG * shorter)) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    if shorter != size:
        width, height = (size * side // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """The lowest and the highest value of each band."""
    found: Any = image.getextrema()
    return list(found) if isinstance(found[0], tuple) else [found]


def _one_colour(image: Image.Image) -> bool:
    return all(low == high for low, high in _extrema(image))


def _range(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    if value_range is None:
        return None
    low, high = (float(value) for value in value_range) if len(value_range) == 2 else (math.nan, math.nan)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range is {list(value_range)}; it must be the values of black and of white, as [0, 1]")
    return low, high
