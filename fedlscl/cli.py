"""The command line: `fedlscl fit` runs or continues a federation, `sweep` many, the other commands use them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlscl.client import Client
from fedlscl.commands import COMMANDS
from fedlscl.data.module import FederatedDataModule
from fedlscl.deployment.shares import deal
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT, weights_sha256
from fedlscl.run.experiment import Experiment, ImpossibleRun, Tracking
from fedlscl.run.names import Parser
from fedlscl.run.sweep import LOG, narrowed, plan, read_sweep, run_all
from fedlscl.schedule import Schedule
from fedlscl.server import Server

OVERVIEW = """\
usage: fedlscl fit --config SETTING [--config METHOD] [--run_dir DIR] [--any.field VALUE]
       fedlscl sweep FILE --setting NAME [--jobs N] [--only PARAMETER=VALUE ...] [-- --any.field VALUE]
       fedlscl tables|plot|report RUNS [RUNS ...] [--out PATH]
       fedlscl predict RUN_DIR IMAGE [IMAGE ...] [--client N]
       fedlscl deal FOLDER --config SETTING [--config METHOD] [--any.field VALUE]

  fit      run a federation, or continue it if its run folder holds an unfinished run
  sweep    run all of a W&B sweep file (sweeps/*.yaml) on this machine, or continue it
  tables   the paper's tables from finished runs, as Markdown, LaTeX and CSV
  plot     the paper's figures from finished runs, as PNG and SVG
  report   one HTML page with tables, figures and every run
  predict  classify image files with one client's model of a run
  deal     write each client's data, and the server's, into a folder of its own, for a federation of several machines

Settings (data, models, schedule) are in experiments/*.yaml, methods in experiments/methods/*.yaml; a later --config
and single fields override what came before. `fedlscl fit --help` lists every field, `--print_config` shows the result.
"""

FIT = (
    "Run a federation, or continue the one in its run folder. Begin with --config experiments/digits.yaml; a later "
    "--config and single fields override what came before. The fields of a method: --model.help CLASS, for "
    "instance FedLSCL; likewise --server.help and --data.source.help."
)

SWEEP = (
    "Run all runs of a W&B sweep file on this machine, with the command lines that `wandb agent` would run. Finished "
    "runs are skipped, interrupted ones continued, and one that fails stops no other. Words behind -- are put behind "
    "every command line. Run it where the paths in the file hold: in the root of the repository."
)

SETTING_VARIABLE = "FEDLSCL_SETTING"
"""Environment variable that the sweep files take the name of the setting from."""

ARGS_GIVEN = "LightningCLI's args parameter"
"""How Lightning's warning begins that there are also words on this process's own command line."""

NOT_PART_OF_A_RUN = ("run_dir", "tracking", "config")


class FederatedCLI(LightningCLI):
    """LightningCLI whose `fit` runs a federation of fits."""

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(
            Client,
            FederatedDataModule,
            trainer_class=RoundTrainer,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                "prog": "fedlscl",
                "allow_abbrev": False,
                "fit": {"description": FIT, "allow_abbrev": False},
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`; none of the arguments of `Trainer.fit` is the user's to give."""
        names = ("model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only")
        return {"fit": set(names)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a federation has besides model, data and Trainer."""
        parser.add_class_arguments(FrozenViT, "backbone")
        parser.add_class_arguments(SmallModelSpec, "cnn")
        parser.add_subclass_arguments(Server, "server", required=True)
        parser.add_class_arguments(Schedule, "federation")
        parser.add_class_arguments(Tracking, "tracking")
        parser.add_argument("--setting", type=str, default="custom", help="name of the setting, for tables")
        parser.add_argument("--method", type=str, default="custom", help="name of the method, for tables")
        parser.add_argument("--run_dir", type=str | None, help="folder of the run; by default a new one below runs/")
        parser.add_argument(
            "--threads", type=int | None, help="CPU threads of torch; sums may differ in the last bit between counts"
        )
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse a seed that generators cannot take."""
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= seed < 2**32:
            sys.exit(f"fedlscl: seed_everything is {seed}, must be a whole number from 0 to {2**32 - 1}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A fresh Trainer with the configured settings."""
        return RoundTrainer(**self._get(self.config_init, "trainer"))

    def instantiate_classes(self) -> None:
        """Build models and data, or say in a line what is wrong."""
        with _in_a_line():
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Set what must hold before any model is built."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            if threads < 1:
                sys.exit(f"fedlscl: threads is {threads}, must be at least 1")
            torch.set_num_threads(threads)

    def fit(self, model: Client, datamodule: FederatedDataModule) -> None:
        """Run or continue the federation."""
        with _in_a_line():
            experiment = self.experiment(model, datamodule)
            experiment.load()
        try:
            experiment.run(Console())
        except ImpossibleRun as error:
            sys.exit(f"fedlscl: {error}")

    def _trainer(self, logger: Logger | None) -> Trainer:
        trainer = self.instantiate_trainer()
        trainer.logger = logger
        return trainer

    def configuration(self) -> dict[str, Any]:
        """What was configured as plain values, without what makes no other run of it."""
        parser = self._parser(self.subcommand)
        dumped = yaml.safe_load(parser.dump(self.config[str(self.subcommand)], skip_none=False))
        return {key: value for key, value in dumped.items() if key not in NOT_PART_OF_A_RUN}

    def experiment(self, model: Client, datamodule: FederatedDataModule) -> Experiment:
        """The experiment that the configuration describes."""
        config = self.configuration()
        values = self.config_init[str(self.subcommand)]
        return Experiment(
            setting=values.setting,
            method=values.method,
            seed=values.seed_everything,
            config=config,
            run_dir=Path(values.run_dir or default_run_dir(config)),
            schedule=values.federation,
            client=model,
            server=values.server,
            data=datamodule,
            vit=values.backbone,
            cnn=values.cnn,
            trainer=self._trainer,
            tracking=values.tracking,
        )


class _Described(FederatedCLI):
    described: Experiment

    def fit(self, model: Client, datamodule: FederatedDataModule) -> None:
        """Keep what was described."""
        self.described = self.experiment(model, datamodule)


def describe(words: Sequence[str]) -> Experiment:
    """The experiment that `fedlscl fit` would run with these words behind it; its data are not loaded yet.

    Raises:
        SystemExit: if the words describe none; why is on the standard error.
    """
    _quiet()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ARGS_GIVEN)
        return _Described(["fit", *words]).described


def run_dir_of(words: Sequence[str]) -> str:
    """The run folder that `fedlscl fit` would take with these words behind it, without building anything.

    Raises:
        SystemExit: if the words describe no run; why is on the standard error.
    """
    parsed = _parsed(["fit", *words])
    return parsed.config[parsed.config.subcommand].run_dir or default_run_dir(parsed.configuration())


def configuration_sha256(words: Sequence[str]) -> str:
    """What tells apart the configurations, and the versions of this package, that words stand for on two machines.

    Raises:
        SystemExit: if the words describe no run; why is on the standard error.
    """
    content = [version("fedlscl"), _parsed(["fit", *words]).configuration()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_of(words: Sequence[str]) -> str | None:
    """`weights_sha256` of the file of weights that words name.

    Raises:
        FileNotFoundError: if it is not on this machine.
        SystemExit: if the words describe no run; why is on the standard error.
    """
    return weights_sha256(_parsed(["fit", *words]).configuration()["backbone"]["weights"])


def _parsed(words: list[str]) -> Parsed:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ARGS_GIVEN)
        return Parsed(words)


class Parsed(FederatedCLI):
    """Only parses: the configuration of a command line, without a model or a run."""

    def _set_seed(self) -> None:
        """Leave the random state of this process alone."""

    def before_instantiate_classes(self) -> None:
        """Set nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def default_run_dir(config: dict[str, Any]) -> str:
    """runs/<setting>-<method>-seed<seed>-<hash>: the same command finds its run again, another one gets its own."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return f"runs/{config['setting']}-{config['method']}-seed{config['seed_everything']}-{digest}"


def main(args: list[str] | None = None) -> None:
    """Entry point of the `fedlscl` command."""
    words = sys.argv[1:] if args is None else args
    _quiet()
    # Lightning 2.6 asks torch for a name that newer releases of torch deprecate; no user can do anything about it
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    if words[:1] in (["fit"], ["sweep"]):
        # Lightning's own handler only notes the signal, so that a run would go on for up to a round
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if words[:1] == ["fit"]:
        FederatedCLI(args)
    elif words[:1] == ["sweep"]:
        _sweep(words[1:])
    elif words[:1] == ["deal"]:
        _deal(words[1:])
    elif words and words[0] in COMMANDS:
        with _in_a_line():
            COMMANDS[words[0]](words[1:])
    else:
        Console().print(OVERVIEW, highlight=False, markup=False, soft_wrap=True, end="")
        if words and words[0] not in ("-h", "--help"):
            sys.exit(f"fedlscl: unknown command '{words[0]}'")


def _quiet() -> None:
    """Lightning tells of devices and loggers whenever a Trainer is made, which here is hundreds of times."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _deal(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        sys.exit("fedlscl: deal needs a folder to write into: fedlscl deal FOLDER --config SETTING")
    described = describe(words[1:])
    with _in_a_line():
        described.load()
        for folder in deal(described.data, described.server.server_images, Path(words[0])):
            Console().print(Text(str(folder)), soft_wrap=True)


def _sweep(words: list[str]) -> None:
    parser = ArgumentParser(prog="fedlscl sweep", description=SWEEP)
    parser.add_argument("file", type=str, help="the sweep file")
    parser.add_argument("--setting", type=str | None, help=f"experiments/<setting>.yaml; else ${SETTING_VARIABLE}")
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
    if options.setting is not None:
        os.environ[SETTING_VARIABLE] = options.setting
    console = Console()
    with _in_a_line():
        sweep = narrowed(read_sweep(Path(options.file)), options.only)
        if any(SETTING_VARIABLE in str(word) for word in sweep["command"]):
            _check_setting(os.environ.get(SETTING_VARIABLE))
        elif options.setting is not None:
            raise ValueError(f"setting has no effect: the command in {options.file} does not use {SETTING_VARIABLE}")
        with console.status("parsing the command lines"):
            runs = plan(sweep, further, _configuration, default_run_dir)
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


def _configuration(words: list[str]) -> dict[str, Any]:
    """The configuration of the words behind `fedlscl`."""
    try:
        parsed = _parsed(words)
        if parsed.config[parsed.config.subcommand].run_dir is not None:
            raise ValueError("run_dir must not be given to a sweep: each run has a folder of its own below runs/")
        return parsed.configuration()
    except SystemExit:
        print(f"fedlscl: that was said of `fedlscl {shlex.join(words)}`", file=sys.stderr)  # noqa: T201
        raise


def _check_setting(name: str | None) -> None:
    known = sorted(path.stem for path in Path("experiments").glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"setting is {name!r}, must be the name of a file in experiments/, of which there are here: "
            f"{', '.join(known) or 'none'} (--setting, or {SETTING_VARIABLE} in the environment)"
        )


@contextmanager
def _in_a_line() -> Iterator[None]:
    """Show wrong input as one line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        sys.exit(f"fedlscl: {error}")
