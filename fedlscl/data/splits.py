"""Which images each client sees in each task: class ids and image indices from labels, a spec and a seed.

The protocol is that of Fed-LSCL, section "Experiments": every client owns some private classes and shares the
public ones with all clients, cuts its own order of classes into tasks, and the images of a public class are
dealt out by a Dirichlet distribution.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlscl.seeds import numpy_generator

HOLDOUT_FRACTION = 0.3

# First word of every random stream: a stream belongs to one purpose (and class or client), so that changing
# one setting reshuffles nothing that does not depend on it.
_CLASSES, _TRAIN_ORDER, _TEST_ORDER, _SHARES, _TASKS = range(5)


@dataclass(frozen=True)
class SplitSpec:
    """How classes and images are dealt out; the defaults are the paper's CIFAR-100 setting.

    Args:
        clients: number of clients.
        tasks: tasks per client.
        classes_per_task: classes in each task; ``tasks * classes_per_task`` is private plus public classes.
        private_classes: classes that belong to one client only, per client.
        public_classes: classes that all clients share.
        dirichlet_alpha: concentration of a public class's images over clients, in (0, 1e9]; small is skewed.
        min_public_images: images of every public class that each client gets before the Dirichlet draw.
        train_per_class: use at most so many training images of a class, drawn by seed; None = all.
        test_per_class: the same for the official test images; without effect under ``holdout30``.
        local_test: ``official`` tests on the official test images of a client's classes. ``holdout30`` leaves
            them untouched and tests on a random 30 % of each class of the client's own training images.
    """

    clients: int = 5
    tasks: int = 5
    classes_per_task: int = 8
    private_classes: int = 15
    public_classes: int = 25
    dirichlet_alpha: float = 1.0
    min_public_images: int = 0
    train_per_class: int | None = None
    test_per_class: int | None = None
    local_test: Literal["official", "holdout30"] = "official"

    def __post_init__(self) -> None:
        """Refuse numbers that no split can satisfy.

        Raises:
            ValueError: names the field, its value and what would be right.
        """
        least = {"clients": 1, "tasks": 1, "classes_per_task": 1, "private_classes": 0, "public_classes": 0}
        least |= {"min_public_images": 0, "train_per_class": 1, "test_per_class": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in ("train_per_class", "test_per_class"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"split.{name} is {value!r}; it must be a whole number from {minimum} on")
        alpha = self.dirichlet_alpha
        # Above 1e9 every share is equal to nine digits, and much larger numbers overflow when summed.
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1e9:
            raise ValueError(f"split.dirichlet_alpha is {alpha!r}; it must be above 0 and at most 1e9")
        object.__setattr__(self, "dirichlet_alpha", float(alpha))  # 1 and 1.0 are the same split
        if self.local_test not in ("official", "holdout30"):
            raise ValueError(f"split.local_test is {self.local_test!r}; it must be 'official' or 'holdout30'")
        self._check_class_count()

    def _check_class_count(self) -> None:
        held, used = self.private_classes + self.public_classes, self.tasks * self.classes_per_task
        if held == used:
            return
        fits = []
        if held and held % self.tasks == 0:
            fits.append(f"classes_per_task={held // self.tasks}")
        if held and held % self.classes_per_task == 0:
            fits.append(f"tasks={held // self.classes_per_task}")
        if used >= self.private_classes:
            fits.append(f"public_classes={used - self.private_classes}")
        if used >= self.public_classes:
            fits.append(f"private_classes={used - self.public_classes}")
        raise ValueError(
            f"split: private_classes + public_classes = {self.private_classes} + {self.public_classes} = "
            f"{held}, but tasks * classes_per_task = {self.tasks} * {self.classes_per_task} = {used}; "
            f"any one of these would fit: {', '.join(fits)}"
        )


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
    """A complete, checked split. Two splits are the same exactly if their ``sha256`` is the same."""

    spec: SplitSpec
    seed: int
    clients: tuple[ClientSplit, ...]

    def __post_init__(self) -> None:
        """Check every rule of the protocol.

        Raises:
            ValueError: names the client and task that break a rule, and the rule.
        """
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
        )

    @property
    def present(self) -> tuple[ClientSplit, ...]:
        """The clients whose tasks are known; all of them but in a place with some of the clients only."""
        return tuple(client for client in self.clients if client.tasks)

    def to_json(self) -> str:
        """Return the split as compact JSON with sorted keys: equal splits give equal text."""
        content = {
            "spec": asdict(self.spec),
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
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Split:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is no split, or one that breaks a rule of the protocol.
        """
        try:
            raw = json.loads(text)
            if set(raw) != {field.name for field in fields(cls)}:
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
            return cls(SplitSpec(**raw["spec"]), _seed(raw["seed"]), clients)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a split as Split.to_json writes it: {error}") from error

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of `to_json`: changes with the spec, the seed and every index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def make_split(train_labels: ArrayLike, test_labels: ArrayLike, spec: SplitSpec, seed: int) -> Split:
    """Deal classes and images out to clients and tasks.

    A public class goes to all clients: its images in random order, cut into consecutive parts whose sizes are
    Dirichlet shares rounded by largest remainder, so every image of the (capped) pool is used exactly once.

    Args:
        train_labels: class ids of the training images, shape (N,), any integer type.
        test_labels: class ids of the test images, shape (M,), any integer type.
        spec: how to deal.
        seed: whole number from 0 on; equal arguments give equal splits.

    Returns:
        The split; its hash does not depend on the type of the labels.

    Raises:
        ValueError: too few classes or images; the message names client, task, class, counts and a remedy.
    """
    train, test = _labels("train_labels", train_labels), _labels("test_labels", test_labels)
    seed = _seed(seed)
    known = np.unique(train)
    needed = spec.clients * spec.private_classes + spec.public_classes
    if needed > len(known):
        raise ValueError(
            f"split: clients * private_classes + public_classes = {spec.clients} * {spec.private_classes} + "
            f"{spec.public_classes} = {needed} classes, but the training labels have {len(known)}; "
            f"lower one of the three"
        )
    # Public classes first, then client by client: one client more leaves everybody else's classes alone.
    drawn = numpy_generator(seed, _CLASSES).permutation(known)[:needed].tolist()
    public, owned = drawn[: spec.public_classes], drawn[spec.public_classes :]
    untested = sorted(set(drawn) - set(test.tolist()))
    if untested and spec.local_test == "official":
        raise ValueError(f"split: classes {untested} have training images but no test image")

    parts: list[dict[int, NDArray[np.int64]]] = [{} for _ in range(spec.clients)]
    for label in public:
        pool = _pool(train, label, spec.train_per_class, numpy_generator(seed, _TRAIN_ORDER, label))
        counts = _deal(len(pool), label, spec, numpy_generator(seed, _SHARES, label))
        for own, part in zip(parts, np.split(pool, np.cumsum(counts)[:-1]), strict=True):
            own[label] = part

    clients = []
    for client, own in enumerate(parts):
        private = owned[client * spec.private_classes : (client + 1) * spec.private_classes]
        for label in private:
            own[label] = _pool(train, label, spec.train_per_class, numpy_generator(seed, _TRAIN_ORDER, label))
        fit, evaluate = {}, {}
        for label, part in own.items():
            # Parts are in random order, so the front of one is a random sample of it. Halves round up.
            held_out = math.floor(HOLDOUT_FRACTION * len(part) + 0.5) if spec.local_test == "holdout30" else 0
            fit[label] = part[held_out:]
            if spec.local_test == "holdout30":
                evaluate[label] = part[:held_out]
            else:
                evaluate[label] = _pool(test, label, spec.test_per_class, numpy_generator(seed, _TEST_ORDER, label))
        order = numpy_generator(seed, _TASKS, client).permutation(sorted(own)).tolist()
        tasks = []
        for start in range(0, len(order), spec.classes_per_task):
            classes = tuple(sorted(order[start : start + spec.classes_per_task]))
            tasks.append(
                TaskSplit(
                    classes=classes,
                    train=np.sort(np.concatenate([fit[label] for label in classes])),
                    test=np.sort(np.concatenate([evaluate[label] for label in classes])),
                )
            )
        clients.append(ClientSplit(tuple(sorted(private)), tuple(sorted(public)), tuple(tasks)))
    return Split(spec, seed, tuple(clients))


