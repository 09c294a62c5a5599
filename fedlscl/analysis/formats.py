"""A table, and how it is written as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tabulate import tabulate

Mark = Literal["best", "second", ""]

MISSING = "–"
"""The text of a cell without a number."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: what is shown.
        mark: whether it is the best or second best of its column.
        numbers: what a program reads instead of the text, not rounded and in the unit of the column (bytes, not KiB),
            by what is added to the name of the column: nothing for the number itself, `sd` for its deviation.
    """

    text: str
    mark: Mark = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table, ready to be written in any format.

    Args:
        name: a short name, fit for a file.
        title: what it shows.
        runs: the setting, backbone and test images of the runs.
        note: what its numbers are, in sentences.
        header: the names of the columns.
        rows: the cells, row by row.
    """

    name: str
    title: str
    runs: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def to_markdown(table: Table) -> str:
    """The table as Markdown, with its title, what its runs share, and its note."""
    marks = {"best": "**{}**", "second": "_{}_", "": "{}"}
    rows = [[marks[cell.mark].format(escape_markdown(cell.text)) for cell in row] for row in table.rows]
    header = [escape_markdown(name) for name in table.header]
    body = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    title, runs, note = map(escape_markdown, (table.title, table.runs, table.note))
    return f"**{title}**, {runs}\n\n{body}\n\n{note}\n"


def to_latex(table: Table) -> str:
    """The table as a LaTeX tabular (booktabs not needed), its title and note as comments."""
    marks = {"best": r"\textbf{{{}}}", "second": r"\emph{{{}}}", "": "{}"}
    rows = [[marks[cell.mark].format(_escape_latex(cell.text)) for cell in row] for row in table.rows]
    header = [_escape_latex(name) for name in table.header]
    body = tabulate(rows, header, tablefmt="latex_raw", disable_numparse=True)
    return f"% {in_one_line(table.title)}, {in_one_line(table.runs)}\n% {in_one_line(table.note)}\n{body}\n"


def to_csv(table: Table) -> str:
    """The table as CSV for programs, nothing where a number is missing, marks and the note left out.

    Each of the numbers in a column's cells has a column of its own, named after both, such as `mean sd`.
    """
    columns: list[list[str]] = []
    for place, name in enumerate(table.header):
        cells = [row[place] for row in table.rows]
        kinds = dict.fromkeys(kind for cell in cells for kind in cell.numbers)
        for kind in kinds:
            columns.append(
                [
                    f"{name} {kind}".strip(),
                    *(f"{cell.numbers[kind]:.10g}" if kind in cell.numbers else "" for cell in cells),
                ]
            )
        if not kinds:
            columns.append([name, *("" if cell.text == MISSING else cell.text for cell in cells)])
    return csv_text(zip(*columns, strict=True))


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """CSV, whose cells no spreadsheet takes for formulas: what begins like one gets a ' before it, but for numbers.

    A carriage return, which not every reader takes for a part of a cell, becomes a space.
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_harmless(cell) for cell in row] for row in rows)
    return out.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
"""How a table is written, by the file's suffix."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "✓": r"$\checkmark$",
    "×": r"$\times$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}

_MARKDOWN = {"<": "&lt;", ">": "&gt;", "](": "]\\(", "~~": "\\~\\~", **{sign: f"\\{sign}" for sign in "\\`*|"}}


def in_one_line(text: str) -> str:
    """A text in one line, without signs that are not to be seen."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def escape_markdown(text: str) -> str:
    """A text as Markdown, in one line; an underscore inside a word means nothing there and stays."""
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", in_one_line(text))
    escaped = re.sub(r"[\\`*|<>]|\]\(|~~", lambda found: _MARKDOWN[found[0]], escaped)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", escaped)


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in in_one_line(text))


def _harmless(cell: str) -> str:
    if cell[:1] not in tuple("=+-@\t\r\n") or not cell or _NUMBER.fullmatch(cell):
        return cell.replace("\r", " ")
    return f"'{cell}".replace("\r", " ")


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|nan)")
