"""Exact leaks: features of single images that follow from an upload by arithmetic, without a guess."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedlscl.audit.contents import Contents

SAME = 1e-6
"""Largest distance of two features that are the same, as a part of their length: E travels in float32."""


class Claim(NamedTuple):
    """A feature (e,) that must be that of one image, and the image's class where that is known too."""

    feature: Tensor
    label: int | None


def exact_leaks(contents: Contents) -> list[Claim]:
    """The features of single images that tensors give away.

    Every row is one. The sum of a class with one image is that image's feature. Of a class with two images the sum s
    and the second moments M give both: 2 M - s s^T = d d^T, where d is their difference, and they are (s +- d) / 2.
    With noise on counts or sums there is no class that has exactly one or two images.
    """
    found = [Claim(row, None) for row in contents.rows] if contents.rows is not None else []
    if contents.sums is None or contents.counts is None:
        return found
    for sums, counts in zip(contents.sums, contents.counts, strict=True):
        found += [Claim(sums[label], label) for label in (counts == 1).nonzero().flatten().tolist()]
        if contents.moments is not None and len(contents.sums) == 1:
            for label in (counts == 2).nonzero().flatten().tolist():
                total = sums[label]
                values, vectors = torch.linalg.eigh(2 * contents.moments[label] - torch.outer(total, total))
                apart = vectors[:, -1] * values[-1].clamp(min=0).sqrt()
                found += [Claim((total + sign * apart) / 2, label) for sign in (1, -1)]
    return found


def owners(claims: list[Claim], features: Tensor, labels: Tensor) -> list[int | None]:
    """For each claim which of some images (n, e) with labels (n,) has its feature, and its class; None if none has."""
    found: list[int | None] = []
    for claim in claims:
        distances = (features.double() - claim.feature).norm(dim=1)
        best = int(distances.argmin())
        right = float(distances[best]) <= SAME * max(float(claim.feature.norm()), 1e-12)
        found.append(best if right and claim.label in (None, int(labels[best])) else None)
    return found


def changed_rows(before: Tensor, after: Tensor) -> Tensor:
    """(K,) true for the rows of a matrix (K, d) that training has moved, those of the classes that a client has."""
    return (before != after).any(dim=1)
