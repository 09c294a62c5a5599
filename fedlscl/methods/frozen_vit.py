"""The frozen ViT with a trained head and nothing else: what the foundation model is worth without adaptation.

See docs/methods/frozen_vit.md. FedViT averages the heads of all clients: the server `FedAvg` with `share: head`. With
the server `Isolated` every client trains a head alone (`local_vit`). Objective of FedViT, on the images of the current
task n of client i, with C(i, n) its classes (`train_mask: task`):

    CE(z, y; C(i, n)) = -z_y + log sum over c in C(i, n) of exp(z_c),   z = head(f).

f is the feature (d) of the frozen ViT in evaluation mode. The head is linear, d -> K, or with `hidden: h` two maps,
d -> h -> ReLU -> K.

Aggregation: w <- sum over i of p_i w_i, p_i the client's share of the training images (`weighting: samples`) or 1/k.

What travels: the head, both ways.

Logged: collaborate/cross_entropy; with a continual strategy its terms as well (replay/cross_entropy in `local_vit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT


class FrozenViTClient(Client):
    """A head on the features of the frozen ViT.

    Args:
        share: what travels: nothing or the head.
        hidden: width h of the head's hidden layer; 0 for a linear head.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(self, share: Literal["nothing", "head"] = "nothing", hidden: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not hidden >= 0:
            raise ValueError(f"model.hidden is {hidden}, must be at least 1, or 0 for a linear head")
        self.share, self.hidden = share, hidden

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The head."""
        self.head = make_head(vit.width, self.hidden, num_classes)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The frozen features (B, d)."""
        return {"features": self.vit(images)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the frozen features."""
        return Output(self.head(frozen["features"]), frozen["features"])

    def shared(self) -> dict[str, Tensor]:
        """As `share` says; under the names that the tensors have in the head."""
        return dict(self.head.named_parameters()) if self.share == "head" else {}


def make_head(features: int, hidden: int, classes: int) -> nn.Module:
    """Features to logits, with one hidden layer, or none where its width is 0."""
    if hidden == 0:
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
