"""What the words behind `fedlscl fit` stand for: LightningCLI's configuration, and the experiment that it describes."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from fedlscl.checks import file_name, path
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.presets import preset
from fedlscl.data.source import Source
from fedlscl.federation.trainer import TALKATIVE, RoundTrainer
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.experiment import Experiment, Tracking
from fedlscl.run.fields import flat
from fedlscl.run.names import Parser
from fedlscl.run.shipped import resolved
from fedlscl.run.words import option
from fedlscl.schedule import Schedule
from fedlscl.server import Server

FIT = (
    "Run a federation, or continue the one in its run folder. Begin with --config digits; a later --config and single "
    "fields override what came before. The fields of classes are shown below where --config names these; of others by "
    "--model.help CLASS, for instance FedLSCL, and likewise --server.help and --data.source.help."
)

ARGS_GIVEN = "LightningCLI's args parameter"
"""How Lightning's warning begins that there are also words on this process's own command line."""

NOT_IN_A_PROJECT = set("/\\#?%:")
"""Signs that W&B takes in no project's name."""

NOT_PART_OF_A_RUN = ("run_dir", "tracking", "config")
PATHS = ("run_dir", "data.cache_dir", "data.source.root", "backbone.weights", "cnn.weights", "data.split.by")
NETWORKS = ("model", "backbone", "cnn")


