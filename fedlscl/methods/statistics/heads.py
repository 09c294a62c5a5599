"""Which sums over images a head in closed form needs, and how it follows from them.

Shapes: B batch, K classes, p features of an image, J clients. Sums are float64, and exact as long as every feature is a
multiple of `STEP` and no sum is beyond 2^53 STEP^2 (5e8, which features of the size of 1 reach with 5e8 images).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.checks import at_least, positive
from fedlscl.messages import Rule, Schema, TensorSpec, not_negative, semidefinite

STEP = 2.0**-12
"""Features are rounded to multiples of this: products of two are then exact in float64, and so are sums of these."""

FOLDS = 5
"""A fifth of the images is held out where a strength is chosen (RanPAC, McDonnell et al., 2023)."""

STRENGTHS = tuple(10.0**power for power in range(-8, 10))
"""Among which `auto` chooses, those of RanPAC."""

Sums = Mapping[str, Tensor]


def triangle(matrix: Tensor) -> Tensor:
    """(p (p + 1) / 2,) the lower triangle of a symmetric matrix (p, p)."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def square(lower: Tensor) -> Tensor:
    """(p, p) the symmetric matrix with a lower triangle (p (p + 1) / 2,)."""
    size = int((2 * len(lower)) ** 0.5)
    rows, columns = torch.tril_indices(size, size, device=lower.device)
    matrix = lower.new_empty(size, size)
    matrix[rows, columns] = lower
    matrix[columns, rows] = lower
    return matrix


def semidefinite_triangles(tensor: Tensor) -> str | None:
    """Lower triangles (n, p (p + 1) / 2) of sums of x x^T, see `fedlscl.messages.semidefinite`."""
    return next((problem for lower in tensor if (problem := semidefinite(square(lower)))), None)


class Solution(NamedTuple):
    """A linear head."""

    weight: Tensor  # (K, p) float64
    bias: Tensor  # (K,) float64
    metrics: Mapping[str, float]


def as_message(solution: Solution, counts: Tensor) -> dict[str, Tensor]:
    """A head as it travels; `counts` (K,) tells of which classes an image is behind it."""
    return {"weight": solution.weight.float(), "bias": solution.bias.float(), "known": counts > 0}


def head_schema(features: int, classes: int) -> Schema:
    """What a message with a head for p features and K classes looks like."""
    return {
        "weight": TensorSpec((classes, features)),
        "bias": TensorSpec((classes,)),
        "known": TensorSpec((classes,), torch.bool),
    }


