"""The command line: `fedlscl fit` runs or continues a federation, `sweep` many, the other commands use them.

Each command imports what it needs when it is called, so that no other pays for it.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import warnings
from difflib import get_close_matches
from pathlib import Path

from fedlscl import __version__
from fedlscl.analysis.commands import plot_command, report_command, tables_command
from fedlscl.checks import output
from fedlscl.checks import path as path_of
from fedlscl.run import help
from fedlscl.run.about import completion, doctor_command, methods_command, settings_command
from fedlscl.run.errors import in_a_line, kept_in, meant, printable
from fedlscl.run.shipped import resolved
from fedlscl.run.words import flag, from_here, loading, option, parser_of, say

OVERVIEW = """\
usage: fedlscl fit --config SETTING [--method METHOD] [--run_dir DIR] [--any.field VALUE] [--dry_run]
       fedlscl split --config SETTING [--out FILE.png|FILE.csv] [--any.field VALUE]
       fedlscl sweep FILE --setting NAME [--method NAME] [--jobs N] [--only PARAMETER=VALUE ...] [-- --any.field VALUE]
       fedlscl study FOLDER|CSV|DATASET [--clients N] [--tasks N] [--minutes N] [--weights FILE] [--methods NAME ...]
       fedlscl tables|plot|report RUNS [RUNS ...] [--out PATH]
       fedlscl predict RUN_DIR IMAGE|FOLDER [...] [--client N ...] [--task N] [--top K] [--out FILE.csv|FILE.json]
       fedlscl deal FOLDER --config SETTING [--method METHOD] [--any.field VALUE]
       fedlscl audit RUN [RUN ...] [--out FOLDER] [--seeds N] [-- --any.field VALUE]
       fedlscl publish RUN_DIR [--out FOLDER] [--push OWNER/NAME [--public]]
       fedlscl settings|methods|doctor|completion

  fit         run a federation, or continue it if its run folder holds an unfinished run
  split       show which client gets which classes and images, and train nothing
  study       an answer about images of your own: which method to take, by how much, at what cost
  sweep       run all of a W&B sweep file (sweeps/*.yaml) on this machine, or continue it
  tables      the paper's tables from finished runs, as Markdown, LaTeX and CSV
  plot        the paper's figures from finished runs, as PNG and SVG
  report      one HTML page with tables, figures and every run
  predict     classify image files with one client's model of a run
  deal        write each client's data, and the server's, into a folder of its own, for a federation of several machines
  audit       attack what the server of finished runs received: what could it learn of the clients' images?
  publish     a folder of a finished run to give away, or to push to the Hugging Face Hub: card, weights, numbers
  settings    the settings (data, models, schedule) that there are by name
  methods     the methods that there are by name
  doctor      versions, devices, disk, and what can be reached
  completion  a script by which the shell completes the words of this command

Begin with `fedlscl fit --config digits`. A later --config and single fields override what came before. `fedlscl fit
--help` shows the fields that matter first, `--print_config` the result. Settings are experiments/*.yaml, methods
experiments/methods/*.yaml, and files of your own go by their paths.
"""

SWEEP = (
    "Run all runs of a W&B sweep file on this machine, with the command lines that `wandb agent` would run. Finished "
    "runs are skipped, interrupted ones continued, and one that fails stops no other. Words behind -- are put behind "
    "every command line. Run it where the paths in the file hold: in the root of the repository."
)

STUDY = (
    "Look at images of your own, propose a split over clients and tasks, take the best foundation model that is there, "
    "run a few methods as far as the minutes go, and say which to take. Given again, it goes on where it was."
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

PUBLISH = (
    "Write a folder of a finished run that can be given away: model card, configuration, summary, split, and each "
    "client's weights as safetensors, without images and what was computed from them; the card says what the folder "
    "tells of the clients. With --push it goes to the Hugging Face Hub, where it is private unless --public is given."
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
        elif words and words[0] in ("--version", "-V"):
            say(f"fedlscl {__version__}")
        else:
            sys.stdout.write(OVERVIEW)
            if words and words[0] not in ("-h", "--help"):
                sys.exit(f"fedlscl: unknown command '{words[0]}'{meant(get_close_matches(words[0], COMMANDS), '')}")


def _end_when_told() -> None:
    """Lightning's own handler only notes the signal, so that a run would go on for up to a round."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def fit_command(words: list[str]) -> None:
    """`fedlscl fit`: run or continue a federation."""
    from fedlscl.run.leash import follow

    if help.asked(words) == "short":
        sys.stdout.write(help.SHORT)
        return
    dry, words = flag(words, "dry_run")
    words = resolved(words)
    follow()
    _end_when_told()
    from_here()
    with loading():
        from rich.console import Console

        from fedlscl.run.configuration import Configuration
        from fedlscl.run.names import check_order
    if help.asked(words) == "all":
        help.everything(words)
        return
    check_order(words)
    console = Console()
    with console.status("building the models"):
        experiment = Configuration(words).build()
    experiment.load()
    if dry:
        experiment.check(console)
        return
    with kept_in(experiment.run_dir):
        experiment.run(console)


def sweep_command(words: list[str]) -> None:
    """`fedlscl sweep`: run all runs of a sweep file, or those that are not finished."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    _end_when_told()
    parser = parser_of("sweep", SWEEP)
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
    parser.add_argument("--dry_run", action="store_true", help="only show the command lines and their run folders")
    from_here()
    at = words.index("--") if "--" in words else len(words)
    dry, own = flag(words[:at], "dry_run")
    options, further = parser.parse_args(own), words[at + 1 :]
    if options.jobs < 1:
        sys.exit(f"fedlscl: jobs is {options.jobs}, must be at least 1")
    with loading():
        from fedlscl.run.planned import LOG
        from fedlscl.run.sweep import narrowed, plan, read_sweep, run_all

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
    if dry:
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


def study_command(words: list[str]) -> None:
    """`fedlscl study`: from a folder of images to an answer."""
    begun = time.monotonic()
    _end_when_told()
    parser = parser_of("study", STUDY)
    parser.add_argument(
        "source", type=str, help="folder of images, CSV file, torchvision:NAME, huggingface:OWNER/NAME, medmnist:NAME"
    )
    parser.add_argument("--clients", type=int, default=5, help="how many clients share the images")
    parser.add_argument("--tasks", type=int, default=3, help="tasks that each learns one after another")
    parser.add_argument("--minutes", type=float, default=30.0, help="that it may take, over all starts")
    parser.add_argument("--methods", type=str, nargs="+", help="names, or files like those of experiments/methods")
    parser.add_argument("--weights", type=str | None, help="a ViT of timm as a safetensors file")
    parser.add_argument("--out", type=str | None, help="folder of the study; by default studies/<name>")
    options = parser.parse_args(words)
    from_here()
    with loading():
        from rich.console import Console

        from fedlscl.study.command import study
        from fedlscl.study.plan import Asked

    methods = tuple(options.methods) if options.methods else None
    asked = Asked(options.source, options.clients, options.tasks, options.weights, methods)
    study(asked, options.minutes, options.out, begun, Console())


def deal_command(words: list[str]) -> None:
    """`fedlscl deal`: write each client's data, and the server's."""
    if not words or words[0].startswith("-"):
        sys.exit("fedlscl: deal needs a folder to write into: fedlscl deal FOLDER --config SETTING")
    further = resolved(words[1:])
    from_here()
    with loading():
        from fedlscl.deployment.shares import deal
        from fedlscl.run.configuration import Configuration
    experiment = Configuration(further).build()
    experiment.load()
    for folder in deal(experiment.data, experiment.server.server_images, path_of(words[0])):
        say(folder)


def split_command(words: list[str]) -> None:
    """`fedlscl split`: show who gets which images."""
    if help.asked(words):
        sys.stdout.write(help.SPLIT)
        return
    out, words = option(words, "out")
    words = resolved(words)
    from_here()
    with loading():
        from fedlscl.run.configuration import Configuration
        from fedlscl.run.names import check_order
        from fedlscl.run.splitting import SUFFIXES, show, write

    target = None if out is None else output(path_of(out, "out"), SUFFIXES)
    check_order(words)
    configuration = Configuration(words)
    data = configuration.data()
    data.prepare_data()
    data.setup()
    show(data.split_map)
    if target is not None:
        write(data, target, f"{configuration.values['setting']}, seed {data.seed}")
        say(f"split: {target}")


def predict_command(words: list[str]) -> None:
    """`fedlscl predict`: classify image files."""
    parser = parser_of("predict", PREDICT)
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    parser.add_argument("images", type=str, nargs="+", help="image files, or folders, of which all images are taken")
    parser.add_argument("--client", type=int, nargs="+", default=[0], help="whose models, and whose classes")
    parser.add_argument(
        "--task", type=int | None, help="the task, from 1, that the images are of: its classes alone compete"
    )
    parser.add_argument(
        "--top", type=int | None, help="how many classes to show of each image; by default 3 in a terminal, and else 1"
    )
    parser.add_argument("--out", type=str | None, help="a .csv or .json file for the probabilities of all classes")
    options = parser.parse_args(words)
    with loading():
        from fedlscl.analysis.predictions import WRITERS, show, told, write
        from fedlscl.run.predict import files_in, known, predictions

    out = None if options.out is None else output(path_of(options.out), WRITERS)
    if options.top is not None and options.top < 1:
        raise ValueError(f"top is {options.top}, must be at least 1")
    files, others = files_in(options.images)
    found = predictions(path_of(options.run_dir), files, options.client, options.task)
    for client in dict.fromkeys(options.client):
        sys.stderr.write(f"{told(client, known(path_of(options.run_dir), client, options.task))}\n")
    top = options.top or (3 if sys.stdout.isatty() else 1)
    answers, failures = show(found, len(files), top, keep=out is not None)
    if out is not None:
        write(answers, out)
    if others:
        sys.stderr.write(f"fedlscl: {len(others)} other files in these folders are no images, such as {others[0]}\n")
    if failures:
        sys.exit("\n".join(f"fedlscl: {failure}" for failure in failures))


def completion_command(words: list[str]) -> None:
    """`fedlscl completion`: a script for the shell."""
    parser_of(
        "completion", "Print a script by which bash, or zsh, completes words; it says where to put it."
    ).parse_args(words)
    sys.stdout.write(completion(COMMANDS))


def audit_command(words: list[str]) -> None:
    """`fedlscl audit`: what the server of finished runs could learn of the clients' images."""
    parser = parser_of("audit", AUDIT)
    parser.add_argument("runs", type=str, nargs="+", help="folders of finished runs with --tracking.received true")
    parser.add_argument("--out", type=str, default="audit", help="folder to write tables and pictures into")
    parser.add_argument("--seeds", type=int, default=1, help="how often each run is attacked, with other draws")
    parser.add_argument("--reconstruct", type=int, default=2, help="of how many clients of a run images are made")
    at = words.index("--") if "--" in words else len(words)
    options, further = parser.parse_args(words[:at]), words[at + 1 :]
    from_here()
    with loading():
        from fedlscl.audit.command import audit

    folders = [path_of(run) for run in options.runs]
    for file in audit(folders, path_of(options.out), options.seeds, options.reconstruct, further, say)[:1]:
        sys.stdout.write(file.read_text(encoding="utf-8"))


def publish_command(words: list[str]) -> None:
    """`fedlscl publish`: a folder of a finished run that can be given away."""
    parser = parser_of("publish", PUBLISH)
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    parser.add_argument("--out", type=str | None, help="folder to write; by default published/<name of the run>")
    parser.add_argument("--push", type=str | None, help="name on the Hugging Face Hub to push to, as owner/name")
    parser.add_argument("--public", action="store_true", help="let everybody see it there, where it is new")
    options = parser.parse_args(words)
    if options.public and options.push is None:
        raise ValueError("public has no effect without --push OWNER/NAME")
    with loading():
        from fedlscl.run.publish import publish, push

    run_dir = path_of(options.run_dir, "run_dir")
    folder = path_of(options.out, "out") if options.out else Path("published") / run_dir.resolve().name
    files = publish(run_dir, folder)
    size = sum(file.stat().st_size for file in files)
    say(f"published: {folder} ({len(files)} files, {size / 2**20:.1f} MiB); read its {files[0].name} first")
    say("it has each client's weights, the classes of each client, and which image is whose; no images, no features")
    if options.push is not None:
        say(f"pushed: {push(folder, options.push, private=not options.public)}")


COMMANDS = {
    "fit": fit_command,
    "split": split_command,
    "sweep": sweep_command,
    "study": study_command,
    "tables": tables_command,
    "plot": plot_command,
    "report": report_command,
    "predict": predict_command,
    "deal": deal_command,
    "audit": audit_command,
    "publish": publish_command,
    "settings": settings_command,
    "methods": methods_command,
    "doctor": doctor_command,
    "completion": completion_command,
}
