"""The frozen ViT with a trained head and nothing else: what the foundation model is worth without adaptation.

With the server `Isolated` every client trains its head alone; with `FedAvg` and `share: head` the heads are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fedlscl.backbones import FrozenViT, SmallModelSpec
from fedlscl.client import Client
from fedlscl.continual import Output


class FrozenViTClient(Client):
    """A linear head on the features of the frozen ViT.

    Args:
        share: what travels: nothing or the head.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(self, share: Literal["nothing", "head"] = "nothing", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.share = share

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The head."""
        self.head = nn.Linear(vit.width, num_classes)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The frozen features (B, d)."""
        return {"features": self.vit(images)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the frozen features."""
        return Output(self.head(frozen["features"]), frozen["features"])

    def shared(self) -> dict[str, Tensor]:
        """As `share` says."""
        return {"weight": self.head.weight, "bias": self.head.bias} if self.share == "head" else {}
