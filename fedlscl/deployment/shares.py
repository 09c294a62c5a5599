"""A part of a federation's data in a folder of its own: all that one client, or the server, may see.

A folder holds ``share.json`` and, as NumPy arrays, ``train-images``, ``train-labels``, ``test-images`` and
``test-labels``: images (n, 3, H, W) in uint8, class ids (n,) in int64.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.data.splits import ClientSplit, Split, TaskSplit
from fedlscl.files import Damaged, replacing, sync, write_atomically

PARTS = ("train", "test")
ARRAYS = {f"{part}-{what}.npy": (part, what) for part in PARTS for what in ("images", "labels")}
"""The files of the arrays, and what each holds of which part."""

FIELDS = {"data", "classes", "sha256", "server_images", "split"}
"""What `share.json` holds; also `files`, the checksum of each array, unless somebody else than `deal` has written it.

The server's has `samples`, each client's number of training images in each task.
"""


class LocalShare(FederatedDataModule):
    """The data of one place, as `deal` writes them.

    Args:
        folder: one of the folders that `deal` makes.
        device_mib: see `FederatedDataModule`.

    Raises:
        FileNotFoundError: if there is no share in `folder`.
        ValueError: if `share.json` is not what `deal` writes; `samples` and `files` may be missing.
    """

    def __init__(self, folder: Path, device_mib: float = 8192) -> None:
        path = folder / "share.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no share of a federation's data ({path.name}); see `fedlscl deal`")
        try:
            self._content = json.loads(path.read_text())
            if missing := FIELDS - set(self._content):
                raise ValueError(f"it lacks {sorted(missing)}")
            if not isinstance(self._content.get("files", {}), dict):
                raise ValueError(f"files is {self._content['files']}, must be the checksum of each array by file name")
            share = Split.from_json(json.dumps(self._content["split"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        super().__init__(_Arrays(folder), share.spec, share.seed, device_mib=device_mib)
        self.folder, self.split = folder, share
        self._samples = _samples(self._content.get("samples", []), share, path)

    def prepare_data(self) -> None:
        """Everything is there."""

    def setup(self, stage: str | None = None) -> None:
        """Open the images, which are read when they are needed.

        Raises:
            Damaged: if an array is not the one that was dealt.
            ValueError: if they are not those that the tasks name; a share need not have been made by `deal`.
        """
        self.dataset = self.source.load(self.folder)
        for client in self.split.present:
            for number, task in enumerate(client.tasks, 1):
                for part, positions in (("train", task.train), (self.split.evaluate_on, task.test)):
                    labels, where = getattr(self.dataset, part).labels, f"{self.folder}: task {number}"
                    if positions.size and positions[-1] >= len(labels):
                        raise ValueError(f"{where} has position {positions[-1]} in {part}-images of {len(labels)}")
                    if others := set(labels[positions].tolist()) - set(task.classes):
                        raise ValueError(f"{where} has classes {list(task.classes)}, but {part} images of {others}")

    @property
    def split_sha256(self) -> str:
        """The hash of the split that this is a share of."""
        return str(self._content["sha256"])

    def samples_of(self, client: int) -> tuple[int, ...]:
        """As the server's share says, which has none of the clients' images."""
        return super().samples_of(client) or (self._samples[client] if self._samples else ())

    def server_images(self, per_class: int) -> tuple[Tensor, Tensor]:
        """The server's images, which are all that the server's share holds."""
        if (there := self._content["server_images"]) != per_class:
            raise ValueError(
                f"{self.folder} holds {there} images of each class for the server, server wants {per_class}"
            )
        return self.batch("train", np.arange(len(self.dataset.train.labels)))


def _samples(found: object, split: Split, path: Path) -> list[tuple[int, ...]]:
    """What a share says of the clients' numbers of images, checked."""
    clients, tasks = split.spec.clients, split.spec.tasks
    if found == []:
        return []
    rows = [tuple(row) for row in found if isinstance(row, list)] if isinstance(found, list) else []
    if len(rows) != clients or any(len(row) != tasks or any(type(n) is not int or n < 0 for n in row) for row in rows):
        raise ValueError(f"{path}: samples must be for each of {clients} clients a list of {tasks} whole numbers")
    return rows


