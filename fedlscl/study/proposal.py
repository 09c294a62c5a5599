"""A split that fits a data set: how many classes a client has for itself, shares, and learns in a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedlscl.data.dealing import make_split
from fedlscl.data.held_out import held_out
from fedlscl.data.splits import Split, SplitSpec

PRIVATE = 0.75
"""Part of all classes that are somebody's own, as in the paper: 5 x 15 of 100."""

MOST_ROWS = 40
"""Classes that are drawn in a row each."""


class Proposal(NamedTuple):
    """Fields of a split, and what is to be said of it."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


def propose(
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    classes: Sequence[str],
    clients: int,
    tasks: int,
    seeds: Sequence[int],
    train_per_class: int | None = None,
    test_per_class: int | None = None,
) -> Proposal:
    """A split into private and public classes that works with all seeds, tested on held-out and on test images.

    About 3 of 4 classes are dealt to one client each and the others shared by all, so that every class is used. Where
    that cannot be, as when a class has too few images to be shared, all are private, and those left over are named.

    Args:
        train: class ids (N,) of the training images.
        test: class ids (M,) of the test images.
        classes: names by class id.
        clients: how many.
        tasks: tasks of a client; fewer where it would not have two classes for each.
        seeds: for which it must work.
        train_per_class: training images of a class that are used at most.
        test_per_class: likewise of test images.

    Raises:
        ValueError: no split works; why, and what would.
    """
    counts = np.bincount(train, minlength=len(classes))
    held = held_out(train)
    least = int(min(np.bincount(train[~held]).min(), train_per_class or counts.max()))
    caps = {"train_per_class": train_per_class, "test_per_class": test_per_class}
    private = int(PRIVATE * len(classes)) // clients
    shares = [(private, len(classes) - clients * private), (len(classes) // clients, 0)]
    reason: ValueError | None = None
    for own, public in shares:
        if own + public == 0:
            continue
        made = min(tasks, max(1, (own + public) // 2))
        sizes = [len(part) for part in np.array_split(np.arange(own + public), made)]
        for smallest in dict.fromkeys((min(10, least // (2 * clients)), min(10, least // clients))) if public else (0,):
            fields = {
                "clients": clients,
                "tasks": made,
                "classes_per_task": sizes[0] if len(set(sizes)) == 1 else sizes,
                "private_classes": own,
                "public_classes": public,
                "min_public_images": smallest,
                **{name: value for name, value in caps.items() if value is not None},
            }
            try:
                for seed in seeds:
                    for labels in ((train, test), (train[~held], train[held])):
                        make_split(*labels, _spec(fields), seed)
            except ValueError as error:
                reason = error
                continue
            return Proposal(fields, _notes(fields, classes, counts, tasks))
    few = classes[int(counts.argmin())]
    raise ValueError(
        f"no split of {len(classes)} classes over {clients} clients and {tasks} tasks works: {reason}. Give fewer "
        f"--clients or --tasks, or more images (class '{few}' has {counts.min()})"
    )


def _notes(fields: dict[str, Any], classes: Sequence[str], counts: NDArray[np.int64], tasks: int) -> tuple[str, ...]:
    clients, own, public = fields["clients"], fields["private_classes"], fields["public_classes"]
    sizes = fields["classes_per_task"]
    told = f"{sizes} classes each" if isinstance(sizes, int) else f"{', '.join(map(str, sizes))} classes"
    of_own = f"{own} class{'es'[: 2 * (own != 1)]}"
    notes = [
        f"{clients} clients, each with {of_own} of its own and the {public} that all share; {fields['tasks']} "
        f"tasks of {told}"
    ]
    if fields["tasks"] < tasks:
        notes.append(f"not {tasks} tasks, since a client has {own + public} classes and a task should have two")
    if left := len(classes) - clients * own - public:
        notes.append(f"{left} of {len(classes)} classes are left out, others with each seed: they cannot be shared")
    if (low := int(counts.min())) < 20:
        notes.append(f"class '{classes[int(counts.argmin())]}' has {low} training images: expect its accuracy to vary")
    return tuple(notes)


def _spec(fields: dict[str, Any]) -> SplitSpec:
    return SplitSpec(**fields)


def drawn(split: Split, train: NDArray[np.int64], classes: Sequence[str]) -> Table:
    """A split as a table for the terminal: by class and client the task and the training images; or by task."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    everybody = range(len(split.clients))
    held: dict[tuple[int, int], str] = {}
    for client in everybody:
        for n, task in enumerate(split.clients[client].tasks, 1):
            labels, counts = np.unique(train[task.train], return_counts=True)
            images = dict(zip(labels.tolist(), counts.tolist(), strict=True))
            for label in task.classes:
                held[label, client] = f"[cyan]{n}[/]:{images.get(label, 0)}"
    if len(classes) <= MOST_ROWS:
        table.add_column("class (task:images)")
        for client in everybody:
            table.add_column(f"client {client}", justify="right")
        for label, name in enumerate(classes):
            cells = [held.get((label, client), "[dim]·[/]") for client in everybody]
            table.add_row(_plain(name), *cells, "" if any("cyan" in cell for cell in cells) else "left out")
        return table
    table.add_column("client")
    for n in range(split.spec.tasks):
        table.add_column(f"task {n + 1}", justify="right")
    for client in everybody:
        cells = [f"{len(task.classes)} classes, {len(task.train)} images" for task in split.clients[client].tasks]
        table.add_row(str(client), *cells)
    return table


def _plain(name: str) -> str:
    """A name without what rich takes for markup."""
    return name.replace("[", r"\[")
