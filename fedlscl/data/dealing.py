"""Deals classes and images out to clients and tasks: from labels, a spec and a seed to a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlscl.checks import path as path_of
from fedlscl.data.assignment import read_assignment
from fedlscl.data.source import Owners
from fedlscl.data.splits import ClientSplit, Split, SplitSpec, TaskSplit, whole_seed
from fedlscl.seeds import numpy_generator

HOLDOUT_FRACTION = 0.3
FOLDERS = "folders"
"""What `by` is where the data say whose each image is."""

# First word of every random stream: a stream belongs to one purpose (and class, client or task), so that changing
# one setting reshuffles nothing that does not depend on it.
_CLASSES, _TRAIN_ORDER, _TEST_ORDER, _SHARES, _TASKS, _HOLDERS = range(6)


class Plan(NamedTuple):
    """Who has which classes.

    Args:
        tasks: the classes of each client's tasks.
        holders: the clients that have a class, by class; its images are dealt in this order.
        private: the classes of each client that are its own.
    """

    tasks: list[list[list[int]]]
    holders: dict[int, list[int]]
    private: list[set[int]]


def make_split(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    spec: SplitSpec,
    seed: int,
    names: Sequence[str] = (),
    owners: Owners | None = None,
) -> Split:
    """Deal classes and images out to clients and tasks.

    A public class goes to all clients: its images in random order, cut into consecutive parts whose sizes are
    Dirichlet shares rounded by largest remainder, so every image of the (capped) pool is used exactly once. With
    `classes_per_client` it goes to some clients, in parts of equal size. With `by` it goes to those that a file says,
    likewise by Dirichlet shares; or every image is its owner's.

    Args:
        train_labels: class ids of the training images, shape (N,), any integer type.
        test_labels: class ids of the test images, shape (M,), any integer type.
        spec: how to deal.
        seed: whole number from 0 on; equal arguments give equal splits.
        names: of the classes by class id; needed where `private_names` or a file is given.
        owners: where the data say whose each image is.

    Returns:
        The split; its hash does not depend on the type of the labels.

    Raises:
        ValueError: too few classes or images; the message names client, task, class, counts and a remedy.
        OSError: the file that `by` names cannot be read.
    """
    train, test = _labels("train_labels", train_labels), _labels("test_labels", test_labels)
    seed = whole_seed(seed)
    _check_by(spec, owners)
    if spec.by is None:
        plan = _counted(train, spec, seed, names)
    elif spec.by != FOLDERS:
        file = path_of(spec.by, "data.split.by")
        if not file.is_file():
            raise FileNotFoundError(
                f"data.split.by is '{spec.by}', but there is no such file; it must be a CSV file, {FOLDERS}, or null"
            )
        plan = _shared(read_assignment(file, spec.clients, spec.tasks, names))
    else:
        plan = _owned(train, spec, seed, owners)
    trains, tests = [train] * spec.clients, [test] * spec.clients
    if owners is not None:
        trains = [np.where(owners.train == client, train, -1) for client in range(spec.clients)]
        tests = [np.where(owners.test == client, test, -1) for client in range(spec.clients)]
    if spec.local_test == "official":
        _check_tested(plan, trains, tests, spec, names)

    parts: list[dict[int, NDArray[np.int64]]] = [{} for _ in range(spec.clients)]
    for label, holders in plan.holders.items():
        order = [numpy_generator(seed, _TRAIN_ORDER, label) for _ in holders]
        if owners is not None:
            shares = [_pool(trains[n], label, spec.train_per_class, rng) for n, rng in zip(holders, order, strict=True)]
        else:
            pool = _pool(train, label, spec.train_per_class, order[0])
            shares = _cut_up(pool, label, holders, plan, spec, seed)
        for client, part in zip(holders, shares, strict=True):
            parts[client][label] = part

    clients = []
    for client, own in enumerate(parts):
        fit, evaluate = {}, {}
        for label, part in own.items():
            # Parts are in random order, so the front of one is a random sample of it. Halves round up.
            held_out = math.floor(HOLDOUT_FRACTION * len(part) + 0.5) if spec.local_test == "holdout30" else 0
            fit[label] = part[held_out:]
            if spec.local_test == "holdout30":
                evaluate[label] = part[:held_out]
            else:
                rng = numpy_generator(seed, _TEST_ORDER, label)
                evaluate[label] = _pool(tests[client], label, spec.test_per_class, rng)
        tasks: list[TaskSplit] = []
        for of_task in plan.tasks[client]:
            classes = tuple(sorted(of_task))
            if not classes:
                raise ValueError(
                    f"split: client {client} has no class in task {len(tasks) + 1}; lower data.split.tasks "
                    f"({spec.tasks}), or say by a file who has which classes (data.split.by)"
                )
            tasks.append(
                TaskSplit(
                    classes=classes,
                    train=np.sort(np.concatenate([fit[label] for label in classes])),
                    test=np.sort(np.concatenate([evaluate[label] for label in classes])),
                )
            )
        private = plan.private[client]
        clients.append(ClientSplit(tuple(sorted(private)), tuple(sorted(own.keys() - private)), tuple(tasks)))
    return Split(spec, seed, tuple(clients))


def _check_by(spec: SplitSpec, owners: Owners | None) -> None:
    """Refuse data that say whose images are whose where nobody asks, or the other way round."""
    if owners is None:
        if spec.by == FOLDERS:
            raise ValueError(
                f"data.split.by is {FOLDERS}, but these data are not in a folder for each client; give --data.source "
                "ClientFolders, or null"
            )
        return
    if spec.by is None:
        raise ValueError(
            f"data.split.by is null, but each of {owners.clients} clients has images in a folder of its own; give "
            f"--data.split.by {FOLDERS}, or a CSV file that says which classes are in which task"
        )
    if owners.clients != spec.clients:
        raise ValueError(
            f"data.split.clients is {spec.clients}, but the data are in folders of {owners.clients} clients; give "
            f"--data.split.clients {owners.clients}"
        )


def _counted(train: NDArray[np.int64], spec: SplitSpec, seed: int, names: Sequence[str]) -> Plan:
    """By the numbers of private and of public classes."""
    known = np.unique(train)
    needed = spec.clients * spec.private_classes + spec.public_classes
    if needed > len(known):
        raise ValueError(
            f"split: clients * private_classes + public_classes = {spec.clients} * {spec.private_classes} + "
            f"{spec.public_classes} = {needed} classes, but the training labels have {len(known)}; "
            f"lower one of the three"
        )
    named = _named(known.tolist(), spec, names)
    # Public classes first, then client by client: one client more leaves everybody else's classes alone.
    drawn = numpy_generator(seed, _CLASSES).permutation([label for label in known if label not in named]).tolist()
    public, owned = drawn[: spec.public_classes], named or drawn[spec.public_classes : needed]
    common = _cut(numpy_generator(seed, _TASKS).permutation(sorted(public)), spec)
    holders = _holders(common, spec, seed)
    private, tasks = [], []
    for client in range(spec.clients):
        mine = owned[client * spec.private_classes : (client + 1) * spec.private_classes]
        holders |= {label: [client] for label in mine}
        own = {*mine, *(label for label in public if client in holders[label])}
        order = common
        if spec.task_order == "own":
            order = _cut(numpy_generator(seed, _TASKS, client).permutation(sorted(own)), spec)
        private.append({*mine})
        tasks.append([[label for label in of_task if label in own] for of_task in order])
    return Plan(tasks, holders, private)


def _shared(tasks: list[list[list[int]]]) -> Plan:
    """By what a file says: a class that one client alone has is its own."""
    holders: dict[int, list[int]] = {}
    for client, of_client in enumerate(tasks):
        for label in sorted(label for of_task in of_client for label in of_task):
            holders.setdefault(label, []).append(client)
    private = [{label for label, having in holders.items() if having == [client]} for client in range(len(tasks))]
    return Plan(tasks, holders, private)


def _owned(train: NDArray[np.int64], spec: SplitSpec, seed: int, owners: Owners | None) -> Plan:
    """By whose folder images are in: each client's classes are cut into tasks as equal as can be."""
    assert owners is not None  # `_check_by` has made sure
    common = numpy_generator(seed, _TASKS).permutation(np.unique(train))
    tasks = []
    for client in range(spec.clients):
        own = np.unique(train[owners.train == client])
        if spec.task_order == "common":
            cut = [np.intersect1d(part, own) for part in np.array_split(common, spec.tasks)]
        else:
            cut = np.array_split(numpy_generator(seed, _TASKS, client).permutation(own), spec.tasks)
        tasks.append([part.tolist() for part in cut])
    return _shared(tasks)


