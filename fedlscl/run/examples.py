"""A few test images of a finished run with what its clients say of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedlscl.run.configuration import Configuration
from fedlscl.run.folder import CONFIG
from fedlscl.run.predict import FinishedRun

LOOKED_AT = 48
"""Test images of a client that are classified, to find right and wrong answers among them."""

CLIENTS = 3
"""How many clients are asked, the first ones."""

BEST = 3
"""How many classes of each image are told."""


class Example(NamedTuple):
    """A test image and the answer of a client.

    Args:
        pixels: uint8 (3, H, W).
        truth: the name of its class.
        best: the most likely classes with their probabilities, the best first.
    """

    pixels: NDArray[np.uint8]
    truth: str
    best: tuple[tuple[str, float], ...]

    @property
    def right(self) -> bool:
        """Whether the best is the truth."""
        return self.best[0][0] == self.truth


class Asked(NamedTuple):
    """A client's answers.

    Args:
        client: which client.
        right: how many of the images looked at are right.
        looked_at: how many were.
        images: some of them.
    """

    client: int
    right: int
    looked_at: int
    images: tuple[Example, ...]


def examples(run_dir: Path, count: int) -> list[Asked]:
    """Test images of a run's first clients, and what these say of them.

    Args:
        run_dir: folder of a finished run, whose data must be there.
        count: how many images of each client.

    Returns:
        For each client right and wrong answers alternately, as far as there are both.

    Raises:
        FileNotFoundError: if there is no finished run in `run_dir`, or its data are not there.
        ValueError: if something in the folder is damaged, or data or weights are not the run's.
    """
    run = FinishedRun(run_dir)
    data = Configuration(["--config", str(run_dir / CONFIG)]).data()
    data.prepare_data()
    data.setup()
    if data.split_sha256 != run.split.sha256:
        raise ValueError(f"the data that '{run_dir / CONFIG}' names are not those of the run: another split comes out")
    images = data.dataset.train if run.split.evaluate_on == "train" else data.dataset.test
    told = "seen" in run.task_aware  # parameters are chosen by the task of an image
    found = []
    for client in [n for n, own in enumerate(run.split.clients) if own.tasks][:CLIENTS]:
        answers: list[Example] = []
        tasks = run.split.clients[client].tasks
        share = -(-LOOKED_AT // len(tasks))
        for number, task in enumerate(tasks, 1):
            places = np.linspace(0, len(task.test) - 1, min(share, len(task.test))).round().astype(int)
            chosen = np.asarray(task.test)[places]
            if not len(chosen):
                continue
            known = number if told else None
            pixels = np.stack([np.asarray(images.images[index]) for index in chosen])
            labels, probabilities = run.classify(run.client(client, known), torch.from_numpy(pixels), known)
            for own, index, row in zip(pixels, chosen, probabilities, strict=True):
                values, order = row.topk(min(BEST, len(labels)))
                best = [(run.classes[labels[place]], value) for place, value in zip(order, values, strict=True)]
                truth = run.classes[int(images.labels[index])]
                answers.append(Example(own, truth, tuple((name, float(value)) for name, value in best)))
        right = sum(each.right for each in answers)
        found.append(Asked(client, right, len(answers), tuple(_alternately(answers))[:count]))
    return found


def _alternately(answers: list[Example]) -> Iterator[Example]:
    """A right one, a wrong one and so on, those of all tasks in turn, and then those that are left."""
    right, wrong = ([each for each in answers if each.right is is_right] for is_right in (True, False))
    pairs = zip_longest(_spread(right), _spread(wrong))
    return (each for each in chain.from_iterable(pairs) if each is not None)


def _spread(answers: list[Example]) -> list[Example]:
    """In an order in which the first few are of classes that are as different as can be."""
    seen: dict[str, int] = {}
    turns = []
    for each in answers:
        turns.append(seen.setdefault(each.truth, 0))
        seen[each.truth] += 1
    return [answers[place] for place in sorted(range(len(answers)), key=lambda place: turns[place])]
