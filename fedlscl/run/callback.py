"""What a run notes of its federation: metrics, seconds, memory, and progress on the screen."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger

from fedlscl.evaluation import MASKS, FloatArray
from fedlscl.federation.callback import RoundResult
from fedlscl.messages import Received
from fedlscl.run.console import FederationProgress, ProgressCallback
from fedlscl.run.received import keep
from fedlscl.run.summary import Accuracy
from fedlscl.run.tracking import ClientLogger, OfClients, Tracker
from fedlscl.server import Total

FEWEST = 3
"""Clients behind a mean that is recorded in their place: mean and deviation of two are the two numbers."""


class RunCallback(ProgressCallback):
    """Leads metrics to the tracker and progress to the screen, and stores what a summary needs beside the rounds.

    Args:
        tracker: gets the metrics.
        bar: shows progress.
        tasks: of the federation.
        rounds: of each task.
        progress: what the federation's store holds of earlier rounds.
        files: the checksums of the files with which the run began, by name.
        received: the run folder, if what the server receives is to be kept there.
        clients: what is recorded of single clients.
        trained: whether that is to be had of their training.
    """

    def __init__(
        self,
        tracker: Tracker,
        bar: FederationProgress,
        tasks: int,
        rounds: int,
        progress: Mapping[str, Any],
        files: Mapping[str, str],
        received: Path | None = None,
        clients: OfClients = "all",
        trained: bool = True,
    ) -> None:
        super().__init__(bar, rounds)
        self.clients, self.trained = clients, trained
        self._logged: dict[int, dict[str, float]] = {}  # in this round, by client
        self.tracker, self.tasks, self.files, self.received = tracker, tasks, files, received
        self.history = list(progress.get("history", []))
        self.seconds: dict[str, float] = dict(progress.get("seconds", {"total": 0.0}))
        self.memory = float(progress.get("memory", 0.0))
        self._since = time.perf_counter()

    def on_fit_start(self, task: int, round: int, client: int) -> Logger | None:
        """Also its metrics, which are those of the client."""
        super().on_fit_start(task, round, client)
        if self.clients == "all":
            return ClientLogger(self.tracker, f"client/{client}", task=task, round=round)
        return _Kept(self._logged.setdefault(client, {})) if self.trained else None

    def on_received(self, task: int, round: int, sent: Received | Total) -> None:
        """Keep it, if that is wanted."""
        if self.received is not None:
            keep(self.received, task, round, sent)

    def on_aggregate_start(self, task: int, round: int) -> Logger:
        """Its metrics are those of the server."""
        return ClientLogger(self.tracker, "server", task=task, round=round)

    def on_round_end(self, result: RoundResult) -> None:
        """Log it, and note what it cost."""
        super().on_round_end(result)
        self.history.append(result.to_json())
        metrics = {
            **together(self._logged, "clients/"),
            **measured(self.history, self.tasks, self.rounds, self.clients),
        }
        self.tracker.log(metrics, task=result.task, round=result.round)
        self._logged = {}
        now = time.perf_counter()
        for phase, seconds in {**result.seconds, "total": now - self._since}.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self._since = now
        self.memory = max(self.memory, peak_memory_mib())

    def state_dict(self) -> dict[str, Any]:
        """Seconds, memory, and what the run's files are, which are written before this counts."""
        return {
            "seconds": self.seconds,
            "memory": self.memory,
            "wandb_id": self.tracker.run_id,
            "metrics_bytes": self.tracker.flush(),
            "metrics_sha256": self.tracker.metrics_sha256,
            "files": dict(self.files),
        }

    def in_a_line(self, result: RoundResult) -> str:
        """What is said of a round."""
        seen = result.mean("seen")
        left_out = f", without clients {sorted(result.skipped)}" if result.skipped else ""
        return (
            f"task {result.task}/{self.tasks}  round {(result.round - 1) % self.rounds + 1}/{self.rounds}  "
            f"accuracy on the classes seen so far {seen:.1f} %{left_out}"
        )


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


class _Kept(Logger):
    """Keeps what a fit logs."""

    name, version = "client", ""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__()
        self._values = values

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._values |= {name: float(value) for name, value in metrics.items() if name != "epoch"}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def together(by_client: Mapping[int, Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Mean and sample deviation over clients of each number that at least `FEWEST` of them have, by name.

    Args:
        by_client: the numbers of each client.
        prefix: put before each name.
    """
    values: dict[str, list[float]] = {}
    for _, numbers in sorted(by_client.items()):  # in whatever order they came: the last bits depend on it
        for name, value in numbers.items():
            values.setdefault(name, []).append(value)
    found = {}
    for name, of in values.items():
        if len(of) >= FEWEST:
            mean = math.fsum(of) / len(of)
            found[f"{prefix}{name}/mean"] = mean
            found[f"{prefix}{name}/deviation"] = math.sqrt(math.fsum((v - mean) ** 2 for v in of) / (len(of) - 1))
    return found


def measured(history: list[dict[str, Any]], tasks: int, rounds: int, clients: OfClients = "all") -> dict[str, float]:
    """What is logged at the end of the last round of a history, by name; of single clients what `clients` says."""
    result = RoundResult.from_json(history[-1])
    metrics: dict[str, float] = {f"server/{name}": value for name, value in result.server.items()}
    metrics |= {f"server/seconds/{phase}": seconds for phase, seconds in result.seconds.items()}
    for name, counts in (
        ("bytes_up", result.bytes_up),
        ("bytes_down", result.bytes_down),
        ("skipped", dict.fromkeys(result.skipped, 1)),
    ):
        metrics |= _of_clients({client: {name: count} for client, count in counts.items()}, "", clients)
    for mask, accuracies in result.accuracy.items():
        found = {
            client: {f"task/{n + 1}": value for n, value in enumerate(values) if not math.isnan(value)}
            for client, values in enumerate(accuracies)  # without those of a client that could not be asked
        }
        metrics |= _of_clients(found, f"eval/{mask}/", clients)
        metrics[f"eval/{mask}/mean"] = result.mean(mask)
    if result.round % rounds == 0:
        for mask, array in accuracy_arrays(history, tasks, rounds).items():
            metrics |= {f"task/{mask}/{name}": value for name, value in Accuracy.of(array).scalars.items()}
    return metrics


def _of_clients(by_client: Mapping[int, Mapping[str, float]], prefix: str, clients: OfClients) -> dict[str, float]:
    """What is recorded of numbers that each client has."""
    if clients == "all":
        return {f"{prefix}client/{k}/{name}": value for k, found in by_client.items() for name, value in found.items()}
    return together(by_client, f"{prefix}clients/") if clients == "aggregate" else {}


def known(
    history: list[dict[str, Any]], tasks: int, rounds: int, clients: OfClients = "all"
) -> Iterator[tuple[dict[str, float], int, int]]:
    """What was logged at the end of each round, with its task and its number."""
    for until, entry in enumerate(history, 1):
        yield measured(history[:until], tasks, rounds, clients), entry["task"], entry["round"]


def peak_memory_mib() -> float:
    """The most memory that this process has had, in MiB; 0 on a system that does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
