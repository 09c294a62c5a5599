"""Linear discriminants on several blocks of the frozen ViT, from sums over all clients: a method of our own.

See docs/methods/fed_discriminants.md. There is no objective and no gradient. Each of the last four blocks gives two
vectors an image, class token and mean patch token (d). With the mean mu_c of class c and the mean m over all images,
the covariance S within classes, A = (1 - g) S + g (tr S / d) I, and w_c = A^-1 (mu_c - m), a vector x has the scores

    (x - m)^T w_c - (mu_c - m)^T w_c / 2   or   (x - m)^T w_c / |w_c|.

The logits are the weighted sum of the scores of all vectors. Each client takes the weights, the g, and which of the two
scores, of a few, with which most of its training images are right when each is left out of the sums.

Aggregation: a sum over clients and tasks; each client solves for a head of its own.

What travels: up the sums over a client's new images, once a task; down those over all images so far, in the same shape.

Logged: server/images; discriminants/choice, the number of the client's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.messages import Download, Rule, Schema, TensorSpec, not_negative
from fedlscl.methods.statistics.client import StatisticsClient
from fedlscl.methods.statistics.heads import (
    ClosedFormHead,
    Solution,
    Sums,
    as_message,
    one_hot,
    semidefinite_triangles,
    square,
    triangle,
)
from fedlscl.methods.statistics.server import StatisticsServer
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answer, Answers, Context, Metrics

BLOCKS = 4
"""How many of the last blocks give features; a ViT with fewer gives those that it has."""

WEIGHTS = ((1, 1 / 2), (1,) * 8)
"""Of class token and mean patch token of the last block, of the one before, and so on; 0 where there is none."""


SMALL_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Of the small model's features, where there are any, as a multiple of all weights of the ViT's vectors together."""

SMALL_SHRINKAGE = 0.01
"""The g of the small model's features."""


class Choice(NamedTuple):
    """What a client chooses."""

    weights: tuple[float, ...]
    shrinkage: float  # g of the ViT's vectors
    unit: bool  # whether the weights of every class are of length 1
    small: float = 0.0  # one of `SMALL_WEIGHTS`


CHOICES = tuple(Choice(*one) for one in product(WEIGHTS, (0.1, 0.3), (False, True)))

CHOICES_OF_BOTH = tuple(one._replace(small=small) for small in SMALL_WEIGHTS for one in CHOICES)


