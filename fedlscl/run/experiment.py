"""One run folder: a federation with its configuration, split, metrics, checkpoint, pictures and summary.

A run folder is continued where its checkpoint stands; whatever is in it was written completely or not at all.
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.store import Store
from fedlscl.federation.template import MakeTrainer, Template
from fedlscl.federation.transport import InProcess, Transport
from fedlscl.files import write_atomically
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.callback import RunCallback, accuracy_arrays
from fedlscl.run.console import FederationProgress, summary_table
from fedlscl.run.fields import read_json, read_yaml, short
from fedlscl.run.summary import Accuracy, Compute, Skipped, Summary, Traffic
from fedlscl.run.tracking import Tracker, WandbMode
from fedlscl.schedule import Schedule
from fedlscl.server import Server

PACKAGES = ("fedlscl", "torch", "lightning", "torchvision", "timm", "torchmetrics", "numpy", "wandb")
PICTURE = "accuracy_over_rounds.png"
FINGERPRINTS = {  # of what can be other than it was under a configuration that is the same
    "split_sha256": "the images' classes, or how they are split,",
    "data_sha256": "the images",
    "weights_sha256": "the foundation model's weights",
}


@dataclass(frozen=True)
class Tracking:
    """Where the metrics go besides the run folder.

    Args:
        wandb_mode: auto is online for a user who is logged in to W&B, and offline otherwise; nothing ever asks.
        project: W&B project.
    """

    wandb_mode: WandbMode = "auto"
    project: str = "fedlscl"


NOT_SET = "not set"
"""What a difference says where one of two configurations, of another version perhaps, lacks a field."""


class ImpossibleRun(ValueError):
    """A run that cannot begin as configured; the text says which field is wrong and what would be right."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes.

    `config` is the whole configuration as plain values; it names the run and must be the same when a run goes on.
    `transport` makes what leads to the clients, by default those of this process. `overrides` is what the command line
    gave beyond its configuration files, by dotted name; it is noted in the summary and decides nothing.
    """

    setting: str
    method: str
    seed: int
    config: Mapping[str, Any]
    run_dir: Path
    schedule: Schedule
    client: Client
    server: Server
    data: FederatedDataModule
    vit: FrozenViT
    cnn: SmallModelSpec
    trainer: MakeTrainer
    tracking: Tracking
    transport: Callable[[Template, Store], Transport] = InProcess
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Fetch and split the data, which must be there before anything else."""
        self.data.prepare_data()
        self.data.setup()

    def run(self, console: Console) -> Summary:
        """Run or continue the federation.

        Returns:
            What `summary.json` holds.

        Raises:
            ImpossibleRun: the configuration is impossible, or the run folder belongs to another one or is in use.
        """
        with ExitStack() as stack:
            finished = self.run_dir / "summary.json"
            try:
                stack.enter_context(_locked(self.run_dir))
                self._check_same_run()
                if not finished.exists():
                    federation = self.federation()
                    tracker = stack.enter_context(self._tracker(federation.store.progress))
            except (ValueError, OSError) as error:
                raise ImpossibleRun(str(error)) from error
            if finished.exists():
                summary = Summary.read(finished)
                console.print("This run is finished; its numbers follow. Give another --run_dir to run it again.")
            else:
                summary = self._go_on(federation, tracker, console)
            summary_table(summary, console, picture=self.run_dir / PICTURE, run_dir=self.run_dir)
        return summary

    def _check_same_run(self) -> None:
        """Compare configuration and split with those that the run folder began with."""
        path = self.run_dir / "config.yaml"
        before = read_yaml(path) if path.exists() else self.config
        if not isinstance(before, Mapping):
            raise ValueError(f"{path} is no configuration: it was cut short or changed; give another run_dir")
        if different := differences(short(before), self.config):
            raise ValueError(
                f"run_dir '{self.run_dir}' holds a run with another configuration ({'; '.join(different)}); "
                "give another run_dir, or the same configuration to continue it"
            )
        path = self.run_dir / "split.json"
        before = read_json(path) if path.exists() else {}
        for name, now in self._fingerprints.items():
            then = before.get(name)
            if now and then and now != then:
                raise ValueError(
                    f"{FINGERPRINTS[name]} are not those that the run in run_dir '{self.run_dir}' began with "
                    f"({now[:12]} now, {then[:12]} then); put the same in place, or give another run_dir"
                )

    def federation(self) -> Federation:
        """Everything that takes part, as far as the run folder's checkpoint has come."""
        store, template = Store(self.run_dir / "checkpoint"), self.template()
        return Federation(self.schedule, self.server, template, store, self.transport(template, store))

    def template(self) -> Template:
        """What all clients are like."""
        return Template(self.client, self.data, self.vit, self.cnn, self.seed, self.trainer)

    def _tracker(self, progress: Mapping[str, Any]) -> Tracker:
        return Tracker(
            self.run_dir,
            wandb_mode=self.tracking.wandb_mode,
            project=self.tracking.project,
            name=self.run_dir.name,
            config=self.config,
            run_id=progress.get("wandb_id"),
            metrics_bytes=progress.get("metrics_bytes"),
        )

    @property
    def _fingerprints(self) -> dict[str, str | None]:
        """One for each of `FINGERPRINTS`, None where there is none to take."""
        return {
            "split_sha256": self.data.split_sha256,
            # of a part of the data nobody could tell whether it is the same data
            "data_sha256": self.data.dataset.sha256 if self.data.dataset.complete else None,
            "weights_sha256": self.vit.weights_sha256,
        }

    def _save_beginning(self) -> None:
        """Write what names the run: its configuration and its split."""
        for path in self.run_dir.glob(".*.tmp"):
            path.unlink()  # a killed process had begun to write it
        split = {
            **self._fingerprints,
            "data": self.data.dataset.name,
            "classes": list(self.data.class_names),
            "image_size": self.data.dataset.train.images.shape[-1],
            "split": json.loads(self.data.split.to_json()),
        }
        write_atomically(self.run_dir / "split.json", json.dumps(split).encode())
        write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False).encode())

    def _go_on(self, federation: Federation, tracker: Tracker, console: Console) -> Summary:
        self._save_beginning()
        behind = len(federation.history)
        if behind:
            console.print(f"Continuing after round {behind}.")
        tasks, rounds = self.data.split.spec.tasks, self.schedule.rounds
        taking_part = self.schedule.clients_per_round or len(self.data.split.clients)
        with FederationProgress(tasks, rounds, taking_part, completed=behind * taking_part, console=console) as bar:
            callback = RunCallback(tracker, bar, tasks, rounds, federation.store.progress)
            for result in federation.run(callback):
                bar.round_done(callback.in_a_line(result))
        progress = federation.store.progress
        summary = self._summarise(progress, federation)
        self._draw(summary, progress["history"], tracker)
        tracker.summary({f"{mask}/{k}": v for mask in MASKS for k, v in summary.accuracy[mask].scalars.items()})
        summary.write(self.run_dir / "summary.json")
        return summary

    def _summarise(self, progress: Mapping[str, Any], federation: Federation) -> Summary:
        history, clients = progress["history"], federation.clients
        acc = accuracy_arrays(history, self.data.split.spec.tasks, self.schedule.rounds)
        fingerprints = self._fingerprints
        return Summary(
            method=self.method,
            setting=self.setting,
            seed=self.seed,
            backbone=f"{self.vit.name}, {self.vit.source}, {self.vit.image_size} px",
            cnn=self.cnn.name if isinstance(self.cnn.name, str) else tuple(self.cnn.name),
            task_aware=tuple(self.client.task_aware),
            evaluated_on="test images" if self.data.split.evaluate_on == "test" else "images held out of training",
            split_sha256=self.data.split_sha256,
            data_sha256=fingerprints["data_sha256"],
            weights_sha256=fingerprints["weights_sha256"],
            accuracy={mask: Accuracy.of(values) for mask, values in acc.items()},
            bytes_up=_traffic([entry["bytes_up"] for entry in history], clients),
            bytes_down=_traffic([entry["bytes_down"] for entry in history], clients),
            bytes_setup_per_client=federation.setup_bytes,
            compute={name: Compute(**counts) for name, counts in federation.cost().items()},
            skipped=tuple(
                Skipped(entry["round"], int(client), reason)
                for entry in history
                for client, reason in entry["skipped"].items()
            ),
            seconds=progress["seconds"],
            peak_memory_mib=progress["memory"],
            threads=torch.get_num_threads(),
            machine=f"{platform.system()} {platform.machine()}, {_device()}",
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            config=dict(self.config),
            overrides=dict(self.overrides),
        )

    def _draw(self, summary: Summary, history: list[dict[str, Any]], tracker: Tracker) -> None:
        from fedlscl.run import plots  # and with it matplotlib

        title = f"{self.method} on {self.setting}, seed {self.seed}"
        plots.accuracy_over_rounds(history, self.run_dir / PICTURE, title=title)
        tracker.image("accuracy_over_rounds", self.run_dir / PICTURE)
        for mask in MASKS:
            path = self.run_dir / f"accuracy_matrix_{mask}.png"
            matrix = summary.accuracy[mask].matrix
            plots.accuracy_matrix(matrix, path, f"{title}, mask {mask}")
            tracker.image(f"accuracy_matrix/{mask}", path)
            tasks = len(matrix[0])
            rows = [[client, after + 1, *row] for client, rows in enumerate(matrix) for after, row in enumerate(rows)]
            tracker.table(f"accuracy/{mask}", ["client", "after task", *(f"task {n + 1}" for n in range(tasks))], rows)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as text."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)  # null is as good as nothing
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {old.get(key, NOT_SET)} there, {new.get(key, NOT_SET)} now")
    return found


def _traffic(rounds: list[dict[int, int]], clients: int) -> Traffic:
    """The bytes of each round by client, whose index is text once the checkpoint was read."""
    return Traffic.of(
        [[entry.get(client, entry.get(str(client))) for client in range(clients)] for entry in rounds]  # type: ignore[call-overload]
    )


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    # another vector unit rounds differently, which a small model's training amplifies
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"run_dir '{folder}' is in use by another process; wait for it or give another run_dir"
            ) from error
        yield