def _check_tested(
    plan: Plan,
    trains: list[NDArray[np.int64]],
    tests: list[NDArray[np.int64]],
    spec: SplitSpec,
    names: Sequence[str],
) -> None:
    """Every class of a client needs a test image, and, where it is by its owner, a training image."""
    untested = sorted(set(plan.holders) - set(np.unique(np.concatenate(tests)).tolist()))
    if untested:
        raise ValueError(f"split: classes {untested} have training images but no test image")
    if spec.by is None:
        return
    for client, of_client in enumerate(plan.tasks):
        for part, labels in (("training", trains[client]), ("test", tests[client])):
            lacking = {label for of_task in of_client for label in of_task} - set(np.unique(labels).tolist())
            if lacking:
                name = names[min(lacking)] if names else str(min(lacking))
                raise ValueError(
                    f"split: client {client} has no {part} image of class {name}, which is among its classes; add "
                    "some, or take the class away from it"
                )


def _cut_up(
    pool: NDArray[np.int64], label: int, holders: list[int], plan: Plan, spec: SplitSpec, seed: int
) -> list[NDArray[np.int64]]:
    """The images of a class for each client that has it."""
    if label in plan.private[holders[0]]:
        return [pool]
    if spec.classes_per_client is not None and spec.by is None:
        return np.array_split(pool, len(holders))
    counts = _deal(len(pool), label, len(holders), spec, numpy_generator(seed, _SHARES, label))
    return np.split(pool, np.cumsum(counts)[:-1])


