"""One-by-one distillation in closed form (Fed-LSCL, Eq. 5).

The generator is linear, so Eq. 5 is a ridge regression. With X_j = [FS_j, 1] and Phi_j the (e + 1, P) matrix of
phi_j (transposed weight above bias), C_j = X_j^T X_j / n_j and G_j = C_j Phi_j, the optimum of student i solves

    (sum_{j != i} C_j + lambda I) Phi = sum_{j != i} G_j + lambda Phi_i.

The sums over all clients are shared by the students: take them once (`total`), take out each student's own part
(`others`), solve. The cost grows with the number of clients, not its square, and the memory not at all.

Where the left side is badly conditioned (few features, a small lambda), a Cholesky factor would lose the step in
rounding; the solution of least norm is then taken from the eigenvalues instead (`ridge`), at some ten times the cost.

Shapes: e feature width, P generated numbers per sample, n_j features of client j.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Generator(NamedTuple):
    """A linear parameter generator and the features that go with it."""

    weight: Tensor  # (P, e)
    bias: Tensor  # (P,)
    features: Tensor  # (n, e)


class Statistics(NamedTuple):
    """What a client, or a sum of clients, contributes to Eq. 5, in float64."""

    gram: Tensor  # (e + 1, e + 1), C
    target: Tensor  # (e + 1, P), G
    energy: Tensor  # (), tr(Phi^T C Phi): the mean square of the generated numbers of one sample


def matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """Phi, (e + 1, P) in float64."""
    return torch.cat([weight.T, bias[None]]).double()


def statistics(client: Generator) -> Statistics:
    """C_j, G_j and the mean square of what phi_j generates."""
    x = torch.cat([client.features, torch.ones_like(client.features[:, :1])], dim=1).double()
    phi = matrix(client.weight, client.bias)
    gram = x.T @ x / len(x)
    target = gram @ phi
    return Statistics(gram, target, (phi * target).sum())


def total(clients: Iterable[Generator]) -> Statistics:
    """The sums over at least one client; goes through them once."""
    parts = map(statistics, clients)
    sums = next(parts)
    for part in parts:
        for value, added in zip(sums, part, strict=True):
            value.add_(added)
    return sums


def others(everyone: Statistics, client: Generator) -> Statistics:
    """The sums over the teachers of a client, from those over all clients."""
    return Statistics(*(value - own for value, own in zip(everyone, statistics(client), strict=True)))


def exact(client: Generator, teachers: Statistics, strength: float) -> tuple[Tensor, Tensor]:
    """The minimiser of Eq. 5 for one client.

    Args:
        client: the student's own generator.
        teachers: the sums over the other clients.
        strength: lambda, not negative. With 0 the solution nearest to the client's own generator is taken.

    Returns:
        weight (P, e) and bias (P,), in the dtype of the client's generator.
    """
    phi = matrix(client.weight, client.bias)
    # Solve for the step away from phi_i: then lambda -> infinity, or no teacher, gives phi_i itself without rounding
    solution = phi + ridge(teachers.gram, teachers.target - teachers.gram @ phi, strength)
    return solution[:-1].T.to(client.weight.dtype), solution[-1].to(client.bias.dtype)


def objective(client: Generator, teachers: Statistics, weight: Tensor, bias: Tensor, strength: float) -> float:
    """Eq. 5 of a student with this weight and bias, from the sums over its teachers: no feature is gone through."""
    phi = matrix(weight, bias)
    distance = (phi * (teachers.gram @ phi - 2 * teachers.target)).sum() + teachers.energy
    return float(distance + strength * (phi - matrix(client.weight, client.bias)).square().sum())


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
