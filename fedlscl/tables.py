"""The paper's tables from finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mark = Literal["best", "second", ""]


@dataclass(frozen=True)
class Cell:
    """One cell of a table: plain text, and whether it is the best or second best of its column."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table, ready to be written in any format.

    Args:
        name: a short name, fit for a file.
        title: what it shows.
        note: what its numbers are, in sentences.
        header: the names of the columns.
        rows: the cells, row by row.
    """

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