def _named(known: list[int], spec: SplitSpec, names: Sequence[str]) -> list[int]:
    """The private classes of all clients, one client's after another's, where patterns of names say which these are."""
    owned: list[int] = []
    for client, pattern in enumerate(spec.private_names or ()):
        found = [label for label in known if fnmatchcase(names[label], pattern)]
        if len(found) != spec.private_classes:
            some = f": {', '.join(names[label] for label in found[:8])}" if found else ""
            raise ValueError(
                f"split.private_names: '{pattern}' of client {client} fits {len(found)} classes{some}; it must fit "
                f"{spec.private_classes} (private_classes) of {len(known)}, such as {names[known[0]]}"
            )
        if both := set(found) & set(owned):
            raise ValueError(f"split.private_names: class {names[min(both)]} fits the patterns of two clients")
        owned += found
    return owned


def _cut(order: NDArray[np.int64], spec: SplitSpec) -> list[list[int]]:
    """The classes of each task, from all of them in order."""
    return [part.tolist() for part in np.split(order, np.cumsum(spec.task_sizes)[:-1])]


def _holders(tasks: list[list[int]], spec: SplitSpec, seed: int) -> dict[int, list[int]]:
    """By public class the clients that have it; with `classes_per_client` so many of each task's, dealt like cards."""
    if spec.classes_per_client is None:
        return {label: list(range(spec.clients)) for classes in tasks for label in classes}
    holders: dict[int, list[int]] = {label: [] for classes in tasks for label in classes}
    for task, classes in enumerate(tasks):
        clients = numpy_generator(seed, _HOLDERS, task).permutation(spec.clients).tolist()
        for place, client in enumerate(np.repeat(clients, spec.classes_per_client).tolist()):
            holders[classes[place % len(classes)]].append(client)
    return holders


def _pool(labels: NDArray[np.int64], label: int, cap: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of a class in random order, at most `cap`; a larger cap only appends to a smaller one's."""
    return rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)[:cap]


def _deal(images: int, label: int, clients: int, spec: SplitSpec, rng: np.random.Generator) -> NDArray[np.int64]:
    """Images of one class for each of the clients that have it, shape (clients,), summing to `images`."""
    free = images - clients * spec.min_public_images
    if free < 0:
        raise ValueError(
            f"split.min_public_images is {spec.min_public_images}: {clients} clients would need "
            f"{clients * spec.min_public_images} images of public class {label}, which has {images} "
            f"(train_per_class={spec.train_per_class}); at most {images // clients} fits"
        )
    quota = free * rng.dirichlet(np.full(clients, spec.dirichlet_alpha))
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
