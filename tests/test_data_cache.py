"""What is kept in the cache folder: known by content, checked before use, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import pixels, write_folder
from PIL import Image

from fedlscl.data import cache as module
from fedlscl.data.cache import Contents
from fedlscl.data.decoding import Decoder
from fedlscl.data.folders import ImageFolder
from fedlscl.data.source import Dataset, ImageSet
from fedlscl.data.temporary import sweep, temporary_file, temporary_folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def load(root: Path, cache: Path, **settings: Any) -> Dataset:
    return ImageFolder(str(root), 8, **settings).load(cache)


def replace_unseen(path: Path, seed: int) -> None:
    """Other pixels in a file of the same size, name and time of change."""
    before = path.stat()
    Image.fromarray(pixels(seed)).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0")[: max(before.st_size, path.stat().st_size)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_bmp(root: Path, first: int) -> Path:
    """Two classes of images that are alike in name, size and time."""
    for part in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for k in range(2):
                path = root / part / name / f"{k}.bmp"
                Image.fromarray(pixels(first + 2 * label + k)).save(path)
                os.utime(path, ns=(10**18, 10**18))
    return root


def test_folders_alike_in_all_but_content_are_kept_apart(tmp_path: Path, cache: Path) -> None:
    one, other = write_bmp(tmp_path / "a" / "pets", 0), write_bmp(tmp_path / "b" / "pets", 50)
    first, second = load(one, cache), load(other, cache)
    np.testing.assert_array_equal(first.train.images[0], pixels(0).transpose(2, 0, 1))
    np.testing.assert_array_equal(second.train.images[0], pixels(50).transpose(2, 0, 1))
    assert first.sha256 != second.sha256
    changed = one / "train" / "bee" / "1.bmp"  # the last of all, in the same place, of the same size and time
    Image.fromarray(pixels(77)).save(changed)
    os.utime(changed, ns=(10**18, 10**18))
    again = load(one, cache)
    np.testing.assert_array_equal(again.train.images[3], pixels(77).transpose(2, 0, 1))
    assert again.sha256 != first.sha256


def test_the_same_content_elsewhere_is_decoded_no_more(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(write_bmp(tmp_path / "a", 0), cache, name="x")
    monkeypatch.setattr(Decoder, "decode", None)  # nobody may
    second = load(write_bmp(tmp_path / "b", 0), cache, name="x")
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.test.images, second.test.images)


def test_other_settings_are_other_images(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "pets"
    for part in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for k in range(2):
                drawing = np.zeros((8, 8, 4), np.uint8)
                drawing[label + k : 5, k + 2 : 6, 3] = 255
                Image.fromarray(drawing).save(root / part / name / f"{k}.png")
    white, red = load(root, cache), load(root, cache, background="red")
    assert white.train.images[0, :, 7, 7].tolist() == [255, 255, 255]
    assert red.train.images[0, :, 7, 7].tolist() == [255, 0, 0]
    assert white.train.images[0, :, 2, 3].tolist() == red.train.images[0, :, 2, 3].tolist() == [0, 0, 0]
    source = ImageFolder(str(root), 8, background="red")  # what predict decodes with
    assert source.decode(root / "test" / "ant" / "0.png", 8)[:, 7, 7].tolist() == [255, 0, 0]
    with pytest.raises(
        ValueError, match=r"train: all 2 images of class 'ant' are of the one colour \[0, 0, 0\], though"
    ):
        load(root, cache, background="black")


# ---------------------------------------------------------------- files' hashes


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that are opened from here on."""
    found: list[Path] = []
    original = Path.open

    def noted(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".png":
            found.append(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noted)
    return found


def test_a_second_start_reads_no_image(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "pets")
    monkeypatch.setattr(module, "_TICK", -(10**12))  # as if they had been written long ago
    first = load(root, cache)
    read = opened(monkeypatch)
    assert load(root, cache).sha256 == first.sha256
    assert read == []
    replaced = root / "train" / "ant" / "1.png"
    replace_unseen(replaced, 99)  # the time that a user can set is as it was; the one that the system sets is not
    second = load(root, cache)
    assert replaced in read
    np.testing.assert_array_equal(second.train.images[1], pixels(99).transpose(2, 0, 1))


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    root = write_folder(tmp_path / "pets")
    path = root / "train" / "ant" / "0.png"
    contents = Contents(root, cache)
    before = contents.of([path])
    contents.save()
    assert list(cache.glob("contents-*")) == []  # it might change again without a sign
    assert before == [module.xxhash.xxh3_128_hexdigest(path.read_bytes())]


@pytest.mark.parametrize("damage", [(".*", ""), (".*\n", ""), ("a", "b"), ("0", "1"), ("(.*)\n(.*)", r"\2\n\1")])
def test_a_damaged_record_of_hashes_is_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: tuple[str, str]
) -> None:
    monkeypatch.setattr(module, "_TICK", -(10**12))
    root = write_folder(tmp_path / "pets")
    first = load(root, cache)
    (kept,) = cache.glob("contents-*")
    good = kept.read_text()
    kept.write_text(re.sub(*damage, good, count=1, flags=re.DOTALL))
    assert kept.read_text() != good
    assert load(root, cache).sha256 == first.sha256
    assert kept.read_text() == good


