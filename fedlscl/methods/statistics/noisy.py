"""Heads in closed form from sums with noise, see `fedlscl.privacy`.

Features have a length of at most 1, so that it is known how much one image adds to the sums, and there is no intercept,
whose 1 would be as long as all features together. The classes' numbers of images are not sent, and every class may be
the answer.

Shapes: B batch, K classes, p features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.messages import Rule, not_negative
from fedlscl.methods.statistics.heads import (
    STEP,
    ClassMeans,
    ClosedFormHead,
    Ridge,
    Solution,
    Sums,
    one_hot,
    square,
    triangle,
)

NOISE = "noise"
"""The name among the sums of how much noise is in them: the sum of the squared deviations, see `NoisyHead.scales`."""

SHARE = 0.25
"""How much G counts beside S where both share the noise; chosen on images held out, see results/privacy.md."""


class NoisyHead(ClosedFormHead):
    """A rule that leads from sums with noise to a linear head."""

    rules: ClassVar[Mapping[str, Rule]] = {NOISE: not_negative}

    @abstractmethod
    def scales(self, features: int, classes: int) -> dict[str, Tensor]:
        """By sum, how large the noise of each value is beside that of the others.

        What an image of features with a length of at most 1 adds to all sums, divided by these, has a length of at most
        1. Noise of z times these is therefore that of the Gaussian mechanism with the multiplier z.
        """

    def counts(self, sums: Sums) -> Tensor:
        """1 for each class: whether there are images behind it is not told."""
        return torch.ones(sums["class_sums"].shape[-2], dtype=torch.float64)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The multiplier of the noise in all sums."""
        return {NOISE: float(sums[NOISE]) ** 0.5}

    def problem(self, sums: Sums, images: int) -> None:
        """Anything may be a sum with noise."""


class NoisyMeans(NoisyHead):
    """`ClassMeans` from s_c alone. An image adds its feature to one row: its length is that of the feature."""

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """s_c, and the noise."""
        return {"class_sums": (classes, features), NOISE: ()}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """s_c."""
        return {"class_sums": one_hot(labels, classes).T @ features, NOISE: torch.zeros((), dtype=torch.float64)}

    def scales(self, features: int, classes: int) -> dict[str, Tensor]:
        """1."""
        return {"class_sums": torch.ones(classes, features, dtype=torch.float64)}

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """As without noise, which has no direction."""
        (total,) = sums.values()
        weight = F.normalize(total["class_sums"], dim=1)
        return Solution(weight, weight.new_zeros(len(weight)), {})


class NoisyRidge(NoisyHead):
    """`Ridge` from G = sum of h h^T and S = sum of y h^T.

    How much an image adds. Of a symmetric matrix a triangle is released. With each value off the diagonal times sqrt(2)
    its length is that of the whole matrix, |h h^T| = |h|^2, since |h|^4 = sum over i of h_i^4 + 2 sum over i > j of
    h_i^2 h_j^2; without, it could be as long, where h has one value alone, so that nothing would be gained. To S an
    image adds h in one row. With G times a = `SHARE` the length of both is sqrt(a^2 |h|^4 + |h|^2), at most
    sqrt(a^2 + 1). Noise of this deviation in each of these values is one of sqrt(a^2 + 1) / a on the diagonal of G, of
    that over sqrt(2) off it, and of sqrt(a^2 + 1) in S.

    Args:
        ridge: strength and normalisation. With the strength `auto` it is the norm that the noise of G alone has, about
            sqrt(2 p) times that on its diagonal (Wigner's semicircle): it follows from public numbers, and G and the
            penalty together stay positive definite.
    """

    def __init__(self, ridge: Ridge) -> None:
        self.strength, self.normalise = ridge.strength, ridge.normalise

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The lower triangle of G, S, and the noise."""
        return {"gram": (features * (features + 1) // 2,), "class_sums": (classes, features), NOISE: ()}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """G and S."""
        return {
            "gram": triangle(features.T @ features),
            "class_sums": one_hot(labels, classes).T @ features,
            NOISE: torch.zeros((), dtype=torch.float64),
        }

    def scales(self, features: int, classes: int) -> dict[str, Tensor]:
        """See above."""
        both = (1 + SHARE**2) ** 0.5
        of_gram = torch.full((features, features), both / SHARE / 2**0.5, dtype=torch.float64)
        of_gram.diagonal().fill_(both / SHARE)
        return {"gram": triangle(of_gram), "class_sums": torch.full((classes, features), both, dtype=torch.float64)}

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """W = (G+ + strength I)^-1 S, with G+ as G, but zeros for its negative eigenvalues, which are noise."""
        (total,) = sums.values()
        values, vectors = torch.linalg.eigh(square(total["gram"]))
        deviation = (1 + SHARE**2) ** 0.5 / SHARE * float(total[NOISE]) ** 0.5
        strength = deviation * (2 * len(values)) ** 0.5 if self.strength == "auto" else self.strength
        rotated = vectors.T @ total["class_sums"].T
        solved = (vectors @ (rotated / (values.clamp(min=0) + strength)[:, None])).T.contiguous()
        if self.normalise:
            solved = F.normalize(solved, dim=1)
        return Solution(solved, solved.new_zeros(len(solved)), {"strength": strength})


def noisy(head: ClosedFormHead) -> NoisyHead:
    """The same rule for sums with noise.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(head, Ridge):
        return NoisyRidge(head)
    if isinstance(head, ClassMeans):
        return NoisyMeans()
    raise ValueError(
        f"model.privacy is set, but model.head {type(head).__name__} divides by the classes' numbers of images, which "
        "with noise may be 0 or less; take Ridge or ClassMeans"
    )


def of_unit_length(features: Tensor) -> Tensor:
    """(B, p) multiples of `STEP`, of any length, as such of a length of at most 1, and hardly less."""
    length = features.norm(dim=1, keepdim=True).clamp(min=STEP)
    # rounded towards zero no value grows; the factor is for the error of the division
    shortened: Tensor = (features / length * ((1 - 2**-20) / STEP)).trunc() * STEP
    return shortened
