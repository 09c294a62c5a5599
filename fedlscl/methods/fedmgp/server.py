"""The server of FedMGP: one prompt of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.checks import at_least
from fedlscl.federation.trainer import fit_once
from fedlscl.messages import Schema, Upload
from fedlscl.methods.fedmgp.client import FedMGPClient
from fedlscl.methods.fedmgp.fits import Distillation, HeadTraining, Steps
from fedlscl.robust import Averaging, Robust
from fedlscl.server import Answer, Answers, Context, Metrics, Server


class FedMGPServer(Server):
    """Fuses the clients' prompts on images of its own.

    Args:
        fusion: `distil` the prompts into one, or hand everyone that of the first client, as published code does.
        surrogates: images of each class that the server holds for the distillation.
        epochs: over these, for the prompt and again for the head.
        batch_size: images of a step.
        learning_rate: of Adam.
        robust: how key and head are averaged, see `FedAvg`; the prompt is distilled from all.
        trim: the fraction that a trimmed mean leaves out at either end.
    """

    serves, needs = "FedMGPClient", ("prompt", "key", "global_head")

    def __init__(
        self,
        fusion: Literal["distil", "client0"] = "distil",
        surrogates: int = 20,
        epochs: int = 5,
        batch_size: int = 16,
        learning_rate: float = 1e-3,
        robust: Robust = "none",
        trim: float = 0.2,
    ) -> None:
        super().__init__()
        self.mean = Averaging(robust, trim)
        if fusion not in ("distil", "client0"):
            raise ValueError(f"server.fusion is {fusion}, must be distil or client0")
        at_least(1, "server", surrogates=surrogates, epochs=epochs, batch_size=batch_size)
        at_least(0, "server", learning_rate=learning_rate)
        self.fusion, self.epochs, self.batch_size, self.learning_rate = fusion, epochs, batch_size, learning_rate
        self.server_images = surrogates if fusion == "distil" else 0

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """The models that prompts are fused with are those of the clients."""
        super().begin(uploads, downloads, model)
        self.model = model

    def hold(self, images: Tensor, labels: Tensor) -> None:
        """Keep the surrogate images."""
        self.images, self.labels = images, labels

    def state(self) -> dict[str, Tensor]:
        """What a robust average remembers."""
        return self.mean.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take it over."""
        self.mean.load(state)

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The same for all clients."""
        if self.fusion == "client0":
            sent = uploads[min(uploads)].tensors
            answer = Answer({name: sent[name] for name in ("prompt", "key")})
            return dict.fromkeys(range(context.clients), answer), {}
        student, *teachers = [uploads[index].tensors["prompt"] for index in sorted(uploads)]
        mean = self.mean(((upload.tensors, upload.samples) for upload in uploads.values()), context.start)
        model = self.model()
        assert isinstance(model, FedMGPClient)  # nobody else sends such prompts
        model.adopt({**mean, "prompt": student})
        rng = seeds.generator(context.round.seed, "fusion", context.round.number)
        distillation = Distillation(model, self._steps(rng), teachers)
        fit_once(context.trainer(), distillation)
        training = HeadTraining(model, self._steps(rng))
        fit_once(context.trainer(), training)
        before, after = distillation.before, distillation.after
        metrics = {"fusion_before": before, "fusion_after": after, "head": training.after}
        answer = Answer({name: tensor.detach().cpu() for name, tensor in model.shared().items()})
        return dict.fromkeys(range(context.clients), answer), metrics

    def _steps(self, rng: torch.Generator) -> Steps:
        """The surrogates and their labels in random order, in parts of nearly equal size."""
        order = torch.randperm(len(self.labels), generator=rng)
        parts = order.tensor_split(-(-len(order) // self.batch_size))
        batches = [(self.images[part], self.labels[part]) for part in parts]
        return Steps(batches, self.epochs, self.learning_rate)