class _Arrays(Source):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, cache_dir: Path) -> Dataset:
        content = json.loads((self.folder / "share.json").read_text())
        for name, stated in content.get("files", {}).items():
            if _checksum(self.folder / name) != stated:
                raise Damaged(f"'{self.folder / name}' is damaged: put back a copy, or deal the data again")
        train, test = (
            ImageSet(_array(self.folder / f"{part}-images.npy", "r"), _array(self.folder / f"{part}-labels.npy"))
            for part in PARTS
        )
        return Dataset(content["data"], train, test, tuple(content["classes"]), complete=False)


def _array(path: Path, mode: Literal["r"] | None = None) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header ends in any error of numpy's
        raise ValueError(f"'{path}' is not an array of NumPy ({type(error).__name__}: {error})") from error
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def deal(data: FederatedDataModule, per_class: int, folder: Path) -> Iterator[Path]:
    """Write every place's share, bit for bit the images that it has in a federation in one process.

    Args:
        data: the whole data set, set up.
        per_class: how many labelled images of each class the server holds.
        folder: gets ``client-0``, ``client-1`` and so on, and ``server``; shares that were dealt into it before go.

    Yields:
        The folder of each share, once it is complete.
    """
    # of shares dealt before none must count while its images are replaced, and none of its images must be left
    for name in ("share.json", *ARRAYS):
        for path in folder.glob(f"*/{name}"):
            if re.fullmatch(r"client-\d+|server", path.parent.name):
                path.unlink()
    size = data.dataset.train.images.shape[1:]
    for index in range(len(data.split.clients)):
        held: dict[str, list[NDArray[np.int64]]] = {part: [] for part in PARTS}
        for task in data.split.clients[index].tasks:
            held["train"].append(task.train)
            held[data.split.evaluate_on].append(task.test)
        # ascending, so that images are in the same order in a share as they are in the whole
        own = {part: np.unique(np.concatenate([np.empty(0, np.int64), *indices])) for part, indices in held.items()}
        tasks = tuple(
            TaskSplit(
                task.classes,
                np.searchsorted(own["train"], task.train),
                np.searchsorted(own[data.split.evaluate_on], task.test),
            )
            for task in data.split.clients[index].tasks
        )
        known = data.split.only([index]).clients
        share = ClientSplit(known[index].private, known[index].public, tasks)
        others = (*known[:index], share, *known[index + 1 :])
        split = Split(data.split.spec, data.split.seed, others, data.split.federation)
        sets = {part: (getattr(data.dataset, part).images, getattr(data.dataset, part).labels) for part in PARTS}
        yield _write(
            data,
            folder / f"client-{index}",
            split,
            {part: ImageSet(images[own[part]], labels[own[part]]) for part, (images, labels) in sets.items()},
            0,
        )
    nothing = ImageSet(np.empty((0, *size), np.uint8), np.empty(0, np.int64))
    public = nothing
    if per_class:
        images, labels = data.server_images(per_class)
        public = ImageSet(images.numpy(), labels.numpy())
    samples = [list(data.samples_of(index)) for index in range(len(data.split.clients))]
    held_there = {"train": public, "test": nothing}
    yield _write(data, folder / "server", data.split.only([]), held_there, per_class, {"samples": samples})


def _write(
    data: FederatedDataModule,
    folder: Path,
    split: Split,
    sets: dict[str, ImageSet],
    per_class: int,
    more: Mapping[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, what) in ARRAYS.items():
        _save(folder / name, getattr(sets[part], what))
    content = {
        "data": data.dataset.name,
        "classes": list(data.class_names),
        "sha256": data.split_sha256,
        "server_images": per_class,
        "files": {name: _checksum(folder / name) for name in ARRAYS},
        "split": json.loads(split.to_json()),
        **(more or {}),
    }
    write_atomically(folder / "share.json", json.dumps(content).encode())  # last: without it there is no share
    return folder


def _save(path: Path, array: NDArray[np.generic]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        sync(temporary)
