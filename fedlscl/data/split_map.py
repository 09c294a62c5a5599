"""Who has which classes and how many images of each, to be drawn: class x client x task, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlscl.data.splits import Split


@dataclass(frozen=True, eq=False)
class SplitMap:
    """A split in numbers. A client learns a class in one task, so that two tables are enough.

    Args:
        names: of the classes, by class id (K).
        task: (K, C) in which task, from 1, a client learns a class; 0 where it never does.
        train: (K, C) training images.
        test: (K, C) images that the client is tested on.
        left_out: (K,) training images of each class that nobody trains with, and nobody is tested on.
    """

    names: tuple[str, ...]
    task: NDArray[np.int64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    left_out: NDArray[np.int64]

    @classmethod
    def of(cls, split: Split, train: NDArray[np.int64], test: NDArray[np.int64], names: Sequence[str]) -> SplitMap:
        """The map of a split.

        Args:
            split: the split.
            train: class ids (N,) of all training images.
            test: class ids (M,) of all test images.
            names: of the classes, by class id.
        """
        shape = len(names), len(split.clients)
        task, counts, tested = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        evaluated = train if split.evaluate_on == "train" else test
        used = np.zeros(len(train), dtype=bool)
        for client, own in enumerate(split.clients):
            for number, of_task in enumerate(own.tasks, 1):
                task[list(of_task.classes), client] = number
                counts[:, client] += np.bincount(train[of_task.train], minlength=shape[0])
                tested[:, client] += np.bincount(evaluated[of_task.test], minlength=shape[0])
                used[of_task.train] = True
                if split.evaluate_on == "train":
                    used[of_task.test] = True
        return cls(tuple(names), task, counts, tested, np.bincount(train[~used], minlength=shape[0]))

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return int(self.task.shape[1])

    @property
    def tasks(self) -> int:
        """How many tasks each of them learns."""
        return int(self.task.max(initial=0))

    @property
    def holders(self) -> NDArray[np.int64]:
        """(K,) how many clients have a class."""
        found: NDArray[np.int64] = (self.task > 0).sum(1)
        return found

    @property
    def unused(self) -> tuple[str, ...]:
        """The classes that nobody has."""
        return tuple(name for name, count in zip(self.names, self.holders, strict=True) if not count)

    def classes(self, client: int, task: int) -> list[int]:
        """The class ids of a client's task."""
        return [int(label) for label in np.flatnonzero(self.task[:, client] == task)]

    def left_out_text(self) -> str | None:
        """What nobody gets, in a line; None where everybody together has everything."""
        images, classes = int(self.left_out.sum()), len(self.unused)
        if not images:
            return None
        rest = int(self.left_out[self.holders > 0].sum())
        parts = []
        if classes:
            what = "class" if classes == 1 else "classes"
            shown = ", ".join(self.unused[:8]) + (f" and {classes - 8} more" if classes > 8 else "")
            parts.append(f"{classes} {what} that no client has ({shown}; {images - rest} training images)")
        if rest:
            parts.append(f"{rest} training images of classes that clients have")
        return f"left out: {', and '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        tables = {name: getattr(self, name).tolist() for name in ("task", "train", "test", "left_out")}
        return {"names": list(self.names), **tables}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SplitMap:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is none.
        """
        try:
            names = tuple(str(name) for name in content["names"])
            task, train, test, left = (
                np.array(content[name], dtype=np.int64) for name in ("task", "train", "test", "left_out")
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the map of a split: {error}") from error
        if not task.shape == train.shape == test.shape or task.ndim != 2 or not left.shape == (len(names),):
            raise ValueError(f"not the map of a split: its tables are {task.shape}, {train.shape}, {test.shape}")
        return cls(names, task, train, test, left)


def short_lines(found: SplitMap, width: int, most: int = 6) -> Iterator[str]:
    """The split in a few lines: a client each, and what is left out.

    Args:
        found: the map.
        width: of the terminal, in characters.
        most: how many clients have a line.
    """
    holders = found.holders
    alone, everybody = int((holders == 1).sum()), int((holders == found.clients).sum())
    shared = [
        f"{alone} of one client" if alone and found.clients > 1 else "",
        f"{everybody} of all" if everybody else "",
    ]
    kinds = f" ({', '.join(part for part in shared if part)})" if any(shared) else ""
    used = len(found.names) - len(found.unused)
    yield (
        f"split: {found.clients} clients, {found.tasks} tasks, {used} of {len(found.names)} classes{kinds}, "
        f"{int(found.train.sum())} training images"
    )
    shown = found.clients if found.clients <= most else most - 1
    for client in range(shown):
        room = (width - 30) // max(found.tasks, 1) - 3
        tasks = " | ".join(_listed(found, client, task, room) for task in range(1, found.tasks + 1))
        yield f"  client {client}: {tasks}  ({int(found.train[:, client].sum())} images)"
    if shown < found.clients:
        images = found.train[:, shown:].sum(0)
        yield f"  clients {shown} to {found.clients - 1}: {int(images.min())} to {int(images.max())} images each"
    if (left_out := found.left_out_text()) is not None:
        yield f"  {left_out}"


def _listed(found: SplitMap, client: int, task: int, room: int) -> str:
    """The classes of a task by name, as far as there is room, and how many there are else."""
    names = [found.names[label] for label in found.classes(client, task)]
    text = " ".join(names)
    return text if len(text) <= max(room, 4) else f"{len(names)} classes"


def rows(found: SplitMap) -> Iterator[list[str]]:
    """The whole map as cells: a row for each class, a column for each client, with task and training images.

    The first row has the headings; a last column has the images that nobody gets, where there are any. Where a
    client is tested on a class without a training image, the cell says 0.
    """
    rest = bool(found.left_out.any())
    yield ["class", *(f"client {client}" for client in range(found.clients)), *(["left out"] if rest else [])]
    for label, name in enumerate(found.names):
        cells = [
            f"{task}: {train}" if task else ""
            for task, train in zip(found.task[label].tolist(), found.train[label].tolist(), strict=True)
        ]
        yield [name, *cells, *([str(int(found.left_out[label]) or "")] if rest else [])]
