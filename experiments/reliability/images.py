"""Odd images: every format and pixel format that Pillow writes, read back and compared with what was drawn."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from fedlscl.data.decoding import Decoder, readable

COUNT = 300  # files with random damage
SIDE = 32  # pixels
EVERY_MODE = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "F"),
    *("I;16", "I;16B", "I;16L"),
)
LOSSY = {"JPEG": 12, "MPO": 12, "WEBP": 4, "AVIF": 12, "JPEG2000": 2, "LAB": 20, "YCbCr": 3, "DDS": 0}
"""By which a pixel may differ, of 255; by no more than 0 elsewhere."""

BEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "ICO": {"sizes": [(SIDE, SIDE)]},
    "ICNS": {},
}
WITH_EXIF = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF")
STORED = {  # what turned the upright image into the one that is stored with this EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Row(NamedTuple):
    """What was tried, what should have come out, what did, and whether that is a fault."""

    what: str
    expected: str
    found: str
    fault: bool


def drawing(seed: int = 0) -> Image.Image:
    """A picture of a few soft colours that no turn or mirror leaves as it is."""
    rng = np.random.default_rng(seed)
    pixels = np.repeat(np.repeat(rng.integers(0, 4, (4, 4, 3)) * 60 + 30, SIDE // 4, 0), SIDE // 4, 1)
    pixels[: SIDE // 4, : SIDE // 2] = (250, 40, 10)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file that Pillow makes of it."""
    file = io.BytesIO()
    image.save(file, kind, **{**BEST.get(kind, {}), **options})
    return file.getvalue()


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An RGB image in another pixel format, of its whole range."""
    if mode.startswith("I;16"):
        values = np.asarray(image.convert("L")).astype(">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, image.size, values.astype(values.dtype).tobytes())
    if mode in ("I", "F"):
        return image.convert("L").convert(mode)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        made = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert made is not None
        return made
    if mode == "PA":
        return image.convert("P").convert("PA")
    return image.convert(mode)


def upright(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    """What a viewer shows of it, opaque as it is."""
    grey = mode in ("I", "F") or mode.startswith("I;16")
    same = image.convert("L") if grey else image if mode == "LAB" else in_mode(image, mode)
    return np.asarray(same.convert("RGB"))


def compare(
    what: str, content: bytes, expected: NDArray[np.uint8] | str, bound: int = 0, decoder: Decoder | None = None
) -> Row:
    """Decode a file; `expected` are its pixels (H, W, 3), or a part of the refusal."""
    wanted = f"refused: {expected}" if isinstance(expected, str) else f"at most {bound}"
    try:
        pixels = (decoder or Decoder(SIDE)).decode(content, "it").pixels.transpose(1, 2, 0)
    except ValueError as error:
        fault = not isinstance(expected, str) or expected not in str(error)
        return Row(what, wanted, str(error) if fault else "refused", fault)
    if isinstance(expected, str):
        return Row(what, wanted, f"read, {pixels.min()} to {pixels.max()}", True)
    off = int(np.abs(pixels.astype(int) - expected).max())
    return Row(what, wanted, str(off), off > bound)


def formats() -> Iterator[Row]:
    """Every format and pixel format that is written and read."""
    for kind in sorted(set(readable()) & set(Image.SAVE)):
        # icons are written in many sizes, of which the largest is read
        image = drawing().resize((1024, 1024), Image.Resampling.NEAREST) if kind == "ICNS" else drawing()
        for mode in EVERY_MODE:
            stored = in_mode(image, mode)
            try:
                content = saved(stored, kind)
                with Image.open(io.BytesIO(content)) as back:
                    read = back.mode
            except (OSError, ValueError, KeyError, UnidentifiedImageError):
                continue  # not written in this mode, or not by this build
            bound = max(LOSSY.get(kind, 0), LOSSY.get(mode, 0) if mode != read or mode == "LAB" else 0)
            expected: NDArray[np.uint8] | str = upright(image, mode)
            if kind == "ICNS":
                small = Image.fromarray(upright(image, mode)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                expected = np.asarray(small)
                if mode == "P":  # Pillow loses the palette
                    expected = "cannot be read"
            if read in ("I", "F") and not (kind == "PPM" and mode.startswith("I;16")):
                expected = "value_range"
                if kind == "PPM" and mode == "I":  # which is read as what it says, of 0..65535
                    expected = np.zeros((SIDE, SIDE, 3), np.uint8)
                elif kind != "SPIDER":
                    yield compare(f"{kind}, {mode}", content, upright(image, mode), 0, Decoder(SIDE, "white", (0, 255)))
            elif mode in ("I", "F"):
                continue  # Pillow has made 8 or 16 bits of it when it wrote it
            elif mode.startswith("I;16") and read not in ("I;16", "I;16B", "I;16L", "I"):
                continue
            yield compare(f"{kind}, {mode}", content, expected, bound)


def orientations() -> Iterator[Row]:
    """All eight, in all formats that carry them, square and not."""
    for kind in WITH_EXIF:
        for orientation in range(1, 9):
            whole = drawing(1)
            for image in (whole, whole.crop((0, 0, SIDE, 20))):
                exif = Image.Exif()
                exif[0x0112] = orientation
                stored = image.transpose(STORED[orientation]) if orientation in STORED else image
                expected = Decoder(20 if image.height == 20 else SIDE).decode(saved(image, "PNG"), "it").pixels
                decoder = Decoder(image.height)
                what = f"{kind}, {orientation}{'' if image.width == image.height else ' (wide)'}"
                content = saved(stored, kind, exif=exif)
                yield compare(what, content, expected.transpose(1, 2, 0), LOSSY.get(kind, 0), decoder)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    turned = drawing(1).transpose(STORED[6])
    yield compare("JPEG, orientation 6 in XMP", saved(turned, "JPEG", xmp=xmp), np.asarray(drawing(1)), LOSSY["JPEG"])
    broken = saved(drawing(1), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield compare("JPEG, broken EXIF", broken, np.asarray(drawing(1)), LOSSY["JPEG"])


def transparency() -> Iterator[Row]:
    """Drawings on nothing, in every way that formats have, on three backgrounds."""
    image = drawing(2)
    grey, colours = np.asarray(image.convert("L")), np.asarray(image)
    alpha = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    rgba, la = np.dstack([colours, alpha]), np.dstack([grey, alpha])
    palette = image.quantize(16)
    shades = bytes(np.linspace(0, 255, 16).astype(np.uint8).tolist())
    index, shown = np.asarray(palette), np.asarray(palette.convert("RGB"))
    as_rgb, first = np.dstack([grey] * 3), colours[0, 0].tolist()
    clear = np.where((colours == first).all(-1), 0, 255)
    for background in ("white", "black", (12, 200, 99)):
        on = Decoder(SIDE, background)

        def laid(pixels: NDArray[np.uint8], opacity: NDArray[Any], on: Decoder = on) -> NDArray[np.uint8]:
            share = opacity[..., None] / 255
            return np.rint(pixels * share + np.array(on.background) * (1 - share)).astype(np.uint8)

        for kind in ("PNG", "TIFF", "WEBP", "TGA", "ICO", "QOI", "SGI", "DDS", "IM"):
            content = saved(Image.fromarray(rgba), kind)
            yield compare(f"{kind}, RGBA on {background}", content, laid(colours, alpha), 1, on)
        for kind in ("PNG", "TIFF", "TGA", "IM"):
            yield compare(f"{kind}, LA on {background}", saved(Image.fromarray(la), kind), laid(as_rgb, alpha), 1, on)
        opacity = np.frombuffer(shades, np.uint8)[index]
        content = saved(palette, "PNG", transparency=shades)
        yield compare(f"PNG, palette with shades on {background}", content, laid(shown, opacity), 1, on)
        for kind in ("PNG", "GIF"):
            content = saved(palette, kind, transparency=3)
            yield compare(f"{kind}, one clear colour on {background}", content, laid(shown, (index != 3) * 255), 0, on)
        content = saved(image, "PNG", transparency=tuple(first))
        yield compare(f"PNG, RGB with a clear one on {background}", content, laid(colours, clear), 0, on)
        content = saved(image.convert("L"), "PNG", transparency=int(grey[0, 0]))
        yield compare(
            f"PNG, grey with a clear one on {background}", content, laid(as_rgb, (grey != grey[0, 0]) * 255), 0, on
        )
        for bits in (1, 2, 4, 16):
            values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2 ** min(bits, 8) * (257 if bits == 16 else 1)
            content = png(values, bits, clear=1 if bits < 16 else 257)
            pixels = np.dstack([values * 255 // (2**bits - 1)] * 3).astype(np.uint8)
            opacity = (values != (1 if bits < 16 else 257)) * 255
            yield compare(
                f"PNG, {bits}-bit grey with a clear one on {background}", content, laid(pixels, opacity), 0, on
            )


def depths() -> Iterator[Row]:
    """More than 8 bits, with and without a certain scale."""
    ramp = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    eight = np.dstack([np.floor(ramp * 65535).astype(int) >> 8] * 3).astype(np.uint8)
    full, twelve = (np.floor(ramp * top).astype(np.uint16) for top in (65535, 4095))
    for kind in ("PNG", "TIFF", "JPEG2000", "IM"):
        bound = LOSSY.get(kind, 0)
        yield compare(f"{kind}, 16 bits", saved(Image.fromarray(full), kind), eight, bound)
        if kind != "JPEG2000":
            content = saved(Image.fromarray(twelve), kind)
            yield compare(f"{kind}, 12 bits in 16", content, "value_range")
            expected = np.dstack([twelve >> 4] * 3).astype(np.uint8)
            yield compare(
                f"{kind}, 12 bits in 16, range given", content, expected, 0, Decoder(SIDE, "white", (0, 4095))
            )
            dark = np.dstack([twelve >> 8] * 3).astype(np.uint8)
            yield compare(f"{kind}, dark, 16 bits", content, dark, 0, Decoder(SIDE, "white", (0, 65535)))
            outside = Decoder(SIDE, "white", (0, 1000))
            yield compare(f"{kind}, beyond the range", content, "outside value_range", 0, outside)
    colours = np.dstack([full, full[::-1], full.T])
    upper = (colours >> 8).astype(np.uint8)
    yield compare("PNG, RGB of 16 bits", png(colours, 16), upper)
    yield compare("PNG, RGB of 12 bits in 16", png(colours >> 4, 16), "value_range")
    inverted = saved(Image.fromarray(full), "TIFF", tiffinfo={262: 0})
    yield compare("TIFF, 16 bits, white is zero", inverted, 255 - eight)
    signed = saved(Image.fromarray(eight[..., 0] ^ 128), "TIFF", tiffinfo={339: 2})
    yield compare("TIFF, 8 bits with a sign", signed, "value_range")
    yield compare("TIFF, 8 bits with a sign, range given", signed, eight, 0, Decoder(SIDE, "white", (-128, 127)))
    pgm = f"P5 {SIDE} {SIDE} 4095\n".encode() + twelve.astype(">u2").tobytes()
    yield compare("PGM that says 12 bits", pgm, np.dstack([np.rint(twelve / 4095 * 65535).astype(int) >> 8] * 3))
    for name, values, given in (
        ("float32 of 0..1", ramp.astype(np.float32), (0, 1)),
        ("float32 of -5..5", (ramp * 10 - 5).astype(np.float32), (-5, 5)),
        ("int32", (ramp * 100000).astype(np.int32), (0, 100000)),
    ):
        content, exact = saved(Image.fromarray(values), "TIFF"), np.dstack([np.rint(ramp * 255)] * 3)
        yield compare(f"TIFF, {name}", content, "value_range")
        yield compare(f"TIFF, {name}, range given", content, exact.astype(np.uint8), 1, Decoder(SIDE, "white", given))
    values = ramp.astype(np.float32)
    values[3, 4] = np.nan
    yield compare(
        "TIFF, float32 with NaN", saved(Image.fromarray(values), "TIFF"), "outside", 0, Decoder(SIDE, "white", (0, 1))
    )


def colour_spaces() -> Iterator[Row]:
    """Profiles, gamma and CMYK."""
    image = drawing(3)
    pixels = np.asarray(image)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield compare("PNG, sRGB profile", saved(image, "PNG", icc_profile=srgb), pixels)
    yield compare("PNG, broken profile", saved(image, "PNG", icc_profile=b"nothing" * 30), pixels)
    yield compare(
        "PNG, grey with an RGB profile", saved(image.convert("L"), "PNG", icc_profile=srgb), upright(image, "L")
    )
    for kind in ("PNG", "TIFF", "WEBP"):
        swapped = saved(image, kind, icc_profile=swapping_profile())
        yield compare(f"{kind}, profile with red and blue exchanged", swapped, pixels[..., ::-1], 4)
    linear = np.rint(255 * (pixels / 255) ** 2.2).astype(np.uint8)
    content = png(linear, 8, extra=chunk(b"gAMA", struct.pack(">I", 100000)))
    bright = np.rint(255 * (linear / 255) ** (1 / 2.2))
    yield compare("PNG, gamma 1", content, bright.astype(np.uint8), 1)
    yield compare("PNG, usual gamma", png(pixels, 8, extra=chunk(b"gAMA", struct.pack(">I", 45455))), pixels)
    cmyk = image.convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        yield compare(f"{kind}, CMYK", saved(cmyk, kind), np.asarray(cmyk.convert("RGB")), LOSSY.get(kind, 0))


def sizes() -> Iterator[Row]:
    """The smallest, the longest and the largest, cut files, and other suffixes."""
    red = np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8)
    for width, height in ((1, 1), (1, 20000), (20000, 1), (3, 65000), (2000, 2000)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = compare(f"PNG, {width} x {height}", saved(Image.new("RGB", (width, height), "red"), "PNG"), red)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found = f"{row.found}, {grown:.0f} MiB more memory" if grown > 1 else row.found
        yield row._replace(found=found, fault=row.fault or grown > 200)
    for width, height in ((20000, 5000), (30000, 30000), (2**31 - 1, 1)):
        yield compare(f"PNG, header of {width} x {height}", png_header(width, height), "pixels")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in sorted(set(readable()) & set(Image.SAVE)):
        try:
            content = saved(noise, kind)
        except (OSError, ValueError, KeyError):
            continue
        try:
            whole = Decoder(SIDE).decode(content, "it").pixels
            half = Decoder(SIDE).decode(content[: len(content) // 2], "it").pixels
        except ValueError:
            yield Row(f"the first half, {kind}", "refused", "refused", False)
        else:
            same = bool((whole == half).all())  # another size of the same icon may come first
            yield Row(f"the first half, {kind}", "refused", "as the whole" if same else "read", not same)


def damage(seed: int, count: int) -> Iterator[Row]:
    """Files with a few bytes changed or a part missing: read or refused, and nothing else, in seconds."""
    rng = np.random.default_rng(seed)
    files = {}
    for kind in sorted(set(readable()) & set(Image.SAVE)):
        try:
            files[kind] = saved(drawing(), kind)
        except (OSError, ValueError, KeyError):
            continue
    read = refused = 0
    for _ in range(count):
        kind = sorted(files)[rng.integers(len(files))]
        content = bytearray(files[kind])
        for position in rng.integers(0, len(content), rng.integers(1, 9)):
            content[position] = rng.integers(256)
        if rng.random() < 0.3:
            content = content[: rng.integers(1, len(content))]
        since = time.monotonic()
        try:
            pixels = Decoder(SIDE).decode(bytes(content), "it").pixels
            read += 1
            odd = pixels.shape != (3, SIDE, SIDE) or pixels.dtype != np.uint8
            if odd or time.monotonic() - since > 5:
                yield Row(
                    f"{kind}, damaged", "read or refused", f"{pixels.shape}, {time.monotonic() - since:.1f} s", True
                )
        except ValueError:
            refused += 1
        except Exception as error:
            yield Row(f"{kind}, damaged", "read or refused", repr(error), True)
    yield Row(f"{count} damaged files", "read or refused", f"{read} read, {refused} refused", False)


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """The beginning of a PNG file, with which no more than its size can be known."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def png(values: NDArray[Any], bits: int, clear: int | None = None, extra: bytes = b"") -> bytes:
    """A PNG file of grey (H, W) or RGB (H, W, 3) values of 1 to 16 bits, with one grey that is transparent."""
    rows = values.reshape(len(values), -1)
    if bits < 8:
        packed = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -bits:].reshape(len(rows), -1)
        lines = np.packbits(packed, axis=-1)
    else:
        lines = rows.astype(">u2" if bits == 16 else np.uint8)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 2 if values.ndim == 3 else 0, 0, 0, 0)
    marked = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + marked + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def swapping_profile() -> bytes:
    """sRGB's profile with the primaries of red and blue exchanged."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(content[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack_from(">I", content, 128)[0], 12)
    }
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    content[red : red + 8], content[blue : blue + 8] = content[blue : blue + 8], content[red : red + 8]
    return bytes(content)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of one format with the same outcome as one."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for row in rows:
        kind, _, what = row.what.partition(", ")
        groups.setdefault((kind, row.expected, row.found, row.fault), []).append(what)
    return [
        Row(f"{kind}: {'; '.join(filter(None, what))}".removesuffix(": "), str(expected), str(found), bool(fault))
        for (kind, expected, found, fault), what in groups.items()
    ]


def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Read what was drawn, in a table for each kind of question."""
    del folder  # nothing is written
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "Formats and pixel formats": formats,
        "Orientation": orientations,
        "Transparency": transparency,
        "More than 8 bits": depths,
        "Colours": colour_spaces,
        "Sizes": sizes,
        "Damage": lambda: damage(seed, count),
    }
    faults, text = 0, []
    for title, part in parts.items():
        rows = list(part())
        wrong = sum(row.fault for row in rows)
        faults += wrong
        text += [f"### {title}", "", f"{len(rows)} tried, {wrong} faults.", ""]
        text += ["| file | largest difference of a pixel, of 255 | found |", "| --- | --- | --- |"]
        text += [
            f"| {row.what} | {row.expected} | {'**' * row.fault}{row.found}{'**' * row.fault} |" for row in merged(rows)
        ]
        text.append("")
    return "\n".join(text), faults
