"""Which images each client sees in each task: what is asked for, and what came of it, checked; see `dealing`.

Two protocols. That of Fed-LSCL, section "Experiments" (`task_order: own`): every client owns some private classes and
shares the public ones with all clients, and cuts its own order of classes into tasks. That of most of the field
(`task_order: common`): all clients learn the classes of the same task at the same time, and share its images.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

ADDED = {"task_order": "own", "classes_per_client": None, "private_names": None, "by": None}
"""Fields of `SplitSpec` that a later version has added: at these values they are no part of a split's JSON and hash."""


@dataclass(frozen=True)
class SplitSpec:
    """How classes and images are dealt out; the defaults are the paper's CIFAR-100 setting.

    Args:
        clients: number of clients.
        tasks: tasks per client.
        classes_per_task: classes in each task, or a list with a number for each; all together are private plus public
            classes.
        private_classes: classes that belong to one client only, per client.
        public_classes: classes that all clients share.
        dirichlet_alpha: concentration of a public class's images over clients, in (0, 1e9]; small is skewed.
        min_public_images: images of every public class that each client gets before the Dirichlet draw.
        train_per_class: use at most so many training images of a class, drawn by seed; None = all.
        test_per_class: the same for the official test images; without effect under ``holdout30``.
        local_test: ``official`` tests on the official test images of a client's classes. ``holdout30`` leaves
            them untouched and tests on a random 30 % of each class of the client's own training images.
        task_order: ``own`` cuts each client's classes into tasks in an order of its own; ``common`` is one sequence
            of tasks for all clients, which needs that no class is private.
        classes_per_client: under ``common``, how many classes of each task a client has; a class's images are shared
            equally by those that have it, and `dirichlet_alpha` and `min_public_images` are without effect. None = all
            classes, their images dealt by the Dirichlet distribution.
        private_names: for each client a pattern that the names of its private classes fit, and no others, as in a
            shell (``sketch_*``); None = they are drawn by seed.
        by: what says which client has which classes in which task: None = the numbers of classes; a CSV file with the
            columns ``client``, ``task`` and ``classes``, see `assignment`; or ``folders``, where the data are in a
            folder for each client. `clients` and `tasks` must be theirs, and numbers of classes are without effect.
    """

    clients: int = 5
    tasks: int = 5
    classes_per_task: int | tuple[int, ...] = 8
    private_classes: int = 15
    public_classes: int = 25
    dirichlet_alpha: float = 1.0
    min_public_images: int = 0
    train_per_class: int | None = None
    test_per_class: int | None = None
    local_test: Literal["official", "holdout30"] = "official"
    task_order: Literal["own", "common"] = "own"
    classes_per_client: int | None = None
    private_names: tuple[str, ...] | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that no split can satisfy.

        Raises:
            ValueError: names the field, its value and what would be right.
        """
        least = {"clients": 1, "tasks": 1, "private_classes": 0, "public_classes": 0}
        optional = {"train_per_class": 1, "test_per_class": 1, "classes_per_client": 1}
        for name, minimum in (least | {"min_public_images": 0} | optional).items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"split.{name} is {value!r}; it must be a whole number from {minimum} on")
        if self.by is None:
            self._check_task_sizes()
        alpha = self.dirichlet_alpha
        # Above 1e9 every share is equal to nine digits, and much larger numbers overflow when summed.
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1e9:
            raise ValueError(f"split.dirichlet_alpha is {alpha!r}; it must be above 0 and at most 1e9")
        object.__setattr__(self, "dirichlet_alpha", float(alpha))  # 1 and 1.0 are the same split
        if self.local_test not in ("official", "holdout30"):
            raise ValueError(f"split.local_test is {self.local_test!r}; it must be 'official' or 'holdout30'")
        if self.task_order not in ("own", "common"):
            raise ValueError(f"split.task_order is {self.task_order!r}; it must be 'own' or 'common'")
        if self.by is None:
            self._check_class_count()
            self._check_task_order()
        if self.private_names is not None:
            object.__setattr__(self, "private_names", tuple(self.private_names))
            if self.by is None and len(self.private_names) != self.clients:
                raise ValueError(
                    f"split.private_names has {len(self.private_names)} patterns; it must have one for each of "
                    f"{self.clients} clients"
                )

    def _check_task_sizes(self) -> None:
        given = self.classes_per_task
        if isinstance(given, list | tuple):
            object.__setattr__(self, "classes_per_task", tuple(given))
            if len(given) != self.tasks:
                raise ValueError(
                    f"split.classes_per_task is {list(given)}; it must have a number for each of {self.tasks} tasks"
                )
        for size in given if isinstance(given, list | tuple) else (given,):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"split.classes_per_task is {given!r}; it must be whole numbers from 1 on")

    def _check_class_count(self) -> None:
        held, used = self.private_classes + self.public_classes, sum(self.task_sizes)
        if held == used:
            return
        fits, size = [], self.classes_per_task
        if held and held % self.tasks == 0:
            fits.append(f"classes_per_task={held // self.tasks}")
        if isinstance(size, int) and held and held % size == 0:
            fits.append(f"tasks={held // size}")
        if used >= self.private_classes:
            fits.append(f"public_classes={used - self.private_classes}")
        if used >= self.public_classes:
            fits.append(f"private_classes={used - self.public_classes}")
        raise ValueError(
            f"split: private_classes + public_classes = {self.private_classes} + {self.public_classes} = "
            f"{held}, but {self._all_tasks} = {used}; "
            f"any one of these would fit: {', '.join(fits)}"
        )

    def _check_task_order(self) -> None:
        held = self.classes_per_client
        if self.task_order == "own":
            if held is not None:
                raise ValueError(
                    f"split.classes_per_client is {held}; it needs split.task_order common, or must be null"
                )
            return
        if self.private_classes:
            raise ValueError(
                f"split.private_classes is {self.private_classes}; under split.task_order common all clients have the "
                f"classes of a task: it must be 0, and split.public_classes {sum(self.task_sizes)}"
            )
        if held is None:
            return
        least, most = min(self.task_sizes), max(self.task_sizes)
        if held > least:
            raise ValueError(f"split.classes_per_client is {held}; a task has {least} classes (classes_per_task)")
        if self.clients * held < most:
            raise ValueError(
                f"split: clients * classes_per_client = {self.clients} * {held} is less than the "
                f"{most} classes of a task (classes_per_task), and each must have a client"
            )

    @property
    def _all_tasks(self) -> str:
        size = self.classes_per_task
        if isinstance(size, int):
            return f"tasks * classes_per_task = {self.tasks} * {size}"
        return f"classes_per_task {' + '.join(map(str, size))}"

    @property
    def task_sizes(self) -> tuple[int, ...]:
        """Classes of each task."""
        size = self.classes_per_task
        return (size,) * self.tasks if isinstance(size, int) else size

    @property
    def client_task_sizes(self) -> tuple[int, ...]:
        """Classes that a client has in each task."""
        held = self.classes_per_client
        return self.task_sizes if held is None else (held,) * self.tasks

    def to_json(self) -> dict[str, Any]:
        """As plain values; fields of `ADDED` are left out where they are off."""
        return {name: value for name, value in asdict(self).items() if name not in ADDED or value != ADDED[name]}


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """One task of one client: sorted class ids and sorted image indices (int64).

    ``train`` indexes the training set; ``test`` indexes the set that ``Split.evaluate_on`` names.
    """

    classes: tuple[int, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClientSplit:
    """One client: its private and its public class ids (sorted), and its tasks in order; none where it is unknown."""

    private: tuple[int, ...]
    public: tuple[int, ...]
    tasks: tuple[TaskSplit, ...]


@dataclass(frozen=True, eq=False)
class Split:
    """A complete, checked split. Two splits are the same exactly if their ``sha256`` is the same.

    `federation` holds of each task the sorted ids of the classes that any client has in it. It follows from the
    clients, and must be given only where not all of them are known.
    """

    spec: SplitSpec
    seed: int
    clients: tuple[ClientSplit, ...]
    federation: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check every rule of the protocol.

        Raises:
            ValueError: names the client and task that break a rule, and the rule.
        """
        if len(self.present) == len(self.clients):
            tasks = zip_longest(*(client.tasks for client in self.clients), fillvalue=None)
            of_task = ({label for task in each if task for label in task.classes} for each in tasks)
            object.__setattr__(self, "federation", tuple(tuple(sorted(labels)) for labels in of_task))
        _check(self)

    @property
    def evaluate_on(self) -> Literal["test", "train"]:
        """The image set that every ``TaskSplit.test`` indexes."""
        return "train" if self.spec.local_test == "holdout30" else "test"

    def only(self, clients: Collection[int]) -> Split:
        """What a place with these clients may know: their tasks, and of all others nothing."""
        return Split(
            self.spec,
            self.seed,
            tuple(client if n in clients else ClientSplit((), (), ()) for n, client in enumerate(self.clients)),
            self.federation,
        )

    @property
    def present(self) -> tuple[ClientSplit, ...]:
        """The clients whose tasks are known; all of them but in a place with some of the clients only."""
        return tuple(client for client in self.clients if client.tasks)

    @property
    def task_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Classes of each task, for each client; with `by`, for each whose tasks are known."""
        if self.spec.by is None:
            return (self.spec.client_task_sizes,) * len(self.clients)
        return tuple(tuple(len(task.classes) for task in client.tasks) for client in self.present)

    def to_json(self) -> str:
        """Return the split as compact JSON with sorted keys: equal splits give equal text."""
        content = {
            "spec": self.spec.to_json(),
            "seed": self.seed,
            "clients": [
                {
                    "private": client.private,
                    "public": client.public,
                    "tasks": [
                        {"classes": t.classes, "train": t.train.tolist(), "test": t.test.tolist()} for t in client.tasks
                    ],
                }
                for client in self.clients
            ],
        }
        if len(self.present) < len(self.clients):  # or it follows from them
            content["federation"] = self.federation
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Split:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no split, or one that breaks a rule of the protocol.
        """
        try:
            raw = json.loads(text)
            if set(raw) | {"federation"} != {field.name for field in fields(cls)}:
                raise ValueError(f"found the keys {sorted(raw)}")
            clients = tuple(
                ClientSplit(
                    private=_ids(client["private"]),
                    public=_ids(client["public"]),
                    tasks=tuple(
                        TaskSplit(_ids(t["classes"]), _index(_ids(t["train"])), _index(_ids(t["test"])))
                        for t in client["tasks"]
                    ),
                )
                for client in raw["clients"]
            )
            federation = tuple(map(_ids, raw.get("federation", [])))
            return cls(SplitSpec(**raw["spec"]), whole_seed(raw["seed"]), clients, federation)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a split as Split.to_json writes it: {error}") from error

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of `to_json`: changes with the spec, the seed and every index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def whole_seed(seed: Any) -> int:
    """The seed as a whole number; raises ValueError if it is none."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if value < 0 or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 on")
    return value


def _ids(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"expected a list of whole numbers, found {str(values)[:60]}")
    return tuple(values)


def _index(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _check(split: Split) -> None:
    """Raise ValueError unless `split` follows the rules of the protocol."""
    spec = split.spec
    _same(len(split.clients), spec.clients, "number of clients")
    _same(len(split.federation), spec.tasks, "number of tasks in federation")
    exclusive: set[int] = set()
    images: list[NDArray[np.int64]] = []  # training images in use, which no two tasks may share
    for i, client in enumerate(split.clients):
        if client not in split.present:
            continue
        who = f"client {i}"
        private, public = set(client.private), set(client.public)
        if spec.by is None:
            _same(len(private), spec.private_classes, f"{who}: number of private classes")
            expected = sum(spec.client_task_sizes) - spec.private_classes
            _same(len(public), expected, f"{who}: number of public classes")
            if spec.classes_per_client is None:
                _same(sorted(public), sorted(split.present[0].public), f"{who}: public classes")
        _same(sorted(private & (exclusive | public)), [], f"{who}: private classes that somebody else has")
        exclusive |= private
        _same(len(client.tasks), spec.tasks, f"{who}: number of tasks")
        classes = [label for task in client.tasks for label in task.classes]
        _same(sorted(classes), sorted(private | public), f"{who}: classes of all tasks")
        for n, task in enumerate(client.tasks):
            where = f"{who}, task {n}"
            if spec.by is None:
                _same(len(task.classes), spec.client_task_sizes[n], f"{where}: number of classes")
            _same(sorted(set(task.classes) - set(split.federation[n])), [], f"{where}: classes not in federation")
            for part, index in (("train", task.train), ("test", task.test)):
                if index.size and (index[0] < 0 or (np.diff(index) <= 0).any()):
                    raise ValueError(f"{where}: {part} indices are not sorted, distinct and at least 0")
            images.append(task.train)
            if split.evaluate_on == "train":
                images.append(task.test)
            if task.train.size < 2 or not task.test.size:
                raise ValueError(
                    f"{where}: {task.train.size} training and {task.test.size} test images for the classes "
                    f"{list(task.classes)}; 2 and 1 are needed. Raise split.min_public_images "
                    f"({spec.min_public_images}), split.dirichlet_alpha ({spec.dirichlet_alpha:g}) or "
                    f"split.train_per_class ({spec.train_per_class}), or take another seed ({split.seed})"
                )
        if split.evaluate_on == "test":
            _distinct([task.test for task in client.tasks], f"{who}: test images")
    _distinct(images, "training images")
    if spec.task_order == "common" and spec.by is None:
        for n, labels in enumerate(split.federation):
            _same(len(labels), spec.task_sizes[n], f"task {n}: number of classes in federation")
        every = {label for labels in split.federation for label in labels}
        _same(len(every), spec.public_classes, "number of classes in federation")


def _same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}")


def _distinct(parts: list[NDArray[np.int64]], what: str) -> None:
    values, counts = np.unique(np.concatenate([_index([]), *parts]), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{what}: {values[counts > 1][:5].tolist()} used more than once")
