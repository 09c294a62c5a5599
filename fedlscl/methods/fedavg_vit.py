"""FedAvg of the whole ViT (McMahan et al., 2017): every client trains the foundation model, the server averages it.

See docs/methods/fedavg_vit.md. Objective, on the images of the current task n of client i, with C(i, n) its classes
(`train_mask: task`):

    CE(z, y; C(i, n)) = -z_y + log sum over c in C(i, n) of exp(z_c),   z = head(f).

Aggregation: w <- sum over i of p_i w_i, p_i the client's share of the training images (`weighting: samples`) or 1/k.

What travels: ViT and head, both ways.

Logged: collaborate/cross_entropy; with a continual strategy its terms as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT, TrainedViT


class FedAvgViTClient(Client):
    """A ViT that begins as the frozen one, and a linear head, all of it trained and shared; settings: see `Client`."""

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The ViT and the head."""
        self.trained = TrainedViT(vit)
        self.head = nn.Linear(vit.width, num_classes)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features."""
        features = self.trained(images)
        return Output(self.head(features), features)

    def shared(self) -> dict[str, Tensor]:
        """ViT and head."""
        return self.state_dict(keep_vars=True)
