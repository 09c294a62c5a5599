"""One-by-one distillation in closed form (Fed-LSCL, Eq. 5).

The generator is linear, so Eq. 5 is a ridge regression. With X_j = [FS_j, 1] and Phi_j the (e + 1, P) matrix of
phi_j (transposed weight above bias), C_j = X_j^T X_j / n_j and G_j = C_j Phi_j, the optimum of student i solves

    (sum_{j != i} C_j + lambda I) Phi = sum_{j != i} G_j + lambda Phi_i.

The sums over all clients are shared by the students, so the cost grows with the number of clients, not its square.

Shapes: e feature width, P generated numbers per sample, n_j features of client j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Generator(NamedTuple):
    """A linear parameter generator and the features that go with it."""

    weight: Tensor  # (P, e)
    bias: Tensor  # (P,)
    features: Tensor  # (n, e)


class Statistics(NamedTuple):
    """What a client, or a sum of clients, contributes to the normal equations, in float64."""

    gram: Tensor  # (e + 1, e + 1), C
    target: Tensor  # (e + 1, P), G


def matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """Phi, (e + 1, P) in float64."""
    return torch.cat([weight.T, bias[None]]).double()


def statistics(client: Generator) -> Statistics:
    """C_j and G_j."""
    x = torch.cat([client.features, torch.ones_like(client.features[:, :1])], dim=1).double()
    gram = x.T @ x / len(x)
    return Statistics(gram, gram @ matrix(client.weight, client.bias))


def exact(clients: Mapping[int, Generator], strength: float) -> dict[int, tuple[Tensor, Tensor]]:
    """The minimiser of Eq. 5 for every client.

    Args:
        clients: the generators and feature sets, by client.
        strength: lambda, not negative. With 0 the solution nearest to the client's own generator is taken.

    Returns:
        weight (P, e) and bias (P,) for each client, in the dtype of its upload.
    """
    parts = (statistics(client) for client in clients.values())
    first = next(parts)
    total = Statistics(first.gram.clone(), first.target.clone())
    for part in parts:
        total.gram.add_(part.gram)
        total.target.add_(part.target)
    return {index: _solve(client, total, strength) for index, client in clients.items()}


def _solve(client: Generator, total: Statistics, strength: float) -> tuple[Tensor, Tensor]:
    own, phi = statistics(client), matrix(client.weight, client.bias)
    gram = total.gram - own.gram
    # Solve for the step away from phi_i: then lambda -> infinity, or no teacher, gives phi_i itself without rounding
    residual = total.target - own.target - gram @ phi
    solution = phi + ridge(gram, residual, strength)
    return solution[:-1].T.to(client.weight.dtype), solution[-1].to(client.bias.dtype)


def ridge(gram: Tensor, target: Tensor, strength: float) -> Tensor:
    """X with (gram + strength I) X = target, of least norm where that is singular.

    Args:
        gram: (n, n) symmetric positive semi-definite, float64.
        target: (n, P).
        strength: not negative.
    """
    factor, failed = torch.linalg.cholesky_ex(gram + strength * torch.eye(len(gram), dtype=gram.dtype))
    pivots = factor.diagonal()
    # A pivot lost in rounding means directions that no feature determines: leave those out
    if not failed and pivots.min() > 1e-7 * pivots.max():
        return torch.cholesky_solve(target, factor)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0) + strength
    inverse = torch.where(values > 1e-14 * values.max(), 1 / values, 0.0)
    solution: Tensor = vectors @ (inverse[:, None] * (vectors.T @ target))
    return solution
