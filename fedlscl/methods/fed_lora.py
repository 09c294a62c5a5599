"""FedAvg-LoRA (FedIT; Zhang et al., 2024) and FFA-LoRA (Sun et al., ICLR 2024): averaged LoRA in a frozen ViT.

See docs/methods/fed_lora.md. Every block l returns W h + c + (alpha / r) B_l A_l h in its `layers`. Objective, on the
images of the current task n of client i, with C(i, n) its classes (`train_mask: task`):

    CE(z, y; C(i, n)) = -z_y + log sum over c in C(i, n) of exp(z_c),   z = head(f).

FedAvg-LoRA trains A and B, FFA-LoRA (`train: b`) keeps the A that all clients start with, so that the mean of products
is the product of the mean.

Aggregation: w <- sum over i of p_i w_i of what is trained and of the head.

What travels: B, the head, and with `train: both` A, both ways; at first also A.

Logged: collaborate/cross_entropy; with a continual strategy its terms as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.checks import at_least, positive
from fedlscl.client import Client
from fedlscl.messages import Schema, schema_of
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT


class FedLoRAClient(Client):
    """A frozen ViT with LoRA in all blocks, and a linear head.

    Args:
        rank: r.
        alpha: of the scale alpha / r.
        layers: the linear layers of a block that are adapted, of attn.qkv, attn.proj, mlp.fc1 and mlp.fc2.
        train: both factors, or B alone.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        layers: Sequence[str] = ("attn.qkv",),
        train: Literal["both", "b"] = "both",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, "model", rank=rank)
        positive("model", alpha=alpha)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"model.layers is {list(layers)}, must name at least one layer, and none twice")
        self.rank, self.alpha, self.layers, self.train_factors = rank, alpha, tuple(layers), train

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The factors (B all zero, A as `nn.Linear` draws it) and the head.

        Raises:
            ValueError: if a layer is no linear one of the ViT's blocks.
        """
        there = {name: m for name, m in vit.vit.blocks[0].named_modules() if isinstance(m, nn.Linear)}
        if unknown := [name for name in self.layers if name not in there]:
            raise ValueError(f"model.layers has {unknown[0]}, must be of {', '.join(there)}")
        linear = [there[name] for name in self.layers]
        self.a = nn.ParameterList(torch.empty(vit.depth, self.rank, layer.in_features) for layer in linear)
        self.b = nn.ParameterList(torch.zeros(vit.depth, layer.out_features, self.rank) for layer in linear)
        for a in self.a:
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]))
        self.a.requires_grad_(self.train_factors == "both")
        self.head = nn.Linear(vit.width, num_classes)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens (B, T, d) that enter the first block."""
        return {"tokens": self.vit.lower(self.vit.prepare(images), 0)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the adapted features."""
        features = self.lora_features(frozen["tokens"], 0, self._pairs)
        return Output(self.head(features), features)

    def _pairs(self) -> list[LowRank]:
        return [
            LowRank(block, LoRA(a[block], b[block]), layer, self.alpha / self.rank)
            for layer, a, b in zip(self.layers, self.a, self.b, strict=True)
            for block in range(self.vit.depth)
        ]

    def shared(self) -> dict[str, Tensor]:
        """Both factors and the head."""
        return dict(self.named_parameters())

    def outgoing(self) -> dict[str, Tensor]:
        """What is trained."""
        return self._trained()

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def upload_schema(self) -> Schema:
        """What is trained."""
        return schema_of(self._trained())

    def download_schema(self) -> Schema:
        """What is trained."""
        return schema_of(self._trained())
