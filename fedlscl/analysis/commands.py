"""The commands that read finished runs: `fedlscl tables`, `plot` and `report`.

Each imports what it needs when it is called, so that no other pays for it.
"""

from __future__ import annotations

import re
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fedlscl.checks import LONGEST, output
from fedlscl.checks import path as path_of
from fedlscl.run.words import parser_of, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from fedlscl.analysis.comparison import Comparison


MOST_EXAMPLES = 24
"""Images of a client on a report."""


def tables_command(words: list[str]) -> None:
    """`fedlscl tables`: print the tables as Markdown and write them in every format."""
    parser = _runs_parser(
        "tables", "Write the paper's tables, with the paper's numbers beside them, from finished runs."
    )
    parser.add_argument("--masks", type=list[str], default=["task"], help="masks to show Table 1 under")
    parser.add_argument("--out", type=str, default="tables", help="folder to write Markdown, LaTeX and CSV into")
    parser.add_argument("--leaderboard", type=str | None, help="a .md file for a ranking in each setting")
    options = parser.parse_args(words)
    from fedlscl.analysis.formats import FORMATS, to_markdown
    from fedlscl.analysis.leaderboard import leaderboard
    from fedlscl.analysis.tables import tables
    from fedlscl.analysis.tuning import tuning

    out, texts = path_of(options.out), []
    page = None if options.leaderboard is None else output(path_of(options.leaderboard, "leaderboard"), (".md",))
    comparisons = _comparisons(options.runs)
    if page is not None:
        _write(page, leaderboard([comparison for _, comparison in comparisons], options.runs))
    for name, comparison in comparisons:
        texts.append(f"## {comparison.title}\n")
        every = [other for _, other in comparisons]
        for table in [*tables(comparison, options.masks), *tuning(comparison, every)]:
            texts.append(to_markdown(table))
            for suffix, write in FORMATS.items():
                _write(out / f"{name}-{table.name}.{suffix}", write(table))
    sys.stdout.write("\n".join(texts) + "\n")  # Markdown to be piped on, which rich would wrap


def plot_command(words: list[str]) -> None:
    """`fedlscl plot`: draw the paper's figures."""
    parser = _runs_parser("plot", "Draw the paper's figures, and forgetting and traffic, from finished runs.")
    parser.add_argument("--mask", type=str, default="seen", help="task, seen, federation or none")
    parser.add_argument("--out", type=str, default="figures", help="folder to write PNG and SVG into")
    options = parser.parse_args(words)
    from dataclasses import replace

    from fedlscl.analysis.figures import pictures, save

    for name, comparison in _comparisons(options.runs):
        folder = path_of(options.out) / name
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [replace(found, name=f"{found.name}_{options.mask}") for found in pictures(comparison, options.mask)]
        captions = folder / f"captions_{options.mask}.md"
        _write(captions, "\n".join(f"**{found.name}**: {found.title}. {found.caption}\n" for found in drawn))
        for path in [captions, *(path for found in drawn for path in save(found, folder))]:
            say(path)


def report_command(words: list[str]) -> None:
    """`fedlscl report`: one HTML page with everything."""
    parser = _runs_parser("report", "Write one self-contained HTML page with settings, tables, figures and every run.")
    parser.add_argument("--out", type=str, default="report.html", help="the file to write")
    parser.add_argument("--examples", type=int, default=0, help="test images of each of three clients, with answers")
    parser.add_argument("--audit", type=str, nargs="+", default=[], help="folders that `fedlscl audit` has written")
    options = parser.parse_args(words)
    from fedlscl.analysis.report import write_report

    if not 0 <= options.examples <= MOST_EXAMPLES:
        raise ValueError(f"examples is {options.examples}, must be 0 to {MOST_EXAMPLES}")
    path = path_of(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    audits = [path_of(folder) for folder in options.audit]
    write_report([comparison for _, comparison in _comparisons(options.runs)], path, options.examples, audits)
    say(f"report: {path}")


def _runs_parser(name: str, description: str) -> ArgumentParser:
    parser = parser_of(name, description)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, folders of them, or their summary.json")
    return parser


def _comparisons(paths: list[str]) -> list[tuple[str, Comparison]]:
    """The comparisons, each with a name of its own that is fit for a file: the setting, and what tells it apart."""
    from fedlscl.analysis.comparison import compare
    from fedlscl.analysis.results import read_runs

    comparisons = compare(read_runs(paths))
    named: dict[str, Comparison] = {}
    for comparison in comparisons:
        same = [other for other in comparisons if other.setting == comparison.setting]
        parts = [comparison.setting]
        parts += [comparison.backbone] * (len({other.backbone for other in same}) > 1)
        parts += [comparison.evaluated_on] * (len({other.evaluated_on for other in same}) > 1)
        base = "-".join(re.sub(r"[^\w.]+", "_", part)[:LONGEST].lstrip(".") or "_" for part in parts)
        # signs that no file name takes may have been all that told two apart
        free = (name for n in count(1) if (name := base + f"_{n}" * (n > 1)) not in named)
        named[next(free)] = comparison
    return list(named.items())


def _write(path: Path, text: str) -> None:
    from fedlscl.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode(errors="replace"))
