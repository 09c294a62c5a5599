"""One-by-one distillation in closed form (Fed-LSCL, Eq. 5).

The generator is linear, so Eq. 5 is a ridge regression. With X_j = [FS_j, 1] and Phi_j the (e + 1, P) matrix of
phi_j (transposed weight above bias), C_j = X_j^T X_j / n_j and G_j = C_j Phi_j, the optimum of student i solves

    (sum_{j != i} C_j + lambda I) Phi = sum_{j != i} G_j + lambda Phi_i.

With the sums S = sum C_j, T = sum G_j and E = sum tr(Phi_j^T G_j) over all clients, student i included, and its step
D = Phi - Phi_i away from its own generator, which agrees with itself on its own features, Eq. 5 is

    f(D) = f(0) - 2 <D, R> + <D, (S - C_i + lambda I) D>,   R = T - S Phi_i,   f(0) = E - <Phi_i, T + R>,

and the optimum solves (S - C_i + lambda I) D = R. So the sums are taken once (`total`), and a student needs no more
of the other clients: the cost grows with the number of clients, not its square, and the memory not at all.

Where the left side is badly conditioned (few features, a small lambda), a Cholesky factor would lose the step in
rounding; the solution of least norm is then taken from the eigenvalues instead (`ridge`), at some ten times the cost.

Shapes: e feature width, P generated numbers per sample, n_j features of client j.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Generator(NamedTuple):
    """A linear parameter generator and the features that go with it."""

    weight: Tensor  # (P, e)
    bias: Tensor  # (P,)
    features: Tensor  # (n, e)


class Sums(NamedTuple):
    """What the clients contribute to Eq. 5, in float64."""

    gram: Tensor  # (e + 1, e + 1), S
    target: Tensor  # (e + 1, P), T
    energy: Tensor  # (), E


def matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """Phi, (e + 1, P) in float64."""
    return torch.cat([weight.T, bias[None]]).double()


def second_moments(features: Tensor) -> Tensor:
    """C of features (n, e), (e + 1, e + 1) in float64."""
    x = torch.cat([features, torch.ones_like(features[:, :1])], dim=1).double()
    return x.T @ x / len(x)


def total(clients: Iterable[Generator]) -> Sums:
    """The sums over at least one client; goes through them once."""
    parts = map(_contribution, clients)
    sums = next(parts)
    for part in parts:
        for value, added in zip(sums, part, strict=True):
            value.add_(added)
    return sums


def _contribution(client: Generator) -> Sums:
    phi, gram = matrix(client.weight, client.bias), second_moments(client.features)
    target = gram @ phi
    return Sums(gram, target, (phi * target).sum())


class Student:
    """Eq. 5 of one client that is part of the sums.

    Args:
        weight: (P, e) of the client's own generator phi_i.
        bias: (P,) of it.
        moments: C_i (e + 1, e + 1) of the client's own features.
        everyone: the sums over all clients.
        strength: lambda, not negative.
    """

    def __init__(self, weight: Tensor, bias: Tensor, moments: Tensor, everyone: Sums, strength: float) -> None:
        self._dtype, self._strength = weight.dtype, strength
        self._phi = matrix(weight, bias)
        self._gram = everyone.gram - moments
        self._pull = everyone.target - everyone.gram @ self._phi
        self._start = everyone.energy - (self._phi * (everyone.target + self._pull)).sum()

    def exact(self) -> tuple[Tensor, Tensor]:
        """The minimiser: weight (P, e) and bias (P,), in the dtype of the client's own.

        With lambda = 0 it is the solution nearest to the client's own generator.
        """
        # Solving for the step, lambda -> infinity, or no teacher, gives phi_i itself without rounding
        return self._moved(ridge(self._gram, self._pull, self._strength))

    def path(self, strengths: Iterable[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """The minimisers for other values of lambda, all positive, from one eigendecomposition."""
        values, vectors = torch.linalg.eigh(self._gram)
        pull = vectors.T @ self._pull
        for strength in strengths:
            yield self._moved(vectors @ (pull / (values.clamp(min=0) + strength)[:, None]))

    def _moved(self, step: Tensor) -> tuple[Tensor, Tensor]:
        solution = self._phi + step
        return solution[:-1].T.to(self._dtype), solution[-1].to(self._dtype)

    def objective(self, weight: Tensor, bias: Tensor) -> float:
        """Eq. 5 for this weight and bias."""
        step = matrix(weight, bias) - self._phi
        pulled = self._gram @ step + self._strength * step - 2 * self._pull
        return float(self._start + (step * pulled).sum())

    @property
    def start(self) -> float:
        """Eq. 5 for the client's own generator."""
        return float(self._start)


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
