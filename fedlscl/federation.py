"""The federation (Fed-LSCL, Algorithm 1): for each task, for each round: clients fit, the server answers, all evaluate.

It knows clients, the server and their messages, and nothing of any method.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedlscl import seeds
from fedlscl.backbones import FrozenViT, SmallModelSpec
from fedlscl.checkpoint import Store, client_name
from fedlscl.client import Client
from fedlscl.data import FederatedDataModule
from fedlscl.evaluation import MASKS
from fedlscl.messages import Download, MessageError, Received, Upload
from fedlscl.precomputed import Part, Precomputed
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Answers, Server
from fedlscl.trainer import StepCount, fit_once

log = logging.getLogger(__name__)

MakeTrainer = Callable[[Logger | None], Trainer]


class Listener(Protocol):
    """Who wants to know what the federation does."""

    def visiting(self, task: int, round: int, client: int) -> Logger | None:
        """A client's fit begins; returns where its metrics go."""

    def visited(self) -> None:
        """A client's turn is over, in whatever way."""

    def serving(self, task: int, round: int) -> Logger | None:
        """The server begins to aggregate; returns where the metrics of its fits go."""

    def served(self, step: int, steps: float) -> None:
        """A fit of the server has done so many of its steps, infinitely many if nobody knows."""


@dataclass
class RoundResult:
    """One round: what was exchanged and how good every client's global model is now.

    `round` counts over all tasks; task and round are 1-based. Accuracies are in %, for each mask a list per client
    with a value for each task learned so far. Bytes are those of the serialised messages.
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
    """Everything that takes part in a run.

    A client is a state in `store`; one object for each CNN architecture lends its body to all of them in turn. Memory
    therefore does not grow with the number of clients, and a resumed run goes through the very same steps.
    """

    schedule: Schedule
    client: Client
    server: Server
    data: FederatedDataModule
    vit: FrozenViT
    cnn: SmallModelSpec
    seed: int
    store: Store
    trainer: MakeTrainer

    def __post_init__(self) -> None:
        """Build a body for each architecture, and what the server hands to everyone at the start."""
        self.clients = len(self.data.split.clients)
        self.schedule.check(self.clients)
        self.cnn.check(self.clients)
        self.client.check(self.data.split)
        names = [self.cnn.name_of(index) for index in range(self.clients)]
        self.bodies: dict[str, Client] = {}
        for name in dict.fromkeys(names):
            self.bodies[name] = self._body(name)
        first, *others = self.bodies.values()
        self.precomputed = Precomputed(self.data, first.precompute, self.vit.cache_mib)
        for body in others:
            if body.download_schema() != first.download_schema():
                raise ValueError(
                    "cnn.name lists different CNNs, but this method exchanges tensors of the CNN, which then do not fit"
                )
        self.server.begin(first.upload_schema(), first.download_schema(), lambda: self._body(names[0]))
        if self.server.public_images:
            self.server.hold(*self.data.public(self.server.public_images))
        self.handout = {name: tensor.detach().clone() for name, tensor in first.shared().items()}
        self.setup_bytes = sum(tensor.nbytes for tensor in self.handout.values())

    def _body(self, cnn_name: str) -> Client:
        with seeds.seeded(self.seed, "server"):
            return copy.deepcopy(self.client).assemble(self.vit, self.cnn, cnn_name, self.data.num_classes)

    def run(self, listener: Listener) -> Iterator[RoundResult]:
        """Algorithm 1 from the first round that `store` does not hold; commit the store after each result."""
        done = self.store.progress.get("round", 0)
        tester = self.trainer(None)  # one for all: unlike a fit, a test leaves nothing behind in a Trainer
        for round in self.schedule.after(done, self.data.split.spec.tasks, self.seed):
            result = RoundResult(round.task, round.number)
            uploads = Received()
            participants = self.schedule.participants(self.clients, round)
            for index in participants:
                logger = listener.visiting(round.task, round.number, index)
                with result.timed("fit"):
                    self._fit(index, round, result, logger, uploads)
                listener.visited()
            if len(result.skipped) == len(participants):
                raise RuntimeError(f"no client finished round {round.number}: {result.skipped}")
            answers: Answers = {}
            if uploads:
                with result.timed("aggregate"):
                    answers = self._aggregate(uploads, round, listener)
            for index in range(self.clients):
                answer = None
                if index in answers:
                    with result.timed("aggregate"):
                        answer = answers[index]
                with result.timed("evaluate"):
                    self._answer_and_evaluate(index, answer, result, tester)
            result.server = dict(self.server.metrics) if uploads else {}
            yield result

    def _aggregate(self, uploads: Received, round: Round, listener: Listener) -> Answers:
        if (state := self.store.read("server")) is not None:
            self.server.load(state)
        logger = listener.serving(round.task, round.number)

        def trainer() -> Trainer:
            made = self.trainer(logger)
            made.callbacks.append(StepCount(listener.served))  # type: ignore[attr-defined]
            return made

        with seeds.seeded(self.seed, "aggregate", round.number):
            answers = self.server.aggregate(uploads, self.clients, round, trainer)
        if state := self.server.state():
            self.store.write("server", state)
        return answers

    def _fit(self, index: int, round: Round, result: RoundResult, logger: Logger | None, uploads: Received) -> None:
        """One client's round, with its upload put among the others if the server wants one.

        A client that fails, or sends what cannot be used, is left out with the reason on record.
        """
        try:
            body = self.visit(index)
            body.begin_round(round)
            with seeds.seeded(self.seed, "fit", index, round.number):
                fit_once(self.trainer(logger), body)
            state = body.state()
            if broken := [n for n, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
                raise FloatingPointError(f"training diverged: '{broken[0]}' holds NaN or infinite values")
            if self.server.listens:
                self._receive(body, result, uploads)
        except Exception as error:
            # One client must not stop the others; its state of the last round is still in the store
            log.warning("client %d is left out of round %d", index, result.round, exc_info=error)
            result.skipped[index] = f"{type(error).__name__}: {error}"
            return
        self.store.write(client_name(index), state)

    def _receive(self, body: Client, result: RoundResult, uploads: Received) -> None:
        message, schema = body.upload().to_bytes(), body.upload_schema()
        result.bytes_up[body.index] = len(message)
        upload = Upload.from_bytes(message, schema)
        if (upload.client, upload.round) != (body.index, result.round):
            raise MessageError(f"upload claims to be of client {upload.client}, round {upload.round}")
        uploads.add(body.index, self.store.put_aside(f"upload-{body.index}", message), schema)

    def _answer_and_evaluate(
        self, index: int, answer: Mapping[str, Tensor] | None, result: RoundResult, tester: Trainer
    ) -> None:
        body = self.visit(index)
        if answer is not None:
            message = Download(index, result.task, result.round, 0, answer).to_bytes()
            result.bytes_down[index] = len(message)
            body.download(Download.from_bytes(message, body.download_schema()))
        body.begin_evaluation(result.task)
        tester.test(body, verbose=False)
        if answer is not None:  # only now, since a client may need its device to make up its mind about the answer
            self.store.amend(client_name(index), body.state())
        for mask, values in body.accuracy().items():
            result.accuracy[mask].append(values)

    def compute(self) -> dict[str, dict[str, int]]:
        """What a client of each CNN trains and computes, counted at the end of a federation.

        Returns:
            For the CNN of each name `trained_parameters`, and the floating-point operations (matrix products,
            convolutions and attention) to classify one test image: `flops_frozen`, which do not depend on anything
            trained and are done once per image, and `flops`, all others.
        """
        counts = {}
        for name in self.bodies:
            body = self.visit(next(index for index in range(self.clients) if self.cnn.name_of(index) == name))
            frozen, total = FlopCounterMode(display=False), FlopCounterMode(display=False)

            def lookup(
                part: Part,
                indices: NDArray[np.int64],
                device: torch.device,
                body: Client = body,
                frozen: FlopCounterMode = frozen,
            ) -> dict[str, Tensor]:
                pixels, _ = self.data.batch(part, indices, device)
                with frozen:
                    return body.precompute(pixels)

            body.precomputed = lookup
            body.begin_evaluation(self.data.split.spec.tasks)
            body.test_images = body.test_images[:1]
            with total:
                self.trainer(None).test(body, verbose=False)
            counts[name] = {
                "trained_parameters": sum(p.numel() for p in body.parameters() if p.requires_grad),
                "flops_frozen": frozen.get_total_flops(),
                "flops": total.get_total_flops() - frozen.get_total_flops(),
            }
        return counts

    def visit(self, index: int) -> Client:
        """The client, in its last state; one that was never visited gets the common start from the server."""
        body = self.bodies[self.cnn.name_of(index)]
        stored = self.store.read(client_name(index))
        state = body.initial_state(seeds.derive(self.seed, "client", index)) if stored is None else stored
        body.enter(index, self.data, self.precomputed, state)
        if stored is None:
            message = Download(index, 0, 0, 0, self.handout).to_bytes()
            body.adopt(Download.from_bytes(message, body.shared_schema()).tensors)
        return body
