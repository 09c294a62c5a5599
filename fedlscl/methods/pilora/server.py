"""The server of PILoRA: the mean pair, and of each class one prototype of many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedlscl.checks import positive
from fedlscl.messages import MessageError, Schema, Upload
from fedlscl.methods.pilora.client import PAIR
from fedlscl.methods.pilora.prototypes import weights
from fedlscl.robust import Averaging, Robust
from fedlscl.server import Answer, Answers, Context, Metrics, Server


class PILoRAServer(Server):
    """Averages the pairs and weighs the prototypes of each class anew.

    Args:
        proto_clients: whose copies of a class's prototype count, those of the clients `training` it now or of `all`.
        temperature: of the softmax that makes weights of them.
        robust: how the pairs are averaged, see `FedAvg`.
        trim: the fraction that a trimmed mean leaves out at either end.
    """

    serves, needs = "PILoRAClient", ("means",)

    def __init__(
        self,
        proto_clients: Literal["training", "all"] = "training",
        temperature: float = 0.2,
        robust: Robust = "none",
        trim: float = 0.2,
    ) -> None:
        super().__init__()
        self.mean = Averaging(robust, trim)
        positive("server", temperature=temperature)
        self.proto_clients, self.temperature = proto_clients, temperature

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """The prototypes are those of the common start."""
        super().begin(uploads, downloads, model)
        self.prototypes = model().get_parameter("prototypes").detach().clone()

    def check(self, upload: Upload) -> None:
        """Each class once, and of each that is held a prototype and a mean."""
        sent = upload.tensors
        classes, held = sent["classes"], len(sent["prototypes"])
        if len(torch.unique(classes)) < len(classes) or classes.min() < 0 or classes.max() >= len(self.prototypes):
            raise MessageError(f"upload: 'classes' must be different numbers from 0 to {len(self.prototypes) - 1}")
        if len(sent["means"]) != held or held > len(classes):
            raise MessageError(
                f"upload: {held} prototypes, {len(sent['means'])} means and {len(classes)} classes do not fit together"
            )

    def state(self) -> dict[str, Tensor]:
        """The prototypes (K, d) of all classes, as answered last, and what a robust average remembers."""
        return {**self.mean.state(), "prototypes": self.prototypes}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the prototypes."""
        self.mean.load(state)
        self.prototypes = state["prototypes"].clone()

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The mean pair for everyone, absent clients included, and to each sender the prototypes of its classes."""
        classes: dict[int, Tensor] = {}
        candidates: dict[int, list[Tensor]] = defaultdict(list)
        means: dict[int, list[Tensor]] = defaultdict(list)

        def pairs() -> Iterator[tuple[dict[str, Tensor], int]]:
            for index, upload in uploads.items():
                sent = upload.tensors
                classes[index] = sent["classes"]
                held = sent["classes"][: len(sent["prototypes"])].tolist()
                for label, prototype, mean in zip(held, sent["prototypes"], sent["means"], strict=True):
                    candidates[label].append(prototype)
                    means[label].append(mean)
                yield {name: sent[name] for name in PAIR}, upload.samples

        pair = self.mean(pairs(), context.start)
        for label, copies in candidates.items():
            if self.proto_clients == "all":
                copies += [self.prototypes[label]] * (context.clients - len(copies))
            stacked = torch.stack(copies)
            u = weights(stacked, torch.stack(means[label]), self.temperature)
            self.prototypes[label] = u @ stacked.double()
        own = {index: {"prototypes": self.prototypes[numbers]} for index, numbers in classes.items()}
        return {index: Answer({**pair, **own.get(index, {})}) for index in range(context.clients)}, {}
