"""The federation (Fed-LSCL, Algorithm 1): for each task, for each round: clients fit, the server answers, all evaluate.

It knows the server and the messages, and nothing of any method or of where the clients are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from fedlscl import seeds
from fedlscl.evaluation import MASKS
from fedlscl.federation.site import Site
from fedlscl.federation.store import Store
from fedlscl.federation.trainer import StepCount
from fedlscl.federation.transport import Fitted, Transport
from fedlscl.federation.transport import Listener as ClientListener
from fedlscl.messages import Download, MessageError, Received, Upload
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Answers, Server

log = logging.getLogger(__name__)
MOST_SAID = 500  # characters on record of why a client is left out, of which a client may determine some


class Listener(ClientListener, Protocol):
    """Who wants to know what the federation does."""

    def serving(self, task: int, round: int) -> Logger | None:
        """The server begins to aggregate; returns where the metrics of its fits go."""

    def served(self, step: int, steps: float) -> None:
        """A fit of the server has done so many of its steps, infinitely many if nobody knows."""


@dataclass
class RoundResult:
    """One round: what was exchanged and how good every client's global model is now.

    `round` counts over all tasks; task and round are 1-based. Accuracies are in %, for each mask a list per client
    with a value for each task learned so far, NaN where a client could not be asked. Bytes are those of the serialised
    messages.
    """

    task: int
    round: int
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    accuracy: dict[str, list[list[float]]] = field(default_factory=lambda: {mask: [] for mask in MASKS})
    server: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Federation:
    """Everything that takes part in a run, on the server's side.

    Args:
        schedule: who takes part when.
        server: fuses what the clients send.
        site: what the clients' models and messages look like, and the server's own data.
        store: the server's state and the run's progress.
        transport: leads to the clients.
    """

    schedule: Schedule
    server: Server
    site: Site
    store: Store
    transport: Transport

    def __post_init__(self) -> None:
        """Check that all fits together, and tell the server what it will hear."""
        self.clients = self.site.clients
        self.schedule.check(self.clients)
        first, name = self.site.first, self.site.cnn.name_of(0)
        self.server.begin(first.upload_schema(), first.download_schema(), lambda: self.site.new_body(name))
        if self.server.public_images:
            self.server.hold(*self.site.data.public(self.server.public_images))
        self.setup_bytes = sum(tensor.nbytes for tensor in self.site.handout.values())

    def run(self, listener: Listener) -> Iterator[RoundResult]:
        """Algorithm 1 from the first round that `store` does not hold; commit the store after each result."""
        done = self.store.progress.get("round", 0)
        for round in self.schedule.after(done, self.site.data.split.spec.tasks, self.site.seed):
            result = RoundResult(round.task, round.number)
            uploads = Received()
            participants = self.schedule.participants(self.clients, round)
            with result.timed("fit"):
                for fitted in self.transport.fit(round, participants, self.server.listens, listener):
                    self._receive(fitted, result, uploads)
            if len(result.skipped) == len(participants):
                raise RuntimeError(f"no client finished round {round.number}: {result.skipped}")
            answers: Answers = {}
            if uploads:
                with result.timed("aggregate"):
                    answers = self._aggregate(uploads, round, listener)
            accepted = set(participants) - set(result.skipped)
            for index in range(self.clients):
                message = None
                if index in answers:
                    with result.timed("aggregate"):
                        message = Download(index, result.task, result.round, 0, answers[index]).to_bytes()
                    result.bytes_down[index] = len(message)
                with result.timed("evaluate"):
                    self.transport.answer(round, index, message, index in accepted)
            with result.timed("evaluate"):
                found = self.transport.evaluations(round)
            if not found and round.ends_task:
                raise RuntimeError(
                    f"no client has ended round {round.number}, the last of its task, so that nobody knows how good "
                    "the models are; start the run again to repeat the round"
                )
            for index in range(self.clients):
                for mask, by_client in result.accuracy.items():
                    by_client.append(found[index][mask] if index in found else [math.nan] * round.task)
            result.server = dict(self.server.metrics) if uploads else {}
            yield result

    def _receive(self, fitted: Fitted, result: RoundResult, uploads: Received) -> None:
        """Put an upload among the others; a client that sends what cannot be used is left out, the reason on record."""
        problem = fitted.problem
        if fitted.upload is not None and problem is None:
            try:
                self._take(fitted.client, fitted.upload, result, uploads)
            except MessageError as error:
                problem = f"{type(error).__name__}: {error}"
                log.warning("client %d is left out of round %d: %s", fitted.client, result.round, problem)
        if problem is not None:
            result.skipped[fitted.client] = problem[:MOST_SAID]

    def _take(self, client: int, message: bytes, result: RoundResult, uploads: Received) -> None:
        result.bytes_up[client] = len(message)
        schema = self.site.body(client).upload_schema()
        upload = Upload.from_bytes(message, schema)
        if (upload.client, upload.round) != (client, result.round):
            raise MessageError(f"upload claims to be of client {upload.client}, round {upload.round}")
        if upload.samples < 1:
            raise MessageError("upload claims that no sample is behind it")
        self.server.check(upload)
        uploads.add(client, self.store.put_aside(f"upload-{client}", message), schema)

    def _aggregate(self, uploads: Received, round: Round, listener: Listener) -> Answers:
        if (state := self.store.read("server")) is not None:
            self.server.load(state)
        logger = listener.serving(round.task, round.number)

        def trainer() -> Trainer:
            made = self.site.trainer(logger)
            made.callbacks.append(StepCount(listener.served))  # type: ignore[attr-defined]
            return made

        with seeds.seeded(self.site.seed, "aggregate", round.number):
            answers = self.server.aggregate(uploads, self.clients, round, trainer)
        if state := self.server.state():
            self.store.write("server", state)
        return answers

    def compute(self) -> dict[str, dict[str, int]]:
        """For the CNN of each name what a client with it trains and computes, see `Site.compute`; none if none says."""
        counts: dict[str, dict[str, int]] = {}
        for index in range(self.clients):
            name = self.site.cnn.name_of(index)
            if name not in counts and (found := self.transport.compute(index)):
                counts[name] = found
        return counts
