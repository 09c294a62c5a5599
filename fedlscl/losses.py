"""The objectives of Fed-LSCL as pure functions.

Shapes: B batch, K classes, e feature width, P generated numbers per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(logits: Tensor, labels: Tensor, classes: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy among some classes only (Fed-LSCL, Eq. 3, with the logits of all other classes at minus infinity).

    Args:
        logits: (B, K).
        labels: (B,) class numbers, every one of them among `classes`.
        classes: (K,) boolean, true for the classes that compete.
        reduction: as in `torch.nn.functional.cross_entropy`.

    Returns:
        A scalar, or (B,) with `reduction="none"`. A class outside `classes` gets no gradient.
    """
    return F.cross_entropy(logits.float().masked_fill(~classes, -torch.inf), labels, reduction=reduction)


def continual_penalty(now: Tensor, before: Tensor, known: Tensor) -> Tensor:
    """One term of Eq. 4: the squared L2 distance to what the snapshot produced, averaged over the buffered samples.

    Args:
        now: (B, e) features or (B, P) generated weights of the model in training.
        before: the same of the snapshot; rows of samples that are not `known` are ignored.
        known: (B,) 1.0 for buffered samples, 0.0 for others.

    Returns:
        A scalar, 0 if no sample is known.
    """
    distances = (now.float() - before.float()).square().sum(dim=1)
    return torch.where(known > 0, distances, 0.0).sum() / known.sum().clamp(min=1)


def o2d_loss(
    weight: Tensor, bias: Tensor, own: tuple[Tensor, Tensor], x: Tensor, wanted: Tensor, strength: float
) -> Tensor:
    """One teacher's part in the one-by-one distillation objective of one student (Fed-LSCL, Eq. 5).

    mean over x in FS_j of ||phi(x) - phi_j(x)||^2, plus strength * ||phi - phi_i||^2, where the last norm runs over all
    entries of weight and bias. Eq. 5 is the sum over the teachers, with its lambda shared out among them.

    Args:
        weight: (P, e) of the student phi.
        bias: (P,) of the student phi.
        own: weight and bias of phi_i, the student as uploaded.
        x: FS_j (n, e), or some of it.
        wanted: phi_j(x) (n, P).
        strength: this teacher's share of lambda.
    """
    distance = (F.linear(x, weight, bias) - wanted).square().sum(dim=1).mean()
    return distance + strength * ((weight - own[0]).square().sum() + (bias - own[1]).square().sum())
