"""What a round gave, and who hears of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger

from fedlscl.evaluation import MASKS, measured_mean
from fedlscl.messages import Received
from fedlscl.server import Total


@dataclass
class RoundResult:
    """One round: what was exchanged and how good every client's global model is now.

    `round` counts over all tasks; task and round are 1-based. Accuracies are in %, for each mask a list per client
    with a value for each task learned so far, NaN where a client could not be asked. Bytes are those of the serialised
    messages. `unanswered` says of each client that kept its model, since there was no answer to it that could be used,
    why. Seconds are those of the phases `fit`, `aggregate`, `download` and `evaluate`.
    """

    task: int
    round: int
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    accuracy: dict[str, list[list[float]]] = field(default_factory=lambda: {mask: [] for mask in MASKS})
    server: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def mean(self, mask: str) -> float:
        """The accuracy in % under a mask: the mean over clients of the mean over the tasks learned so far."""
        return float(measured_mean(measured_mean(self.accuracy[mask], 1), 0))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RoundResult:
        """The reverse of `to_json`, also after JSON has made texts of the clients' numbers."""
        by_client = ("bytes_up", "bytes_down", "skipped", "unanswered")
        numbered = {name: {int(c): v for c, v in values[name].items()} for name in by_client if name in values}
        return cls(**{**values, **numbered})


class FederationCallback:
    """Hears what a federation does; each method does nothing here. As in Lightning, a subclass overrides some."""

    def on_fit_start(self, task: int, round: int, client: int) -> Logger | None:
        """A client's fit begins; returns where its metrics go."""
        return None

    def on_fit_end(self) -> None:
        """A client's turn is over, in whatever way."""

    def on_received(self, task: int, round: int, sent: Received | Total) -> None:
        """The server has what clients sent, or the sums of it, and has done nothing with it yet."""

    def on_aggregate_start(self, task: int, round: int) -> Logger | None:
        """The server begins to aggregate; returns where the metrics of its fits go."""
        return None

    def on_aggregate_step(self, step: int, steps: float) -> None:
        """A fit of the server has done so many of its steps, infinitely many if nobody knows."""

    def on_round_end(self, result: RoundResult) -> None:
        """A round is over, and about to be written to the store."""

    def state_dict(self) -> dict[str, Any]:
        """What of this callback is to be stored with the round, as plain values under names of its own."""
        return {}
