"""A federation small enough to be run in seconds: synthetic images, a two-block ViT and a narrow ResNet."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlscl import seeds
from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.continual import Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Dataset, ImageSet, Source
from fedlscl.data.splits import SplitSpec
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.store import Store, client_name
from fedlscl.federation.template import Template
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.federation.transport import InProcess
from fedlscl.messages import Message
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Isolated, Server

SPLIT: dict[str, Any] = {
    "clients": 3,
    "tasks": 2,
    "classes_per_task": 2,
    "private_classes": 2,
    "public_classes": 2,
    "min_public_images": 3,
}
VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "image_size": 16,
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
CNN: dict[str, Any] = {
    "name": "resnet18",
    "features": 16,
    "image_size": 16,
    "model_args": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]},
}
CLIENT: dict[str, Any] = {"epochs": 1, "batch_size": 8, "buffer_size": 3}


class Patterns(Source):
    """8x8 images of a pattern per class under noise, never the same image twice."""

    def __init__(self, classes: int = 8, train: int = 12, test: int = 4, seed: int = 0) -> None:
        self.classes, self.train, self.test, self.seed = classes, train, test, seed

    def load(self, cache_dir: Path) -> Dataset:
        rng = np.random.default_rng(self.seed)
        patterns = rng.integers(0, 256, (self.classes, 3, 8, 8))

        def draw(count: int) -> ImageSet:
            labels = rng.permutation(np.repeat(np.arange(self.classes), count))
            noisy = patterns[labels] + rng.normal(0, 30, (len(labels), 3, 8, 8))
            return ImageSet(np.clip(noisy, 0, 255).astype(np.uint8), labels.astype(np.int64))

        train, test = draw(self.train), draw(self.test)
        return Dataset("patterns", train, test, tuple(f"pattern {n}" for n in range(self.classes)))


class Recorder(FederationCallback):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.visits: list[tuple[int, int, int]] = []
        self.turns = 0
        self.served_rounds: list[tuple[int, int]] = []
        self.steps: list[tuple[int, float]] = []

    def on_fit_start(self, task: int, round: int, client: int) -> None:
        self.visits.append((task, round, client))

    def on_fit_end(self) -> None:
        self.turns += 1

    def on_aggregate_start(self, task: int, round: int) -> None:
        self.served_rounds.append((task, round))

    def on_aggregate_step(self, step: int, steps: float) -> None:
        self.steps.append((step, steps))


def make_trainer(logger: Any = None) -> RoundTrainer:
    trainer = RoundTrainer("cpu")
    trainer.logger = logger
    return trainer


def make_data(cache: Path, **changes: Any) -> FederatedDataModule:
    """The tiny data, split by seed 0; `changes` are fields of the split."""
    spec = SplitSpec(**{**SPLIT, **changes})
    data = FederatedDataModule(Patterns(), spec, seed=0, cache_dir=str(cache))
    data.setup()
    return data


def make_vit() -> FrozenViT:
    with seeds.seeded(0, "vit"):
        return FrozenViT(**VIT)


def make_client(kind: type[Client] = FedLSCL, **changes: Any) -> Client:
    """Settings of a client; FedLSCL adapts the second of the two blocks."""
    own = {"block": 1, "rank": 2} if issubclass(kind, FedLSCL) else {}
    return kind(**{"continual": Replay(passes=1), **CLIENT, **own, **changes})


def make_federation(
    folder: Path,
    data: FederatedDataModule,
    vit: FrozenViT,
    client: Client | None = None,
    server: Server | None = None,
    rounds: int = 1,
    clients_per_round: int | None = None,
    seed: int = 0,
    cnn: Mapping[str, Any] = CNN,
    **secure: Any,
) -> Federation:
    client = client or make_client()
    server = server or (ExactO2D() if isinstance(client, FedLSCL) else Isolated())
    template, store = Template(client, data, vit, SmallModelSpec(**cnn), seed, make_trainer, server), Store(folder)
    schedule = Schedule(rounds, clients_per_round, **secure)
    return Federation(schedule, template, store, InProcess(template, store))


def fresh(experiment: Experiment) -> Experiment:
    """The same experiment of objects of its own, as if its words had been parsed again, which takes much longer."""
    made: Any = None  # it makes new Trainers and keeps nothing, but holds the whole parser
    return replace(deepcopy(replace(experiment, trainer=made)), trainer=experiment.trainer)


class Known(Configuration):
    """A configuration that is parsed and built once for the same words.

    Both take longer than a round does here, and every node of a federation on Flower asks for the same.
    """

    def __new__(cls, words: Sequence[str]) -> Known:
        return known(tuple(words))

    def __init__(self, words: Sequence[str]) -> None:
        """All is there."""

    def build(self) -> Experiment:
        return fresh(self.built)

    @cached_property
    def built(self) -> Experiment:
        return super().build()


@cache
def known(words: tuple[str, ...]) -> Known:
    made = object.__new__(Known)
    Configuration.__init__(made, words)
    return made


def run(federation: Federation, callback: FederationCallback | None = None) -> list[RoundResult]:
    """All rounds that are left."""
    return list(federation.run(callback))


def outcome(results: list[RoundResult]) -> list[Any]:
    """Everything of some rounds but their seconds."""
    return [(r.task, r.round, r.bytes_up, r.bytes_down, r.skipped, r.accuracy, r.server) for r in results]


def restore_client(federation: Federation, index: int) -> Any:
    """A client in its last state; of the class that the federation was given."""
    assert isinstance(federation.transport, InProcess)
    worker, state = federation.transport.worker, federation.store.read(client_name(index))
    return worker.restore(index, state, federation.template.start_message(index) if state is None else None)


def fit(body: Client, task: int, round: int, seed: int = 0) -> None:
    """One client's round, without a server."""
    body.begin_round(Round(task, round, False, seed))
    with seeds.seeded(seed, "fit", body.index, round):
        make_trainer().fit(body)


