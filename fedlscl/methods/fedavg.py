"""FedAvg (McMahan et al., 2017): every client trains the whole small model, the server averages the models.

See docs/methods/fedavg.md. Objective, on the images of the current task n of client i, with C(i, n) its classes
(`train_mask: task`):

    CE(z, y; C(i, n)) = -z_y + log sum over c in C(i, n) of exp(z_c).

Aggregation: w <- sum over i of p_i w_i, p_i the client's share of the training images (`weighting: samples`) or 1/k;
the running statistics of batch normalisation likewise, of its counters the largest.

What travels: CNN and head, both ways.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT


class FedAvgClient(Client):
    """A CNN and a linear head on its features, all of it shared; for the settings see `Client`."""

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The CNN and the head."""
        self.cnn = SmallModel(cnn, cnn_name, unit_length=False)
        self.head = nn.Linear(cnn.features, num_classes)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features."""
        features = self.cnn(images)
        return Output(self.head(features), features)

    def shared(self) -> dict[str, Tensor]:
        """CNN and head, running statistics of batch normalisation included."""
        return self.state_dict(keep_vars=True)
