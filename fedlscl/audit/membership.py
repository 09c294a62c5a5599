"""Membership: how well a score tells a client's training images from others of the same classes.

Shapes: n members, m others, e features of an image, K classes. A higher score stands for a member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.audit.contents import Contents

FALSE_POSITIVES = 0.01
DRAWS = 500
"""Of the bootstrap."""

Scores = NDArray[np.float64]


class Interval(NamedTuple):
    """A number with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Membership(NamedTuple):
    """Area under the ROC curve, and true positive rate at 1 % false positives."""

    auc: Interval
    tpr: Interval


def auc(members: Scores, others: Scores) -> float:
    """The chance that a member's score is above another's, a tie counting half; 0.5 is guessing."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    at_most = np.searchsorted(ordered, members, "right")
    return float((below + at_most).mean() / (2 * len(others)))


def tpr(members: Scores, others: Scores, false_positives: float = FALSE_POSITIVES) -> float:
    """The part of the members above a threshold that at most this part of the others is above.

    With fewer than 1 / false_positives others, none of them may be above it.
    """
    allowed = int(false_positives * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def measured(groups: Sequence[tuple[Scores, Scores]], seed: int = 0) -> Membership:
    """Both numbers under one threshold for all clients, with intervals by the bootstrap over images.

    Args:
        groups: the scores of members and of others of each client and run.
        seed: of the draws with replacement.
    """
    members, others = (np.concatenate(scores) for scores in zip(*groups, strict=True))
    rng, drawn = np.random.default_rng(seed), np.empty((DRAWS, 2))
    for draw in range(DRAWS):
        pair = rng.choice(members, len(members)), rng.choice(others, len(others))
        drawn[draw] = auc(*pair), tpr(*pair)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    value = auc(members, others), tpr(members, others)
    return Membership(*(Interval(value[k], float(low[k]), float(high[k])) for k in range(2)))


# ------------------------------------------------------------------------------------------ scores


def nearest(rows: Tensor, features: Tensor) -> Tensor:
    """(n,) minus the distance of features (n, e) to the nearest of the rows (r, e) that were sent."""
    distances = torch.cdist(features.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return -distances.amin(dim=1)


def leverage(gram: Tensor, features: Tensor, noise: float = 0.0) -> Tensor:
    """(n,) minus x^T G^-1 x: what is in a sum G of x x^T lies in the directions in which G is large.

    Args:
        gram: (e, e), or (e + 1, e + 1) with a 1 behind each feature. A small multiple of the identity makes it
            invertible; where noise has made eigenvalues negative, they count as that.
        features: (n, e).
        noise: the deviation of the noise in G; the multiple is then the norm of a symmetric matrix of such noise, below
            which nothing can be told.
    """
    x = features.double()
    if len(gram) == x.shape[1] + 1:
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    if noise:
        values = values.clamp(min=0) + noise * (2 * len(values)) ** 0.5
    least = 1e-6 * values.abs().mean().clamp(min=1e-30)
    sizes: Tensor = ((x @ vectors).square() / values.clamp(min=least)).sum(dim=1)
    return -sizes


def pull(contents: Contents, features: Tensor, labels: Tensor, public: Tensor, of_public: Tensor) -> Tensor:
    """(n,) how much the mean of its class lies on the side of an image, beside the mean of public images.

    (x - mu_c)^T W (m_c - mu_c), where m_c is the mean that was sent, mu_c that of public images of the class, and W the
    inverse of their covariance: the likelihood ratio for the mean of a Gaussian (Sankararaman et al., 2009). Noise in
    the sum adds to the covariance of the mean; counts that are not told are estimated by the sum's length along mu_c.

    Args:
        contents: has sums.
        features: (n, e).
        labels: (n,).
        public: (p, e) features of public images.
        of_public: (p,) their labels.
    """
    assert contents.sums is not None
    sums, counts = contents.sums.sum(dim=0), None if contents.counts is None else contents.counts.sum(dim=0)
    x, known, scores = features.double(), public.double(), torch.zeros(len(features), dtype=torch.float64)
    means = {label: known[of_public == label].mean(dim=0) for label in torch.unique(of_public).tolist()}
    overall = known.mean(dim=0)
    apart = known - torch.stack([means[label] for label in of_public.tolist()])
    covariance = apart.T @ apart / max(len(apart) - len(means), 1)
    covariance.diagonal().add_(0.1 * covariance.diagonal().mean())
    for label in torch.unique(labels).tolist():
        of_class, mean = labels == label, means.get(label, overall)
        count = (sums[label] @ mean / mean.square().sum() if counts is None else counts[label]).clamp(min=1)
        spread = covariance + contents.noise**2 / count * torch.eye(len(covariance), dtype=torch.float64)
        scores[of_class] = (x[of_class] - mean) @ torch.linalg.solve(spread, sums[label] / count - mean)
    return scores
