"""Classify image files with clients' global models of a finished run, by the code that tested them in the run."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedlscl.batches import Images
from fedlscl.checks import path as path_of
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Dataset, ImageSet, Part, Source
from fedlscl.data.splits import Split
from fedlscl.federation import store as checkpoint
from fedlscl.files import Damaged, content_of
from fedlscl.run.configuration import Configuration
from fedlscl.run.folder import CHECKPOINT, CONFIG, SPLIT, SUMMARY, RunFolder
from fedlscl.run.summary import Summary


class Prediction(NamedTuple):
    """What a client's model says of one image.

    Args:
        image: the file, as it was named.
        client: whose model.
        classes: names of the classes that compete, the most likely first.
        probabilities: of these classes; they add up to 1.
    """

    image: str
    client: int
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Of the most likely class."""
        return self.probabilities[0]


class Failure(NamedTuple):
    """An image that cannot be read.

    Args:
        image: the file, as it was named.
        reason: why, naming it.
    """

    image: str
    reason: str


def predict(run_dir: Path, images: Sequence[str], client: int = 0, task: int | None = None) -> list[Prediction]:
    """Classify images.

    Args:
        run_dir: folder of a finished run.
        images: image files of any size; they are prepared as the run's data were.
        client: whose model, and whose classes.
        task: the task, from 1, that the images are of, whose classes alone compete then; None if nobody knows.

    Raises:
        FileNotFoundError: if there is no finished run in `run_dir`, or no such image.
        ValueError: if there is no such client or task, a file is not an image, the weights are not the run's, or the
            method chooses parameters by the task and nobody says which it is.
    """
    found = []
    for each in predictions(run_dir, images, [client], task):
        if isinstance(each, Failure):
            raise FileNotFoundError(each.reason) if not Path(each.image).exists() else ValueError(each.reason)
        found.append(each)
    return found


def predictions(
    run_dir: Path, images: Sequence[str], clients: Sequence[int], task: int | None = None
) -> Iterator[Prediction | Failure]:
    """Classify images one after another, and go on past those that cannot be read.

    Args:
        run_dir: folder of a finished run.
        images: see `predict`.
        clients: whose models.
        task: see `predict`.

    Returns:
        For each image, in this order, a prediction of each client, or why there is none.

    Raises:
        FileNotFoundError: if there is no finished run in `run_dir`.
        ValueError: see `predict`.
    """
    run = FinishedRun(run_dir)
    bodies = [run.client(index, task) for index in dict.fromkeys(clients)]
    return _classified(run, bodies, images, task)


class Known(NamedTuple):
    """Which classes a client can name.

    Args:
        learned: their names; every image is given one of these.
        never: the classes of the data that the client has never seen, an image of which is thus given a wrong one.
    """

    learned: tuple[str, ...]
    never: tuple[str, ...]


def known(run_dir: Path, client: int, task: int | None = None) -> Known:
    """Which classes compete in a client's predictions, and which it has never seen.

    Args:
        run_dir: folder of a finished run.
        client: which client.
        task: see `predict`; its classes alone compete then.

    Raises:
        ValueError: if something in the folder is damaged.
    """
    folder = RunFolder(run_dir)
    stored, split = _stored(folder, folder.sums())
    tasks = split.clients[client].tasks
    ever = {label for own in tasks for label in own.classes}
    competing = ever if task is None else {*tasks[task - 1].classes}
    names = [str(name) for name in stored["classes"]]
    return Known(
        tuple(names[label] for label in sorted(competing)),
        tuple(name for label, name in enumerate(names) if label not in ever),
    )


