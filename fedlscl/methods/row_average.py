"""FedViT with a head that is averaged row by row.

FedAvg moves the row of a class by the sum of what those clients did who train it, times their shares of *all* images:
where one of five clients has a class, by about a fifth. Here row c is averaged by the images of class c alone:

    w_c <- sum over i of n_ic w_ic / sum over i of n_ic,

n_ic the images of class c on which client i trained in this round. A row whose class nobody trained stays the plain
mean; under `train_mask: task` no client has moved it, so that it is the old row. Objective as in FedAvg.

What travels: the head, both ways, and from each client n_ic for all K classes (int64): 4 (d + 1) K bytes down and
8 K more up. The server thereby learns which classes a client has, and how many images of each.

An option of the shared protocol, not a published method. Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.continual import Continual, NoReplay
from fedlscl.messages import Schema, TensorSpec, Upload
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg

COUNTS = "class_counts"


class CountingFrozenViTClient(FrozenViTClient):
    """`FrozenViTClient`, which also says how many images of each class it trained on; for the settings see there."""

    def __init__(self, continual: Continual, **kwargs: Any) -> None:
        super().__init__(continual=continual, **kwargs)
        if not isinstance(continual, NoReplay):
            raise ValueError("model.continual must be NoReplay: only current images are counted")

    def outgoing(self) -> dict[str, Tensor]:
        """What is shared, and the images of each class (K,)."""
        return {**self.shared(), COUNTS: torch.bincount(self._labels(self.current), minlength=self.num_classes)}

    def upload_schema(self) -> Schema:
        """What is shared, and a number for each class."""
        return {**self.shared_schema(), COUNTS: TensorSpec((self.num_classes,), torch.int64)}


class RowAverage(FedAvg):
    """FedAvg, but for the tensors that have a row for each class.

    Args:
        rows: names of the tensors that are averaged row by row.
        weighting: how the others are averaged, see `FedAvg`.
    """

    def __init__(self, rows: list[str], weighting: Literal["samples", "uniform"] = "samples") -> None:
        super().__init__(weighting)
        self.rows = rows

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that count, and for tensors with as many rows as there are classes."""
        super().begin(uploads, downloads, model)
        if COUNTS not in uploads:
            raise ValueError(f"server: RowAverage wants '{COUNTS}' from the clients; take a model that sends it")
        for name in self.rows:
            if name not in self.names or uploads[name].shape[:1] != uploads[COUNTS].shape:
                fitting = [n for n in self.names if uploads[n].shape[:1] == uploads[COUNTS].shape]
                raise ValueError(f"server.rows names '{name}', must name tensors with a row for each class: {fitting}")

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """One mean for all clients."""
        answers = super().aggregate(uploads, clients, round, trainer)
        mean = dict(answers[0])
        mean |= row_means({name: mean[name] for name in self.rows}, [upload.tensors for upload in uploads.values()])
        return dict.fromkeys(range(clients), mean)


def row_means(plain: Mapping[str, Tensor], models: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average row c of each tensor by the images of class c.

    Args:
        plain: tensors (K, ...) by name, whose rows are kept for classes that nobody has.
        models: each client's tensors of these names, and under ``class_counts`` its images of each class (K,).

    Returns:
        The means, in the shapes and dtypes of `plain`.
    """
    # a count below zero cannot be, but a client may send it
    counts = torch.stack([model[COUNTS].clamp(min=0) for model in models]).double()
    held = counts.sum(0) > 0
    shares = counts[:, held] / counts[:, held].sum(0)
    means = {}
    for name, tensor in plain.items():
        rows = torch.stack([model[name][held] for model in models]).double()
        means[name] = tensor.clone()
        means[name][held] = torch.einsum("ic,ic...->c...", shares, rows).to(tensor.dtype)
    return means
