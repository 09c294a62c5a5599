"""FedProto (Tan et al., 2022): clients exchange the mean representation of each class, and no weights.

See docs/methods/fedproto.md. Objective, with r (e) the representation of an image, P_y the prototype of its class that
the server answered last and C(i, n) the classes of client i's current task (`train_mask: task`):

    CE(z, y; C(i, n)) + strength / e * ||r - P_y||^2;

the second term is 0 for an image whose class has no prototype, as in the first round.

Aggregation: P_c <- sum over i of n_ic P_ic / sum over i of n_ic, with P_ic the mean of r over the n_ic current training
images of class c of client i, after its training. A class that nobody sent in a round has no prototype after it.

What travels: prototypes (K, e) and images (K,), both ways; 0 where there is none.

Logged: collaborate/cross_entropy, collaborate/prototype (the second term).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlscl.batches import Batch, Output
from fedlscl.checks import at_least
from fedlscl.messages import MessageError, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.server import Answer, Answers, Context, Metrics, Server, Total


class FedProtoClient(FedAvgClient):
    """A CNN and a head of the client's own, as in FedAvg, and the prototypes of all clients.

    Args:
        strength: lambda, weight of the mean squared distance to the prototypes.
        **kwargs: settings of every client, see `Client`.
    """

    prototypes: Tensor  # (K, e) as the server answered last
    images: Tensor  # (K,) how many images each is the mean of

    def __init__(self, strength: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(0, "model", strength=strength)
        self.strength = strength

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The networks, and no prototype yet."""
        super().build(vit, cnn, cnn_name, num_classes)
        self.register_buffer("prototypes", torch.zeros(num_classes, cnn.features))
        self.register_buffer("images", torch.zeros(num_classes, dtype=torch.int64))

    def shared(self) -> dict[str, Tensor]:
        """The prototypes and their numbers of images."""
        return {"prototypes": self.prototypes, "images": self.images}

    def outgoing(self) -> dict[str, Tensor]:
        """The client's own, of this round."""
        return self.own

    def on_train_end(self) -> None:
        """Take the mean representation of each current class."""
        super().on_train_end()
        labels, representation = self.data.labels(self.current), self.observe(self.current)["representation"]
        images = torch.bincount(labels, minlength=self.num_classes)
        sums = torch.zeros(self.num_classes, representation.shape[1]).index_add(0, labels, representation)
        self.own = {"prototypes": sums / images.clamp(min=1)[:, None], "images": images}

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and the distance to the prototypes, a mean over the batch."""
        labels = batch.images.labels
        distances = (output.representation - self.prototypes[labels]).square().mean(dim=1)
        distance = torch.where(self.images[labels] > 0, distances, 0.0).mean()
        return {**super().collaborative_losses(output, batch), "prototype": self.strength * distance}


class FedProtoServer(Server):
    """Averages prototypes class by class, each weighted by the number of its images."""

    serves, needs = "FedProtoClient", ("prototypes", "images")

    def check(self, upload: Upload) -> None:
        """Every image behind the upload is behind one of its prototypes."""
        images = upload.tensors["images"]
        if bool((images < 0).any()) or int(images.sum()) != upload.samples:
            raise MessageError(f"upload: images is {images.tolist()}, must add up to {upload.samples} images")

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The same prototypes for all clients, absent ones included."""
        sums, images = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for upload in uploads.values():
            of_client = upload.tensors["images"]
            sums = sums + of_client[:, None] * upload.tensors["prototypes"].double()
            images = images + of_client
        return self._answers(sums, images, context)

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """Each prototype times the number of its images, and these."""
        images = upload.tensors["images"]
        return {"sums": images[:, None] * upload.tensors["prototypes"].double(), "images": images}

    def factors(self, images: int) -> Mapping[str, int]:
        """Of each prototype, the number of its images."""
        return {"sums": images}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """The same prototypes, from sums alone."""
        return self._answers(total.tensors["sums"], total.tensors["images"].long(), context)

    def _answers(self, sums: Tensor, images: Tensor, context: Context) -> tuple[Answers, Metrics]:
        prototypes = (sums / images.clamp(min=1)[:, None]).float()
        answer = Answer({"prototypes": prototypes, "images": images})
        return dict.fromkeys(range(context.clients), answer), {}
