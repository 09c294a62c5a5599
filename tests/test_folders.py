"""Images of files: decoding, folders, ImageNet-R and its archive, the cache of decoded images."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import pixels, write_folder
from PIL import Image
from torchvision.transforms import v2

from fedlscl.data import cache
from fedlscl.data.cub import CUB200
from fedlscl.data.decoding import Decoder, decode_image
from fedlscl.data.folders import ImageFolder, ImageNetR
from fedlscl.data.source import Dataset, ImageSet

# ---------------------------------------------------------------- decode_image


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 8)
    np.testing.assert_array_equal(decoded, pixels(0).transpose(2, 0, 1))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("shape", [(40, 23), (23, 40), (31, 31), (16, 45), (45, 16), (5, 9), (17, 16)])
def test_resizing_and_cutting_equal_torchvisions(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = Image.fromarray(pixels(1, *shape))
    image.save(tmp_path / "a.png")
    bicubic = v2.InterpolationMode.BICUBIC
    reference = v2.Compose([v2.Resize(16, bicubic, antialias=True), v2.CenterCrop(16), v2.PILToTensor()])
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 16), reference(image).numpy())


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "grey16.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "alpha.png")
    for name in ("grey", "grey16", "alpha"):
        decoded = decode_image(tmp_path / f"{name}.png", 8)
        np.testing.assert_array_equal(decoded, np.stack([grey] * 3), err_msg=name)

    palette = Image.fromarray(pixels(0) // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.gif")
    for name in ("palette.png", "palette.gif"):
        decoded = decode_image(tmp_path / name, 8)
        np.testing.assert_array_equal(decoded, (pixels(0) // 128 * 255).transpose(2, 0, 1), err_msg=name)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(pixels(0, 64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image .* replace or delete it"):
            decode_image(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match=r"no image .*absent\.png"):
        decode_image(tmp_path / "absent.png", 8)
    with pytest.raises(ValueError, match="size is 0"):
        decode_image(tmp_path / "whole.png", 0)


# ------------------------------------------------------------------ ImageFolder


def test_a_folder_gives_its_images_in_sorted_order(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("ignored")
    (root / "train" / "ant" / "._0.png").write_text("ignored")
    with pytest.warns(UserWarning, match=r"pets: 2 files are left out, .*: train/ant/\._0\.png, train/ant/notes\.txt$"):
        loaded = ImageFolder(str(root), 8).load(tmp_path)
    assert loaded.name == "pets"
    assert loaded.classes == ("ant", "bee")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    together = np.concatenate([loaded.train.images, loaded.test.images])
    np.testing.assert_array_equal(together, [pixels(k).transpose(2, 0, 1) for k in range(10)])
    assert isinstance(loaded.train.images, np.memmap)
    assert not loaded.train.images.flags.writeable
    (root / "train" / "ant" / "notes.txt").unlink()
    (root / "train" / "ant" / "._0.png").unlink()
    assert ImageFolder(str(root), 8, name="animals").load(tmp_path).name == "animals"


class Counter:
    """Counts the calls of a method from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.calls = 0
        original = getattr(owner, name)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return original(*args)

        monkeypatch.setattr(owner, name, counted)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many images are decoded."""
    return Counter(monkeypatch, Decoder, "decode")


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path: Path, decoder: Counter) -> None:
    source, cache = ImageFolder(str(write_folder(tmp_path / "pets")), 8), tmp_path / "cache"
    cache.mkdir()
    source.load(cache)
    assert decoder.calls == 10
    source.load(cache)
    assert decoder.calls == 10

    changed = tmp_path / "pets" / "train" / "ant" / "1.png"
    stamp = changed.stat().st_mtime_ns
    os.utime(changed, ns=(stamp, stamp + 1))
    source.load(cache)
    assert decoder.calls == 10  # the content is what it was
    Image.fromarray(pixels(99)).save(tmp_path / "new.png")
    os.replace(tmp_path / "new.png", changed)
    np.testing.assert_array_equal(source.load(cache).train.images[1], pixels(99).transpose(2, 0, 1))
    assert decoder.calls == 16  # only the training images
    changed.unlink()
    assert len(source.load(cache).train.images) == 5
    assert ImageFolder(str(tmp_path / "pets"), 4).load(cache).train.images.shape == (5, 3, 4, 4)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "pickle", "shape", "bit", "longer"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, decoder: Counter, damage: str) -> None:
    source, cache = ImageFolder(str(write_folder(tmp_path / "pets")), 8), tmp_path / "cache"
    cache.mkdir()
    good = source.load(cache).train.images.copy()
    for file in cache.glob("*.npy"):
        content = file.read_bytes()
        file.unlink()  # not written over: that would change the mapped images of an earlier load
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]  # in the last pixels
        others = {"cut": content[:-1], "empty": b"", "other": b"PK\x03\x04", "bit": flipped, "longer": content + b"\0"}
        if damage in others:
            file.write_bytes(others[damage])
        elif damage == "pickle":
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        else:
            np.save(file, np.zeros((1, 3, 8, 8), np.uint8))
    np.testing.assert_array_equal(source.load(cache).train.images, good)
    assert decoder.calls == 20


def test_an_unreadable_image_stops_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "cache"
    cache.mkdir()
    (root / "train" / "bee" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"train.bee.1\.png cannot be read as an image"):
        ImageFolder(str(root), 8).load(cache)
    assert list(cache.iterdir()) == []


def test_many_images_are_decoded_in_order_under_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PROGRESS_FROM", 1)
    root = write_folder(tmp_path / "pets", names=("a", "b", "c"), train=70, test=1)
    images = ImageFolder(str(root), 8).load(tmp_path).train.images
    listed = [f"{k}.png" for k in range(70)]
    expected = [pixels(c * 70 + listed.index(name)) for c in range(3) for name in sorted(listed)]
    np.testing.assert_array_equal(images, np.array(expected).transpose(0, 3, 1, 2))


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    def load(root: Path, expected: int | None = None) -> Dataset:
        return ImageFolder(str(root), 8, expected_classes=expected).load(tmp_path)

    with pytest.raises(FileNotFoundError, match=r"nowhere.train is not there"):
        load(tmp_path / "nowhere")
    root = write_folder(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"train holds 2 class folders, expected 3"):
        load(root, expected=3)
    (root / "test" / "wasp").mkdir()
    with pytest.raises(ValueError, match=r"test.wasp holds no image \(.*png.*\); add some or delete"):
        load(root)
    Image.fromarray(pixels(0)).save(root / "test" / "wasp" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"train.wasp is not there, .* the same classes"):
        load(root)
    (root / "test" / "wasp").rename(root / "train" / "wasp")
    with pytest.raises(FileNotFoundError, match=r"test.wasp is not there"):
        load(root)
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none.train holds 0 class folders, expected at least 1"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="size is -1"):
        ImageFolder(str(root), -1)


# -------------------------------------------------------------------- ImageNetR


def _write_imagenet_r(root: Path, count: int = 10) -> Path:
    for c, wnid in enumerate(("n02", "n01")):
        (root / wnid).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(pixels(100 * c + k, 10, 8)).save(root / wnid / f"art_{k}.jpg")
    (root / "README.txt").write_text("beside the classes, as published")
    return root


def test_imagenet_r_is_cut_once_for_all(tmp_path: Path) -> None:
    root, cache = _write_imagenet_r(tmp_path / "imagenet-r"), tmp_path / "cache"
    cache.mkdir()
    source = ImageNetR(str(root), 8, expected_classes=2)
    loaded = source.load(cache)
    assert loaded.classes == ("n01", "n02")
    assert np.bincount(loaded.train.labels).tolist() == [8, 8]
    assert np.bincount(loaded.test.labels).tolist() == [2, 2]

    (record,) = cache.glob("imagenet-r-test-*.json")
    names = json.loads(record.read_text())
    decoded = [decode_image(root / name, 8) for name in names]
    np.testing.assert_array_equal(loaded.test.images, decoded)
    left = {f"{w}/art_{k}.jpg" for w in ("n01", "n02") for k in range(10)} - set(names)
    np.testing.assert_array_equal(loaded.train.images, [decode_image(root / n, 8) for n in sorted(left)])

    # The record rules, whatever would be drawn today; without it the same is drawn again, also elsewhere.
    record.write_text(json.dumps(["n01/art_3.jpg", "n02/art_5.jpg"]))
    kept = source.load(cache).test
    np.testing.assert_array_equal(kept.images[1], decode_image(root / "n02/art_5.jpg", 8))
    record.unlink()
    root.rename(tmp_path / "moved")
    ImageNetR(str(tmp_path / "moved"), 8, expected_classes=2).load(cache)
    assert json.loads(record.read_text()) == names

    for damage in ("", "[]", "3", '["n01/art_0.jpg"]', json.dumps([*left, *names])):
        record.write_text(damage)
        with pytest.raises(ValueError, match=r"imagenet-r-test-.*json is damaged; delete it"):
            ImageNetR(str(tmp_path / "moved"), 8, expected_classes=2).load(cache)


def test_imagenet_r_from_its_archive(tmp_path: Path) -> None:
    root, cache = _write_imagenet_r(tmp_path / "imagenet-r"), tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(tmp_path / "imagenet-r.tar", "w") as tar:
        tar.add(root, "imagenet-r")
    from_folder = ImageNetR(str(root), 8, expected_classes=2).load(cache)
    source = ImageNetR(str(tmp_path / "imagenet-r.tar"), 8, expected_classes=2)
    for _ in range(2):
        from_archive = source.load(cache)
        np.testing.assert_array_equal(from_archive.test.images, from_folder.test.images)
        np.testing.assert_array_equal(from_archive.train.images, from_folder.train.images)
    assert not list(cache.glob(".unpack-*"))


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = tmp_path / "imagenet-r.tar"

    def member(name: str) -> None:
        with tarfile.open(archive, "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))

    source = ImageNetR(str(archive), 8)
    member("imagenet-r/../../../evil.txt")
    with pytest.raises(ValueError, match=r"imagenet-r\.tar cannot be unpacked .*outside"):
        source.load(cache)
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("imagenet-r/n01")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"imagenet-r\.tar cannot be unpacked .*link"):
        source.load(cache)
    member("other/file.txt")
    with pytest.raises(ValueError, match="has no folder imagenet-r"):
        source.load(cache)
    archive.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        source.load(cache)
    assert list(cache.iterdir()) == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_imagenet_r_needs_its_classes_and_two_images_of_each(tmp_path: Path) -> None:
    root = _write_imagenet_r(tmp_path / "imagenet-r", count=1)
    with pytest.raises(ValueError, match="holds 2 class folders, expected 200"):
        ImageNetR(str(root), 8).load(tmp_path)
    with pytest.raises(ValueError, match=r"n01 has 1 image; a training and a test image are needed"):
        ImageNetR(str(root), 8, expected_classes=2).load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent is not there"):
        ImageNetR(str(tmp_path / "absent"), 8).load(tmp_path)


# ------------------------------------------------------------------- CUB-200-2011


def _write_cub(root: Path) -> Path:
    """Two kinds of birds, four images each; as in the true lists, numbers follow the names."""
    names = [f"{c:03}.Bird_{c}/Bird_{c}_{k:04}_{9 - k}.jpg" for c in (1, 2) for k in range(4)]
    for k, name in enumerate(names):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(k, 10, 8)).save(path)
    (root / "images.txt").write_text("".join(f"{k} {name}\n" for k, name in enumerate(names, 1)))
    (root / "train_test_split.txt").write_text("".join(f"{k} {int(k % 4 < 2)}\n" for k in range(1, 9)))
    return root


def test_cub_has_its_official_split_from_folder_and_archive(tmp_path: Path) -> None:
    root, cache = _write_cub(tmp_path / "CUB_200_2011"), tmp_path / "cache"
    cache.mkdir()
    loaded = CUB200(str(root), 8, expected_classes=2).load(cache)
    assert loaded.classes == ("001.Bird_1", "002.Bird_2")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 0, 1, 1], [0, 0, 1, 1])
    for part, names in (("train", ("1_0000_9", "1_0003_6")), ("test", ("1_0001_8", "1_0002_7"))):
        expected = [decode_image(root / "images" / "001.Bird_1" / f"Bird_{name}.jpg", 8) for name in names]
        np.testing.assert_array_equal(getattr(loaded, part).images[:2], expected)

    archive = tmp_path / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, "CUB_200_2011")
        tar.addfile(tarfile.TarInfo("attributes.txt"))  # it lies beside the folder
    assert CUB200(str(archive), 8, expected_classes=2).load(cache).sha256 == loaded.sha256


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("images.txt", "8 002.Bird_2/Bird", "8 ../Bird", r"'\.\./Bird_2_0003_6.jpg' of image 8 is no CLASS/FILE"),
        ("images.txt", "2 001", "1 001", r"images.txt, line 2: '1 001.* is no number of its own"),
        ("images.txt", "002.Bird_2", "001.Bird_1", "has 1 classes, expected 2"),
        ("train_test_split.txt", "8 1\n", "", "image 8 is in one of"),
        ("train_test_split.txt", "3 0", "3 2", "image 3 has '2', must be 1 .training. or 0"),
        ("train_test_split.txt", " 1", " 0", "class 001.Bird_1 has no training image"),
    ],
)
def test_lists_of_cub_that_are_not_are_refused(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    root = _write_cub(tmp_path / "CUB_200_2011")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=said):
        CUB200(str(root), 8, expected_classes=2).load(tmp_path)
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is not there; root must be the folder CUB_200_2011"):
        CUB200(str(root), 8).load(tmp_path)


# ---------------------------------------------------------------------- Dataset


def test_a_dataset_checks_its_arrays() -> None:
    images, labels = np.zeros((4, 3, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    good = ImageSet(images, labels)
    Dataset("x", good, good, ("a", "b"))
    for bad, message in (
        (ImageSet(images.astype(float), labels), r"x: test images are \(4, 3, 2, 2\) float64"),
        (ImageSet(images[:, :1], labels), r"x: test images are \(4, 1, 2, 2\) uint8"),
        (ImageSet(images, labels[:3]), r"x: test labels are \(3,\) int64"),
        (ImageSet(images, labels.astype(np.int32)), r"x: test labels are \(4,\) int32"),
        (ImageSet(images, labels * 0), r"x: test labels must be all of 0\.\.1: \[1\] have no image"),
        (ImageSet(images, labels - 1), r"\[1\] have no image, \[-1\] have no name"),
        (ImageSet(images, labels + 1), r"\[0\] have no image, \[2\] have no name"),
        (ImageSet(images[:0], labels[:0]), r"\[0, 1\] have no image"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset("x", good, bad, ("a", "b"))


def test_the_fingerprint_tells_images_labels_and_classes_apart() -> None:
    """Any number of images; the first and the last of each set are among those that are read."""

    def made(labels: tuple[int, ...] = (0, 1) * 50, pixel: int = 0, classes: tuple[str, ...] = ("a", "b")) -> Dataset:
        images = np.zeros((100, 3, 2, 2), dtype=np.uint8)
        images[-1, 0, 0, 0] = pixel
        train = ImageSet(images, np.array(labels, dtype=np.int64))
        one_each = ImageSet(np.zeros((2, 3, 2, 2), dtype=np.uint8), np.array([0, 1], dtype=np.int64))
        return Dataset("x", train, one_each, classes)

    others = [made(labels=(0,) * 50 + (1,) * 50), made(pixel=1), made(classes=("a", "c"))]
    assert made().sha256 == made().sha256
    assert len({made().sha256, *(other.sha256 for other in others)}) == 4


# ------------------------------------------------------------ what is an image


def test_images_of_all_formats_and_depths_of_folders_are_used(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", train=1)
    ant = root / "train" / "ant"
    (ant / "b" / "deep").mkdir(parents=True)
    for n, name in enumerate(("a.jfif", "a.avif", "a.jp2", "a.QOI", "b/a.webp", "b/deep/a.tga", "b/b.png"), 50):
        options = {"format": "JPEG"} if name.endswith("jfif") else {}
        Image.fromarray(pixels(n)).save(ant / name, **options)
    (root / "train" / "bee" / "loop").symlink_to(root / "train" / "bee")
    (root / "test" / "bee" / "linked.png").symlink_to(ant / "b" / "b.png")
    loaded = ImageFolder(str(root), 8).load(tmp_path)
    assert loaded.train.labels.tolist() == [0] * 8 + [1]
    assert loaded.test.labels.tolist() == [0, 0, 1, 1, 1]
    names = ("0.png", "a.QOI", "a.avif", "a.jfif", "a.jp2", "b/a.webp", "b/b.png", "b/deep/a.tga")
    paths = [ant / name for name in names]
    np.testing.assert_array_equal(loaded.train.images[:8], [decode_image(path, 8) for path in paths])
    np.testing.assert_array_equal(loaded.test.images[-1], pixels(56).transpose(2, 0, 1))


def test_whatever_is_left_out_is_named_and_counted_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    others = ("train/__MACOSX/ant/._0.png", "train/ant/.git/x.png", "train/ant/Thumbs.db", "train/ant/x.heic")
    others += ("train/stray.jpg", "test/bee/.hidden.png", "test/.cache/bee/0.png", "test/bee/broken.png")
    for name in others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "test/bee/broken.png").unlink()
    (root / "test/bee/broken.png").symlink_to(root / "nowhere.png")
    (root / "train" / "README.txt").write_text("beside the classes, and no image")
    with pytest.warns(UserWarning, match="left out") as told:
        loaded = ImageFolder(str(root), 8).load(tmp_path)
    (warning,) = told
    assert str(warning.message).startswith(f"{root}: 8 files are left out, ")
    assert str(warning.message).endswith(
        ": train/__MACOSX/ant/._0.png, train/ant/.git/x.png, train/ant/Thumbs.db, train/ant/x.heic, train/stray.jpg "
        "and 3 more"
    )
    assert loaded.classes == ("ant", "bee")
    assert len(loaded.train.labels) == 6


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "caf\u00e9",
            "cafe\u0301",
            r"train.caf.* is not there, but one that looks like it: 'cafe\\u0301' in test, 'caf\\xe9' in train; ",
        ),
        ("Ant", "ant", r"test.Ant is not there, but one that looks like it: 'Ant' in train, 'ant' in test; rename one"),
        ("ant", "ant\u200b", r"looks like it: 'ant' in train, 'ant\\u200b' in test"),
        ("ant", "wasp", r"test.ant is not there, nor is 1 other, and train and test need images of the same classes"),
    ],
)
def test_class_names_that_look_alike_are_shown_as_they_are(tmp_path: Path, train: str, test: str, message: str) -> None:
    root = write_folder(tmp_path / "pets", names=(train, "bee"))
    (root / "test" / train).rename(root / "test" / "for a while")
    (root / "test" / "for a while").rename(root / "test" / test)
    with pytest.raises(FileNotFoundError, match=message):
        ImageFolder(str(root), 8).load(tmp_path)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", names=("caf\u00e9", "cafe\u0301"))
    with pytest.raises(
        ValueError, match=r"train holds two classes that look alike, 'cafe\\u0301' and 'caf\\xe9'; rename one"
    ):
        ImageFolder(str(root), 8).load(tmp_path)
    cases = write_folder(tmp_path / "cases", names=("A", "a"))  # which everybody tells apart
    assert ImageFolder(str(cases), 8).load(tmp_path).classes == ("A", "a")


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = tmp_path / "imagenet-r.tar"
    found = []
    for seed in (0, 40):
        root = tmp_path / str(seed)
        for c, wnid in enumerate(("n01", "n02")):
            (root / wnid).mkdir(parents=True)
            for k in range(5):
                Image.fromarray(pixels(seed + 5 * c + k)).save(root / wnid / f"{k}.bmp")
        with tarfile.open(archive, "w") as tar:
            tar.add(root, "imagenet-r")
        os.utime(archive, ns=(10**18, 10**18))  # of the same size and time
        found.append(ImageNetR(str(archive), 8, expected_classes=2).load(cache))
    assert found[0].train.images.shape == found[1].train.images.shape
    assert (found[0].train.images != found[1].train.images).any()
    assert found[0].sha256 != found[1].sha256
