"""Where clients live: one machine that trains and tests the clients whose states it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedlscl import seeds
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Part
from fedlscl.federation.trainer import fit_once
from fedlscl.messages import Download
from fedlscl.models.cache import FrozenCache
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

MakeTrainer = Callable[[Logger | None], Trainer]

COUNTS = ("trained_parameters", "flops_frozen", "flops")


@dataclass
class Site:
    """All that clients need besides their states: data, frozen model, and a body of each CNN architecture.

    A client is a state, kept by whoever runs the site; one object for each architecture lends its body to all of them
    in turn. Memory therefore does not grow with the number of clients.
    """

    client: Client
    data: FederatedDataModule
    vit: FrozenViT
    cnn: SmallModelSpec
    seed: int
    trainer: MakeTrainer

    def __post_init__(self) -> None:
        """Build a body for each architecture, and the tensors with which all clients start.

        Raises:
            ValueError: if the method cannot work with this split or these CNNs.
        """
        self.clients = self.data.split.spec.clients
        self.cnn.check(self.clients)
        self.client.check(self.data.split)
        self.bodies: dict[str, Client] = {}
        for index in range(self.clients):
            if (name := self.cnn.name_of(index)) not in self.bodies:
                self.bodies[name] = self.new_body(name)
        self.first, *others = self.bodies.values()
        for body in others:
            if body.download_schema() != self.first.download_schema():
                raise ValueError(
                    "cnn.name lists different CNNs, but this method exchanges tensors of the CNN, which then do not fit"
                )
        self.precomputed = FrozenCache(self.data, self.first.precompute, self.vit.cache_mib)
        self.handout = {name: tensor.detach().clone() for name, tensor in self.first.shared().items()}
        self._tester: Trainer | None = None

    def new_body(self, cnn_name: str) -> Client:
        """Networks in the common start of all clients with this CNN."""
        with seeds.seeded(self.seed, "server"):
            return copy.deepcopy(self.client).assemble(self.vit, self.cnn, cnn_name, self.data.num_classes)

    def body(self, index: int) -> Client:
        """The body that a client is lent, whatever client it is at the moment."""
        return self.bodies[self.cnn.name_of(index)]

    def start(self, index: int) -> bytes:
        """The message with which the server begins: the tensors that all clients start with."""
        return Download(index, 0, 0, 0, self.handout).to_bytes()

    def enter(self, index: int, state: Mapping[str, Tensor] | None, start: bytes | None) -> Client:
        """The client in a state, or, where there is none, as it is before its first round.

        Args:
            index: which client.
            state: what `Client.state` returned for it; None for one that has done nothing yet.
            start: the message that `start` makes, for one that has done nothing yet.

        Raises:
            ValueError: if it has neither.
        """
        body = self.body(index)
        if state is not None:
            body.enter(index, self.data, self.precomputed, state)
        elif start is not None:
            new = body.initial_state(seeds.derive(self.seed, "client", index))
            body.enter(index, self.data, self.precomputed, new)
            body.adopt(Download.from_bytes(start, body.shared_schema()).tensors)
        else:
            raise ValueError(f"client {index} has no state, and was not told what clients start with")
        return body

    def fit(self, body: Client, round: Round, logger: Logger | None) -> dict[str, Tensor]:
        """Train a client that was entered for a round.

        Returns:
            Its state.

        Raises:
            FloatingPointError: if a number in it is not finite.
        """
        body.begin_round(round)
        with seeds.seeded(self.seed, "fit", body.index, round.number):
            fit_once(self.trainer(logger), body)
        state = body.state()
        if broken := [n for n, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
            raise FloatingPointError(f"training diverged: '{broken[0]}' holds NaN or infinite values")
        return state

    def answer(self, body: Client, task: int, message: bytes | None) -> dict[str, list[float]]:
        """Hand the server's answer, if there is one, to a client that was entered, and test it on tasks 1 to `task`.

        The client may make up its mind about the answer in the test: its state is complete only afterwards.

        Returns:
            For each mask the accuracy in % on every task.

        Raises:
            MessageError: if the answer does not fit.
        """
        if message is not None:
            body.download(Download.from_bytes(message, body.download_schema()))
        body.begin_evaluation(task)
        if self._tester is None:
            self._tester = self.trainer(None)  # one for all: unlike a fit, a test leaves nothing behind in a Trainer
        self._tester.test(body, verbose=False)
        return body.accuracy()

    def compute(self, body: Client) -> dict[str, int]:
        """What a client that was entered trains and computes, counted at the end of a federation.

        Returns:
            By the names in `COUNTS`: `trained_parameters`, and the floating-point operations (matrix products,
            convolutions and attention) to classify one test image: `flops_frozen`, which do not depend on anything
            trained and are done once per image, and `flops`, all others.
        """
        frozen, total = FlopCounterMode(display=False), FlopCounterMode(display=False)

        def lookup(part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
            pixels, _ = self.data.batch(part, indices, device)
            with frozen:
                return body.precompute(pixels)

        body.precomputed = lookup
        body.begin_evaluation(self.data.split.spec.tasks)
        body.test_images = body.test_images[:1]
        with total:
            self.trainer(None).test(body, verbose=False)
        trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
        counts = (trained, frozen.get_total_flops(), total.get_total_flops() - frozen.get_total_flops())
        return dict(zip(COUNTS, counts, strict=True))
