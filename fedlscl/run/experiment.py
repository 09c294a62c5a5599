"""One run folder: a federation with its configuration, split, metrics, checkpoint, pictures and summary.

A run folder is continued where its checkpoint stands; whatever is in it was written completely or not at all.
"""

from __future__ import annotations

import fcntl
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import Logger
from rich.console import Console

from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.evaluation import MASKS, FloatArray, measured_mean, summarise
from fedlscl.federation.algorithm import Federation, RoundResult
from fedlscl.federation.site import MakeTrainer, Site
from fedlscl.federation.store import Store
from fedlscl.federation.transport import InProcess, Transport
from fedlscl.files import write_atomically
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run.console import FederationProgress, summary_table
from fedlscl.run.fields import short
from fedlscl.run.tracking import ClientLogger, Tracker, WandbMode
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


class ImpossibleRun(ValueError):
    """A run that cannot begin as configured; the text says which field is wrong and what would be right."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes.

    `config` is the whole configuration as plain values; it names the run and must be the same when a run goes on.
    `transport` makes what leads to the clients, by default those of this process.
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
    transport: Callable[[Site, Store], Transport] = InProcess

    def load(self) -> None:
        """Fetch and split the data, which must be there before anything else."""
        self.data.prepare_data()
        self.data.setup()

    def run(self, console: Console) -> dict[str, Any]:
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
                summary: dict[str, Any] = json.loads(finished.read_text())
                console.print("This run is finished; its numbers follow. Give another --run_dir to run it again.")
            else:
                summary = self._go_on(federation, tracker, console)
            summary_table(summary, console, picture=self.run_dir / PICTURE, run_dir=self.run_dir)
        return summary

    def _check_same_run(self) -> None:
        """Compare configuration and split with those that the run folder began with."""
        path = self.run_dir / "config.yaml"
        if path.exists() and (different := differences(short(yaml.safe_load(path.read_text())), self.config)):
            raise ValueError(
                f"run_dir '{self.run_dir}' holds a run with another configuration ({'; '.join(different)}); "
                "give another run_dir, or the same configuration to continue it"
            )
        path = self.run_dir / "split.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        for name, now in self._fingerprints.items():
            then = before.get(name)
            if now and then and now != then:
                raise ValueError(
                    f"{FINGERPRINTS[name]} are not those that the run in run_dir '{self.run_dir}' began with "
                    f"({now[:12]} now, {then[:12]} then); put the same in place, or give another run_dir"
                )

    def federation(self) -> Federation:
        """Everything that takes part, as far as the run folder's checkpoint has come."""
        store, site = Store(self.run_dir / "checkpoint"), self.site()
        return Federation(self.schedule, self.server, site, store, self.transport(site, store))

    def site(self) -> Site:
        """What the clients of this process need."""
        return Site(self.client, self.data, self.vit, self.cnn, self.seed, self.trainer)

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
        split = {
            **self._fingerprints,
            "data": self.data.dataset.name,
            "classes": list(self.data.class_names),
            "image_size": self.data.dataset.train.images.shape[-1],
            "split": json.loads(self.data.split.to_json()),
        }
        write_atomically(self.run_dir / "split.json", json.dumps(split).encode())
        write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False).encode())

    def _go_on(self, federation: Federation, tracker: Tracker, console: Console) -> dict[str, Any]:
        started = time.perf_counter()
        self._save_beginning()
        progress: dict[str, Any] = federation.store.progress or {
            "round": 0,
            "history": [],
            "seconds": {"total": 0.0},
            "memory": 0.0,
        }
        if progress["round"]:
            console.print(f"Continuing after round {progress['round']}.")
        tasks, rounds = self.data.split.spec.tasks, self.schedule.rounds
        taking_part = self.schedule.clients_per_round or len(self.data.split.clients)
        behind = progress["round"] * taking_part
        with FederationProgress(tasks, rounds, taking_part, completed=behind, console=console) as bar:
            listener = _Listener(tracker, bar, rounds)
            for result in federation.run(listener):
                progress["history"].append(asdict(result))
                progress["round"] = result.round
                acc = accuracy_arrays(progress["history"], tasks, rounds)
                _record(tracker, result, acc if result.round % rounds == 0 else None)
                now = time.perf_counter()
                for phase, seconds in {**result.seconds, "total": now - started}.items():
                    progress["seconds"][phase] = progress["seconds"].get(phase, 0.0) + seconds
                started = now
                progress["memory"] = max(progress["memory"], _peak_memory_mib())
                progress |= {"wandb_id": tracker.run_id, "metrics_bytes": tracker.flush()}
                federation.store.commit(progress)
                seen = _mean_of_clients(result.accuracy["seen"])
                left_out = f", without clients {sorted(result.skipped)}" if result.skipped else ""
                bar.round_done(
                    f"task {result.task}/{tasks}  round {(result.round - 1) % rounds + 1}/{rounds}  "
                    f"accuracy on the classes seen so far {seen:.1f} %{left_out}"
                )
        summary = self._summarise(progress, federation)
        self._draw(summary, progress["history"], tracker)
        tracker.summary({f"{mask}/{k}": v for mask in MASKS for k, v in _scalars(summary["accuracy"][mask]).items()})
        write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        return summary

    def _summarise(self, progress: Mapping[str, Any], federation: Federation) -> dict[str, Any]:
        history, clients = progress["history"], federation.clients
        acc = accuracy_arrays(history, self.data.split.spec.tasks, self.schedule.rounds)
        return {
            "method": self.method,
            "setting": self.setting,
            "seed": self.seed,
            "backbone": f"{self.vit.name}, {self.vit.source}, {self.vit.image_size} px",
            "cnn": self.cnn.name,
            "task_aware": list(self.client.task_aware),
            "evaluated_on": "test images" if self.data.split.evaluate_on == "test" else "images held out of training",
            **self._fingerprints,
            "accuracy": {mask: summarise(values) for mask, values in acc.items()},
            "bytes_up": _traffic([entry["bytes_up"] for entry in history], clients),
            "bytes_down": _traffic([entry["bytes_down"] for entry in history], clients),
            "bytes_setup_per_client": federation.setup_bytes,
            "compute": federation.compute(),
            "skipped": [
                {"round": entry["round"], "client": int(client), "reason": reason}
                for entry in history
                for client, reason in entry["skipped"].items()
            ],
            "seconds": progress["seconds"],
            "peak_memory_mib": progress["memory"],
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, {_device()}",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "config": dict(self.config),
        }

    def _draw(self, summary: Mapping[str, Any], history: list[dict[str, Any]], tracker: Tracker) -> None:
        from fedlscl.run import plots  # and with it matplotlib

        title = f"{self.method} on {self.setting}, seed {self.seed}"
        plots.accuracy_over_rounds(history, self.run_dir / PICTURE, title=title)
        tracker.image("accuracy_over_rounds", self.run_dir / PICTURE)
        for mask in MASKS:
            path = self.run_dir / f"accuracy_matrix_{mask}.png"
            matrix = summary["accuracy"][mask]["matrix"]
            plots.accuracy_matrix(matrix, path, f"{title}, mask {mask}")
            tracker.image(f"accuracy_matrix/{mask}", path)
            tasks = len(matrix[0])
            rows = [[client, after + 1, *row] for client, rows in enumerate(matrix) for after, row in enumerate(rows)]
            tracker.table(f"accuracy/{mask}", ["client", "after task", *(f"task {n + 1}" for n in range(tasks))], rows)


