"""The small model alone: the CNN of Fed-LSCL with a head on its features, without a foundation model.

See docs/methods/small_model.md. Objective: cross-entropy among all seen classes, and what `continual` adds. The
features are of unit length as in Fed-LSCL, so the head sees them times `logit_scale`; Eq. 4 keeps them in place.

Aggregation: with the server `Isolated` every client trains alone; with `FedAvg` the part named by `share`, which is
what travels, is averaged. Table 2's row without any component is `share: cnn`.

Logged: collaborate/cross_entropy, replay/cross_entropy, replay/features (lambda_E ||E - E'||^2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT


class SmallModelClient(Client):
    """A CNN and a head.

    Args:
        share: what travels: nothing, the CNN, or CNN and head.
        logit_scale: factor on the unit-length features before the head.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(
        self, share: Literal["nothing", "cnn", "all"] = "nothing", logit_scale: float = 16.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.share, self.logit_scale = share, logit_scale

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """theta and a head on E."""
        self.cnn = SmallModel(cnn, cnn_name)
        self.head = nn.Linear(cnn.features, num_classes)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on E."""
        features = self.cnn(images)
        return Output(self.head(self.logit_scale * features), features, {"features": features})

    def shared(self) -> dict[str, Tensor]:
        """As `share` says; running statistics of batch normalisation included."""
        prefixes = {"nothing": (), "cnn": ("cnn.",), "all": ("cnn.", "head.")}[self.share]
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name.startswith(prefixes)}
