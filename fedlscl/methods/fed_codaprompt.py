"""FedCODAPrompt: CODA-Prompt (Smith et al., 2023), with components and head averaged.

See docs/methods/fed_codaprompt.md. The ViT is frozen. In each adapted block the tokens of an image attend to L further
keys and values, its prefix, a sum of components P_m weighted by how the image's query q(x), its feature under the
unprompted ViT, agrees with key K_m under attention A_m:

    p(x) = sum over m of alpha_m(x) P_m,    alpha_m(x) = cos(q(x) * A_m, K_m).

An equal part of the M components is new in each task; those of tasks to come have no part in the sum. Objective, on the
images of the current task n of client i, with C(i, n) its classes (`train_mask: task`) and T the components so far:

    CE(z, y; C(i, n)) + lambda * sum over blocks and over T in (P, K, A) of mean (T T^T - I)^2,

over the components of task n and the head alone.

Aggregation: w <- sum over i of p_i w_i, as FedAvg. What travels: P, K, A of all tasks, and the head, both ways.

Logged: collaborate/cross_entropy, collaborate/orthogonality (the second term).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.batches import Batch, Output
from fedlscl.checks import at_least
from fedlscl.continual import NoReplay
from fedlscl.methods.fed_dualprompt import TaskPoolClient, blocks_of
from fedlscl.models.adapters import Prefixes
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT

BLOCKS = (0, 1, 2, 3, 4)  # as published


class FedCODAPromptClient(TaskPoolClient):
    """Prefixes in the blocks of the frozen ViT, made for each image of components, and a linear head.

    Args:
        pool_size: M, components of all tasks together, at least one for each task.
        length: L, keys and values of a prefix.
        blocks: indices of the blocks with prefixes; by default those of 0 to 4 that exist.
        orthogonality: lambda, weight of the penalty on components that are not orthonormal.
        **kwargs: settings of every client, see `Client`.
    """

    required = (("continual", NoReplay),)  # what finished tasks have learned is held

    def __init__(
        self,
        pool_size: int = 100,
        length: int = 4,
        blocks: list[int] | None = None,
        orthogonality: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(pool_size, **kwargs)
        at_least(1, "model", length=length)
        at_least(0, "model", orthogonality=orthogonality)
        self.length, self.wanted_blocks, self.orthogonality = length, blocks, orthogonality

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Components, keys and attention (blocks, M, ...), and the head."""
        self.blocks = blocks_of("blocks", self.wanted_blocks, BLOCKS, vit.depth)
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"model.blocks is {self.blocks}, must name one block or more, each once")
        self.first = min(self.blocks)
        pool = (len(self.blocks), self.pool_size)
        self.components = orthonormal(*pool, 2, self.length, vit.heads, vit.width // vit.heads)
        self.keys = orthonormal(*pool, vit.width)
        self.attention = orthonormal(*pool, vit.width)
        self.head = nn.Linear(vit.width, num_classes)

    def in_use(self, pool: Tensor) -> Tensor:
        """The m of the tasks so far, (blocks, m, ...), of a pool (blocks, M, ...); training moves the last task's."""
        each = self.pool_size // len(self.data.tasks)
        if not self.training:
            return pool[:, : each * self.reached()]
        begin, end = each * (self.round.task - 1), each * self.round.task
        return torch.cat([pool[:, :begin].detach(), pool[:, begin:end]], dim=1)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features under the image's prefixes."""
        pools = zip(*(self.in_use(pool) for pool in (self.components, self.keys, self.attention)), strict=True)
        injections = [
            Prefixes(block, assembled(components, agreement(frozen["query"], keys, attention)))
            for block, (components, keys, attention) in zip(self.blocks, pools, strict=True)
        ]
        features = self.vit.upper(frozen["tokens"], self.first, injections)
        return Output(self.head(features), features)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and the penalty."""
        pools = [self.in_use(pool) for pool in (self.components, self.keys, self.attention)]
        penalty = self.orthogonality * torch.stack([overlap(pool.flatten(2)) for pool in pools]).sum()
        return {**super().collaborative_losses(output, batch), "orthogonality": penalty}


def agreement(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """alpha (B, m) from queries (B, d), keys and attention (m, d), in float32 under autocast too."""
    return F.cosine_similarity(query.float().unsqueeze(1) * attention, keys, dim=2)


def assembled(components: Tensor, weights: Tensor) -> Tensor:
    """The sum of components (m, ...) for each row of weights (B, m), (B, ...)."""
    return (weights @ components.flatten(1)).view(len(weights), *components.shape[1:])


def overlap(rows: Tensor) -> Tensor:
    """The mean of (T T^T - I)^2 over the m x m entries, of rows T (blocks, m, n), summed over the blocks; a scalar."""
    with torch.autocast(rows.device.type, enabled=False):  # near 1 half precision has two digits
        products = rows @ rows.mT
    return (products - torch.eye(rows.shape[1], device=rows.device)).square().mean((1, 2)).sum()


def orthonormal(blocks: int, *shape: int) -> nn.Parameter:
    """(blocks, M, ...) whose M rows are orthonormal in each block; if they are more than their entries, its columns."""
    return nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(shape)) for _ in range(blocks)]))
