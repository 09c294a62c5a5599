"""Deals classes and images out to clients and tasks: from labels, a spec and a seed to a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlscl.data.splits import ClientSplit, Split, SplitSpec, TaskSplit, whole_seed
from fedlscl.seeds import numpy_generator

HOLDOUT_FRACTION = 0.3

# First word of every random stream: a stream belongs to one purpose (and class, client or task), so that changing
# one setting reshuffles nothing that does not depend on it.
_CLASSES, _TRAIN_ORDER, _TEST_ORDER, _SHARES, _TASKS, _HOLDERS = range(6)


def make_split(
    train_labels: ArrayLike, test_labels: ArrayLike, spec: SplitSpec, seed: int, names: Sequence[str] = ()
) -> Split:
    """Deal classes and images out to clients and tasks.

    A public class goes to all clients: its images in random order, cut into consecutive parts whose sizes are
    Dirichlet shares rounded by largest remainder, so every image of the (capped) pool is used exactly once. With
    `classes_per_client` it goes to some clients, in parts of equal size.

    Args:
        train_labels: class ids of the training images, shape (N,), any integer type.
        test_labels: class ids of the test images, shape (M,), any integer type.
        spec: how to deal.
        seed: whole number from 0 on; equal arguments give equal splits.
        names: of the classes by class id; needed where `private_names` is given.

    Returns:
        The split; its hash does not depend on the type of the labels.

    Raises:
        ValueError: too few classes or images; the message names client, task, class, counts and a remedy.
    """
    train, test = _labels("train_labels", train_labels), _labels("test_labels", test_labels)
    seed = whole_seed(seed)
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
    drawn = public + owned
    untested = sorted(set(drawn) - set(test.tolist()))
    if untested and spec.local_test == "official":
        raise ValueError(f"split: classes {untested} have training images but no test image")

    common = _cut(numpy_generator(seed, _TASKS).permutation(sorted(public)), spec)
    holders = _holders(common, spec, seed)
    parts: list[dict[int, NDArray[np.int64]]] = [{} for _ in range(spec.clients)]
    for label in public:
        pool = _pool(train, label, spec.train_per_class, numpy_generator(seed, _TRAIN_ORDER, label))
        if spec.classes_per_client is None:
            counts = _deal(len(pool), label, spec, numpy_generator(seed, _SHARES, label))
            shares = np.split(pool, np.cumsum(counts)[:-1])
        else:
            shares = np.array_split(pool, len(holders[label]))
        for client, part in zip(holders[label], shares, strict=True):
            parts[client][label] = part

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
        order = common
        if spec.task_order == "own":
            order = _cut(numpy_generator(seed, _TASKS, client).permutation(sorted(own)), spec)
        tasks = []
        for of_task in order:
            classes = tuple(sorted(own.keys() & set(of_task)))
            tasks.append(
                TaskSplit(
                    classes=classes,
                    train=np.sort(np.concatenate([fit[label] for label in classes])),
                    test=np.sort(np.concatenate([evaluate[label] for label in classes])),
                )
            )
        clients.append(ClientSplit(tuple(sorted(private)), tuple(sorted(own.keys() - set(private))), tuple(tasks)))
    return Split(spec, seed, tuple(clients))


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
