"""Joint training: the small model on all clients' images of all tasks at once, a reference for who must not.

See docs/methods/joint.md. Objective: CE(z, y) over all classes of the federation, on the union of all training images;
every round goes over it `epochs` times. There is nothing to aggregate and nothing travels, since every client trains a
joint model of its own, from its own start.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlscl.client import Client
from fedlscl.data.local import LocalData
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.splits import Split
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.frozen_vit import FrozenViTClient


class Pooled(Client):
    """A client that sees the images of all clients and tasks at once, from the first round on."""

    def check(self, split: Split) -> None:
        """Only where all the data are."""
        if len(split.present) < len(split.clients):
            raise ValueError(
                "joint training needs the images of all clients in one place, and here are not all of them"
            )

    def images_kept(self, classes: int, exchanged: bool) -> int | None:
        """There are no others."""
        return None

    def see(self, data: FederatedDataModule, index: int) -> LocalData:
        """Also everybody's training images."""
        parts = [torch.as_tensor(task.train) for client in data.split.clients for task in client.tasks]
        self.everyone = torch.cat(parts)
        return super().see(data, index)

    def training_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every image of every client and task is current, every class competes."""
        everything = torch.ones(self.num_classes, dtype=torch.bool)
        return self.everyone, everything, everything


class JointClient(Pooled, FedAvgClient):
    """A small model that sees everything; for the settings see `Client`."""

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""


class JointViTClient(Pooled, FrozenViTClient):
    """A head on the frozen ViT, trained on everything: the reference for a linear head there."""

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""
