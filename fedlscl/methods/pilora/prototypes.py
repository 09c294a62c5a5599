"""Prototypes: how far features are from them, and what weight each client's copy gets."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """delta (B, K) in float32, of features (B, d) to prototypes (K, d); no gradient where both are the same."""
    squares = (features.float()[:, None] - prototypes).square().mean(dim=2)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def weights(candidates: Tensor, means: Tensor, temperature: float) -> Tensor:
    """u (m,) in float64, summing to 1, for candidates (m, d) and the class means (h, d) of those who hold the class."""
    far: Tensor = (candidates.double()[:, None] - means.double()).norm(dim=2).sum(dim=1)
    near = far.clamp(min=1e-30).reciprocal()
    span = near.max() - near.min()
    if span <= 1e-12 * near.max():  # nothing but rounding, or a single candidate
        return torch.full_like(near, 1 / len(near))
    return ((near - near.min()) / span / temperature).softmax(dim=0)
