"""Images that are in a folder for each client: whose an image is, nobody needs to draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlscl.data.cache import Files, load_images
from fedlscl.data.cutting import TEST_FRACTION, cut_parts
from fedlscl.data.folders import ImageFiles, check_same_classes, class_folders, list_classes, warn_of_left_out
from fedlscl.data.source import Dataset, Owners
from fedlscl.data.temporary import sweep


class ClientFolders(ImageFiles):
    """Any images in ``<client>/train/<class>/`` and ``<client>/test/<class>/``, or in ``<client>/<class>/``.

    Clients are numbered by the sorted names of their folders. A class that several have is one class. Without ``train``
    and ``test`` a random 20 % of a client's images of a class, the same in every run, are its test images, see
    `cut_parts`. It goes with ``data.split.by: folders``.
    """

    def __init__(
        self,
        root: str,
        size: int,
        name: str | None = None,
        expected_classes: int | None = None,
        background: str | tuple[int, int, int] = "white",
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Name what to read.

        Args:
            root: the folder that holds a folder for each client.
            size: side in pixels that images are decoded to.
            name: name of the data set; None = the folder's.
            expected_classes: refuse any other number of classes; None = any.
            background: colour behind transparent images. See ImageFolder.
            value_range: values that are black and white in images that do not say it themselves. See ImageFolder.
        """
        super().__init__(root, size, expected_classes, background, value_range)
        self.name = name

    def load(self, cache_dir: Path) -> Dataset:
        """Return the images of all clients, decoded or from the cache.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a class is empty or not in both parts of a client, or images cannot be read.
        """
        sweep(cache_dir)
        clients = class_folders(self.root)
        if not clients:
            raise FileNotFoundError(f"{self.root} is not there or empty; it must hold a folder of images per client")
        parts = {"train": _Part(), "test": _Part()}
        left_out: list[Path] = []
        for client, folder in enumerate(clients):
            for part, (classes, others) in self._read(folder, cache_dir).items():
                parts[part].add(client, classes)
                left_out += others
        warn_of_left_out(self.root, left_out)
        names = sorted(parts["train"].files)
        if self.expected_classes not in (None, len(names)):
            raise ValueError(
                f"{self.root} holds {len(names)} classes, expected {self.expected_classes} "
                "(data.source.expected_classes); is the root right?"
            )
        files = [Files(part, {name: found.files[name] for name in names}) for part, found in parts.items()]
        train, test = load_images("clientfolders", self.decoder, self.root, files, cache_dir)
        owners = Owners(*(found.owner_of(names) for found in parts.values()))
        return Dataset(self.name or self.root.resolve().name, train, test, tuple(names), owners=owners)

    def count(self) -> int | None:
        """The classes of all clients together."""
        inner = ((folder / "train" if (folder / "train").is_dir() else folder) for folder in class_folders(self.root))
        return len({each.name for folder in inner for each in class_folders(folder)}) or None

    @staticmethod
    def _read(folder: Path, cache_dir: Path) -> dict[str, tuple[dict[str, list[Path]], list[Path]]]:
        """One client's images by part and class, and the files that are left out."""
        if (folder / "train").is_dir():
            train, test = (list_classes(folder / part, None) for part in ("train", "test"))
            check_same_classes(folder / "train", train.classes, folder / "test", test.classes)
            return {"train": (train.classes, train.left_out), "test": (test.classes, test.left_out)}
        found = list_classes(folder, None)
        drawn, tested = cut_parts("clientfolders", found.classes, folder, TEST_FRACTION, cache_dir)
        return {"train": (drawn.by_class, found.left_out), "test": (tested.by_class, [])}


class _Part:
    """Training or test images of all clients, by class, and whose they are."""

    def __init__(self) -> None:
        self.files: dict[str, list[Path]] = {}
        self._owners: dict[str, list[int]] = {}

    def add(self, client: int, classes: dict[str, list[Path]]) -> None:
        """A client's images, by class."""
        for name, paths in classes.items():
            self.files.setdefault(name, []).extend(paths)
            self._owners.setdefault(name, []).extend([client] * len(paths))

    def owner_of(self, names: list[str]) -> NDArray[np.int64]:
        """Of each image, in the order in which they are read."""
        return np.array([owner for name in names for owner in self._owners[name]], dtype=np.int64)
