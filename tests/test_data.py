"""The data sets of fedlscl.data, and the data module that splits them among clients."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from pictures import pixels, write_folder
from sklearn.datasets import load_digits

from fedlscl.data.folders import ImageFolder, ImageNetR
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.packed import CIFAR100, Digits
from fedlscl.data.source import Dataset, ImageSet
from fedlscl.data.splits import ClientSplit, Split, SplitSpec, TaskSplit

SPEC = SplitSpec(clients=2, tasks=2, classes_per_task=2, private_classes=3, public_classes=1)

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
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary\.tar\.gz is missing or damaged.*download to true"):
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


def test_cifar100_that_cannot_be_downloaded_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host: fetch https://.* elsewhere and put it at"):
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


# ----------------------------------------------------------------------- Digits


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
    module = FederatedDataModule(ImageFolder(str(write_folder(tmp_path / "pets")), 8), SPEC, 0, str(tmp_path))
    module.dataset = module.source.load(tmp_path)
    images, labels = module.batch("train", np.array([4, 0, 4]))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), [pixels(k).transpose(2, 0, 1) for k in (4, 0, 4)])
    assert labels.tolist() == [1, 0, 1]
    images += 1  # a copy: nothing of the cache changes
    again, _ = module.batch("train", torch.tensor([4]))
    np.testing.assert_array_equal(again[0].numpy(), pixels(4).transpose(2, 0, 1))
    tested, labels = module.batch("test", torch.tensor([3]))
    np.testing.assert_array_equal(tested[0].numpy(), pixels(9).transpose(2, 0, 1))
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
    root = write_folder(tmp_path / "pets")
    monkeypatch.setenv("FEDLSCL_CACHE", str(tmp_path / "from_env"))
    FederatedDataModule(ImageFolder(str(root), 8), SPEC).prepare_data()
    assert len(list((tmp_path / "from_env").glob("imagefolder-8-*.npy"))) == 2
    monkeypatch.delenv("FEDLSCL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    FederatedDataModule(ImageFolder(str(root), 8), SPEC).prepare_data()
    assert len(list((tmp_path / "home" / ".cache" / "fedlscl").glob("imagefolder-8-*.npy"))) == 2


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    return parser


def test_yaml_builds_the_module(tmp_path: Path) -> None:
    text = f"""
    data:
      source: {{class_path: Digits}}
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
        ("{class_path: CIFAR100, init_args: {root: here, download: false}}", CIFAR100),
        ("{class_path: ImageNetR, init_args: {root: here, size: 224}}", ImageNetR),
        ("{class_path: ImageFolder, init_args: {root: here, size: 64}}", ImageFolder),
        ("Digits", Digits),
    ],
)
def test_every_source_can_be_named_in_yaml(source: str, expected: type) -> None:
    parser = _parser()
    config = parser.parse_string(f"data: {{source: {source}, split: {{dirichlet_alpha: 3, train_per_class: 40}}}}")
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
        text = f"data: {{source: {{class_path: Digits}}, split: {split}}}"
        with pytest.raises(jsonargparse.ArgumentError, match=message):
            _parser().parse_string(text)


def test_what_is_tested_without_training_images_is_counted() -> None:
    module = FederatedDataModule(Digits(), SPEC, seed=0)
    train = ImageSet(np.zeros((8, 3, 2, 2), np.uint8), np.array([0, 0, 0, 1, 1, 1, 2, 2], dtype=np.int64))
    test = ImageSet(np.zeros((3, 3, 2, 2), np.uint8), np.array([0, 1, 2], dtype=np.int64))
    module.dataset = Dataset("x", train, test, ("a", "b", "c"))
    index = np.array
    tasks = (
        TaskSplit((0, 1), index([0, 1, 2]), index([0, 1])),  # all of class 1 went elsewhere
        TaskSplit((1, 2), index([3, 6, 7]), index([1, 2])),
    )
    spec = SplitSpec(clients=2, tasks=1, classes_per_task=2, private_classes=1, public_classes=1)
    clients = (ClientSplit((0,), (1,), tasks[:1]), ClientSplit((2,), (1,), tasks[1:]))
    module.split = Split(spec, 0, clients)
    assert module.tested_pairs == [(0, 0, True), (0, 1, False), (1, 1, True), (1, 2, True)]


def test_all_the_data_that_come_packed_have_fingerprints(tmp_path: Path) -> None:
    digits = Digits().load(tmp_path)
    assert digits.sha256.startswith("all:dcd55eb5ab83")
    _write_cifar(tmp_path / "cifar-100-binary")
    before = CIFAR100(str(tmp_path)).load(tmp_path).sha256
    content = bytearray((tmp_path / "cifar-100-binary" / "train.bin").read_bytes())
    content[-1] ^= 1  # the last pixel of all
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(content)
    assert CIFAR100(str(tmp_path)).load(tmp_path).sha256 != before


def test_the_images_are_read_once_for_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FederatedDataModule(Digits(), SPEC, seed=0, cache_dir=str(tmp_path))
    module.prepare_data()
    monkeypatch.setattr(Digits, "load", None)
    module.setup()
    assert module.num_classes == 10