@pytest.mark.parametrize("kept", range(0, 128, 9))
def test_decoded_images_whose_file_is_damaged_are_decoded_anew(tmp_path: Path, cache: Path, kept: int) -> None:
    """Whatever of the header is left, from which on all is zero."""
    root = write_folder(tmp_path / "pets")
    first = load(root, cache)
    for path in cache.glob("*.npy"):
        content = path.read_bytes()
        path.write_bytes(content[:kept] + bytes(len(content) - kept))
    assert load(root, cache).sha256 == first.sha256


def test_a_hash_that_is_not_that_of_the_content_is_found_out(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TICK", -(10**12))
    root = write_folder(tmp_path / "pets")
    load(root, cache)
    (kept,) = cache.glob("contents-*")
    content = json.loads(kept.read_text().partition("\n")[2])
    content["train/ant/0.png"][-1] = "0" * 32
    text = json.dumps(content)
    kept.write_text(f"{module.xxhash.xxh3_128_hexdigest(text.encode())}\n{text}")
    with pytest.raises(ValueError, match=r"ant.0\.png changed while it was read; start again"):
        load(root, cache)
    load(root, cache)  # the record is gone


def test_a_cache_that_may_only_be_read_will_do(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "pets")
    first = load(root, cache)
    monkeypatch.setattr(module, "_TICK", -(10**12))

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "write_atomically", refuse)
    assert load(root, cache).sha256 == first.sha256


# ------------------------------------------------------------ what cannot be used


def test_all_bad_images_are_counted_and_the_first_named(tmp_path: Path, cache: Path) -> None:
    root = write_folder(tmp_path / "pets")
    for path in ("train/ant/0.png", "train/bee/2.png", "test/ant/1.png", "test/bee/0.png"):
        (root / path).write_text("no image")
    with pytest.raises(ValueError, match=r"^4 of 10 images cannot be used: ") as error:
        load(root, cache)
    assert len(re.findall("cannot be read as an image", str(error.value))) == 3
    assert str(error.value).endswith("; and 1 more")
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("same", ["all", "colour", "vanished"])
def test_images_that_decoding_has_made_alike_are_refused(tmp_path: Path, cache: Path, same: str) -> None:
    root = write_folder(tmp_path / "pets", names=("ant", "bee", "cat"))
    for n, path in enumerate(sorted((root / "train").rglob("*.png"))):
        if same == "all":
            Image.fromarray(pixels(1)).save(path)
        elif path.parent.name != "bee":
            if same == "colour":
                Image.new("RGB", (8 + n, 9), (1, 2, 3)).save(path)
            elif path.parent.name == "ant":
                drawing = np.full((8, 8, 4), 255, np.uint8)  # white on nothing
                drawing[n:, :, 3] = 0
                Image.fromarray(drawing).save(path)
    message = {
        "all": r"^train: all 9 images look the same: .*ant.0\.png and so on",
        "colour": r"images of class 'cat' are of the one colour \[1, 2, 3\], as are those of class 'ant'; nothing",
        "vanished": r"class 'ant' are of the one colour \[255, 255, 255\], though .* set background",
    }[same]
    with pytest.raises(ValueError, match=message):
        load(root, cache)


