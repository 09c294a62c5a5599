"""What `fedlscl split` shows: the whole map of a split in the terminal, as a picture, or as a file to edit."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlscl.data.assignment import assignment
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.split_map import SplitMap, rows, short_lines
from fedlscl.files import content_of, write_atomically
from fedlscl.run.folder import SPLIT

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".csv")
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
"""Of the tasks, in turns."""


def print_short(found: SplitMap, console: Console) -> None:
    """Print the map of a split in a few lines."""
    for line in short_lines(found, console.width):
        console.print(Text(line), soft_wrap=True)


def show(found: SplitMap) -> None:
    """Print the map of a split: as tables that fit the terminal, elsewhere as lines with tabs between cells."""
    console = Console()
    print_short(found, console)
    heading, *body = rows(found)
    if not console.is_terminal:
        sys.stdout.write("\n".join("\t".join(row) for row in [heading, *body]) + "\n")
        return
    console.print("\ntask: training images, of each client")
    at_once = max((console.width - max(map(len, found.names)) - 14) // 12, 1)
    for first in range(0, found.clients, at_once):
        chosen = range(first, min(first + at_once, found.clients))
        table = Table(box=box.SIMPLE_HEAD)
        rest = heading[found.clients + 1 :]
        for column in ("class", *(heading[client + 1] for client in chosen), *rest):
            table.add_column(column, justify="left" if column == "class" else "right", no_wrap=True)
        for label, row in enumerate(body):
            cells = (Text(row[n + 1], style=_colour(int(found.task[label, n]))) for n in chosen)
            table.add_row(Text(row[0]), *cells, *(Text(cell, style="dim") for cell in row[found.clients + 1 :]))
        console.print(table)


def read_map(folder: Path) -> SplitMap | None:
    """The map of the split of a run, None where its folder has none; with a warning in the log where it is damaged."""
    content = content_of(folder / SPLIT)
    try:
        stored = None if content is None else json.loads(content).get("map")
        return None if stored is None else SplitMap.from_json(stored)
    except (ValueError, AttributeError) as error:
        log.warning("%s: the map of the split is left out, for %s", folder / SPLIT, error)
        return None


def write(data: FederatedDataModule, path: Path, title: str) -> None:
    """Write the map of a split as a picture, or the classes of each client as a file that `data.split.by` takes.

    Args:
        data: the data, set up.
        path: a file that `checks.output` has returned.
        title: of the picture.
    """
    if path.suffix == ".csv":
        tasks = [[task.classes for task in client.tasks] for client in data.split.clients]
        write_atomically(path, assignment(tasks, data.class_names).encode())
        return
    from fedlscl.run import plots  # and with it matplotlib

    plots.split_picture(data.split_map, path, title)


def _colour(task: int) -> str:
    return COLOURS[(task - 1) % len(COLOURS)] if task else ""
