"""The commands of `fedlscl` that use finished runs: `tables`, `plot`, `report` and `predict`."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import count
from pathlib import Path

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from rich.text import Text

from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.figures import pictures, save
from fedlscl.analysis.formats import FORMATS, to_markdown
from fedlscl.analysis.report import write_report
from fedlscl.analysis.results import read_runs
from fedlscl.analysis.tables import tables
from fedlscl.files import write_atomically
from fedlscl.run.predict import predict

RUNS = "run folders, folders of them, or their summary.json"


def tables_command(words: list[str]) -> None:
    """`fedlscl tables`: print the tables as Markdown and write them in every format."""
    parser = _parser("tables", "Write the paper's tables, with the paper's numbers beside them, from finished runs.")
    parser.add_argument("--masks", type=list[str], default=["task"], help="masks to show Table 1 under")
    parser.add_argument("--out", type=str, default="tables", help="folder to write Markdown, LaTeX and CSV into")
    options = parser.parse_args(words)
    texts = []
    for name, comparison in _comparisons(options.runs):
        texts.append(f"## {comparison.title}\n")
        for table in tables(comparison, options.masks):
            texts.append(to_markdown(table))
            for suffix, write in FORMATS.items():
                _write(Path(options.out) / f"{name}-{table.name}.{suffix}", write(table))
    print("\n".join(texts))  # noqa: T201  # Markdown to be piped on, which rich would wrap


def plot_command(words: list[str]) -> None:
    """`fedlscl plot`: draw the paper's figures."""
    parser = _parser("plot", "Draw the paper's figures, and forgetting and traffic, from finished runs.")
    parser.add_argument("--mask", type=str, default="seen", help="task, seen or none")
    parser.add_argument("--out", type=str, default="figures", help="folder to write PNG and SVG into")
    options = parser.parse_args(words)
    for name, comparison in _comparisons(options.runs):
        folder = Path(options.out) / name
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [replace(found, name=f"{found.name}_{options.mask}") for found in pictures(comparison, options.mask)]
        captions = folder / f"captions_{options.mask}.md"
        _write(captions, "\n".join(f"**{found.name}**: {found.title}. {found.caption}\n" for found in drawn))
        for path in [captions, *(path for found in drawn for path in save(found, folder))]:
            Console().print(Text(str(path)), soft_wrap=True)


def report_command(words: list[str]) -> None:
    """`fedlscl report`: one HTML page with everything."""
    parser = _parser("report", "Write one self-contained HTML page with settings, tables, figures and every run.")
    parser.add_argument("--out", type=str, default="report.html", help="the file to write")
    options = parser.parse_args(words)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report([comparison for _, comparison in _comparisons(options.runs)], path)
    Console().print(Text(f"report: {path}"), soft_wrap=True)


def predict_command(words: list[str]) -> None:
    """`fedlscl predict`: classify image files."""
    parser = ArgumentParser(
        prog="fedlscl predict", description="Classify image files with one client's model of a run."
    )
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    parser.add_argument("images", type=str, nargs="+", help="image files")
    parser.add_argument("--client", type=int, default=0, help="whose model, and whose classes")
    options = parser.parse_args(words)
    printed = Printed("image", "class", "probability", box=box.SIMPLE_HEAD)
    for image, label, probability in predict(Path(options.run_dir), options.images, options.client):
        printed.add_row(image, label, f"{probability:.3f}")
    Console().print(printed)


COMMANDS = {"tables": tables_command, "plot": plot_command, "report": report_command, "predict": predict_command}


def _parser(name: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"fedlscl {name}", description=description)
    parser.add_argument("runs", type=str, nargs="+", help=RUNS)
    return parser


def _comparisons(paths: list[str]) -> list[tuple[str, Comparison]]:
    """The comparisons, each with a name of its own that is fit for a file: the setting, and what tells it apart."""
    comparisons = compare(read_runs(paths))
    named: dict[str, Comparison] = {}
    for comparison in comparisons:
        same = [other for other in comparisons if other.setting == comparison.setting]
        parts = [comparison.setting]
        parts += [comparison.backbone] * (len({other.backbone for other in same}) > 1)
        parts += [comparison.evaluated_on] * (len({other.evaluated_on for other in same}) > 1)
        base = "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)
        # signs that no file name takes may have been all that told two apart
        free = (name for n in count(1) if (name := base + f"_{n}" * (n > 1)) not in named)
        named[next(free)] = comparison
    return list(named.items())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
