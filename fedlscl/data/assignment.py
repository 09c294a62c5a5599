"""Which classes each client has in each task, from a CSV file that a person writes, or `fedlscl split` does.

    client,task,classes
    0,1,cat;dog
    0,2,horse
    1,1,sketch_*

Clients are numbered from 0, tasks from 1. A cell has one name or more, with semicolons between, or patterns as in a
shell; a client may have several rows of a task.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

COLUMNS = ("client", "task", "classes")


def read_assignment(path: Path, clients: int, tasks: int, names: Sequence[str]) -> list[list[list[int]]]:
    """The classes of each client in each task.

    Args:
        path: the file.
        clients: how many clients there are to be.
        tasks: how many tasks each of them learns.
        names: of the classes, by class id.

    Returns:
        Sorted class ids, by client and task.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming file, line, value and what would be right.
    """
    found: dict[int, dict[int, list[int]]] = {}
    where: dict[tuple[int, int], int] = {}  # by client and class, the line
    for line, row in _rows(path):
        client, task = (_number(path, line, name, row[name], least) for name, least in (("client", 0), ("task", 1)))
        for label in _labels(path, line, row["classes"], names):
            if (before := where.setdefault((client, label), line)) != line:
                raise ValueError(
                    f"{path}, line {line}: client {client} has class {names[label]} already in line {before}; a client "
                    "learns a class once"
                )
            if label not in (there := found.setdefault(client, {}).setdefault(task, [])):
                there.append(label)
    numbers = len(found), max((task for of_client in found.values() for task in of_client), default=0)
    for kind, there, first in (
        ("client", sorted(found), 0),
        *((f"client {c}: task", sorted(found[c]), 1) for c in found),
    ):
        count = numbers[0] if kind == "client" else numbers[1]
        if missing := sorted(set(range(first, first + count)) - set(there)):
            raise ValueError(f"{path}: {kind} {missing[0]} is missing; each client needs a class in each task")
    if numbers != (clients, tasks):
        raise ValueError(
            f"data.split.clients and tasks are {clients} and {tasks}, but {path} has {numbers[0]} clients and "
            f"{numbers[1]} tasks; give --data.split.clients {numbers[0]} --data.split.tasks {numbers[1]}"
        )
    return [[sorted(found[client][task]) for task in range(1, tasks + 1)] for client in range(clients)]


def assignment(tasks: Iterable[Iterable[Iterable[int]]], names: Sequence[str]) -> str:
    """The text of such a file.

    Args:
        tasks: class ids by client and task.
        names: of the classes, by class id.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for client, of_client in enumerate(tasks):
        for task, labels in enumerate(of_client, 1):
            # a name that holds what stands between names has a row of its own
            alone = [names[label] for label in labels if ";" in names[label]]
            cells = [";".join(names[label] for label in labels if ";" not in names[label]), *alone]
            writer.writerows((client, task, cell) for cell in cells if cell)
    return text.getvalue()


def _rows(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """Lines with their numbers, their cells by column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason}); save it as UTF-8") from error
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter="," if "," in first else ";")
    header = [cell.strip().lower() for cell in next(reader, [])]
    header = ["classes" if cell == "class" else cell for cell in header]
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f"{path}, line 1: there is no column {missing[0]}; must be {','.join(COLUMNS)}")
    for cells in reader:
        if any(cell.strip() for cell in cells):
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {reader.line_num}: {len(cells)} cells, must be {len(header)}")
            yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _number(path: Path, line: int, name: str, cell: str, least: int) -> int:
    if not cell.isascii() or not cell.isdigit() or int(cell) < least:
        raise ValueError(f"{path}, line {line}: {name} is '{cell}', must be a whole number from {least} on")
    return int(cell)


def _labels(path: Path, line: int, cell: str, names: Sequence[str]) -> list[int]:
    if cell in names:
        return [names.index(cell)]
    found = []
    for part in (part.strip() for part in cell.split(";")):
        fitting = [label for label, name in enumerate(names) if name == part or fnmatchcase(name, part)]
        if not fitting:
            near = get_close_matches(part, names, 1)
            meant = f"; did you mean {near[0]}?" if near else f", such as {names[0]}"
            raise ValueError(f"{path}, line {line}: classes has '{part}', must be the name of a class{meant}")
        found += fitting
    return found
