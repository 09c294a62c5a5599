"""Every method on three clients of the digits, small enough for hundreds of runs: two tasks of two rounds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fedlscl.federation.algorithm import Federation
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.transport import Fitted, Replied, Transport
from fedlscl.federation.worker import Accuracy
from fedlscl.messages import MessageError, Upload
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.schedule import Round

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait for the first

METHODS = Path(__file__).resolve().parent.parent / "methods"
CLIENTS = 3
BUDGET = {"epochs": 3, "batch_size": 16, "buffer_size": 3, "learning_rate": 0.005}
OF_SERVER: dict[str, dict[str, int]] = {  # of the servers that train
    "glfc": {"iterations": 2, "monitors": 2},
    "target": {"synthesis_rounds": 3, "steps": 3, "batch_size": 8},
    "mfcl": {"steps": 6, "batch_size": 8},
    "fedmgp": {"epochs": 1, "surrogates": 4},
}
SPLIT = {"clients": CLIENTS, "tasks": 2, "classes_per_task": 2, "private_classes": 2, "public_classes": 2}
SETTING: dict[str, Any] = {
    "setting": "small",
    "seed_everything": 42,
    "data": {
        "source": {"class_path": "Digits"},
        "split": {**SPLIT, "min_public_images": 6, "train_per_class": 30, "test_per_class": 15},
    },
    "backbone": {
        "name": "vit_tiny_patch16_224",
        "image_size": 16,
        "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    },
    "cnn": {
        "name": "resnet18",
        "features": 16,
        "image_size": 16,
        "model_args": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1], "norm_layer": "groupnorm1"},
    },
    "federation": {"rounds": 2},
    "trainer": {"accelerator": "cpu"},
    "tracking": {"wandb_mode": "disabled"},
    # a method's own client takes over what of this it has
    "model": {"class_path": "FedAvgClient", "init_args": {"continual": {"class_path": "NoReplay"}, **BUDGET}},
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the package warns of, which here is what is to be seen, off the screen."""
    log = logging.getLogger("fedlscl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def exchanging() -> list[str]:
    """The methods whose clients send something."""
    silent = {"Isolated"}
    found = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(METHODS.glob("*.yaml"))}
    return [name for name, content in found.items() if content["server"]["class_path"] not in silent]


def experiment(name: str, folder: Path, *more: str) -> Experiment:
    """The experiment of a method with `more` words; parsing takes longer than a run, so make it once, see `federation`.

    The words that name fields of its own come last, and count.
    """
    path = folder / "small.yaml"
    data = {**SETTING["data"], "cache_dir": str(folder / "cache")}
    path.write_text(yaml.safe_dump({**SETTING, "data": data}))
    words = ["--config", str(path), "--config", str(METHODS / f"{name}.yaml")]
    words += [f"--server.init_args.{field}={value}" for field, value in OF_SERVER.get(name, {}).items()]
    words += more
    made = Configuration(words).build()
    made.load()
    return made


def federation(described: Experiment, folder: Path) -> Federation:
    """A federation of objects of its own, in an empty folder."""
    kept: Any = None  # what makes Trainers holds the whole parser, and keeps nothing
    copied = deepcopy(replace(described, trainer=kept))
    return replace(copied, trainer=described.trainer, run_dir=folder).federation()


Change = Callable[[Upload, Mapping[int, Upload]], "Upload | bytes"]
"""What becomes of an upload, given the others' of the round so far; under -1 the attacker's own of the round before."""


class Hostile:
    """A transport on which one client's uploads are changed on their way.

    Args:
        transport: the way.
        federation: whose it is.
        client: who.
        change: how.
    """

    def __init__(self, federation: Federation, client: int, change: Change) -> None:
        self.transport, self.federation, self.client, self.change = federation.transport, federation, client, change
        self.sent: dict[int, Upload] = {}

    def ask(self, step: str, round: Round, messages: Mapping[int, bytes]) -> Iterator[Replied]:
        """As the transport."""
        return self.transport.ask(step, round, messages)

    def fit(
        self,
        round: Round,
        clients: Sequence[int],
        uploads: bool,
        callback: FederationCallback,
        masking: Mapping[int, bytes] | None = None,
    ) -> Iterator[Fitted]:
        """As the transport, but for the one."""
        self.sent = {-1: self.sent[self.client]} if self.client in self.sent else {}
        for fitted in self.transport.fit(round, clients, uploads, callback, masking):
            if fitted.upload is None:
                yield fitted
                continue
            schema = self.federation.template.model_of(fitted.client).upload_schema()
            try:
                upload = self.sent[fitted.client] = Upload.from_bytes(fitted.upload, schema)
            except MessageError:  # the federation's to say; what an attack has led to, perhaps
                yield fitted
                continue
            if fitted.client != self.client:
                yield fitted
                continue
            changed = self.change(upload, self.sent)
            yield fitted._replace(upload=changed if isinstance(changed, bytes) else changed.to_bytes())

    def answer(self, round: Round, client: int, message: bytes | None, accepted: bool) -> None:
        """As the transport."""
        self.transport.answer(round, client, message, accepted)

    def evaluate(self, round: Round, client: int) -> None:
        """As the transport."""
        self.transport.evaluate(round, client)

    def evaluations(self, round: Round) -> Mapping[int, Accuracy]:
        """As the transport."""
        return self.transport.evaluations(round)

    def cost(self, client: int) -> dict[str, int]:
        """As the transport."""
        return self.transport.cost(client)


def attacked(described: Experiment, folder: Path, client: int, change: Change) -> list[RoundResult]:
    """The rounds of a run in which a client's uploads are changed."""
    made = federation(described, folder)
    hostile: Transport = Hostile(made, client, change)
    made.transport = hostile
    return list(made.run())
