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
from fedlscl.run.tracking import ClientLogger, Tracker
from fedlscl.server import Total


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
    ) -> None:
        super().__init__(bar, rounds)
        self.tracker, self.tasks, self.files, self.received = tracker, tasks, files, received
        self.history = list(progress.get("history", []))
        self.seconds: dict[str, float] = dict(progress.get("seconds", {"total": 0.0}))
        self.memory = float(progress.get("memory", 0.0))
        self._since = time.perf_counter()

    def on_fit_start(self, task: int, round: int, client: int) -> Logger:
        """Also its metrics, which are those of the client."""
        super().on_fit_start(task, round, client)
        return ClientLogger(self.tracker, f"client/{client}", task=task, round=round)

    def on_received(self, task: int, round: int, sent: Received | Total) -> None:
        """Keep it, if that is wanted."""
        if self.received is not None:
            keep(self.received, task, round, sent)

    def on_aggregate_start(self, task: int, round: int) -> Logger:
        """Its metrics are those of the server."""
        return ClientLogger(self.tracker, "server", task=task, round=round)

    def on_round_end(self, result: RoundResult) -> None:
        """Log it, and note what it cost."""
        self.history.append(result.to_json())
        self.tracker.log(measured(self.history, self.tasks, self.rounds), task=result.task, round=result.round)
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


def measured(history: list[dict[str, Any]], tasks: int, rounds: int) -> dict[str, float]:
    """What is logged at the end of the last round of a history, by name."""
    result = RoundResult.from_json(history[-1])
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
        metrics[f"eval/{mask}/mean"] = result.mean(mask)
    if result.round % rounds == 0:
        for mask, array in accuracy_arrays(history, tasks, rounds).items():
            metrics |= {f"task/{mask}/{name}": value for name, value in Accuracy.of(array).scalars.items()}
    return metrics


def known(history: list[dict[str, Any]], tasks: int, rounds: int) -> Iterator[tuple[dict[str, float], int, int]]:
    """What was logged at the end of each round, with its task and its number."""
    for until, entry in enumerate(history, 1):
        yield measured(history[:until], tasks, rounds), entry["task"], entry["round"]


def peak_memory_mib() -> float:
    """The most memory that this process has had, in MiB; 0 on a system that does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
