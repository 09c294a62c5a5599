"""The federation (Fed-LSCL, Algorithm 1): for each task, for each round: clients fit, the server answers, all evaluate.

It knows the server and the messages, and nothing of any method or of where the clients are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer

from fedlscl import seeds
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.store import Store
from fedlscl.federation.template import Template
from fedlscl.federation.trainer import StepCount
from fedlscl.federation.transport import Fitted, Transport
from fedlscl.messages import Download, MessageError, Received, Upload
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Answers, Context, Metrics, Server

log = logging.getLogger(__name__)
MOST_SAID = 500  # characters on record of why a client is left out, of which a client may determine some


class NobodyLeft(RuntimeError):
    """A round that no client has taken part in to its end."""


@dataclass
class Federation:
    """Everything that takes part in a run, on the server's side.

    Args:
        schedule: who takes part when.
        server: fuses what the clients send.
        template: what the clients' models and messages look like, and the server's own data.
        store: the server's state and the run's progress.
        transport: leads to the clients.
    """

    schedule: Schedule
    server: Server
    template: Template
    store: Store
    transport: Transport

    def __post_init__(self) -> None:
        """Check that all fits together, and tell the server what it will hear."""
        self.clients = self.template.clients
        self.schedule.check(self.clients)
        first, name = self.template.first, self.template.cnn.name_of(0)
        self.server.begin(first.upload_schema(), first.download_schema(), lambda: self.template.new_model(name))
        if self.server.server_images:
            self.server.hold(*self.template.data.server_images(self.server.server_images))
        self.setup_bytes = sum(tensor.nbytes for tensor in self.template.common_start.values())

    @property
    def history(self) -> list[RoundResult]:
        """The rounds that are in the store."""
        return [RoundResult.from_json(entry) for entry in self.store.progress.get("history", [])]

    def run(self, callback: FederationCallback | None = None) -> Iterator[RoundResult]:
        """Algorithm 1 from the first round that the store does not hold; each is in the store when it is yielded.

        Raises:
            NobodyLeft: if nobody takes part in a round to its end; what was done before is in the store.
        """
        callback = callback or FederationCallback()
        history = self.store.progress.get("history", [])
        tasks, seed = self.template.data.split.spec.tasks, self.template.seed
        for round in self.schedule.after(len(history), tasks, seed):
            result = self._round(round, callback)
            callback.on_round_end(result)
            history = [*history, result.to_json()]
            self.store.commit({"round": round.number, "history": history, **callback.state_dict()})
            yield result

    def _round(self, round: Round, callback: FederationCallback) -> RoundResult:
        """Clients fit, the server answers, all evaluate."""
        result = RoundResult(round.task, round.number)
        participants = self.schedule.participants(self.clients, round)
        uploads = self._fit(round, participants, result, callback)
        answers: Answers = {}
        if uploads:
            with result.timed("aggregate"):
                answers, metrics = self._aggregate(uploads, round, callback)
                result.server = dict(metrics)
        self._answer(round, answers, set(participants) - set(result.skipped), result)
        with result.timed("evaluate"):
            found = self.transport.evaluations(round)
        if not found and round.ends_task:
            raise NobodyLeft(
                f"no client has ended round {round.number}, the last of its task, so that nobody knows how good "
                "the models are; start the run again to repeat the round"
            )
        for index in range(self.clients):
            for mask, by_client in result.accuracy.items():
                by_client.append(found[index][mask] if index in found else [math.nan] * round.task)
        return result

    def _fit(
        self, round: Round, participants: list[int], result: RoundResult, callback: FederationCallback
    ) -> Received:
        """Let the clients train; the uploads that can be used."""
        uploads = Received()
        with result.timed("fit"):
            for fitted in self.transport.fit(round, participants, self.server.listens, callback):
                self._receive(fitted, result, uploads)
        if len(result.skipped) == len(participants):
            why: dict[str, list[int]] = {}
            for index, problem in sorted(result.skipped.items()):
                why.setdefault(problem, []).append(index)
            reasons = "; ".join(f"client {', '.join(map(str, who))}: {problem}" for problem, who in why.items())
            raise NobodyLeft(f"no client finished round {round.number}: {reasons}")
        return uploads

    def _answer(self, round: Round, answers: Answers, accepted: set[int], result: RoundResult) -> None:
        """Tell every client the end of the round, and let it be tested."""
        of_answers: dict[str, list[float]] = {}
        for index in range(self.clients):
            message = None
            if index in answers:
                with result.timed("aggregate"):
                    answer = answers[index]
                    message = Download(index, round.task, round.number, 0, answer.tensors).to_bytes()
                for name, value in answer.metrics.items():
                    of_answers.setdefault(name, []).append(value)
                result.bytes_down[index] = len(message)
            with result.timed("download"):
                self.transport.answer(round, index, message, index in accepted)
            with result.timed("evaluate"):
                self.transport.evaluate(round, index)
        result.server |= {n: float(torch.tensor(v, dtype=torch.float64).mean()) for n, v in of_answers.items()}

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
        upload = Upload.from_bytes(message, self.template.model_of(client).upload_schema())
        if (upload.client, upload.round) != (client, result.round):
            raise MessageError(f"upload claims to be of client {upload.client}, round {upload.round}")
        if upload.samples < 1:
            raise MessageError("upload claims that no sample is behind it")
        self.server.check(upload)
        uploads.add(upload, self.store.put_aside(f"upload-{client}", message))

    def _aggregate(self, uploads: Received, round: Round, callback: FederationCallback) -> tuple[Answers, Metrics]:
        if (state := self.store.read("server")) is not None:
            self.server.load(state)
        logger = callback.on_aggregate_start(round.task, round.number)

        def trainer() -> Trainer:
            made = self.template.trainer(logger)
            made.callbacks.append(StepCount(callback.on_aggregate_step))  # type: ignore[attr-defined]
            return made

        with seeds.seeded(self.template.seed, "aggregate", round.number):
            aggregated = self.server.aggregate(uploads, Context(self.clients, round, trainer))
        if state := self.server.state():
            self.store.write("server", state)
        return aggregated

    def cost(self) -> dict[str, dict[str, int]]:
        """For the CNN of each name what a client with it trains and computes, see `Worker.cost`; none if none says."""
        counts: dict[str, dict[str, int]] = {}
        for index in range(self.clients):
            name = self.template.cnn.name_of(index)
            if name not in counts and (found := self.transport.cost(index)):
                counts[name] = found
        return counts
