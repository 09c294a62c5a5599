"""Data sets by name, each read from small files in its true format: torchvision, Hugging Face, MedMNIST, CSV tables."""

from __future__ import annotations

import colorsys
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import pixels, write_folder
from PIL import Image

from fedlscl.data.folders import ImageFolder
from fedlscl.data.held_out import HeldOut
from fedlscl.data.hubs import HuggingFace, MedMNIST
from fedlscl.data.inks import INKS, Coloured, Inked
from fedlscl.data.listed import ImageTable
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.packed import CIFAR10, Digits
from fedlscl.data.source import Dataset, ImageSet
from fedlscl.data.splits import SplitSpec
from fedlscl.data.torchvision_sets import REFUSED, SETS, Torchvision


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


def stored(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def of(part: ImageSet) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(label)) for image, label in zip(part.images, part.labels, strict=True)}


# --------------------------------------------------------------------- in other colours


def test_coloured_digits_keep_their_shapes_in_colours_that_say_nothing(tmp_path: Path) -> None:
    """Each value lies between paper and ink by the grey one; a test image comes once."""
    grey, coloured = Digits().load(tmp_path), Coloured(Digits(), 2).load(tmp_path)
    number = len(grey.train.labels)
    assert len(coloured.test.labels) == len(grey.test.labels)
    copies = np.tile(grey.train.images, (2, 1, 1, 1))
    for part, shades in ((coloured.train, copies), (coloured.test, grey.test.images)):
        brightest, darkest = (float(part.images[shades == value].mean()) for value in (255, 0))
        assert abs(brightest - darkest) < 3  # the ink is as often the lighter as the darker
        for image, shade in zip(part.images[:50], shades[:50, 0].reshape(50, -1) / 255, strict=True):
            both = np.stack([1 - shade, shade], 1)
            for values in image.reshape(3, -1).astype(float):
                colours = np.linalg.lstsq(both, values, rcond=None)[0]
                assert np.abs(both @ colours - values).max() < 1  # rounded to whole numbers
                assert colours.min() > -2
                assert colours.max() < 257
    assert (coloured.train.labels == np.tile(grey.train.labels, 2)).all()
    assert not (coloured.train.images[:number] == coloured.train.images[number:]).all(axis=(1, 2, 3)).any()
    assert Coloured(Digits(), 2).load(tmp_path).sha256 == coloured.sha256


def test_inked_digits_are_each_digit_in_each_ink_of_its_hue(tmp_path: Path) -> None:
    """A class is digit and ink; hue is within a quarter of a sixth of the ink's own, and black stays black."""
    grey, inked = Digits().load(tmp_path), Inked(Digits()).load(tmp_path)
    assert (inked.classes[0], inked.classes[1], inked.classes[6], inked.classes[59]) == (
        *("0 in red", "0 in yellow", "1 in red", "9 in magenta"),
    )
    assert Inked(Digits()).count() == len(inked.classes)
    for part, plain in ((inked.train, grey.train), (inked.test, grey.test)):
        by_ink = part.images.reshape(6, len(plain.labels), 3, 8, 8)
        assert (part.labels.reshape(6, -1) == 6 * plain.labels + np.arange(6)[:, None]).all()
        assert (by_ink[:, plain.images == 0] == 0).all()
        brightest = by_ink.max(axis=(3, 4)) / 255  # where the stroke is white: the ink
        for ink, colours in enumerate(brightest):
            hues = np.array([colorsys.rgb_to_hsv(*colour)[0] for colour in colours])
            turned = (hues - ink / 6 + 0.5) % 1 - 0.5
            assert np.abs(turned).max() < 0.26 / 6
            assert turned.std() > 0.1 / 6
    assert INKS[4] == "blue"
    assert inked.train.images[inked.train.labels % 6 == 4].mean(axis=(0, 2, 3)).argmax() == 2
    assert Inked(Digits()).load(tmp_path).sha256 == inked.sha256