@dataclass
class _Listener:
    tracker: Tracker
    bar: FederationProgress
    rounds: int

    def visiting(self, task: int, round: int, client: int) -> Logger:
        self.bar.update(task, (round - 1) % self.rounds + 1, client)
        return ClientLogger(self.tracker, f"client/{client}", task=task, round=round)

    def visited(self) -> None:
        self.bar.advance()

    def serving(self, task: int, round: int) -> Logger:
        return ClientLogger(self.tracker, "server", task=task, round=round)

    def served(self, step: int, steps: float) -> None:
        self.bar.serve(step, steps)


def accuracy_arrays(history: list[dict[str, Any]], tasks: int, rounds: int) -> dict[str, FloatArray]:
    """For each mask the accuracy (clients, after task, on task) in %, of the last round of every finished task."""
    arrays = {}
    for mask in MASKS:
        clients = len(history[0]["accuracy"][mask])
        arrays[mask] = np.full((clients, tasks, tasks), np.nan)
        for entry in history:
            if entry["round"] % rounds == 0:
                for client, values in enumerate(entry["accuracy"][mask]):
                    arrays[mask][client, entry["task"] - 1, : len(values)] = values
    return arrays


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two configurations differ, as text."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} there, {after} now")
    return found


def _record(tracker: Tracker, result: RoundResult, acc: Mapping[str, FloatArray] | None) -> None:
    """Log one round; `acc` once a task is finished."""
    metrics: dict[str, float] = {f"server/{name}": value for name, value in result.server.items()}
    metrics |= {f"server/seconds/{phase}": seconds for phase, seconds in result.seconds.items()}
    metrics |= {f"client/{client}/bytes_up": count for client, count in result.bytes_up.items()}
    metrics |= {f"client/{client}/bytes_down": count for client, count in result.bytes_down.items()}
    metrics |= {f"client/{client}/skipped": 1 for client in result.skipped}
    for mask, by_client in result.accuracy.items():
        for client, values in enumerate(by_client):
            metrics |= {
                f"eval/{mask}/client/{client}/task/{n + 1}": value
                for n, value in enumerate(values)
                if not math.isnan(value)  # a client that could not be asked
            }
        metrics[f"eval/{mask}/mean"] = _mean_of_clients(by_client)
    for mask, array in (acc or {}).items():
        metrics |= {f"task/{mask}/{name}": value for name, value in _scalars(summarise(array)).items()}
    tracker.log(metrics, task=result.task, round=result.round)


def _mean_of_clients(accuracies: list[list[float]]) -> float:
    return float(measured_mean(measured_mean(accuracies, 1), 0))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers among the metrics of one mask, with the newest entry of Table 1."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    return numbers | {"table1": metrics["table1"][-1]}


def _traffic(rounds: list[dict[int, int]], clients: int) -> dict[str, Any]:
    """Bytes in all, by client, on average, and for each round and client (None where nothing was sent)."""
    by_round = [[entry.get(client, entry.get(str(client))) for client in range(clients)] for entry in rounds]  # type: ignore[call-overload]
    sent = [count for row in by_round for count in row if count is not None]
    return {
        "per_client_round": sum(sent) / len(sent) if sent else 0.0,
        "total": sum(sent),
        "by_client": [sum(row[client] or 0 for row in by_round) for client in range(clients)],
        "by_round": by_round,
    }


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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
