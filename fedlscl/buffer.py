"""Which samples of the current task a client keeps for replay: class-balanced, at most M of each class."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Ranking = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def lowest_loss(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples of one class from the lowest cross-entropy upwards (Fed-LSCL, section 4.3.2).

    Args:
        losses: (n,) cross-entropy of each sample.
        features: (n, d), unused here.
        rng: unused here.

    Returns:
        (n,) positions, the first to keep first; ties keep their order.
    """
    return torch.argsort(losses, stable=True)


def herding(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples in the order in which their running mean follows the class mean best (iCaRL), none twice."""
    x = F.normalize(features.double(), dim=1)
    mean, total = x.mean(dim=0), torch.zeros_like(x[0])
    free = torch.ones(len(x), dtype=torch.bool)
    order = []
    for count in range(1, len(x) + 1):
        distance = (mean - (total + x) / count).norm(dim=1).masked_fill(~free, torch.inf)
        best = int(distance.argmin())
        order.append(best)
        free[best] = False
        total = total + x[best]
    return torch.tensor(order)


def random(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples in random order."""
    return torch.randperm(len(losses), generator=rng)


SELECTIONS: dict[str, Ranking] = {"lowest_loss": lowest_loss, "herding": herding, "random": random}


def select(
    ranking: Ranking, losses: Tensor, features: Tensor, labels: Tensor, per_class: int, rng: torch.Generator
) -> Tensor:
    """The `per_class` first samples of every class under `ranking`, or all of a class that has fewer.

    Args:
        ranking: one of `SELECTIONS`.
        losses: (n,) cross-entropy of each sample.
        features: (n, d) representation of each sample.
        labels: (n,) class numbers.
        per_class: M.
        rng: for rankings that draw.

    Returns:
        (at most M x classes,) positions into the n samples, ascending.
    """
    kept = []
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().squeeze(1)
        kept.append(members[ranking(losses[members], features[members], rng)[:per_class]])
    return torch.cat(kept).sort().values
