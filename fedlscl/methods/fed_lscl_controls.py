"""Controls of Fed-LSCL: without its small model, without its one-by-one distillation, without its generated weights.

See docs/methods/fed_lscl_controls.md. Objective of the first two: that of Fed-LSCL.

`FedLSCLStatic` has no CNN: E is the same for every image, so that phi gives one LoRA for all. Everything else is that
of Fed-LSCL, the start of phi and H, the rates, the replay, the server and the bytes: what Fed-LSCL has above it, its
small model is worth.

`FedLSCLAveraged` is Fed-LSCL with the mean of the clients' phi in the place of O2D (server `FedAvg`).

`SideBySide` has both models and generates nothing: each client alone (server `Isolated`) trains its CNN and a linear
head on the CNN's features and the frozen ViT's beside each other, by cross-entropy among all seen classes and what
`continual` adds. What Fed-LSCL has above it, weights for each image are worth over knowing what both models say.

What travels: in the first as in Fed-LSCL, where the features are the constant; in the second phi, both ways; nothing.

Logged: as Fed-LSCL, the second without the server's objectives; the third as `small_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.messages import Schema, schema_of
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.small_model import SmallModelClient
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT

OFF = {"standardise": "none", "linear": False, "own_loss": 0.0, "cnn_rate": 1.0}
"""What only a small model has use for, as it is by default."""


class FedLSCLStatic(FedLSCL):
    """Fed-LSCL without the small model: E = (1, ..., 1) / sqrt(e) for every image.

    Args:
        **kwargs: settings of `FedLSCL`, without those of the small model.
    """

    constant: Tensor  # (e,)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._warned = True  # there is no small model to be warned of
        given = (self.standardise, self.linear, self.own_loss, self.rates["cnn"])
        for (name, off), value in zip(OFF.items(), given, strict=True):
            if value != off:
                raise ValueError(f"model.{name} is {value}, must be {off} for FedLSCLStatic, which has no small model")

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Phi and H, drawn as in Fed-LSCL, where the CNN is drawn first."""
        super().build(vit, cnn, cnn_name, num_classes)
        self.cnn = nn.Identity()
        constant = torch.full((cnn.features,), cnn.features**-0.5)
        self.register_buffer("constant", constant, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """The constant (B, e)."""
        return self.constant.expand(len(images), -1)

    def generate(self, images: Tensor) -> dict[str, Tensor]:
        """E (B, e), and W (B, P), computed once for all."""
        return {"features": self.features(images), "weights": self.generator(self.constant).expand(len(images), -1)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """As Fed-LSCL; the one LoRA is merged into the weights wherever nothing is trained."""
        generated = self.generate(images)

        def pairs() -> list[LowRank]:
            one = self.pair(generated["weights"][:1])
            return [LowRank(one.block, LoRA(one.lora.a[0], one.lora.b[0]), scale=one.scale)]

        adapted = self.lora_features(frozen["tokens"], self.block, pairs)
        return Output(self.head(adapted), adapted, generated)


class FedLSCLAveraged(FedLSCL):
    """Fed-LSCL whose clients upload phi alone, for a server that averages it; for the settings see `FedLSCL`."""

    def images_kept(self, classes: int, exchanged: bool) -> int | None:
        """Those that are replayed: no features of others travel."""
        return Client.images_kept(self, classes, exchanged)

    def on_train_end(self) -> None:
        """No features of the buffered samples are needed."""
        Client.on_train_end(self)

    def outgoing(self) -> dict[str, Tensor]:
        """phi."""
        return self.shared()

    def upload_schema(self) -> Schema:
        """phi."""
        return schema_of(self.shared())


class SideBySide(SmallModelClient):
    """A head on the CNN's features E, times `logit_scale`, beside those of the frozen ViT; see `SmallModelClient`."""

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """theta, and a head on e + d numbers."""
        super().build(vit, cnn, cnn_name, num_classes)
        self.head = nn.Linear(cnn.features + vit.width, num_classes)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The frozen features (B, d)."""
        return {"frozen": self.vit(images)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on both."""
        features = self.cnn(images)
        both = torch.cat([self.logit_scale * features, frozen["frozen"]], dim=1)
        return Output(self.head(both), features, {"features": features})