def _stored(files: RunFolder, sums: Mapping[str, str]) -> tuple[dict[str, Any], Split]:
    """What the file of a run's split holds.

    Raises:
        ValueError: if it is not what the run wrote.
    """
    try:
        stored = json.loads(files.needed(SPLIT, sums))
        return stored, Split.from_json(json.dumps(stored["split"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, Damaged):
            raise
        path = files.path / SPLIT
        raise ValueError(f"{path} is not what `fedlscl fit` wrote ({error}); fetch the run folder again") from error


def files_in(named: Sequence[str]) -> tuple[list[str], list[str]]:
    """The image files that are named, and all below the folders that are.

    Args:
        named: files and folders.

    Returns:
        The images, those of a folder sorted by their paths, and the other files in these folders. What is hidden is
        neither.
    """
    Image.init()
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    images: list[str] = []
    others: list[str] = []
    for name in named:
        if not path_of(name).is_dir():
            images.append(name)
            continue
        for folder, inner, files in os.walk(path_of(name)):
            inner[:] = sorted(each for each in inner if each[0] != ".")
            for file in sorted(each for each in files if each[0] != "."):
                (images if Path(file).suffix.lower() in known else others).append(os.path.join(folder, file))
    return images, others


def _classified(
    run: FinishedRun, bodies: Sequence[Client], images: Sequence[str], task: int | None
) -> Iterator[Prediction | Failure]:
    size = bodies[0].evaluation_batch_size
    for first in range(0, len(images), size):
        results: list[Failure | int] = []
        pixels: list[Tensor] = []
        for name in images[first : first + size]:
            try:
                decoded = run.source.decode(path_of(name), run.image_size)
            except (ValueError, OSError) as error:
                results.append(Failure(name, str(error)))
            else:
                results.append(len(pixels))
                pixels.append(torch.from_numpy(decoded))
        answers = [run.classify(body, torch.stack(pixels), task) for body in bodies] if pixels else []
        for name, result in zip(images[first : first + size], results, strict=True):
            if isinstance(result, Failure):
                yield result
                continue
            for body, (labels, probabilities) in zip(bodies, answers, strict=True):
                row = probabilities[result].sort(descending=True, stable=True)
                names = tuple(run.classes[labels[place]] for place in row.indices.tolist())
                yield Prediction(name, body.index, names, tuple(row.values.tolist()))


class FinishedRun:
    """A finished run, as far as its models are concerned.

    Args:
        folder: its folder.

    Raises:
        FileNotFoundError: if it holds no finished run.
        ValueError: if something in it is damaged, or the weights are not the run's.
    """

    def __init__(self, folder: Path) -> None:
        if content_of(folder / SUMMARY) is None:
            raise FileNotFoundError(
                f"run_dir '{folder}' holds no finished run, without {SUMMARY}; give the folder that `fedlscl fit` named"
            )
        files = RunFolder(folder)
        sums = files.sums()
        files.needed(CONFIG, sums)
        self.folder, path = folder, folder / SPLIT
        stored, self.split = _stored(files, sums)
        try:
            self.classes: list[str] = [str(name) for name in stored["classes"]]
            self.image_size = int(stored["image_size"])
            then = stored.get("weights_sha256")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not what `fedlscl fit` wrote ({error}); fetch the run folder again") from error
        self.task_aware = Summary.read(folder / SUMMARY).task_aware
        configuration = Configuration(["--config", str(folder / CONFIG)])
        self.source = configuration.source()
        self.model, self.vit, self.cnn = configuration.networks()
        self.cnn.check(len(self.split.clients))
        self.precision = configuration.values["trainer"]["precision"]
        if (now := self.vit.weights_sha256) and then and now != then:
            raise ValueError(
                f"the foundation model's weights are not those of the run in '{folder}' ({now[:12]} now, "
                f"{str(then)[:12]} then); put that file back in place"
            )

    def client(self, index: int, task: int | None) -> Client:
        """A client as the run left it, in evaluation mode.

        Raises:
            ValueError: if there is none, its state is not here, or it must be told the task.
        """
        clients = self.split.clients
        if not 0 <= index < len(clients):
            raise ValueError(f"client is {index}, but the run has clients 0 to {len(clients) - 1}")
        if not clients[index].tasks:
            raise ValueError(f"client {index} of the run in '{self.folder}' is elsewhere, and its model with it")
        tasks = len(clients[index].tasks)
        if task is not None and not 1 <= task <= tasks:
            raise ValueError(f"task is {task}, but the run has tasks 1 to {tasks}")
        if task is None and "seen" in self.task_aware:
            raise ValueError(
                f"the method of the run in '{self.folder}' classifies an image with parameters of the task that it is "
                f"of, so that it must be told: give the task, 1 to {tasks} (--task N)"
            )
        folder = self.folder / CHECKPOINT
        try:
            state = checkpoint.read(folder, checkpoint.client_name(index))
        except KeyError:
            raise ValueError(f"client {index} of the run in '{self.folder}' has taken part in no round") from None
        body = copy.deepcopy(self.model).assemble(self.vit, self.cnn, self.cnn.name_of(index), len(self.classes))
        source = _Nothing(self.classes)
        data = FederatedDataModule(source, self.split.spec, self.split.seed)
        data.split, data.dataset = self.split, source.load(folder)
        try:
            body.restore(index, data, lambda *_: {}, state)
        except (RuntimeError, KeyError, ValueError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"the state of client {index} in '{folder}' does not fit '{self.folder / CONFIG}' ({first}); "
                "one of them was changed, or is of another version"
            ) from error
        body.begin_evaluation(tasks)
        body.on_test_start()
        return body

    def classify(self, body: Client, pixels: Tensor, task: int | None) -> tuple[list[int], Tensor]:
        """The classes that compete (n,), and their probabilities (B, n) for uint8 images (B, 3, H, W)."""
        tasks = self.split.clients[body.index].tasks
        labels = sorted(label for own in (tasks if task is None else tasks[task - 1 : task]) for label in own.classes)

        def known(part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
            return body.precompute(pixels)

        body.precomputed = known
        with torch.no_grad(), self._precision():
            batch = Images(np.arange(len(pixels), dtype=np.int64), pixels, torch.full((len(pixels),), labels[0]))
            numbers = torch.full((len(pixels),), 0 if task is None else task - 1)
            logits = body.test_logits(batch, numbers)[:, labels].float()
        return labels, logits.softmax(dim=1)

    def _precision(self) -> AbstractContextManager[Any]:
        """What the run computed in; half precision is for GPUs alone."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()


class _Nothing(Source):
    """The classes of a run without an image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    def load(self, cache_dir: Path) -> Dataset:
        """The classes."""
        nothing = ImageSet(np.empty((0, 3, 1, 1), np.uint8), np.empty(0, np.int64))
        return Dataset("nothing", nothing, nothing, self.classes, complete=False)
