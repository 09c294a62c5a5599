"""Merging by least squares, as LoRM and RegMean do it, with Gram matrices or their diagonals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def merge(clients: Iterable[Mapping[str, tuple[Tensor, Tensor]]], rounding: float | None = None) -> dict[str, Tensor]:
    """By name X = (sum X_i G_i) (sum G_i)^+, which minimises sum ||(X - X_i) G_i^(1/2)||^2; in float64.

    B comes about with `projected` Gram matrices, A and the head with their own, and the deployed weights if the sums
    run over tasks.

    Args:
        clients: of each client by name X_i (..., m, n) and G_i, symmetric (..., n, n) or its diagonal (..., n). The
            same names for all. Gone through once.
        rounding: eigenvalues of sum G_i below this times the largest are taken for zero; by default what is rounding
            in float64.

    Returns:
        (..., m, n) each, in the dtype of X_i. What no client's G_i has in its range is zero.
    """
    products: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for client in clients:
        for name, (x, gram) in client.items():
            dtypes[name] = x.dtype
            products[name] = products.get(name, 0) + times(x.double(), gram.double())
            grams[name] = grams.get(name, 0) + gram.double()
    merged = {}
    for name, product in products.items():
        if is_diagonal(grams[name], product):
            x = divided(product, grams[name].unsqueeze(-2))
        else:
            x = product @ torch.linalg.pinv(grams[name], rtol=rounding, hermitian=True)
        merged[name] = x.to(dtypes[name])
    return merged


def projected(a: Tensor, gram: Tensor) -> Tensor:
    """A G A^T (..., r, r), the Gram matrix of what enters B, from A (..., r, in) and G or its diagonal; in float64."""
    return times(a.double(), gram.double()) @ a.double().mT


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    """alpha G + (1 - alpha) diag(G), (n, n)."""
    return alpha * gram + (1 - alpha) * gram.diag().diag()


def times(x: Tensor, gram: Tensor) -> Tensor:
    """X G (..., m, n), from G (..., n, n) or its diagonal (..., n)."""
    return x * gram.unsqueeze(-2) if is_diagonal(gram, x) else x @ gram


def is_diagonal(gram: Tensor, x: Tensor) -> bool:
    """Whether of the Gram matrix that goes with X (..., m, n) the diagonal (..., n) is given."""
    return gram.ndim < x.ndim


def divided(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / y, 0.0)
