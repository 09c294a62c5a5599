"""Where clients live: one machine that trains and tests the clients whose states it is given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedlscl import seeds
from fedlscl.client import Client
from fedlscl.data.source import Part
from fedlscl.federation.template import Template
from fedlscl.federation.trainer import fit_once
from fedlscl.messages import LARGEST, Download, schema_of
from fedlscl.models.cache import FrozenCache
from fedlscl.schedule import Round

COUNTS = ("trained_parameters", "flops_frozen", "flops")

Accuracy = Mapping[str, list[float]]
"""For each mask a client's accuracy in % on every task learned so far."""


class Worker:
    """One machine on which clients train and are tested.

    A client is a state, kept by whoever runs the worker; the template's model of its architecture is lent to all of
    them in turn. Memory therefore does not grow with the number of clients.

    Args:
        template: what all clients are like.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self.precomputed = FrozenCache(template.data, template.first.precompute, template.vit.cache_mib)
        self._tester: Trainer | None = None

    def restore(self, index: int, state: Mapping[str, Tensor] | None, start: bytes | None) -> Client:
        """The client in a state, or, where there is none, as it is before its first round.

        Args:
            index: which client.
            state: what `Client.state` returned for it; None for one that has done nothing yet.
            start: what `Template.start_message` makes, for one that has done nothing yet.

        Raises:
            ValueError: if it has neither.
        """
        client, data = self.template.model_of(index), self.template.data
        if state is not None:
            client.restore(index, data, self.precomputed, state)
        elif start is not None:
            new = client.initial_state(seeds.derive(self.template.seed, "client", index))
            client.restore(index, data, self.precomputed, new)
            client.adopt(Download.from_bytes(start, schema_of(client.shared())).tensors)
        else:
            raise ValueError(f"client {index} has no state, and was not told what clients start with")
        return client

    def fit(self, client: Client, round: Round, logger: Logger | None) -> dict[str, Tensor]:
        """Train a client that was restored for a round.

        Returns:
            Its state.

        Raises:
            FloatingPointError: if training diverged.
        """
        self.precomputed.begin_task(round.task)
        client.begin_round(round)
        with seeds.seeded(self.template.seed, "fit", client.index, round.number):
            try:
                fit_once(self.template.trainer(logger), client)
            except RuntimeError as error:  # as torch's about a matrix or probabilities that hold NaN
                _check(client, client.state(), error)
                raise
        state = client.state()
        _check(client, state)
        return state

    def apply(self, client: Client, message: bytes) -> None:
        """Hand the server's answer to a client that was restored, and let it compute what follows from it.

        Raises:
            MessageError: if the answer does not fit.
        """
        client.download(Download.from_bytes(message, client.download_schema()))
        client.trainer = tester = self._test_trainer()
        client.to(tester.strategy.root_device)
        client.follow()
        client.eval()
        with torch.no_grad():
            client.on_download_end()

    def evaluate(self, client: Client, task: int) -> Accuracy:
        """Test a client that was restored on tasks 1 to `task`."""
        self.precomputed.begin_task(task)
        client.begin_evaluation(task)
        self._test_trainer().test(client, verbose=False)
        return client.accuracy.compute()

    def _test_trainer(self) -> Trainer:
        """One for all: unlike a fit, a test leaves nothing behind in a Trainer."""
        if self._tester is None:
            self._tester = self.template.trainer(None)
        return self._tester

    def cost(self, client: Client) -> dict[str, int]:
        """What a client that was restored trains and computes, counted at the end of a federation.

        Returns:
            By the names in `COUNTS`: `trained_parameters`, and the floating-point operations (matrix products,
            convolutions and attention) to classify one test image: `flops_frozen`, which do not depend on anything
            trained and are done once per image, and `flops`, all others.
        """
        size, client.evaluation_batch_size = client.evaluation_batch_size, 1
        try:  # the second image takes no more than an image does; with the first comes what is done once for a test
            (frozen_one, one), (frozen_two, two) = (self._operations(client, images) for images in (1, 2))
        finally:
            client.evaluation_batch_size = size
        trained = sum(p.numel() for p in client.parameters() if p.requires_grad)
        frozen = frozen_two - frozen_one
        return dict(zip(COUNTS, (trained, frozen, two - one - frozen), strict=True))

    def _operations(self, client: Client, images: int) -> tuple[int, int]:
        """Those that depend on nothing trained, and all, of a test on so many copies of a client's first test image."""
        frozen, total = 0, FlopCounterMode(display=False)

        def lookup(part: Part, indices: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
            nonlocal frozen
            pixels, _ = self.template.data.batch(part, indices, device)
            with FlopCounterMode(display=False) as counter:
                outputs = client.precompute(pixels)
            frozen += counter.get_total_flops()
            return outputs

        client.precomputed = lookup
        client.begin_evaluation(self.template.data.split.spec.tasks)
        client.test_images = client.test_images[:1].repeat(images)
        with total:
            self.template.trainer(None).test(client, verbose=False)
        return frozen, total.get_total_flops()


def _check(client: Client, state: Mapping[str, Tensor], cause: Exception | None = None) -> None:
    """Refuse a client whose training has diverged: its numbers are not finite, or beyond what a message may hold."""
    broken = [n for n, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    broken += [n for n, p in client.named_parameters() if p.requires_grad and bool((p.detach().abs() > LARGEST).any())]
    if broken:
        raise FloatingPointError(
            f"training diverged: '{broken[0]}' holds NaN or infinite values, or some beyond {LARGEST:g}; "
            f"model.learning_rate is {client.learning_rate:g}, take a smaller one"
        ) from cause
