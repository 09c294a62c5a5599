"""Image files as a viewer shows them: orientation, transparency, depth, colours, bounds, and what is refused."""

from __future__ import annotations

import io
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import pixels
from PIL import Image

from fedlscl.data import decoding
from fedlscl.data.decoding import Decoder, decode_image, image_suffixes

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

from reliability import images as tried


def decoded(image: Image.Image, kind: str = "PNG", size: int = 8, settings: Any = (), **options: Any) -> NDArray[Any]:
    """(H, W, 3) of an image that was saved."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Decoder(size, *settings).decode(file.getvalue(), "it").pixels.transpose(1, 2, 0)


@pytest.mark.parametrize(
    "part", [tried.formats, tried.orientations, tried.transparency, tried.depths, tried.colour_spaces, tried.sizes]
)
def test_whatever_pillow_writes_is_read_as_it_was_drawn(part: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken files
        rows = list(part())
    assert len(rows) > 9
    assert [row for row in rows if row.fault] == []


def test_an_image_taken_with_a_turned_camera_stands_upright(tmp_path: Path) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:2] = 255  # a light sky
    sideways = Image.fromarray(np.rot90(upright).copy())  # as the sensor saw it: the sky at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right of what is stored upside down: turn it clockwise
    sideways.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 8).transpose(1, 2, 0), upright)


def test_a_drawing_on_nothing_is_on_white_or_on_what_is_set(tmp_path: Path) -> None:
    drawing = np.zeros((8, 8, 4), np.uint8)  # black, all of it transparent
    drawing[2:5, 3:6, 3] = 255
    drawing[0, 0] = (255, 0, 0, 51)  # a fifth of red
    Image.fromarray(drawing).save(tmp_path / "a.png")
    on_white = decode_image(tmp_path / "a.png", 8)
    assert on_white[:, 7, 7].tolist() == [255, 255, 255]
    assert on_white[:, 3, 4].tolist() == [0, 0, 0]
    assert on_white[:, 0, 0].tolist() == [255, 204, 204]
    for background in ("#0a1420", [10, 20, 32], (10, 20, 32)):
        on_blue = decode_image(tmp_path / "a.png", 8, background)
        assert on_blue[:, 7, 7].tolist() == [10, 20, 32]
        assert on_blue[:, 3, 4].tolist() == [0, 0, 0]


def test_values_of_more_than_8_bits_need_a_certain_scale() -> None:
    ramp = np.arange(64).reshape(8, 8)
    as_it_is = decoded(Image.fromarray((ramp * 1040).astype(np.uint16)))
    np.testing.assert_array_equal(as_it_is[..., 0], ramp * 1040 // 256)
    few = Image.fromarray((ramp * 65).astype(np.uint16))
    with pytest.raises(
        ValueError, match=r"it has 16-bit values up to 4095 only, .* 12 bits; set .*\[0, 4095\], or \[0, 65535\]"
    ):
        decoded(few)
    np.testing.assert_array_equal(decoded(few, settings=("white", (0, 4095)))[..., 1], ramp * 65 // 16)
    np.testing.assert_array_equal(decoded(few, settings=("white", (0, 65535)))[..., 2], ramp * 65 // 256)
    colours = tried.png(np.dstack([ramp * 65] * 3), 16)  # of which Pillow keeps the upper 8 bits
    with pytest.raises(
        ValueError, match=r"16-bit colours up to 4095 only, .*; convert the file to 8 bits, or set value_range"
    ):
        Decoder(8, value_range=(0, 4095)).decode(colours, "it")
    assert Decoder(8, value_range=(0, 65535)).decode(colours, "it").pixels.max() == 15
    black = Image.fromarray(np.zeros((8, 8), np.uint16))
    assert decoded(black).max() == 0  # is 0 on any scale
    mask = Image.fromarray((ramp % 2).astype(np.int32))
    assert np.unique(decoded(mask, "TIFF", settings=("white", (0, 1)))).tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"signed or 32-bit values \(0 to 1\), .* set value_range"):
        decoded(mask, "TIFF")
    with pytest.raises(ValueError, match=r"floating-point values \(0 to 63\)"):
        decoded(Image.fromarray(ramp.astype(np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"values from 0 to 63, outside value_range \[0, 1\]"):
        decoded(Image.fromarray(ramp.astype(np.float32)), "TIFF", settings=("white", (0, 1)))
    slightly = decoded(Image.fromarray((ramp / 63 * 1.001).astype(np.float32)), "TIFF", settings=("white", (0, 1)))
    assert slightly.max() == 255  # rounds to white
    np.testing.assert_array_equal(
        decoded(Image.fromarray(pixels(0)), settings=("white", (0, 1))), pixels(0)
    )  # is certain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"background": None}, "background is None; it must be .* which YAML wants in quotes"),
        ({"background": "colourless"}, "background is 'colourless'; it must be a colour"),
        ({"background": "#ff000080"}, "background is '#ff000080'"),
        ({"background": (1, 2)}, r"background is \(1, 2\)"),
        ({"background": (1, 2, 256)}, r"background is \(1, 2, 256\)"),
        ({"background": (0.5, 0.5, 0.5)}, r"background is \(0.5"),
        ({"value_range": (1, 0)}, r"value_range is \[1, 0\]; it must be the values of black and of white"),
        ({"value_range": (0, float("inf"))}, "value_range is"),
        ({"value_range": (0, 1, 2)}, "value_range is"),
        ({"size": 0}, "size is 0; it must be a number of pixels above 0"),
        ({"size": 2.5}, r"size is 2\.5"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(**{"size": 8, **settings})


def test_nothing_is_expanded_before_its_size_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1, 20000), "red").save(tmp_path / "long.png")
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        resized.append(size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert decode_image(tmp_path / "long.png", 224).reshape(3, -1).mean(1).tolist() == [255, 0, 0]
    assert resized == [(224, 4 * 224)]
    stripes = np.zeros((400, 20, 3), np.uint8)
    stripes[190:210] = 200  # the middle, which is what is cut out
    assert (decoded(Image.fromarray(stripes), size=20) == 200).all()
    assert (decoded(Image.fromarray(stripes.transpose(1, 0, 2).copy()), size=20) == 200).all()

    (tmp_path / "bomb.png").write_bytes(tried.png_header(20000, 20000))
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)  # ours alone, so that nothing warns
    with pytest.raises(ValueError, match=r"bomb\.png has 400,000,000 pixels, more than 89,478,485; scale it down"):
        decode_image(tmp_path / "bomb.png", 8)
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"long\.png has \d+ bytes, more than 100; scale it down"):
        decode_image(tmp_path / "long.png", 8)


def test_pillows_own_bound_refuses_too(tmp_path: Path) -> None:
    for size in ((20000, 5000), (20000, 20000)):  # it warns of the one and raises for the other
        (tmp_path / "bomb.png").write_bytes(tried.png_header(*size))
        with pytest.raises(ValueError, match=r"bomb\.png has more than 89,478,485 pixels; scale it down"):
            decode_image(tmp_path / "bomb.png", 8)


def test_the_content_says_what_a_file_is(tmp_path: Path) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode_image(tmp_path / "a.jpg", 8).transpose(1, 2, 0), pixels(0))
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(ValueError, match=r"program\.png cannot be read as an image \(no format that is known\)"):
        decode_image(tmp_path / "program.png", 8)
    with pytest.raises(ValueError, match="is no file; name an image file"):
        decode_image(tmp_path, 8)
    assert {".jfif", ".avif", ".jp2", ".png", ".tif", ".webp", ".gif"} <= image_suffixes()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf"} & image_suffixes()


def test_the_first_frame_is_shown() -> None:
    frames = [Image.fromarray(pixels(n) // 128 * 255) for n in range(3)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        shown = decoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(shown, np.asarray(frames[0]), err_msg=kind)


def test_an_orientation_that_is_none_is_passed_over() -> None:
    for orientation in (0, 9, 3000):
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decoded(Image.fromarray(pixels(0)), exif=exif), pixels(0))


def test_whether_a_drawing_vanished_is_known() -> None:
    def vanished(image: Image.Image, background: str) -> bool:
        file = io.BytesIO()
        image.save(file, "PNG")
        return Decoder(4, background).decode(file.getvalue(), "it").vanished

    alpha = np.zeros((8, 8, 4), np.uint8)
    alpha[2:4, 2:4, 3] = 255
    assert vanished(Image.fromarray(alpha), "black")
    assert not vanished(Image.fromarray(alpha), "white")
    assert not vanished(Image.new("RGB", (8, 8), "black"), "black")
    assert not vanished(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "black")  # nothing was drawn
    framed = np.zeros((8, 64, 3), np.uint8)
    framed[:, 0] = 255  # outside the square that is cut out
    assert not vanished(Image.fromarray(framed), "black")


def test_broken_headers_raise_nothing_but_value_errors() -> None:
    header = b"\x89PNG\r\n\x1a\n" + tried.chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
    for content in (b"", b"GIF89a", header, b"P5 2 2 999999999999\n1234", b"II*\0\xff\xff\xff\xff", b"RIFF1234WEBP"):
        with pytest.raises(ValueError, match="it cannot be read as an image"):
            Decoder(8).decode(content, "it")
