"""What clients are like before any of them exists: their messages, their common start, and models to make them of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from fedlscl import seeds
from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.messages import Download
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.server import Server

MakeTrainer = Callable[[Logger | None], Trainer]


@dataclass
class Template:
    """What server and clients agree on: settings, data, the frozen model, and a model for each CNN architecture.

    Args:
        client: the settings of all clients.
        data: the images, set up.
        vit: the frozen model, one for all.
        cnn: which client has which small model.
        seed: of the run.
        trainer: makes a fresh Trainer whose metrics go to a logger.
        server: fuses what the clients send.
    """

    client: Client
    data: FederatedDataModule
    vit: FrozenViT
    cnn: SmallModelSpec
    seed: int
    trainer: MakeTrainer
    server: Server

    def __post_init__(self) -> None:
        """Build a model for each architecture, and the tensors with which all clients start.

        Raises:
            ValueError: if the method cannot work with this split or these CNNs.
        """
        self.clients = self.data.split.spec.clients
        self.cnn.check(self.clients)
        self.client.check(self.data.split)
        self.models: dict[str, Client] = {}
        for index in range(self.clients):
            if (name := self.cnn.name_of(index)) not in self.models:
                self.models[name] = self.new_model(name)
        self.first, *others = self.models.values()
        for model in others:
            if model.download_schema() != self.first.download_schema():
                raise ValueError(
                    "cnn.name lists different CNNs, but this method exchanges tensors of the CNN, which then do not fit"
                )
        self.common_start = {name: tensor.detach().clone() for name, tensor in self.first.shared().items()}

    def begin(self) -> None:
        """Tell the server what it will hear.

        Raises:
            ValueError: if it cannot work with that.
        """
        first, name = self.first, self.cnn.name_of(0)
        self.server.begin(first.upload_schema(), first.download_schema(), lambda: self.new_model(name))

    def new_model(self, cnn_name: str) -> Client:
        """Networks in the common start of all clients with this CNN."""
        with seeds.seeded(self.seed, "server"):
            return copy.deepcopy(self.client).assemble(self.vit, self.cnn, cnn_name, self.data.num_classes)

    def model_of(self, index: int) -> Client:
        """The model of a client's architecture, whatever client it is at the moment."""
        return self.models[self.cnn.name_of(index)]

    def start_message(self, index: int) -> bytes:
        """The message with which the server begins: the tensors that all clients start with."""
        return Download(index, 0, 0, 0, self.common_start).to_bytes()
