"""Usual ways to split a data set, by name: each is values of fields of `SplitSpec`, for some classes and clients."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any


def _sizes(classes: int, tasks: int) -> int | list[int]:
    """Classes of each task, as equal as can be."""
    least, more = divmod(classes, tasks)
    return [least + (task < more) for task in range(tasks)] if more else least


def _private(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    own = classes // clients
    return {
        "task_order": "own",
        "private_classes": own,
        "public_classes": 0,
        "classes_per_task": _sizes(own, tasks),
        "classes_per_client": None,
        "private_names": None,
    }


def _public(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    return {**_common(classes, clients, tasks), "task_order": "own"}


def _common(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    return {
        "task_order": "common",
        "private_classes": 0,
        "public_classes": classes,
        "classes_per_task": _sizes(classes, tasks),
        "classes_per_client": None,
        "private_names": None,
    }


def _dirichlet(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    return {**_common(classes, clients, tasks), "dirichlet_alpha": 0.5}


def _iid(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    return {**_common(classes, clients, tasks), "dirichlet_alpha": 1e9}


def _pathological(classes: int, clients: int, tasks: int) -> dict[str, Any]:
    largest, smallest = -(-classes // tasks), classes // tasks
    held = min(max(2, -(-largest // clients)), smallest)  # each class must have a client
    return {**_common(classes, clients, tasks), "classes_per_client": held}


PRESETS: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "private": _private,
    "public": _public,
    "common": _common,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "iid": _iid,
}
"""Every class is one client's; all clients have all classes, each in an order of its own; all in one order; in one
order with shares drawn from Dirichlet(0.5); in one order, but of each task a client has two classes (or as many as it
takes for each to have a client); in one order with equal shares."""


def preset(name: str, classes: int, clients: int, tasks: int) -> dict[str, Any]:
    """The fields of `SplitSpec` that make a usual split.

    Args:
        name: one of `PRESETS`.
        classes: how many classes there are.
        clients: how many clients they are split over.
        tasks: how many tasks each client learns.

    Returns:
        Values by name; the fields that are not among them are as they were.

    Raises:
        ValueError: if there is no such preset, not a class for each task, or a class that nobody can have.
    """
    if name not in PRESETS:
        near = get_close_matches(name.lower(), PRESETS)
        raise ValueError(
            f"split is '{name}', must be one of {', '.join(PRESETS)}{f'; did you mean {near[0]}?' if near else ''}"
        )
    share = classes // max(clients, 1) if name == "private" else classes
    if share < tasks:
        each = f" over {clients} clients are {share} each, fewer than" if name == "private" else ", fewer than"
        fewer = f"; at most data.split.tasks {share} fits" if share else f"; at most data.split.clients {classes} fits"
        raise ValueError(f"split is '{name}': {classes} classes{each} {tasks} tasks{fewer}")
    if name == "pathological" and clients * (classes // tasks) < -(-classes // tasks):
        raise ValueError(
            f"split is '{name}': {clients} clients cannot have equally many classes of each task and all of them, as "
            f"{classes} classes do not divide by {tasks} tasks; give more clients, or tasks that divide the classes"
        )
    return PRESETS[name](classes, clients, tasks)