def test_copies_of_a_held_out_image_are_not_trained_on(tmp_path: Path) -> None:
    held, coloured = (source.load(tmp_path) for source in (HeldOut(Digits()), Coloured(HeldOut(Digits()), 3)))
    assert len(coloured.train.labels) == 3 * len(held.train.labels)
    assert len(coloured.test.labels) == len(held.test.labels)
    held_out = {source.tested_on for source in (HeldOut(Digits()), Coloured(HeldOut(Digits()), 3))}
    assert held_out == {"images held out of training"}
    assert Coloured(Digits()).tested_on == "test images"


def test_copies_are_not_held_out_from_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"HeldOut holds out training images, but each .* comes 2 times"):
        HeldOut(Coloured(Digits(), 2)).load(tmp_path)
    with pytest.raises(ValueError, match="comes 2 times"):
        HeldOut(Coloured(Coloured(Digits(), 2))).load(tmp_path)
    with pytest.raises(ValueError, match="comes 6 times"):
        HeldOut(Inked(Digits())).load(tmp_path)
    HeldOut(Coloured(Digits())).load(tmp_path)
    split = SplitSpec(
        clients=2, tasks=1, classes_per_task=5, private_classes=0, public_classes=5, local_test="holdout30"
    )
    data = FederatedDataModule(Coloured(Digits(), 2), split, seed=1, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.split\.local_test holdout30 holds out .* of coloured digits comes 2"):
        data.setup()


def test_copies_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="copies is 0"):
        Coloured(Digits(), 0)


# ------------------------------------------------------- folders without test images


