"""The server: uploads of a round in, an answer to every client out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fedlscl.messages import Schema, Upload

Answers = dict[int, dict[str, Tensor]]


class Server(ABC):
    """What every method's server does once a round."""

    listens: ClassVar[bool] = True  # false: nobody uploads anything

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}  # of the last aggregation, by name, for the record

    def begin(self, uploads: Schema, downloads: Schema) -> None:  # noqa: B027 - most servers have nothing to check
        """Hear, before any training, what clients will send and take back.

        Raises:
            ValueError: if the server cannot work with these messages.
        """

    @abstractmethod
    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, seed: int, trainer: Callable[[], Trainer]
    ) -> Answers:
        """Fuse what the clients sent.

        Args:
            uploads: the valid uploads of this round, by client; at least one.
            clients: number of clients in the federation, absent ones included.
            seed: of this round, for what is drawn.
            trainer: makes a fresh Trainer for each model that the server fits.

        Returns:
            The tensors for each client that gets an answer.
        """


class Isolated(Server):
    """No exchange: every client keeps its own model (Table 2 without O2D; local training)."""

    listens = False

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, seed: int, trainer: Callable[[], Trainer]
    ) -> Answers:
        """Never called."""
        raise NotImplementedError("clients without exchange send nothing to aggregate")


class FedAvg(Server):
    """The mean of the clients' tensors, the same for everyone, absent clients included (McMahan et al., 2017).

    Args:
        weighting: by the number of training `samples`, or `uniform`.
    """

    def __init__(self, weighting: Literal["samples", "uniform"] = "samples") -> None:
        super().__init__()
        self.weighting = weighting

    def begin(self, uploads: Schema, downloads: Schema) -> None:
        """Average what clients take back; of what else they send FedAvg makes no use."""
        if not downloads:
            raise ValueError(
                "server: FedAvg has nothing to average, since model shares no tensor; take fedlscl.server.Isolated"
            )
        self.names = tuple(downloads)

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, seed: int, trainer: Callable[[], Trainer]
    ) -> Answers:
        """One mean for all clients."""
        shares = [upload.samples if self.weighting == "samples" else 1 for upload in uploads.values()]
        models = [{name: upload.tensors[name] for name in self.names} for upload in uploads.values()]
        mean = average(models, shares)
        return dict.fromkeys(range(clients), mean)


def average(models: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    """Tensor by tensor the weighted mean; of integer tensors (counters) the maximum.

    Args:
        models: the same names and shapes in each.
        weights: one per model, not negative, not all zero; they are divided by their sum.

    Raises:
        ValueError: if no weight is positive.
    """
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights {weights} must not be negative and must have a positive sum")
    mean = {}
    for name, first in models[0].items():
        stacked = torch.stack([model[name] for model in models])
        if first.is_floating_point():
            shares = torch.tensor(weights, dtype=torch.float64).div(total).to(first.dtype)
            mean[name] = torch.tensordot(shares, stacked, dims=1)
        else:
            mean[name] = stacked.max(dim=0).values
    return mean
