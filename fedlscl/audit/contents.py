"""What some tensors that a server received say of features, by their names and shapes.

Shapes: e features of an image, K classes, P parts into which a client's images may be divided, n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contents:
    """Everything in float64; None for what is not there.

    Args:
        rows: (n, e) features of single images.
        sums: (P, K, e) of the features of each class.
        counts: (P, K) how many images are behind each of these; None also where that is not told.
        gram: (e, e) or, with a 1 behind each feature, (e + 1, e + 1): the sum, or mean, of x x^T.
        moments: (K, e, e) the same of each class.
        noise: the deviation of the noise in all sums, about, where they say that there is some.
    """

    rows: Tensor | None = None
    sums: Tensor | None = None
    counts: Tensor | None = None
    gram: Tensor | None = None
    moments: Tensor | None = None
    noise: float = 0.0

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], features: int) -> Contents:
        """Sort what a message, or a sum of messages, holds.

        Args:
            tensors: by name.
            features: e.
        """
        known = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
        rows, gram, moments = known.get("features"), known.get("gram"), known.get("moments")
        if rows is not None and not (rows.ndim == 2 and rows.shape[1] == features):
            rows = None
        if gram is not None:
            gram = (
                gram
                if gram.shape[0] == gram.shape[-1] and gram.ndim == 2
                else square(gram.reshape(-1, gram.shape[-1]).sum(dim=0))
            )
            gram = gram if len(gram) in (features, features + 1) else None
        sums, counts = _class_sums(known, features)
        if moments is not None and sums is not None and len(moments) == sums.shape[1]:
            moments = torch.stack([square(lower) for lower in moments])
        else:
            moments = None
        noise = known.get("noise", torch.zeros(()))  # the sum of the squares of the deviations
        return cls(rows, sums, counts, gram, moments, float(noise.clamp(min=0)) ** 0.5 if noise.ndim == 0 else 0.0)


def _class_sums(known: Mapping[str, Tensor], features: int) -> tuple[Tensor | None, Tensor | None]:
    """The sums (P, K, e), and their counts (P, K), which may stand in a last column or not be told."""
    sums, counts = known.get("class_sums"), known.get("images")
    if sums is None:
        return None, None
    sums = sums if sums.ndim == 3 else sums[None]
    if sums.shape[2] == features + 1:
        return sums[:, :, :-1], sums[:, :, -1]
    if sums.shape[2] != features:
        return None, None
    return sums, counts if counts is None or counts.ndim == 2 else counts[None]


def square(lower: Tensor) -> Tensor:
    """(p, p) the symmetric matrix with a lower triangle (p (p + 1) / 2,)."""
    size = int((2 * len(lower)) ** 0.5)
    rows, columns = torch.tril_indices(size, size)
    matrix = lower.new_empty(size, size)
    matrix[rows, columns] = lower
    matrix[columns, rows] = lower
    return matrix