class Discriminant(NamedTuple):
    """What follows from the sums over one of the vectors, with one shrinkage."""

    inverse: Tensor  # (d, d) A^-1
    middle: Tensor  # (d,) m
    apart: Tensor  # (K, d) mu_c - m, 0 for a class without images
    counts: Tensor  # (K,) images of each class
    share: float  # of a single image's (x - mu_c)(x - mu_c)^T in A

    def head(self, unit: bool) -> tuple[Tensor, Tensor]:
        """Weights (K, d) and biases (K,)."""
        weight = self.apart @ self.inverse
        bias = -(weight * self.apart).sum(dim=1) / 2
        if unit:
            weight, bias = F.normalize(weight, dim=1), torch.zeros_like(bias)
        return weight, bias - weight @ self.middle

    def left_out(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, K) of vectors (n, d) behind the sums, each with mu and S as they are without itself.

        The degrees of freedom, tr S, m, and the lengths of weights stay. That takes (1 - g) n_c / (n_c - 1)
        (x - mu_c)(x - mu_c)^T / freedom from A (Sherman and Morrison, 1950). A class of which there is no other image
        is as it was.

        Returns:
            The scores, and those of weights of length 1.
        """
        n, rows = self.counts[labels], torch.arange(len(x))
        others = (n - 1).clamp(min=1)
        x = x - self.middle
        r = (x - self.apart[labels]) * (n > 1)[:, None]
        u = r @ self.inverse
        taken = self.share * n / others
        factor = 1 / (1 - taken * (r * u).sum(dim=1))  # r times the inverse without the image is factor u
        gained = taken * factor  # of u u^T by that inverse
        along = u @ self.apart.T  # (n, K)
        weight = self.apart @ self.inverse
        products = x @ weight.T + (gained * (x * u).sum(dim=1))[:, None] * along
        squares = (weight * self.apart).sum(dim=1) + gained[:, None] * along.square()
        # the own class's mean is mu - r / (n - 1)
        own = factor * along[rows, labels]
        products[rows, labels] -= factor * (x * u).sum(dim=1) / others
        squares[rows, labels] += (factor * (r * u).sum(dim=1) / others - 2 * own) / others
        lengths = weight.norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
        return products - squares / 2, products / lengths


class Discriminants(ClosedFormHead):
    """One linear discriminant for each of the vectors of an image, and the weighted sum of their scores.

    Shapes: G vectors of d features each from the ViT, and one of e from a small model or none, p = G d + e.

    Args:
        groups: G; those of the last block come last.
        small: e, and 0 without a small model; its vector is behind all others.
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        "images": not_negative,
        "moments": semidefinite_triangles,
        "small_moments": semidefinite_triangles,
    }

    def __init__(self, groups: int = 2 * BLOCKS, small: int = 0) -> None:
        self.groups, self.small = groups, small
        self.choices = CHOICES_OF_BOTH if small else CHOICES

    def parts(self, features: Tensor) -> list[Tensor]:
        """The vectors (..., d), and the small model's (..., e), of features (..., p)."""
        end = features.shape[-1] - self.small
        return [*features[..., :end].chunk(self.groups, dim=-1), *[features[..., end:]] * bool(self.small)]

    def shapes(self, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """n_c, s_c, and for each of the vectors the lower triangle of the sum of x x^T."""

        def triangles(vectors: int, size: int) -> tuple[int, int]:
            return vectors, size * (size + 1) // 2

        found = {"images": (classes,), "class_sums": (classes, features)}
        found["moments"] = triangles(self.groups, (features - self.small) // self.groups)
        return {**found, "small_moments": triangles(1, self.small)} if self.small else found

    def sums(self, features: Tensor, labels: Tensor, numbers: Tensor, classes: int) -> dict[str, Tensor]:
        """n_c, s_c, and the sums of x x^T."""
        members, moments = one_hot(labels, classes), [triangle(x.T @ x) for x in self.parts(features)]
        found = {"images": members.sum(dim=0), "class_sums": members.T @ features}
        found["moments"] = torch.stack(moments[: self.groups])
        return {**found, "small_moments": torch.stack(moments[self.groups :])} if self.small else found

    def counts(self, sums: Sums) -> Tensor:
        """n_c."""
        return sums["images"]

    def weights(self, choice: Choice) -> list[float]:
        """Of each vector, in the order in which they are in the features."""
        by_block = [choice.weights[n : n + 2] or (0.0, 0.0) for n in range(0, self.groups, 2)]
        of_vit = [weight for pair in reversed(by_block) for weight in pair]
        return [*of_vit, *[choice.small * sum(of_vit)] * bool(self.small)]

    def discriminants(self, sums: Sums, shrinkage: float) -> list[Discriminant]:
        """One for each of the vectors; the small model's has a shrinkage of its own."""
        images = sums["images"]
        means = self.parts(sums["class_sums"] / images.clamp(min=1)[:, None])
        freedom = float((images.sum() - (images > 0).sum()).clamp(min=1))
        moments = [*sums["moments"], *sums.get("small_moments", ())]
        shrinkages = [*[shrinkage] * self.groups, *[SMALL_SHRINKAGE] * bool(self.small)]
        found = []
        for moment, mean, g in zip(moments, means, shrinkages, strict=True):
            covariance = (square(moment) - (mean.T * images) @ mean) / freedom
            spread = covariance.diagonal().mean().clamp(min=1e-6)  # 0 where no class has two images
            shrunk = (1 - g) * covariance
            shrunk.diagonal().add_(g * spread)
            middle = (mean.T @ images) / images.sum()
            apart = (mean - middle) * (images > 0)[:, None]
            found.append(Discriminant(torch.linalg.inv(shrunk), middle, apart, images, (1 - g) / freedom))
        return found

    def solve(self, sums: Mapping[int, Sums], choice: Choice = CHOICES[0]) -> Solution:
        """The head with some choice."""
        (total,) = sums.values()
        heads = [one.head(choice.unit) for one in self.discriminants(total, choice.shrinkage)]
        weights = self.weights(choice)
        weight = torch.cat([of * one for of, (one, _) in zip(weights, heads, strict=True)], dim=1)
        bias = torch.stack([of * one for of, (_, one) in zip(weights, heads, strict=True)]).sum(dim=0)
        return Solution(weight, bias, {})

    def hits(self, sums: Sums, features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """(choices,) how many images are right, with each choice, where each is left out of the sums.

        Args:
            sums: over these and all other images.
            features: (n, p) float64.
            labels: (n,) class numbers.
            classes: (K,) true for those that compete.
        """
        parts, found = self.parts(features), {}
        for shrinkage in {choice.shrinkage for choice in self.choices}:
            fitted = self.discriminants(sums, shrinkage)
            scores = [one.left_out(x, labels) for one, x in zip(fitted, parts, strict=True)]
            for unit in (False, True):
                found[shrinkage, unit] = torch.stack([of[unit] for of in scores])
        right = []
        for choice in self.choices:
            weights = torch.tensor(self.weights(choice), dtype=torch.float64)
            summed = torch.einsum("g,gnk->nk", weights, found[choice.shrinkage, choice.unit])
            right.append((summed.masked_fill(~classes, -torch.inf).argmax(dim=1) == labels).sum())
        return torch.stack(right)


class DiscriminantsClient(StatisticsClient):
    """Sends sums over its images, once a task, and solves for its head from those of all.

    Args:
        evaluation_batch_size: largest batch; the larger, the more memory and, on a GPU, speed.
    """

    head: Discriminants
    hits: Tensor  # (2, choices) images that were right when left out: of finished tasks, and of the current one

    def __init__(self, evaluation_batch_size: int = 128) -> None:
        super().__init__(Discriminants(), evaluation_batch_size=evaluation_batch_size)

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Nothing is known of the choices yet."""
        if not vit.num_prefix_tokens:
            raise ValueError(f"backbone.name: '{vit.name}' has no class token, which DiscriminantsClient needs")
        super().build(vit, cnn, cnn_name, num_classes)
        self.head = self.made_head(2 * min(BLOCKS, vit.depth), cnn)
        self.register_buffer("hits", torch.zeros(2, len(self.head.choices), dtype=torch.int64))

    def made_head(self, groups: int, cnn: SmallModelSpec) -> Discriminants:
        """Discriminants of the ViT's G vectors."""
        return Discriminants(groups)

    @property
    def features(self) -> int:
        """p, of the class tokens and the mean patch tokens of all blocks."""
        return self.head.groups * self.vit.width + self.head.small

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The frozen features (B, p)."""
        return {"features": self.vit.summaries(images, self.head.groups // 2).flatten(1)}

    def begin_round(self, round: Round) -> None:
        """What was right in the last task counts from now on."""
        super().begin_round(round)
        if self.new:
            self.hits[0] += self.hits[1]
            self.hits[1] = 0

    def on_train_start(self) -> None:
        """Also log the choice."""
        super().on_train_start()
        self.log("discriminants/choice", float(self.choice()))

    def choice(self) -> int:
        """Which of the choices has been right most often; of those that are alike the first."""
        return int(self.hits.sum(dim=0).argmax())

    def download(self, message: Download) -> None:
        """Keep the sums until the images are at hand."""
        self.memory.received = dict(message.tensors)

    def on_download_end(self) -> None:
        """Choose, and solve for the head."""
        sums = self.memory.received
        begun = self.memory.begun
        current = self.data.train_images(self.behind, begun)
        if int(self.collected) == begun > self.memory.learned:  # they are behind the sums
            observed = self.observe(current, lambda images: {"features": self.output_features(images)})
            features, labels = self.seen_by_head(observed["features"]), self.data.labels(current)
            self.hits[1] = self.head.hits(sums, features, labels, self.data.class_mask(0, begun))
        solution = self.head.solve({0: sums}, self.head.choices[self.choice()])
        self.memory.received = as_message(solution, self.head.counts(sums))

    def download_schema(self) -> Schema:
        """The sums over all images, in the shape of those that are sent."""
        shapes = self.head.shapes(self.features, self.num_classes)
        return {name: TensorSpec(shape, torch.float64) for name, shape in shapes.items()}


class DiscriminantsServer(StatisticsServer):
    """Adds up what clients send, and answers everybody with the sums."""

    serves, needs, gives = "DiscriminantsClient", ("moments",), ("moments",)

    def answers(self, context: Context) -> tuple[Answers, Metrics]:
        """The sums over all images so far."""
        images = float(self.head.counts(self.sums[0]).sum())
        return dict.fromkeys(range(context.clients), Answer(self.sums[0])), {"images": images}