def train_images(body: FedLSCL, indices: Tensor) -> tuple[Tensor, Tensor]:
    return body.data.batch("train", indices)


def output_of(body: Client, images: Tensor) -> Output:
    """The forward pass on uint8 images, nothing of it computed before."""
    output: Output = body(images, body.precompute(images))
    return output


def outputs(body: FedLSCL, indices: Tensor) -> dict[str, Tensor]:
    """What `generate` gives now on training images, in evaluation mode."""
    body.eval()
    with torch.no_grad():
        return {name: value.clone() for name, value in body.generate(train_images(body, indices)[0]).items()}


def task_images(body: FedLSCL, *tasks: int) -> Tensor:
    return torch.cat([torch.as_tensor(body.data.tasks[task - 1].train) for task in tasks])


def parameters(body: Client) -> dict[str, Tensor]:
    """A copy of all that is trained."""
    return copy_of(dict(body.named_parameters()))


def copy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that stay what they are."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two groups of tensors are equal to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def contents(wire: list[tuple[Message, bytes]], kind: type[Message] = Message) -> dict[Any, Any]:
    """What was sent, to the last bit; the order of a message's metadata is not part of it."""
    return {
        (m.kind, m.client, m.round): (
            m.task,
            m.samples,
            len(data),
            {name: (t.dtype, t.shape, t.contiguous().numpy().tobytes()) for name, t in m.tensors.items()},
        )
        for m, data in wire
        if isinstance(m, kind)
    }


def rows(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lasting(summary: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on time or place; a place that has a part of the data knows no fingerprint of the whole."""
    elsewhere = ("seconds", "peak_memory_mib", "data_sha256", "tested_pairs", "untrained_pairs")
    return {name: value for name, value in summary.items() if name not in elsewhere}


def lasting_rows(run_dir: Path) -> list[dict[str, str]]:
    return [row for row in rows(run_dir) if not row["metric"].startswith("server/seconds/")]


# A setting for the command line, without model and server
SETTING: dict[str, Any] = {
    "setting": "tiny",
    "seed_everything": 7,
    "data": {"source": {"class_path": "helpers.Patterns", "init_args": {"classes": 11}}, "split": SPLIT},
    "backbone": {**VIT, "model_args": {**VIT["model_args"], "depth": 4}},
    "cnn": CNN,
    "federation": {"rounds": 2},
    "trainer": {"accelerator": "cpu"},
    "tracking": {"wandb_mode": "disabled"},
}
