"""Classification sets of torchvision by their names.

Torchvision finds the files, and fetches them where it is told to (its archives are checked by the MD5 that it states,
but for FGVCAircraft's, of which it states none). Image files are then decoded by this package. A set is allowed if
its files are images, text, JSON, CSV, MATLAB's MAT (version 5, numbers and text) or plain arrays; none is unpickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlscl.data.cache import Files, load_images
from fedlscl.data.cutting import cut_parts, test_part
from fedlscl.data.folders import ImageFiles
from fedlscl.data.held_out import held_out
from fedlscl.data.source import Dataset, ImageSet
from fedlscl.data.temporary import sweep


class Layout(NamedTuple):
    """How torchvision's class of a set is asked for its parts.

    Args:
        train: the arguments of each part that is for training.
        test: likewise for testing; none where there is no official split.
        arrays: whether it holds images as an array, and not as files.
        idx: whether it would load an older copy with torch.load, which is refused.
    """

    train: Sequence[Mapping[str, Any]] = ({"split": "train"},)
    test: Sequence[Mapping[str, Any]] = ({"split": "test"},)
    arrays: bool = False
    idx: bool = False


_WHOLE = Layout(({},), ())
_HALVES = Layout()
_WITH_VALIDATION = Layout(({"split": "train"}, {"split": "val"}))
_TRAINVAL = Layout(({"split": "trainval"},))
_FLAG = Layout(({"train": True},), ({"train": False},), arrays=True)

SETS: dict[str, Layout] = {
    "Country211": Layout(({"split": "train"}, {"split": "valid"})),
    "DTD": _WITH_VALIDATION,
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _TRAINVAL,
    "FashionMNIST": _FLAG._replace(idx=True),
    "Flowers102": _WITH_VALIDATION,
    "Food101": _HALVES,
    "GTSRB": _HALVES,
    "Imagenette": Layout(test=({"split": "val"},)),
    "KMNIST": _FLAG._replace(idx=True),
    "MNIST": _FLAG._replace(idx=True),
    "OxfordIIITPet": _TRAINVAL,
    "RenderedSST2": _WITH_VALIDATION,
    "SEMEION": Layout(({},), (), arrays=True),
    "STL10": Layout(arrays=True),
    "SUN397": _WHOLE,
    "SVHN": Layout(arrays=True),
    "StanfordCars": _HALVES,
    "USPS": _FLAG,
}
"""The sets that are read."""

REFUSED = {
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100"), "torchvision unpickles it; {name} of this package reads the binary version"
    ),
    "ImageNet": "torchvision reads its classes with torch.load; ImageFolder reads its unpacked train and val",
    **dict.fromkeys(("EMNIST", "QMNIST"), "torchvision may read it with torch.load, and turns its images"),
    "PCAM": "it needs h5py; MedMNIST has such images",
    **dict.fromkeys(
        ("Caltech101", "Caltech256", "INaturalist", "LFWPeople", "Omniglot", "Places365"),
        "unpack it and read its class folders with ImageFolder",
    ),
}
"""Sets of torchvision that are not, and why."""


class Torchvision(ImageFiles):
    """A classification set of torchvision; class ids follow torchvision's.

    Where it has no official split, a random part of each class, the same in every run, is the test set.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        size: int = 224,
        download: bool = True,
        background: str | tuple[int, int, int] = "white",
        test_fraction: float | None = None,
    ) -> None:
        """Name what to read.

        Args:
            name: torchvision's name of the set, such as EuroSAT, Flowers102 or SVHN.
            root: the folder that torchvision calls root; None = torchvision/ in the cache folder.
            size: side in pixels that image files are decoded to; sets of arrays keep theirs.
            download: have torchvision fetch what is not there.
            background: colour behind transparent images. See ImageFolder.
            test_fraction: the part of each class that is for testing where there is no official split, above 0 and
                below 1; None = 0.2.

        Raises:
            ValueError: there is no such set, or it is none of those that are read.
        """
        super().__init__(root or ".", size, None, background, None)
        check_name(name)
        self.name, self.layout = name, SETS[name]
        self.own_root = root is not None
        self.download = download
        self.test_fraction = test_part("test_fraction", test_fraction)

    def load(self, cache_dir: Path) -> Dataset:
        """Return the set, decoded or from the cache.

        Raises:
            FileNotFoundError: it is not there, and may not or cannot be fetched.
            ValueError: it is not what it should be.
        """
        sweep(cache_dir)
        root = self.root if self.own_root else cache_dir / "torchvision"
        root.mkdir(parents=True, exist_ok=True)
        if self.layout.idx and (old := next(iter((root / self.name / "processed").glob("*.pt")), None)):
            raise ValueError(f"{old} is a pickle that torchvision would read; delete {old.parent}")
        train, test = (
            [self._part(root, options) for options in part] for part in (self.layout.train, self.layout.test)
        )
        classes = _classes(train)
        if self.layout.arrays:
            first, second = (_arrays(part) for part in (train, test))
            if second is None:
                first, second = _cut(first, self.test_fraction, self.name)
        else:
            files = _files(train, classes)
            if test:
                parts = Files("train", files), Files("test", _files(test, classes))
            else:
                parts = cut_parts(self.name.lower(), files, root, self.test_fraction, cache_dir)
            first, second = load_images(self.name.lower(), self.decoder, root, parts, cache_dir)
        return Dataset(self.name.lower(), first, second, classes)

    def _part(self, root: Path, options: Mapping[str, Any]) -> Any:
        from torchvision import datasets

        kind = getattr(datasets, self.name)
        known = inspect.signature(kind).parameters
        further: dict[str, Any] = {"loader": _path} if "loader" in known else {}
        try:
            if self.download:
                return _made(kind, root, {**options, **further, "download": True}, known)
            return kind(str(root), **options, **further)
        except (OSError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise FileNotFoundError(
                f"{self.name} is not complete in {root} ({text}); put there what torchvision.datasets.{self.name} "
                "expects, or run once where it can be fetched, with data.source.download true"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"what torchvision finds of {self.name} in {root} is damaged ({type(error).__name__}: {error})"
            ) from error


def check_name(name: str) -> None:
    """Raise ValueError if the set of torchvision is none that is read; it says why, and which are."""
    if name in SETS:
        return
    near = {each.lower(): each for each in [*SETS, *REFUSED]}.get(name.lower())
    if near in REFUSED:
        raise ValueError(f"data.source.name is '{name}': {REFUSED[near].format(name=near)}")
    meant = f"did you mean {near}? " if near else ""
    raise ValueError(f"data.source.name is '{name}'; {meant}the sets of torchvision that are read: {', '.join(SETS)}")


def _made(kind: Any, root: Path, options: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """The set, fetched where it is not there; first without, since some would fetch what is there."""
    offline = {name: value for name, value in options.items() if name != "download"}
    try:
        return kind(str(root), **offline)
    except (OSError, RuntimeError):
        return kind(str(root), **{name: value for name, value in options.items() if name in known})


def _path(path: Any) -> Path:
    """In the place of a loader: image files are decoded here, and not by torchvision."""
    return Path(path)


def _listed(part: Any) -> list[tuple[Path, int]]:
    """Image files and their classes."""
    if hasattr(part, "loader"):
        return [(path, int(label)) for path, label in (part[n] for n in range(len(part)))]
    pairs = part._samples if hasattr(part, "_samples") else zip(part._images, part._labels, strict=True)
    return [(Path(path), int(label)) for path, label in pairs]


def _classes(parts: Sequence[Any]) -> tuple[str, ...]:
    """Names of the classes by class id; numbers where torchvision has no names."""
    named = getattr(parts[0], "classes", None)
    if named is not None:
        return tuple(str(name if isinstance(name, str) else name[0]) for name in named)
    count = 1 + max(max(_labels(part)) for part in parts)
    return tuple(map(str, range(count)))


def _labels(part: Any) -> Sequence[int]:
    found = getattr(part, "labels", getattr(part, "targets", None))
    return [label for _, label in _listed(part)] if found is None else np.asarray(found).tolist()


def _files(parts: Sequence[Any], classes: Sequence[str]) -> dict[str, list[Path]]:
    """Sorted image files by class, in the order of the class ids."""
    found: list[list[Path]] = [[] for _ in classes]
    for part in parts:
        for path, label in _listed(part):
            found[label].append(path)
    return {name: sorted(paths) for name, paths in zip(classes, found, strict=True)}


def _arrays(parts: Sequence[Any]) -> Any:
    """All images of some parts that hold arrays; None of no part."""
    if not parts:
        return None
    images = np.concatenate([_channels(np.asarray(part.data)) for part in parts])
    return ImageSet(images, np.concatenate([np.asarray(_labels(part), dtype=np.int64) for part in parts]))


def _channels(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Images (N, H, W) or (N, 3, H, W) as (N, 3, H, W)."""
    return np.repeat(images[:, None], 3, axis=1) if images.ndim == 3 else np.ascontiguousarray(images)


def _cut(images: ImageSet, fraction: float, name: str) -> tuple[ImageSet, ImageSet]:
    is_test = held_out(images.labels, fraction, name)
    train, test = (ImageSet(images.images[mask], images.labels[mask]) for mask in (~is_test, is_test))
    return train, test
