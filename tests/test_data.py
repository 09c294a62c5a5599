"""Tests of fedlscl.data and fedlscl.datasets on small files written here."""

# ruff: noqa: D103 - the names of the tests are their descriptions

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from fedlscl import data, datasets
from fedlscl.data import (
    CIFAR100,
    Dataset,
    Digits,
    FederatedDataModule,
    ImageFolder,
    ImageNetR,
    ImageSet,
    decode_image,
)
from fedlscl.splits import SplitSpec

SPEC = SplitSpec(clients=2, tasks=2, classes_per_task=2, private_classes=3, public_classes=1)


def _pixels(seed: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _write_folder(root: Path, names: tuple[str, ...] = ("ant", "bee"), train: int = 3, test: int = 2) -> Path:
    """Write PNG files of 8x8 pixels, numbered through: image k of the data set has ``_pixels(k)``."""
    seed = 0
    for part, count in (("train", train), ("test", test)):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(_pixels(seed)).save(root / part / name / f"{k}.png")
                seed += 1
    return root


# ---------------------------------------------------------------- decode_image


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(_pixels(0)).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 8)
    np.testing.assert_array_equal(decoded, _pixels(0).transpose(2, 0, 1))
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("shape", [(40, 23), (23, 40), (31, 31), (16, 45), (45, 16), (5, 9), (17, 16)])
def test_resizing_and_cutting_equal_torchvisions(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = Image.fromarray(_pixels(1, *shape))
    image.save(tmp_path / "a.png")
    bicubic = v2.InterpolationMode.BICUBIC
    reference = v2.Compose([v2.Resize(16, bicubic, antialias=True), v2.CenterCrop(16), v2.PILToTensor()])
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 16), reference(image).numpy())


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=0)
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "grey16.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "alpha.png")
    for name in ("grey", "clear", "grey16", "alpha"):
        decoded = decode_image(tmp_path / f"{name}.png", 8)
        np.testing.assert_array_equal(decoded, np.stack([grey] * 3), err_msg=name)

    palette = Image.fromarray(_pixels(0) // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette_clear.png", transparency=bytes(range(8)))
    palette.save(tmp_path / "palette.gif")
    for name in ("palette.png", "palette_clear.png", "palette.gif"):
        decoded = decode_image(tmp_path / name, 8)
        np.testing.assert_array_equal(decoded, (_pixels(0) // 128 * 255).transpose(2, 0, 1), err_msg=name)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(_pixels(0, 64, 64)).save(tmp_path / "whole.png")
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
    root = _write_folder(tmp_path / "pets")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("ignored")
    (root / "train" / "ant" / "._0.png").write_text("ignored")
    loaded = ImageFolder(str(root), 8).load(tmp_path)
    assert loaded.name == "pets"
    assert loaded.classes == ("ant", "bee")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    together = np.concatenate([loaded.train.images, loaded.test.images])
    np.testing.assert_array_equal(together, [_pixels(k).transpose(2, 0, 1) for k in range(10)])
    assert isinstance(loaded.train.images, np.memmap)
    assert not loaded.train.images.flags.writeable
    assert ImageFolder(str(root), 8, name="animals").load(tmp_path).name == "animals"


class _Decoder:
    """Counts how often images are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of decode_image."""
        self.calls = 0
        self.original = decode_image
        monkeypatch.setattr(datasets, "decode_image", self)

    def __call__(self, path: Path, size: int) -> NDArray[np.uint8]:
        self.calls += 1
        return self.original(path, size)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> _Decoder:
    """Count the calls of decode_image from here on."""
    return _Decoder(monkeypatch)


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path: Path, decoder: _Decoder) -> None:
    source, cache = ImageFolder(str(_write_folder(tmp_path / "pets")), 8), tmp_path / "cache"
    cache.mkdir()
    source.load(cache)
    assert decoder.calls == 10
    source.load(cache)
    assert decoder.calls == 10

    changed = tmp_path / "pets" / "train" / "ant" / "1.png"
    stamp = changed.stat().st_mtime_ns
    os.utime(changed, ns=(stamp, stamp + 1))  # as small a change as can be
    Image.fromarray(_pixels(99)).save(tmp_path / "new.png")
    source.load(cache)
    assert decoder.calls == 16  # only the training images

    os.replace(tmp_path / "new.png", changed)
    np.testing.assert_array_equal(source.load(cache).train.images[1], _pixels(99).transpose(2, 0, 1))
    changed.unlink()
    assert len(source.load(cache).train.images) == 5
    assert ImageFolder(str(tmp_path / "pets"), 4).load(cache).train.images.shape == (5, 3, 4, 4)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "pickle", "shape"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, decoder: _Decoder, damage: str) -> None:
    source, cache = ImageFolder(str(_write_folder(tmp_path / "pets")), 8), tmp_path / "cache"
    cache.mkdir()
    good = source.load(cache).train.images.copy()
    for file in cache.glob("*.npy"):
        content = file.read_bytes()
        file.unlink()  # not written over: that would change the mapped images of an earlier load
        if damage in ("cut", "empty", "other"):
            file.write_bytes({"cut": content[:-1], "empty": b"", "other": b"PK\x03\x04"}[damage])
        elif damage == "pickle":
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        else:
            np.save(file, np.zeros((1, 3, 8, 8), np.uint8))
    np.testing.assert_array_equal(source.load(cache).train.images, good)
    assert decoder.calls == 20


def test_an_unreadable_image_stops_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    root, cache = _write_folder(tmp_path / "pets"), tmp_path / "cache"
    cache.mkdir()
    (root / "train" / "bee" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"train.bee.1\.png cannot be read as an image"):
        ImageFolder(str(root), 8).load(cache)
    assert list(cache.iterdir()) == []


def test_many_images_are_decoded_in_order_under_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_PROGRESS_FROM", 1)
    root = _write_folder(tmp_path / "pets", names=("a", "b", "c"), train=70, test=1)
    images = ImageFolder(str(root), 8).load(tmp_path).train.images
    listed = [f"{k}.png" for k in range(70)]
    expected = [_pixels(c * 70 + listed.index(name)) for c in range(3) for name in sorted(listed)]
    np.testing.assert_array_equal(images, np.array(expected).transpose(0, 3, 1, 2))


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    def load(root: Path, expected: int | None = None) -> Dataset:
        return ImageFolder(str(root), 8, expected_classes=expected).load(tmp_path)

    with pytest.raises(FileNotFoundError, match=r"nowhere.train is not there"):
        load(tmp_path / "nowhere")
    root = _write_folder(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"train holds 2 class folders, expected 3"):
        load(root, expected=3)
    (root / "test" / "wasp").mkdir()
    with pytest.raises(ValueError, match=r"test.wasp holds no image \(.*png.*\); add some or delete"):
        load(root)
    Image.fromarray(_pixels(0)).save(root / "test" / "wasp" / "0.png")
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
            Image.fromarray(_pixels(100 * c + k, 10, 8)).save(root / wnid / f"art_{k}.jpg")
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


# --------------------------------------------------------------------- CIFAR100


def _write_cifar(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write three classes in the published binary format; return training records and test records."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = []
    for name, fine in (("train", [2, 0, 1, 1, 0, 2]), ("test", [1, 2, 0])):
        records = rng.integers(0, 256, (len(fine), 3074), dtype=np.uint8)
        records[:, 1] = fine
        (folder / f"{name}.bin").write_bytes(records.tobytes())
        parts.append(records)
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n\n")
    (folder / "coarse_label_names.txt").write_text("aquatic_mammals\n")
    return parts[0], parts[1]


def test_cifar100_reads_the_binary_format(tmp_path: Path) -> None:
    train, test = _write_cifar(tmp_path / "cifar-100-binary")
    loaded = CIFAR100(str(tmp_path), download=False).load(tmp_path / "unused")
    assert loaded.classes == ("apple", "aquarium_fish", "baby")
    assert loaded.train.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert loaded.test.labels.tolist() == [1, 2, 0]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):  # red, green, blue planes, row by row
        np.testing.assert_array_equal(loaded.train.images[:, c, y, x], train[:, 2 + 1024 * c + 32 * y + x])
        np.testing.assert_array_equal(loaded.test.images[:, c, y, x], test[:, 2 + 1024 * c + 32 * y + x])
    module = FederatedDataModule(
        CIFAR100(download=False),
        SplitSpec(clients=1, tasks=1, classes_per_task=3, private_classes=3, public_classes=0),
        seed=0,
        cache_dir=str(tmp_path),
    )
    module.setup()
    images, labels = module.batch("train", np.array([3, 0]))
    np.testing.assert_array_equal(images.numpy().reshape(2, -1), train[[3, 0], 2:])
    assert labels.tolist() == [1, 2]
    assert images.is_contiguous()


def test_cifar100_unpacks_only_the_published_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_cifar(tmp_path / "made" / "cifar-100-binary")
    archive = tmp_path / "cache" / "cifar-100-binary.tar.gz"
    source = CIFAR100(download=False)
    with pytest.raises(
        FileNotFoundError, match=r"cifar-100-binary\.tar\.gz is missing or damaged.*download to true"
    ):
        source.load(archive.parent)
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-100-binary", "cifar-100-binary")
    with pytest.raises(FileNotFoundError, match="its MD5 must be 03b5dce0"):
        source.load(archive.parent)
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    monkeypatch.setattr(CIFAR100, "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert source.load(archive.parent).train.labels.tolist() == [2, 0, 1, 1, 0, 2]
    archive.unlink()
    assert source.load(archive.parent).test.labels.tolist() == [1, 2, 0]


def test_cifar100_that_cannot_be_downloaded_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no route to host: fetch https://.* elsewhere and put it at"
    ):
        CIFAR100().load(tmp_path)


def test_damaged_cifar100_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    _write_cifar(folder)
    whole = (folder / "test.bin").read_bytes()
    for content in (whole[:-1], b""):
        (folder / "test.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.bin has \d+ bytes, expected a multiple of 3074; delete"):
            CIFAR100(str(tmp_path)).load(tmp_path)
    (folder / "test.bin").write_bytes(whole)
    (folder / "fine_label_names.txt").write_text("apple\n")
    with pytest.raises(ValueError, match=r"train labels must be all of 0\.\.0: .* \[1, 2\] have no name"):
        CIFAR100(str(tmp_path)).load(tmp_path)
    (folder / "fine_label_names.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"fine_label_names\.txt is missing; delete"):
        CIFAR100(str(tmp_path)).load(tmp_path)


# ------------------------------------------------------------- Digits, Dataset


def test_digits_are_scikit_learns_cut_the_same_way_every_time(tmp_path: Path) -> None:
    loaded, again = Digits().load(tmp_path), Digits().load(tmp_path)
    assert loaded.train.images.shape == (1258, 3, 8, 8)
    assert loaded.test.images.shape == (539, 3, 8, 8)
    assert hashlib.sha256(loaded.test.images.tobytes()).hexdigest()[:12] == "8b03db5a118a"
    np.testing.assert_array_equal(loaded.test.images, again.test.images)

    original = load_digits()
    counts = np.bincount(original.target)
    np.testing.assert_array_equal(np.bincount(loaded.test.labels), np.floor(0.3 * counts + 0.5))

    def rows(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[tuple[int, ...]]:
        assert (images == images[:, :1]).all()
        grey = np.rint(images[:, 0].reshape(len(images), -1) / 255 * 16).astype(int)
        return [(int(label), *row) for label, row in zip(labels, grey.tolist(), strict=True)]

    found = rows(loaded.train.images, loaded.train.labels) + rows(loaded.test.images, loaded.test.labels)
    pairs = zip(original.target, original.data.astype(int).tolist(), strict=True)
    assert sorted(found) == sorted((int(label), *row) for label, row in pairs)
    assert loaded.train.images.max() == 255
    assert list(tmp_path.iterdir()) == []


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


# ---------------------------------------------------------- FederatedDataModule


def test_the_module_is_a_lightning_data_module_that_can_be_set_up_twice(tmp_path: Path) -> None:
    module = FederatedDataModule(Digits(), SPEC, seed=3, cache_dir=str(tmp_path / "new" / "cache"))
    assert isinstance(module, LightningDataModule)
    module.prepare_data()
    module.setup("fit")
    dataset, split = module.dataset, module.split
    module.prepare_data()
    module.setup("test")
    assert module.dataset is dataset
    assert module.split is split
    assert module.num_classes == 10
    assert module.class_names == tuple("0123456789")
    other = FederatedDataModule(Digits(), SPEC, seed=3, cache_dir=str(tmp_path))
    other.setup()
    assert other.split.sha256 == split.sha256
    assert split.spec == SPEC
    assert split.seed == 3


def test_batches_hold_the_images_asked_for(tmp_path: Path) -> None:
    module = FederatedDataModule(
        ImageFolder(str(_write_folder(tmp_path / "pets")), 8), SPEC, 0, str(tmp_path)
    )
    module.dataset = module.source.load(tmp_path)
    images, labels = module.batch("train", np.array([4, 0, 4]))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), [_pixels(k).transpose(2, 0, 1) for k in (4, 0, 4)])
    assert labels.tolist() == [1, 0, 1]
    images += 1  # a copy: nothing of the cache changes
    again, _ = module.batch("train", torch.tensor([4]))
    np.testing.assert_array_equal(again[0].numpy(), _pixels(4).transpose(2, 0, 1))
    tested, labels = module.batch("test", torch.tensor([3]))
    np.testing.assert_array_equal(tested[0].numpy(), _pixels(9).transpose(2, 0, 1))
    none, labels = module.batch("test", np.array([], dtype=np.int64))
    assert none.shape == (0, 3, 8, 8)
    assert labels.shape == (0,)
    with pytest.raises(ValueError, match="part is 'val'"):
        module.batch("val", np.array([0]))  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        module.batch("test", np.array([4]))


def test_the_test_indices_of_a_split_index_what_evaluate_on_says(tmp_path: Path) -> None:
    for local_test in ("official", "holdout30"):
        spec = SplitSpec(2, 2, 2, 3, 1, local_test=local_test)
        module = FederatedDataModule(Digits(), spec, 0, str(tmp_path))
        module.setup()
        for client in module.split.clients:
            for task in client.tasks:
                for part, indices in (("train", task.train), (module.split.evaluate_on, task.test)):
                    _, labels = module.batch(part, indices)  # type: ignore[arg-type]
                    assert set(labels.tolist()) == set(task.classes)


def test_a_missing_seed_is_named(tmp_path: Path) -> None:
    module = FederatedDataModule(Digits(), SPEC, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.seed is not set"):
        module.setup()


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _write_folder(tmp_path / "pets")
    monkeypatch.setenv("FEDLSCL_CACHE", str(tmp_path / "from_env"))
    FederatedDataModule(ImageFolder(str(root), 8), SPEC).prepare_data()
    assert len(list((tmp_path / "from_env").glob("imagefolder-8-*.npy"))) == 2
    monkeypatch.delenv("FEDLSCL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    FederatedDataModule(ImageFolder(str(root), 8), SPEC).prepare_data()
    assert len(list((tmp_path / "home" / ".cache" / "fedlscl").iterdir())) == 2


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    return parser


def test_yaml_builds_the_module(tmp_path: Path) -> None:
    text = f"""
    data:
      source: {{class_path: fedlscl.data.Digits}}
      split: {{clients: 2, tasks: 2, classes_per_task: 2, private_classes: 3, public_classes: 1}}
      seed: 7
      cache_dir: {tmp_path}
    """
    parser = _parser()
    config = parser.parse_string(text)
    module = parser.instantiate(config).data
    module.setup()
    assert module.split.spec == SPEC
    again = parser.instantiate(parser.parse_string(parser.dump(config))).data
    again.setup()
    assert again.split.sha256 == module.split.sha256


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{class_path: fedlscl.data.CIFAR100, init_args: {root: here, download: false}}", CIFAR100),
        ("{class_path: fedlscl.data.ImageNetR, init_args: {root: here, size: 224}}", ImageNetR),
        ("{class_path: fedlscl.data.ImageFolder, init_args: {root: here, size: 64}}", ImageFolder),
        ("Digits", Digits),
    ],
)
def test_every_source_can_be_named_in_yaml(source: str, expected: type) -> None:
    parser = _parser()
    config = parser.parse_string(
        f"data: {{source: {source}, split: {{dirichlet_alpha: 3, train_per_class: 40}}}}"
    )
    module = parser.instantiate(config).data
    assert type(module.source) is expected
    assert module.split_spec == SplitSpec(dirichlet_alpha=3.0, train_per_class=40)
    assert module.seed is None


def test_wrong_yaml_is_refused_by_name() -> None:
    for split, message in (
        ("{klients: 3}", "klients"),
        ("{local_test: x}", "local_test"),
        ("{tasks: many}", "tasks"),
    ):
        text = f"data: {{source: {{class_path: fedlscl.data.Digits}}, split: {split}}}"
        with pytest.raises(jsonargparse.ArgumentError, match=message):
            _parser().parse_string(text)


def test_the_names_that_configurations_use_stay() -> None:
    assert {"Digits", "CIFAR100", "ImageNetR", "ImageFolder", "decode_image"} <= set(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