def _pool(labels: NDArray[np.int64], label: int, cap: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of a class in random order, at most `cap`; a larger cap only appends to a smaller one's."""
    return rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)[:cap]


def _deal(images: int, label: int, spec: SplitSpec, rng: np.random.Generator) -> NDArray[np.int64]:
    """Images of one public class per client, shape (clients,), summing to `images`."""
    free = images - spec.clients * spec.min_public_images
    if free < 0:
        raise ValueError(
            f"split.min_public_images is {spec.min_public_images}: {spec.clients} clients would need "
            f"{spec.clients * spec.min_public_images} images of public class {label}, which has {images} "
            f"(train_per_class={spec.train_per_class}); at most {images // spec.clients} fits"
        )
    quota = free * rng.dirichlet(np.full(spec.clients, spec.dirichlet_alpha))
    counts = np.floor(quota).astype(np.int64)
    left = free - int(counts.sum())
    counts[np.argsort(counts - quota, kind="stable")[:left]] += 1
    return counts + spec.min_public_images


def _labels(name: str, labels: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size or array.min() < 0:
        raise ValueError(
            f"{name} has shape {array.shape} and type {array.dtype}; it must be a non-empty "
            f"list of class ids, whole numbers from 0 on"
        )
    return array.astype(np.int64)


def _seed(seed: Any) -> int:
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
    exclusive: set[int] = set()
    images: list[NDArray[np.int64]] = []  # training images in use, which no two tasks may share
    for i, client in enumerate(split.clients):
        if client not in split.present:
            continue
        who = f"client {i}"
        private, public = set(client.private), set(client.public)
        _same(len(private), spec.private_classes, f"{who}: number of private classes")
        _same(len(public), spec.public_classes, f"{who}: number of public classes")
        _same(sorted(public), sorted(split.present[0].public), f"{who}: public classes")
        _same(sorted(private & (exclusive | public)), [], f"{who}: private classes that somebody else has")
        exclusive |= private
        _same(len(client.tasks), spec.tasks, f"{who}: number of tasks")
        classes = [label for task in client.tasks for label in task.classes]
        _same(sorted(classes), sorted(private | public), f"{who}: classes of all tasks")
        for n, task in enumerate(client.tasks):
            where = f"{who}, task {n}"
            _same(len(task.classes), spec.classes_per_task, f"{where}: number of classes")
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


def _same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}")


def _distinct(parts: list[NDArray[np.int64]], what: str) -> None:
    values, counts = np.unique(np.concatenate([_index([]), *parts]), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{what}: {values[counts > 1][:5].tolist()} used more than once")