@pytest.mark.parametrize("inside", ["train", "."])
def test_a_folder_without_test_images_is_cut_once_and_for_all(tmp_path: Path, inside: str) -> None:
    whole = write_folder(tmp_path / "pets", train=10, test=0)
    (whole / "test" / "ant").rmdir(), (whole / "test" / "bee").rmdir(), (whole / "test").rmdir()
    root = whole if inside == "train" else whole / "train"
    loaded = ImageFolder(str(root), 8).load(tmp_path)
    assert loaded.classes == ("ant", "bee")
    assert (np.bincount(loaded.train.labels).tolist(), np.bincount(loaded.test.labels).tolist()) == ([8, 8], [2, 2])
    every = {(pixels(k).transpose(2, 0, 1).tobytes(), k // 10) for k in range(20)}
    assert of(loaded.train) | of(loaded.test) == every
    assert of(loaded.train).isdisjoint(of(loaded.test))
    # the record alone decides, also where it is not what would be drawn now
    (record,) = tmp_path.glob("imagefolder-test-*.json")
    prefix = ""
    record.write_text(json.dumps([f"{prefix}{name}/{k}.png" for name in ("ant", "bee") for k in (0, 1)]))
    again = ImageFolder(str(root), 8).load(tmp_path)
    assert of(again.test) == {(pixels(k).transpose(2, 0, 1).tobytes(), k // 10) for k in (0, 1, 10, 11)}
    more = ImageFolder(str(root), 8, test_fraction=0.5).load(tmp_path)
    assert np.bincount(more.test.labels).tolist() == [5, 5]
    record.write_text("[]")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        ImageFolder(str(root), 8).load(tmp_path)


def test_a_folder_of_validation_images_takes_the_place_of_a_missing_one_for_testing(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    before = ImageFolder(str(root), 8).load(tmp_path)
    with pytest.raises(ValueError, match=r"test_fraction is 0\.3, but .*test is there"):
        ImageFolder(str(root), 8, test_fraction=0.3).load(tmp_path)
    with pytest.raises(ValueError, match=r"test_fraction is 1\.0; it must be above 0 and below 1"):
        ImageFolder(str(root), 8, test_fraction=1.0)
    (root / "test").rename(root / "val")
    assert ImageFolder(str(root), 8).load(tmp_path).sha256 == before.sha256
    write_folder(tmp_path / "more", train=0)
    (tmp_path / "more" / "test").rename(root / "test")
    with pytest.warns(UserWarning, match="val left out; test is tested on"):
        ImageFolder(str(root), 8).load(tmp_path)


def test_images_held_out_are_neither_trained_on_nor_test_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", train=10)
    whole = ImageFolder(str(root), 8).load(tmp_path)
    part = HeldOut(ImageFolder(str(root), 8)).load(tmp_path)
    assert (np.bincount(part.train.labels).tolist(), np.bincount(part.test.labels).tolist()) == ([7, 7], [3, 3])
    assert of(part.train) | of(part.test) == of(whole.train)
    assert of(part.train).isdisjoint(of(part.test))
    copied = (ImageSet(set_.images[np.arange(len(set_.labels))], set_.labels) for set_ in (part.train, part.test))
    assert part.sha256 == Dataset("pets", *copied, part.classes).sha256 != whole.sha256
    with pytest.raises(ValueError, match=r"data\.source\.fraction is 1\.5"):
        HeldOut(ImageFolder(str(root), 8), 1.5)


# ------------------------------------------------------------------------ tables


def table(folder: Path, text: str) -> ImageTable:
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return ImageTable(str(folder / "list.csv"), 8)


def test_a_table_names_images_classes_and_parts(tmp_path: Path) -> None:
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "cache"
    cache.mkdir()
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    rows = [f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in reversed(files)]
    loaded = table(root, "\n".join(["file,Label,split", *rows])).load(cache)
    as_folder = ImageFolder(str(root), 8).load(cache)
    assert (loaded.sha256, loaded.name) == (as_folder.sha256, "list")
    # semicolons, a folder of their own, a class with a comma, and no parts: some are cut
    rows = [f'{path};"{path.split("/")[1]}, black"' for path in files]
    (tmp_path / "other").mkdir()
    listed = table(tmp_path / "other", "\n".join(["path;class", *rows]))
    listed.folder = root
    cut = listed.load(cache)
    assert cut.classes == ("ant, black", "bee, black")
    assert (len(cut.train.labels), len(cut.test.labels)) == (8, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.png,x\n", r"the header is name, label; it must have one column called path or file .*"),
        ("path,label,class\na.png,x,y\n", r"one column called label or class .*or data\.source\.label must name one"),
        ("path,label\n", "has a header and no rows"),
        ("path,label\na.png\n", "line 2 has 1 cells"),
        ("path,label\na.png,x\na.png,y\n", r"line 3: .*a\.png is in line 2 already"),
        ("path,label,part\na.png,x,dev\n", "line 2: 'dev' is no part"),
        ("path,label,part\na.png,x,train\nb.png,y,test\n", "class 'y' has no image for 'train'"),
        ("path,label\na.png,\n", "line 2: path or class is empty"),
    ],
)
def test_what_is_no_table_of_images_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(tmp_path, text).load(tmp_path)


# --------------------------------------------------------------------- torchvision


def idx(path: Path, values: NDArray[np.uint8]) -> None:
    """The format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.write_bytes(header + values.tobytes())
    with gzip.open(path.with_name(f"{path.name}.gz"), "wb") as packed:
        packed.write(header + values.tobytes())


def known_content(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """The checksums are those of the files as published, and not of small ones."""
    monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file())


def load(name: str, root: Path, **options: Any) -> Dataset:
    cache = root / "cache"
    cache.mkdir(exist_ok=True)
    return Torchvision(name, str(root), 8, download=False, **options).load(cache)


def test_eurosat_is_cut(tmp_path: Path) -> None:
    for c, name in enumerate(("Forest", "River")):
        for k in range(5):
            picture(tmp_path / "eurosat" / "2750" / name / f"{name}_{k}.png", 5 * c + k)
    loaded = load("EuroSAT", tmp_path)
    assert (loaded.name, loaded.classes) == ("eurosat", ("Forest", "River"))
    assert np.bincount(loaded.test.labels).tolist() == [1, 1]
    every = {(pixels(k).transpose(2, 0, 1).tobytes(), k // 5) for k in range(10)}
    assert of(loaded.train) | of(loaded.test) == every
    assert ImageFolder(str(tmp_path / "eurosat" / "2750"), 8).load(tmp_path / "cache").classes == loaded.classes


def test_flowers102_has_training_and_validation_images_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.io import savemat

    known_content(monkeypatch, "flowers102")
    folder = tmp_path / "flowers-102"
    for k in range(1, 307):
        picture(folder / "jpg" / f"image_{k:05d}.jpg", k)
    savemat(folder / "imagelabels.mat", {"labels": [(np.arange(306) % 102 + 1).tolist()]})
    parts = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    savemat(folder / "setid.mat", {name: [list(ids)] for name, ids in parts.items()})
    loaded = load("Flowers102", tmp_path)
    assert (len(loaded.classes), loaded.classes[1]) == (102, "hard-leaved pocket orchid")
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (204, 102)
    first = stored(folder / "jpg" / "image_00205.jpg")
    np.testing.assert_array_equal(loaded.test.images[0], first)


def test_gtsrb_and_pets_have_their_paths_elsewhere(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    for label in range(2):
        for k in range(2):
            picture(base / "GTSRB" / "Training" / f"{label:05d}" / f"0000{k}.ppm", 2 * label + k)
    rows = ["Filename;Width;Height;ClassId"]
    for k, label in enumerate((1, 0)):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm", 10 + k)
        rows.append(f"{k:05d}.ppm;8;8;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows))
    signs = load("GTSRB", tmp_path)
    assert signs.classes == ("0", "1")
    assert of(signs.test) == {
        (pixels(10).transpose(2, 0, 1).tobytes(), 1),
        (pixels(11).transpose(2, 0, 1).tobytes(), 0),
    }

    base = tmp_path / "oxford-iiit-pet"
    for part, first in (("trainval", 0), ("test", 2)):
        names = [f"Abyssinian_{first}", f"beagle_{first + 1}"]
        for k, name in enumerate(names):
            picture(base / "images" / f"{name}.jpg", first + k)
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"{part}.txt").write_text(f"{names[0]} 1 1 1\n{names[1]} 2 2 1\n")
    pets = load("OxfordIIITPet", tmp_path)
    assert pets.classes == ("Abyssinian", "Beagle")
    np.testing.assert_array_equal(pets.test.images[1], stored(base / "images" / "beagle_3.jpg"))


def test_sets_of_arrays_keep_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    labels = np.arange(10, dtype=np.uint8)
    for part, seed in (("train", 0), ("t10k", 1)):
        grey = np.random.default_rng(seed).integers(0, 256, (10, 28, 28), dtype=np.uint8)
        idx(tmp_path / "KMNIST" / "raw" / f"{part}-images-idx3-ubyte", grey)
        idx(tmp_path / "KMNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    loaded = load("KMNIST", tmp_path)
    assert loaded.classes[:2] == ("o", "ki")
    np.testing.assert_array_equal(loaded.test.images, np.repeat(grey[:, None], 3, axis=1))
    (tmp_path / "KMNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        (tmp_path / "KMNIST" / "processed" / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"is a pickle that torchvision would read; delete .*processed"):
        load("KMNIST", tmp_path)

    known_content(monkeypatch, "svhn")
    for part in ("train", "test"):
        colour = np.stack([pixels(k, 32, 32) for k in range(10)], axis=3)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": colour, "y": np.arange(1, 11)[:, None]})
    numbers = load("SVHN", tmp_path)
    assert numbers.train.labels.tolist() == [*range(1, 10), 0]  # its label 10 is the digit 0
    np.testing.assert_array_equal(numbers.train.images[3], pixels(3, 32, 32).transpose(2, 0, 1))


def test_sets_that_are_not_there_or_not_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    with pytest.raises(FileNotFoundError, match=r"DTD is not complete in .*not found.*what torchvision\.datasets\.DTD"):
        load("DTD", tmp_path)
    asked = []

    def fetch(url: str, *args: Any, **options: Any) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", fetch)
    with pytest.raises(FileNotFoundError, match=r"DTD is not complete in .*no network"):
        Torchvision("DTD", str(tmp_path), 8).load(tmp_path)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="'CIFAR10': torchvision unpickles it; CIFAR10 of this package"):
        Torchvision("CIFAR10")
    with pytest.raises(ValueError, match="did you mean EuroSAT"):
        Torchvision("eurosat")
    assert all(hasattr(datasets, name) for name in [*SETS, *REFUSED])
    assert not SETS.keys() & REFUSED.keys()


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    for n, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images = [pixels(2 * n + label, 32, 32).transpose(2, 0, 1) for label in (0, 1)]
        (folder / f"{name}.bin").write_bytes(b"".join(bytes([k]) + image.tobytes() for k, image in enumerate(images)))
    loaded = CIFAR10(str(tmp_path), download=False).load(tmp_path)
    assert loaded.classes == ("airplane", "automobile")
    assert loaded.train.labels.tolist() == [0, 1] * 5
    np.testing.assert_array_equal(loaded.train.images[3], pixels(3, 32, 32).transpose(2, 0, 1))
    np.testing.assert_array_equal(loaded.test.images[1], pixels(11, 32, 32).transpose(2, 0, 1))


# ---------------------------------------------------------------------------- hubs


def test_without_its_package_a_hub_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "medmnist", None)
    with pytest.raises(ImportError, match=r"the package datasets is not installed .*pip install 'fedlscl\[hugging"):
        HuggingFace("owner/name", 8).load(tmp_path)
    with pytest.raises(ImportError, match=r"the package medmnist is not installed .*'fedlscl\[medmnist\]'"):
        MedMNIST("bloodmnist").load(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of parquet files as the hub has them."""
    datasets = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    import pyarrow
    from pyarrow import parquet

    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "never"], "_type": "ClassLabel"}}
    folder = tmp_path / "hub"
    folder.mkdir()
    for part, count, first in (("train", 10, 0), ("test", 4, 100)):
        files = []
        for k in range(count):
            picture(tmp_path / "one.png", first + k)
            files.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": None})
        image = pyarrow.array(files, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
        rows = pyarrow.table({"image": image, "label": [k % 2 for k in range(count)]})
        rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(rows, folder / f"{part}-00000-of-00001.parquet")
    return folder


def test_parquet_files_of_hugging_face_are_decoded_here(hub: Path, tmp_path: Path) -> None:
    loaded = HuggingFace(str(hub), 8).load(tmp_path)
    assert (loaded.name, loaded.classes) == ("hub", ("cat", "dog"))
    assert of(loaded.test) == {(pixels(100 + k).transpose(2, 0, 1).tobytes(), k % 2) for k in range(4)}
    assert len(loaded.train.labels) == 10
    folders = sorted(tmp_path.glob("huggingface-*"))
    assert HuggingFace(str(hub), 8).load(tmp_path).sha256 == loaded.sha256
    assert sorted(tmp_path.glob("huggingface-*")) == folders
    cut = HuggingFace(str(hub), 8, test=None).load(tmp_path)
    assert (len(cut.train.labels), len(cut.test.labels)) == (8, 2)
    with pytest.raises(ValueError, match="has no column 'picture', but image, label"):
        HuggingFace(str(hub), 8, image="picture").load(tmp_path)
    with pytest.raises(ValueError, match="has no part 'dev'"):
        HuggingFace(str(hub), 8, test="dev").load(tmp_path)


def test_files_of_medmnist_are_never_unpickled(tmp_path: Path) -> None:
    pytest.importorskip("medmnist", reason="the extra medmnist is not installed")
    grey = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    labels = (np.arange(24) % 8).astype(np.uint8)[:, None]
    parts = {"train": slice(0, 8), "val": slice(8, 16), "test": slice(16, 24)}
    arrays = {f"{part}_images": grey[rows] for part, rows in parts.items()}
    arrays |= {f"{part}_labels": labels[rows] for part, rows in parts.items()}
    np.savez_compressed(tmp_path / "tissuemnist.npz", **arrays)
    loaded = MedMNIST("TissueMNIST", root=str(tmp_path)).load(tmp_path)
    assert len(loaded.classes) == 8
    np.testing.assert_array_equal(loaded.train.images, np.repeat(grey[:16, None], 3, axis=1))
    assert loaded.test.labels.tolist() == list(range(8))
    np.savez_compressed(tmp_path / "tissuemnist.npz", **{**arrays, "test_images": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="Python objects"):
        MedMNIST("tissuemnist", root=str(tmp_path)).load(tmp_path)
    with pytest.raises(ValueError, match=r"'chestmnist'; the sets of MedMNIST that are read, .*bloodmnist"):
        MedMNIST("chestmnist").load(tmp_path)
