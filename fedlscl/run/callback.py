"""What a run notes of its federation: metrics, seconds, memory, and progress on the screen."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger

from fedlscl.evaluation import MASKS, FloatArray
from fedlscl.federation.callback import RoundResult
from fedlscl.run.console import FederationProgress, ProgressCallback
from fedlscl.run.summary import Accuracy
from fedlscl.run.tracking import ClientLogger, Tracker


class RunCallback(ProgressCallback):
    """Leads metrics to the tracker and progress to the screen, and stores what a summary needs beside the rounds.

    Args:
        tracker: gets the metrics.
        bar: shows progress.
        tasks: of the federation.
        rounds: of each task.
        progress: what the federation's store holds of earlier rounds.
    """

    def __init__(
        self, tracker: Tracker, bar: FederationProgress, tasks: int, rounds: int, progress: Mapping[str, Any]
    ) -> None:
        super().__init__(bar, rounds)
        self.tracker, self.tasks = tracker, tasks
        self.history = list(progress.get("history", []))
        self.seconds: dict[str, float] = dict(progress.get("seconds", {"total": 0.0}))
        self.memory = float(progress.get("memory", 0.0))
        self._since = time.perf_counter()

    def on_fit_start(self, task: int, round: int, client: int) -> Logger:
        """Also its metrics, which are those of the client."""
        super().on_fit_start(task, round, client)
        return ClientLogger(self.tracker, f"client/{client}", task=task, round=round)

    def on_aggregate_start(self, task: int, round: int) -> Logger:
        """Its metrics are those of the server."""
        return ClientLogger(self.tracker, "server", task=task, round=round)

    def on_round_end(self, result: RoundResult) -> None:
        """Log it, and note what it cost."""
        self.history.append(result.to_json())
        ends_task = result.round % self.rounds == 0
        record(self.tracker, result, accuracy_arrays(self.history, self.tasks, self.rounds) if ends_task else None)
        now = time.perf_counter()
        for phase, seconds in {**result.seconds, "total": now - self._since}.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self._since = now
        self.memory = max(self.memory, peak_memory_mib())

    def state_dict(self) -> dict[str, Any]:
        """Seconds, memory, and how far the tracker is, whose files are written before this counts."""
        return {
            "seconds": self.seconds,
            "memory": self.memory,
            "wandb_id": self.tracker.run_id,
            "metrics_bytes": self.tracker.flush(),
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


def record(tracker: Tracker, result: RoundResult, acc: Mapping[str, FloatArray] | None) -> None:
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
        metrics[f"eval/{mask}/mean"] = result.mean(mask)
    for mask, array in (acc or {}).items():
        metrics |= {f"task/{mask}/{name}": value for name, value in Accuracy.of(array).scalars.items()}
    tracker.log(metrics, task=result.task, round=result.round)


def peak_memory_mib() -> float:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