def test_one_class_of_one_colour_is_sane(tmp_path: Path, cache: Path) -> None:
    root = write_folder(tmp_path / "pets")
    for n, path in enumerate(sorted((root / "train" / "ant").iterdir())):
        Image.new("RGB", (8 + n, 9), "black").save(path)
    colours = write_folder(tmp_path / "colours")
    for path in colours.rglob("*.png"):
        Image.new("RGB", (8, 8), "red" if path.parent.name == "ant" else "blue").save(path)
    assert load(root, cache).train.images[:3].max() == 0
    assert load(colours, cache).train.images[0, :, 0, 0].tolist() == [255, 0, 0]


# ---------------------------------------------------------- kills and full disks


def test_a_full_disk_is_told_before_anything_is_decoded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        assert size > 6 * 3 * 8 * 8
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Decoder, "decode", None)  # nobody may
    with pytest.raises(
        OSError, match=r"No space left on device: 0 MiB of decoded images do not fit into .*cache; make room"
    ):
        load(write_folder(tmp_path / "pets"), cache)
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full_later_is_an_error_and_no_signal(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that cannot set space aside, and whose quota is used up while images are written."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    source = ImageFolder(str(write_folder(tmp_path / "pets")), 64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            source.load(cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_holds_stays(tmp_path: Path, cache: Path) -> None:
    words = f"""
import os, signal, sys
from pathlib import Path
from fedlscl.data.temporary import temporary_file, temporary_folder
cache = Path({str(cache)!r})
with temporary_file(cache / "a.npy") as file, temporary_folder(cache) as folder:
    file.write(b"much"); file.flush(); (folder / "image").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", words])
    assert ended.returncode == -signal.SIGKILL
    assert len(list(cache.iterdir())) == 2
    (cache / f".imagefolder-8-a.npy.{'0' * 32}.tmp").write_text("by an earlier version")
    (cache / ".unpack-abcd" / "inner").mkdir(parents=True)
    with temporary_file(cache / "b.npy") as file, temporary_folder(cache) as folder:
        file.write(b"half")
        assert len(list(cache.iterdir())) == 6
        load(write_folder(tmp_path / "pets"), cache)
        assert folder.is_dir()
        assert len(list(cache.glob(".part-*"))) == len(list(cache.glob(".*"))) == 2
        file.write(b" and half")
    assert list(cache.glob(".part-*")) == []
    assert (cache / "b.npy").read_bytes() == b"half and half"


def test_without_locks_only_what_is_a_day_old_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    for name, hours in (("new", 1), ("old", 25)):
        (cache / f".part-{name}").write_text("x")
        then = time.time() - 3600 * hours
        os.utime(cache / f".part-{name}", (then, then))
    with temporary_file(cache / "a.npy") as file:
        file.write(b"x")
        sweep(cache)
    assert sorted(path.name for path in cache.iterdir()) == [".part-new", "a.npy"]


def test_an_error_leaves_no_temporary_file(cache: Path) -> None:
    for opener in (lambda: temporary_file(cache / "a"), lambda: temporary_folder(cache)):
        context: Callable[[], Any] = opener
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
    assert list(cache.iterdir()) == []


# --------------------------------------------------------------- the fingerprint


def test_every_pixel_of_every_image_counts() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(700, dtype=np.int64) % 2

    def made(train: Any, test: Any = images[:2]) -> str:
        return Dataset("x", ImageSet(train, labels), ImageSet(test, labels[:2]), ("a", "b")).sha256

    found = {made(images)}
    assert next(iter(found)).startswith("all:")
    for position in (0, 255, 256, 257, 699):
        changed = images.copy()
        changed[position, 2, 3, 3] ^= 1
        found.add(made(changed))
    found.add(made(images, images[2:4]))
    assert len(found) == 7
    strided = np.zeros((700, 50), np.uint8)
    strided[:, 2:] = images.reshape(700, -1)
    assert made(strided[:, 2:].reshape(700, 3, 4, 4)) == made(images)


def test_the_checksum_of_the_cache_is_the_fingerprint_of_its_images(tmp_path: Path, cache: Path) -> None:
    train = load(write_folder(tmp_path / "pets"), cache).train
    assert train.__dict__["digest"] == ImageSet(train.images, train.labels).digest
    assert replace(train, images=train.images // 2).digest != train.digest
