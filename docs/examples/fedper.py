"""FedPer (Arivazhagan et al., 2019): the body of the network is averaged, the head stays with the client.

Objective: CE(z, y), z = head(r), with r the representation of an image under the body; all of it is trained.

Aggregation: body <- sum over i of p_i body_i, p_i the client's share of the training images.

What travels: the body, both ways.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

from torch import Tensor

from fedlscl.methods.fedavg import FedAvgClient


class FedPerClient(FedAvgClient):
    """FedAvg's networks, a CNN and a head, of which the CNN alone is shared."""

    def shared(self) -> dict[str, Tensor]:
        """The CNN, running statistics of batch normalisation included."""
        return {name: tensor for name, tensor in super().shared().items() if name.startswith("cnn.")}
