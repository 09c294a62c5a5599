"""GLFC's losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """[c = y_b], (B, K) in shape and dtype of `like`."""
    return torch.zeros_like(like).scatter_(1, labels[:, None], 1.0)


def binary(logits: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    """The mean binary cross-entropy (B,) over some columns of logits (B, K), with targets (B, K) in 0..1."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * columns).sum(dim=1) / columns.sum()


def weights(logits: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """omega (B,): each sample's part of its group's gradient, 1 on average in each group; without gradient.

    Args:
        logits: (B, K).
        labels: (B,) class numbers.
        old: (K,) true for learned classes, whose samples are the one group; all 1 if there is none.
    """
    # sigmoid(-z) is 1 - sigmoid(z) without its rounding to 0
    size = torch.sigmoid(-logits.detach().gather(1, labels[:, None]).squeeze(1)).clamp(min=1e-30)
    learned = old[labels]
    omega = torch.ones_like(size)
    for group in (learned, ~learned):
        mean = (size * group).sum() / group.sum().clamp(min=1)
        omega = torch.where(group, size / mean, omega)
    return torch.where(old.any(), omega, 1.0)


def gradient_compensation(logits: Tensor, labels: Tensor, seen: Tensor, old: Tensor) -> Tensor:
    """L_GC, a scalar, from logits (B, K), labels (B,), and the seen and the learned classes (K,)."""
    return (weights(logits, labels, old) * binary(logits, one_hot(labels, logits), seen)).mean()


def relation_distillation(logits: Tensor, labels: Tensor, seen: Tensor, old: Tensor, soft: Tensor) -> Tensor:
    """L_RD, a scalar; as `gradient_compensation`, with the teacher's probabilities `soft` (B, K)."""
    return binary(logits, torch.where(old, soft, one_hot(labels, logits)), seen).mean()


def entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """The entropy (B,) in nats of the softmax of logits (B, K) over some classes (K,)."""
    p = logits.float().masked_fill(~classes, -torch.inf).softmax(dim=1)
    return -(p * (p + 1e-5).log()).sum(dim=1)
