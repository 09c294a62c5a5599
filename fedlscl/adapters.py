"""Per-sample LoRA: a linear layer generates, for every image, the pair that adapts one attention block of the ViT.

Shapes: B batch, T tokens, d ViT width, e feature width, r LoRA rank, P = r*d + 3*d*r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LoRA(NamedTuple):
    """One LoRA pair per sample, for a fused query-key-value projection."""

    a: Tensor  # (B, r, d)
    b: Tensor  # (B, 3d, r)


class ParameterGenerator(nn.Linear):
    """phi: features (B, e) to generated weights W (B, P) (Fed-LSCL, section 4.2).

    At the start every generated B matrix is zero, so the adapted ViT equals the frozen one; the biases that make the A
    matrices follow the usual LoRA initialisation, Kaiming-uniform with a = sqrt(5).
    """

    def __init__(self, features: int, width: int, rank: int) -> None:
        super().__init__(features, rank * width + 3 * width * rank)
        self.rank, self.width = rank, width
        size_a = rank * width
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.bias[:size_a].view(rank, width), a=math.sqrt(5))
            self.weight[size_a:].zero_()
            self.bias[size_a:].zero_()

    def split(self, weights: Tensor) -> LoRA:
        """W (B, P) as one LoRA pair per sample."""
        a, b = weights.tensor_split([self.rank * self.width], dim=1)
        return LoRA(a.view(-1, self.rank, self.width), b.view(-1, 3 * self.width, self.rank))


@contextmanager
def per_sample_lora(projection: nn.Linear, lora: LoRA, scale: float) -> Iterator[None]:
    """Inside this context `projection(h)` returns W h + c + scale * (h A^T) B^T, with every sample's own A and B.

    Args:
        projection: the fused query-key-value projection of one attention block, d to 3d.
        lora: a pair per sample of the batch that will pass.
        scale: alpha / r.
    """

    def add_low_rank(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (h,) = inputs  # (B, T, d)
        return output + scale * ((h @ lora.a.mT) @ lora.b.mT)

    handle = projection.register_forward_hook(add_low_rank)
    try:
        yield
    finally:
        handle.remove()
