"""The command line: `fedlscl fit` runs or continues a federation, `sweep` many, the other commands use them.

Each command imports what it needs when it is called, so that no other pays for it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import warnings
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fedlscl.checks import LONGEST
from fedlscl.checks import path as path_of
from fedlscl.run.errors import OneLine, in_a_line, kept_in, printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from fedlscl.analysis.comparison import Comparison

OVERVIEW = """\
usage: fedlscl fit --config SETTING [--config METHOD] [--run_dir DIR] [--any.field VALUE]
       fedlscl sweep FILE --setting NAME [--method NAME] [--jobs N] [--only PARAMETER=VALUE ...] [-- --any.field VALUE]
       fedlscl tables|plot|report RUNS [RUNS ...] [--out PATH]
       fedlscl predict RUN_DIR IMAGE|FOLDER [...] [--client N ...] [--task N] [--top K] [--out FILE.csv|FILE.json]
       fedlscl deal FOLDER --config SETTING [--config METHOD] [--any.field VALUE]
       fedlscl audit RUN [RUN ...] [--out FOLDER] [--seeds N] [-- --any.field VALUE]

  fit      run a federation, or continue it if its run folder holds an unfinished run
  sweep    run all of a W&B sweep file (sweeps/*.yaml) on this machine, or continue it
  tables   the paper's tables from finished runs, as Markdown, LaTeX and CSV
  plot     the paper's figures from finished runs, as PNG and SVG
  report   one HTML page with tables, figures and every run
  predict  classify image files with one client's model of a run
  deal     write each client's data, and the server's, into a folder of its own, for a federation of several machines
  audit    attack what the server of finished runs received: what could it learn of the clients' images?

Settings (data, models, schedule) are in experiments/*.yaml, methods in experiments/methods/*.yaml; a later --config
and single fields override what came before. `fedlscl fit --help` lists every field, `--print_config` shows the result.
"""

SWEEP = (
    "Run all runs of a W&B sweep file on this machine, with the command lines that `wandb agent` would run. Finished "
    "runs are skipped, interrupted ones continued, and one that fails stops no other. Words behind -- are put behind "
    "every command line. Run it where the paths in the file hold: in the root of the repository."
)

PREDICT = (
    "Classify image files with clients' models of a run, by the classes that each client has learned. An image that "
    "cannot be read is named, the others are answered, and the exit code is 1. Where the output is no terminal, each "
    "line is image, client, class and probability, with tabs between."
)

AUDIT = (
    "Attack what the server of finished runs received: exact leaks, membership, reconstruction. The runs must have "
    "kept it (--tracking.received true); those of the same method are put together. Words behind -- change fields for "
    "the audit, such as --server.iterations 250 where the server makes images."
)

SETTING_VARIABLE, METHOD_VARIABLE = "FEDLSCL_SETTING", "FEDLSCL_METHOD"
"""Environment variables that the sweep files take the name of the setting from, and of the method."""


def main(args: list[str] | None = None) -> None:
    """Entry point of the `fedlscl` command. Whatever goes wrong ends in a line and an exit code, see `run.errors`."""
    with in_a_line():
        printable(sys.stdout, sys.stderr)
        words = sys.argv[1:] if args is None else args
        # Lightning 2.6 asks torch for a name that newer releases of torch deprecate; no user can do anything about it
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        if words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        else:
            sys.stdout.write(OVERVIEW)
            if words and words[0] not in ("-h", "--help"):
                sys.exit(f"fedlscl: unknown command '{words[0]}'")


def _end_when_told() -> None:
    """Lightning's own handler only notes the signal, so that a run would go on for up to a round."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def fit_command(words: list[str]) -> None:
    """`fedlscl fit`: run or continue a federation."""
    from fedlscl.run.leash import follow

    follow()
    _end_when_told()
    from rich.console import Console

    from fedlscl.run.configuration import Configuration

    experiment = Configuration(words).build()
    experiment.load()
    with kept_in(experiment.run_dir):
        experiment.run(Console())


def sweep_command(words: list[str]) -> None:
    """`fedlscl sweep`: run all runs of a sweep file, or those that are not finished."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    _end_when_told()
    parser = _parser("sweep", SWEEP)
    parser.add_argument("file", type=str, help="the sweep file")
    parser.add_argument("--setting", type=str | None, help=f"experiments/<setting>.yaml; else ${SETTING_VARIABLE}")
    parser.add_argument("--method", type=str | None, help=f"experiments/methods/<method>.yaml; else ${METHOD_VARIABLE}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; each gets its share of the cores")
    parser.add_argument(
        "--only",
        type=str,
        nargs="+",
        default=[],
        metavar="PARAMETER=VALUE",
        help="draw only these values of a parameter",
    )
    parser.add_argument("--dry_run", type=bool, default=False, help="only show the command lines and their run folders")
    at = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:at]), words[at + 1 :]
    if options.jobs < 1:
        sys.exit(f"fedlscl: jobs is {options.jobs}, must be at least 1")
    from fedlscl.run.sweep import LOG, narrowed, plan, read_sweep, run_all

    console = Console()
    sweep = narrowed(read_sweep(path_of(options.file)), options.only)
    for name, variable, folder in (
        ("setting", SETTING_VARIABLE, Path("experiments")),
        ("method", METHOD_VARIABLE, Path("experiments/methods")),
    ):
        given = getattr(options, name)
        if given is not None:
            os.environ[variable] = given
        if any(variable in str(word) for word in sweep["command"]):
            _check_name(name, variable, folder)
        elif given is not None:
            raise ValueError(f"{name} has no effect: the command in {options.file} does not use {variable}")
    with console.status("parsing the command lines"):
        runs = plan(sweep, further)
    if options.dry_run:
        for run in runs:
            console.print(Text(f"{shlex.join(run.words)}  # {run.run_dir}"), soft_wrap=True)
        return
    before = sum(run.finished for run in runs)
    console.print(f"{len(runs)} runs, {before} of them finished before; their folders: {runs[0].run_dir.parent}/")
    failed = run_all(runs, options.jobs, console)
    if failed:
        table = Table("failed run", "its last line", box=box.SIMPLE_HEAD)
        for run in failed:
            table.add_row(Text(str(run.run_dir)), Text(run.last_words))
        console.print(table)
        sys.exit(f"fedlscl: {len(failed)} of {len(runs)} runs failed; {LOG} in each folder has what they wrote")
    console.print(f"All {len(runs)} runs are finished.")


def _check_name(field: str, variable: str, folder: Path) -> None:
    name, known = os.environ.get(variable), sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"{field} is {name!r}, must be the name of a file in {folder}/, of which there are here: "
            f"{', '.join(known) or 'none'} (--{field}, or {variable} in the environment)"
        )


def deal_command(words: list[str]) -> None:
    """`fedlscl deal`: write each client's data, and the server's."""
    from fedlscl.deployment.shares import deal
    from fedlscl.run.configuration import Configuration

    if not words or words[0].startswith("-"):
        sys.exit("fedlscl: deal needs a folder to write into: fedlscl deal FOLDER --config SETTING")
    experiment = Configuration(words[1:]).build()
    experiment.load()
    for folder in deal(experiment.data, experiment.server.server_images, path_of(words[0])):
        _say(folder)


def predict_command(words: list[str]) -> None:
    """`fedlscl predict`: classify image files."""
    parser = _parser("predict", PREDICT)
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    parser.add_argument("images", type=str, nargs="+", help="image files, or folders, of which all images are taken")
    parser.add_argument("--client", type=int, nargs="+", default=[0], help="whose models, and whose classes")
    parser.add_argument(
        "--task", type=int | None, help="the task, from 1, that the images are of: its classes alone compete"
    )
    parser.add_argument("--top", type=int, default=1, help="how many classes to show of each image")
    parser.add_argument("--out", type=str | None, help="a .csv or .json file for the probabilities of all classes")
    options = parser.parse_args(words)
    from fedlscl.analysis.predictions import checked, show, write
    from fedlscl.run.predict import files_in, predictions

    out = None if options.out is None else checked(path_of(options.out))
    if options.top < 1:
        raise ValueError(f"top is {options.top}, must be at least 1")
    files, others = files_in(options.images)
    found = predictions(path_of(options.run_dir), files, options.client, options.task)
    answers, failures = show(found, len(files), options.top, keep=out is not None)
    if out is not None:
        write(answers, out)
    if others:
        sys.stderr.write(f"fedlscl: {len(others)} other files in these folders are no images, such as {others[0]}\n")
    if failures:
        sys.exit("\n".join(f"fedlscl: {failure}" for failure in failures))


def tables_command(words: list[str]) -> None:
    """`fedlscl tables`: print the tables as Markdown and write them in every format."""
    parser = _runs_parser(
        "tables", "Write the paper's tables, with the paper's numbers beside them, from finished runs."
    )
    parser.add_argument("--masks", type=list[str], default=["task"], help="masks to show Table 1 under")
    parser.add_argument("--out", type=str, default="tables", help="folder to write Markdown, LaTeX and CSV into")
    options = parser.parse_args(words)
    from fedlscl.analysis.formats import FORMATS, to_markdown
    from fedlscl.analysis.tables import tables
    from fedlscl.analysis.tuning import tuning

    out, texts = path_of(options.out), []
    comparisons = _comparisons(options.runs)
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
            _say(path)


def report_command(words: list[str]) -> None:
    """`fedlscl report`: one HTML page with everything."""
    parser = _runs_parser("report", "Write one self-contained HTML page with settings, tables, figures and every run.")
    parser.add_argument("--out", type=str, default="report.html", help="the file to write")
    options = parser.parse_args(words)
    from fedlscl.analysis.report import write_report

    path = path_of(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report([comparison for _, comparison in _comparisons(options.runs)], path)
    _say(f"report: {path}")


def audit_command(words: list[str]) -> None:
    """`fedlscl audit`: what the server of finished runs could learn of the clients' images."""
    parser = _parser("audit", AUDIT)
    parser.add_argument("runs", type=str, nargs="+", help="folders of finished runs with --tracking.received true")
    parser.add_argument("--out", type=str, default="audit", help="folder to write tables and pictures into")
    parser.add_argument("--seeds", type=int, default=1, help="how often each run is attacked, with other draws")
    parser.add_argument("--reconstruct", type=int, default=2, help="of how many clients of a run images are made")
    at = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:at]), words[at + 1 :]
    from fedlscl.audit.command import audit

    folders = [path_of(run) for run in options.runs]
    for file in audit(folders, path_of(options.out), options.seeds, options.reconstruct, further, _say)[:1]:
        sys.stdout.write(file.read_text(encoding="utf-8"))


COMMANDS = {
    "fit": fit_command,
    "sweep": sweep_command,
    "tables": tables_command,
    "plot": plot_command,
    "report": report_command,
    "predict": predict_command,
    "deal": deal_command,
    "audit": audit_command,
}


def _parser(name: str, description: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    class Parser(OneLine, ArgumentParser):
        """Tells what is wrong in a line."""

    return Parser(prog=f"fedlscl {name}", description=description)


def _runs_parser(name: str, description: str) -> ArgumentParser:
    parser = _parser(name, description)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, folders of them, or their summary.json")
    return parser


def _say(text: object) -> None:
    """Print a line as it is: rich would wrap it."""
    sys.stdout.write(f"{text}\n")


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