class Configuration:
    """A configuration: the files that words name, overlaid by each other and by single fields.

    Args:
        words: those behind `fedlscl fit`.

    Raises:
        SystemExit: if they describe no run; why is on the standard error. Or if they ask for help, which is shown.
    """

    def __init__(self, words: Sequence[str]) -> None:
        try:
            name, rest = option(words, "split")
            self._parse(resolved(rest))
            if name is not None:
                self._parse(self._split(name))
        except ValueError as error:
            sys.exit(f"fedlscl: {error}")

    def _parse(self, words: list[str]) -> None:
        self.words = tuple(words)
        self.__dict__.pop("values", None)  # those of the words before
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ARGS_GIVEN)
            self._cli = _ParsedCLI([*words])
        _check(self._cli.config)

    def _split(self, name: str) -> list[str]:
        """The words of this configuration with the fields of a preset behind its files: single fields win over it."""
        split = self._cli.config.data.split
        classes = self.source().count() or split.clients * split.private_classes + split.public_classes
        fields = preset(name, classes, split.clients, split.tasks)
        given = {field: value if isinstance(value, str) else json.dumps(value) for field, value in fields.items()}
        found = [f"--data.split.{field}={value}" for field, value in given.items()]
        words = [*self.words]
        behind = max((at + 2 for at, word in enumerate(words) if word == "--config"), default=0)
        return [*words[:behind], *found, *words[behind:]]

    @property
    def fields(self) -> list[str]:
        """The names of all fields but those of the classes that it names."""
        parser: Any = self._cli.parser
        return [*Parser.known_fields(parser)]

    @cached_property
    def values(self) -> dict[str, Any]:
        """All fields as plain values, without what makes no other run of it."""
        dumped = yaml.safe_load(self._cli.parser.dump(self._cli.config, skip_none=False))
        return {key: value for key, value in dumped.items() if key not in NOT_PART_OF_A_RUN}

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that the words give themselves, beyond the files that they name, by dotted name."""
        given = {word[2:].partition("=")[0].replace(".init_args", "") for word in self.words if word.startswith("--")}
        prefixes = tuple(f"{name}." for name in given)
        fields = flat(self.values).items()
        return {name: value for name, value in fields if name in given or name.startswith(prefixes)}

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        given = self._cli.config.run_dir
        return path(given) if given else self.default_run_dir

    @property
    def default_run_dir(self) -> Path:
        """runs/<setting>-<method>-seed<seed>-<hash>: the same words find their run again, others get their own."""
        values = self.values
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return Path(f"runs/{values['setting']}-{values['method']}-seed{values['seed_everything']}-{digest}")

    @property
    def sha256(self) -> str:
        """What tells apart the configurations, and the versions of this package, of two machines."""
        return hashlib.sha256(json.dumps([version("fedlscl"), self.values], sort_keys=True).encode()).hexdigest()

    def build(self) -> Experiment:
        """Build models, data and all else, from this process's random state on, which is seeded; no data are loaded.

        Raises:
            ValueError: if a value is impossible.
            OSError: if a file that is named is not there.
        """
        threads = self._cli.config.threads
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}, must be at least 1")
            torch.set_num_threads(threads)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        values = self._cli.build()
        return Experiment(
            setting=values.setting,
            method=values.method,
            seed=values.seed_everything,
            config=self.values,
            run_dir=self.run_dir,
            schedule=values.federation,
            client=values.model,
            server=values.server,
            data=values.data,
            vit=values.backbone,
            cnn=values.cnn,
            trainer=self._cli.trainer_with,
            tracking=values.tracking,
            overrides=self.overrides,
        )

    def networks(self) -> tuple[Client, FrozenViT, SmallModelSpec]:
        """Build what a client's model is made of, and nothing else: neither data nor Trainer need be possible here.

        What a small model begins with is left out, since a client's state has all of its weights.

        Raises:
            ValueError: if a value is impossible.
            OSError: if a file that is named is not there.
        """
        parser = Parser()
        parser.add_subclass_arguments(Client, "model")
        parser.add_class_arguments(FrozenViT, "backbone")
        parser.add_class_arguments(SmallModelSpec, "cnn")
        values = {name: self.values[name] for name in NETWORKS}
        values["cnn"] = {**values["cnn"], "pretrained": False, "weights": None}
        built = parser.instantiate_classes(parser.parse_object(values))
        return built.model, built.backbone, built.cnn

    def data(self) -> FederatedDataModule:
        """Build the data and their split, without the models; nothing is loaded.

        Raises:
            ValueError: if a value is impossible.
        """
        parser = Parser()
        parser.add_class_arguments(FederatedDataModule, "data")
        given = {**self.values["data"], "seed": self.values["seed_everything"]}
        built: FederatedDataModule = parser.instantiate_classes(parser.parse_object({"data": given})).data
        return built

    def source(self) -> Source:
        """Build what knows how the images are read; no data need be there.

        Raises:
            ValueError: if a value is impossible.
        """
        parser = Parser()
        parser.add_subclass_arguments(Source, "source")
        built: Source = parser.instantiate_classes(
            parser.parse_object({"source": self.values["data"]["source"]})
        ).source
        return built


def _check(config: Namespace) -> None:
    """Refuse what could not even name a run.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    for group in ("data", "backbone", "cnn", "federation", "tracking", "trainer", "data.split"):
        if not isinstance(config.get(group), Namespace | Mapping):
            raise ValueError(f"{group} is {config.get(group)}, must be a mapping of fields to their values")
    for name, value in flat(config.as_dict()).items():
        if name in PATHS and value is not None:
            path(value, name)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} is {value}, which is too large")
    seed = config.seed_everything
    if isinstance(seed, bool) or not 0 <= seed < 2**32:  # generators take no other
        raise ValueError(f"seed_everything is {seed}, must be a whole number from 0 to {2**32 - 1}")
    for field in ("setting", "method"):
        file_name(field, config[field])
    project = config.tracking.project
    if not project or len(project) > 128 or NOT_IN_A_PROJECT & {*project}:
        signs = " ".join(sorted(NOT_IN_A_PROJECT))
        raise ValueError(f"tracking.project is '{project}', must have 1 to 128 characters, none of {signs} among them")


class _ParsedCLI(LightningCLI):
    """LightningCLI that parses, and builds when it is told to."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(
            Client,
            FederatedDataModule,
            trainer_class=RoundTrainer,
            subclass_mode_model=True,
            save_config_callback=None,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "fedlscl fit", "description": FIT, "allow_abbrev": False},
            args=words,
            run=False,
        )

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

    def _set_seed(self) -> None:
        """Leave the random state alone until something is built."""

    def instantiate_classes(self) -> None:
        """Build nothing yet."""

    def build(self) -> Namespace:
        """Seed, and build everything."""
        super()._set_seed()
        super().instantiate_classes()
        built: Namespace = self.config_init
        return built

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A fresh Trainer with the configured settings."""
        wanted = self._get(self.config_init, "trainer")
        try:
            return RoundTrainer(**wanted)
        except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
            told = ", ".join(f"trainer.{name} is {value}" for name, value in wanted.items())
            raise ValueError(f"{told}: there can be no such Trainer on this machine ({error})") from error

    def trainer_with(self, logger: Logger | None) -> Trainer:
        """A fresh Trainer that logs there."""
        trainer = self.instantiate_trainer()
        trainer.logger = logger
        return trainer