class ClosedFormHead(ABC):
    """A rule that leads from sums over images to a linear head."""

    by_client: ClassVar[bool] = False  # whether a sum over all clients will not do
    rules: ClassVar[Mapping[str, Rule]] = {"images": not_negative}  # what a client's sums must keep, by name

    @abstractmethod
    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The shape of each sum for p features and K classes."""

    @abstractmethod
    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """The sums over some images.

        Args:
            features: (B, p) float64, multiples of `STEP`.
            labels: (B,) class numbers.
            numbers: (B,) what `numbers_of` gives for the images, by which some rules part them.
            classes: K.
        """

    @abstractmethod
    def counts(self, sums: Sums) -> Tensor:
        """(K,) the number of images of each class behind some sums."""

    @abstractmethod
    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """The head.

        Args:
            sums: over all images so far, by client if `by_client`, else under one number.
        """

    def schema(self, features: int, classes: int) -> Schema:
        """What a message with these sums must look like; it may have none, where a client has nothing new."""
        shapes = self.shapes(features, classes)
        return {
            n: TensorSpec(shape, torch.float64, optional=True, rule=self.rules.get(n)) for n, shape in shapes.items()
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """What is logged of some sums."""
        return {"images": float(self.counts(sums).sum())}

    def problem(self, sums: Sums, images: int) -> str | None:
        """Why these cannot be the sums over so many images, or None."""
        counts = self.counts(sums)
        if bool((counts < 0).any()) or bool((counts != counts.round()).any()) or int(counts.sum()) != images:
            return f"is over {counts.tolist()} images of the classes, must be over {images}"
        return None


class ClassMeans(ClosedFormHead):
    """The class whose mean is nearest by angle: FedNCM (Legate et al., 2023), NCM with one client."""

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """n_c and s_c."""
        return {"images": (classes,), "class_sums": (classes, features)}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """n_c and s_c."""
        members = one_hot(labels, classes)
        return {"images": members.sum(dim=0), "class_sums": members.T @ features}

    def counts(self, sums: Sums) -> Tensor:
        """n_c."""
        return sums["images"]

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """w_c = s_c / |s_c|, since a sum points where its mean does."""
        (total,) = sums.values()
        weight = F.normalize(total["class_sums"], dim=1)
        return Solution(weight, weight.new_zeros(len(weight)), {})


class Ridge(ClosedFormHead):
    """Least squares on one-hot labels with a penalty: Fed3R (Fanì et al., 2024), AFL (He et al., 2025).

    With `projection` it is RanPAC (McDonnell et al., 2023), whose federated form is STSA's exact one.

    Args:
        strength: of the penalty on the squared weights; `auto` takes that of `STRENGTHS` which, fitted to four fifths
            of the images, has the least squared error on the others, for which clients send the sums of both parts.
        normalise: divide every class's weights by their norm, as Fed3R may.
    """

    rules: ClassVar[Mapping[str, Rule]] = {"gram": semidefinite_triangles}

    def __init__(self, strength: float | Literal["auto"] = "auto", normalise: bool = False) -> None:
        if strength != "auto":
            positive("model.head", strength=strength)
        self.strength, self.normalise = strength, normalise
        self.parts = 2 if strength == "auto" else 1

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The lower triangle of G, and S whose last column counts the images; of each part."""
        size = features + 1
        return {"gram": (self.parts, size * (size + 1) // 2), "class_sums": (self.parts, classes, size)}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """G and S, of the fitted images and of those held out."""
        x, members = F.pad(features, (0, 1), value=1.0), one_hot(labels, classes)
        part = numbers % FOLDS == FOLDS - 1 if self.parts == 2 else torch.zeros_like(numbers, dtype=torch.bool)
        of_part = [part == bool(number) for number in range(self.parts)]
        return {
            "gram": torch.stack([triangle(x[chosen].T @ x[chosen]) for chosen in of_part]),
            "class_sums": torch.stack([members[chosen].T @ x[chosen] for chosen in of_part]),
        }

    def counts(self, sums: Sums) -> Tensor:
        """The sum of the ones in [h; 1]."""
        return sums["class_sums"].sum(dim=0)[:, -1]

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """W = (G + strength I)^-1 S."""
        (total,) = sums.values()
        gram, target = square(total["gram"].sum(dim=0)), total["class_sums"].sum(dim=0).T
        strength = self._chosen(total) if self.strength == "auto" else self.strength
        solved = torch.linalg.solve(
            gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), target
        )
        if self.normalise:
            solved = solved / solved[:-1].norm(dim=0).clamp(min=torch.finfo(solved.dtype).tiny)
        return Solution(solved[:-1].T.contiguous(), solved[-1].contiguous(), {"strength": strength})

    @staticmethod
    def _chosen(total: Sums) -> float:
        """The strength with the least squared error |Y - X W|^2 on the images held out, from sums alone."""
        fitted, held = (square(gram) for gram in total["gram"])
        target, wanted = (part.T for part in total["class_sums"])
        values, vectors = torch.linalg.eigh(fitted)
        values, rotated = values.clamp(min=0), vectors.T @ target
        errors = []
        for strength in STRENGTHS:
            weight = vectors @ (rotated / (values + strength)[:, None])
            errors.append(float((weight * (held @ weight - 2 * wanted)).sum()))
        return STRENGTHS[errors.index(min(errors))]


class ClassCovariances(ClosedFormHead):
    """Ridge regression whose second moments the server estimates from the clients' class means: FedCOF (2025).

    With `projection` it is the cheap form of STSA (2026).

    Args:
        shrinkage: what is added to the diagonal of each class's covariance.
        means: how many means a client sends of each class, each of a part of its images; more of them tell more.
    """

    by_client = True

    def __init__(self, shrinkage: float = 1.0, means: int = 1) -> None:
        positive("model.head", shrinkage=shrinkage)
        at_least(1, "model.head", means=means)
        self.shrinkage, self.means = shrinkage, means

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """n_c and s_c, of each part."""
        return {"images": (self.means, classes), "class_sums": (self.means, classes, features)}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """n_c and s_c, of each part."""
        members = one_hot(labels, classes)
        parts = [members * (numbers % self.means == number)[:, None] for number in range(self.means)]
        return {
            "images": torch.stack([part.sum(dim=0) for part in parts]),
            "class_sums": torch.stack([part.T @ features for part in parts]),
        }

    def counts(self, sums: Sums) -> Tensor:
        """n_c."""
        return sums["images"].sum(dim=0)

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """W = G^-1 [n_c mu_c], its columns divided by their norms, with

        G = sum over c of (n_c - 1) Sigma_c + n g g^T + shrinkage I, and
        Sigma_c = sum over the means j of c of n_cj (mu_cj - mu_c)(mu_cj - mu_c)^T / (J_c - 1) + shrinkage I,

        g the mean of all features. The last term, which is ours, is for single images, that have no covariance.
        """
        images = torch.cat([sums[client]["images"] for client in sorted(sums)])  # (J, K)
        class_sums = torch.cat([sums[client]["class_sums"] for client in sorted(sums)])  # (J, K, p)
        total, summed = images.sum(dim=0), class_sums.sum(dim=0)
        means = summed / total.clamp(min=1)[:, None]
        overall = summed.sum(dim=0) / total.sum()
        gram = total.sum() * torch.outer(overall, overall)
        for label in total.nonzero().flatten().tolist():
            of_class = images[:, label]
            having = of_class > 0
            apart = class_sums[having, label] / of_class[having][:, None] - means[label]
            covariance = (apart.T * of_class[having]) @ apart / max(len(apart) - 1, 1)
            covariance.diagonal().add_(self.shrinkage)
            gram += (total[label] - 1) * covariance
        gram.diagonal().add_(self.shrinkage)
        solved = torch.linalg.solve(gram, summed.T)
        return Solution(F.normalize(solved, dim=0).T.contiguous(), solved.new_zeros(len(total)), {})


class ClassGaussians(ClosedFormHead):
    """A head trained on features drawn from a Gaussian of each class: CCVR (Luo et al., 2021) on a frozen ViT.

    Args:
        covariance: one for each `class`, or one `shared` by all, whose sums are K times smaller.
        shrinkage: what is added to the diagonal of a covariance.
        draws: features drawn of each class.
        steps: of Adam on all of them together.
        learning_rate: of Adam.
    """

    rules: ClassVar[Mapping[str, Rule]] = {"images": not_negative, "moments": semidefinite_triangles}

    def __init__(
        self,
        covariance: Literal["class", "shared"] = "class",
        shrinkage: float = 1e-3,
        draws: int = 200,
        steps: int = 200,
        learning_rate: float = 0.01,
    ) -> None:
        positive("model.head", shrinkage=shrinkage, learning_rate=learning_rate)
        at_least(1, "model.head", draws=draws, steps=steps)
        self.covariance, self.shrinkage, self.draws = covariance, shrinkage, draws
        self.steps, self.learning_rate = steps, learning_rate

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """n_c, s_c, and the lower triangle of the sum of h h^T, of each class or of all together."""
        groups = classes if self.covariance == "class" else 1
        moments = (groups, features * (features + 1) // 2)
        return {"images": (classes,), "class_sums": (classes, features), "moments": moments}

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """n_c, s_c, and the sums of h h^T."""
        members, parts = one_hot(labels, classes), [features]
        if self.covariance == "class":
            parts = [features[labels == label] for label in range(classes)]
        moments = torch.stack([triangle(part.T @ part) for part in parts])
        return {"images": members.sum(dim=0), "class_sums": members.T @ features, "moments": moments}

    def counts(self, sums: Sums) -> Tensor:
        """n_c."""
        return sums["images"]

    def solve(self, sums: Mapping[int, Sums]) -> Solution:
        """Draw, and minimise the cross-entropy; what is drawn follows torch's global generator."""
        (total,) = sums.values()
        images = total["images"]
        known = images.nonzero().flatten()
        means = total["class_sums"] / images.clamp(min=1)[:, None]
        spread = self._spread(total, means)
        drawn = torch.randn(len(known), self.draws, means.shape[1], dtype=means.dtype)
        features = (means[known][:, None] + drawn @ spread).flatten(0, 1)
        labels = torch.arange(len(known)).repeat_interleave(self.draws)
        weight, bias = fitted(features, labels, len(known), self.steps, self.learning_rate)
        whole, offsets = torch.zeros_like(means), torch.zeros_like(images)
        whole[known], offsets[known] = weight, bias
        return Solution(whole, offsets, {})

    def _spread(self, total: Sums, means: Tensor) -> Tensor:
        """(classes with images, p, p), or (1, p, p) for all of them: the transposed factors of the covariances."""
        images = total["images"]
        if self.covariance == "class":
            known = images.nonzero().flatten()
            moments = torch.stack([square(total["moments"][label]) for label in known.tolist()])
            centred = moments - images[known][:, None, None] * means[known][:, :, None] * means[known][:, None]
            freedom = (images[known] - 1).clamp(min=1)[:, None, None]
        else:
            centred = (square(total["moments"][0]) - (means.T * images) @ means)[None]
            freedom = (images.sum() - (images > 0).sum()).clamp(min=1)
        covariance = centred / freedom
        covariance.diagonal(dim1=1, dim2=2).add_(self.shrinkage)
        factors: Tensor = torch.linalg.cholesky(covariance)
        return factors.mT


def fitted(features: Tensor, labels: Tensor, classes: int, steps: int, learning_rate: float) -> tuple[Tensor, Tensor]:
    """Weights (C, p) and offsets (C,) of a linear head after some steps of Adam on all features (n, p) together."""
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features, weight, bias), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return weight.detach(), bias.detach()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, K) float64."""
    return F.one_hot(labels, classes).double()


def added(parts: Iterable[Sums]) -> dict[str, Tensor]:
    """The sum of some sums."""
    found: dict[str, Tensor] = {}
    for sums in parts:
        for name, tensor in sums.items():
            found[name] = found[name] + tensor if name in found else tensor
    return found
