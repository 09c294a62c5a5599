"""What the small model of Fed-LSCL is good for, as numbers for the record: nothing that is computed here is used.

Shapes: n images, e feature width, r LoRA rank, d ViT width.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.batches import Batch, Images
from fedlscl.client import Client
from fedlscl.evaluation import ALIKE
from fedlscl.models.adapters import LoRA, LowRank, ParameterGenerator

log = logging.getLogger(__name__)

SAMPLE = 32
"""How many images the small model is shown to be looked at, at most."""

THROUGH = 8
"""How many of these the ViT is shown, of which a pass takes long; twice as many after a task's last round."""

EVERY = 16
"""Of how many steps one has its gradient measured."""


def evenly(indices: Tensor, most: int = SAMPLE) -> Tensor:
    """At most so many of some images (n,), as far apart in their order as can be."""
    return indices[torch.linspace(0, len(indices) - 1, min(most, len(indices))).round().long()]


def distance(features: Tensor) -> float:
    """The mean distance of two of the features (n, e), n > 1."""
    return float(torch.pdist(features.double()).mean())


def varying(gram: Tensor) -> float:
    """The share of the energy of some vectors that is not in their mean: 1 - ||mean v||^2 / mean ||v||^2.

    Args:
        gram: (n, n) float64, their inner products.

    Returns:
        0 where all vectors are equal (or zero), to 1.
    """
    energy = float(gram.diagonal().mean())
    return max(0.0, 1 - float(gram.mean()) / energy) if energy > 0 else 0.0


def inner(vectors: Tensor) -> Tensor:
    """(n, n) float64, the inner products of some vectors (n, ...)."""
    rows = vectors.double().flatten(1)
    return rows @ rows.mT


def products(lora: LoRA) -> Tensor:
    """(n, n) float64, the inner products <B_i A_i, B_j A_j> of n LoRA pairs' products, none of which is formed."""
    n, rank, _ = lora.a.shape
    a, b = (inner(factor.reshape(n * rank, -1)) for factor in (lora.a, lora.b.mT))
    found: Tensor = (a * b).view(n, rank, n, rank).sum((1, 3))
    return found


def relative(change: Tensor, to: Tensor) -> Tensor:
    """(n,) the L2 norm of a change (n, ...), relative to that of what is changed (n, ...)."""
    changed, before = (torch.linalg.vector_norm(x.float().flatten(1), dim=1) for x in (change, to))
    found: Tensor = changed / before
    return found


class Generating(Client):
    """A client whose small model generates the LoRA weights of every image, and what is looked at in it."""

    block: int  # index of the adapted ViT block
    scale: float  # of the LoRA's product, alpha / r
    generator: ParameterGenerator  # phi
    head: nn.Module
    unprotected = (
        "trains phi on the images in steps without noise, and all that it sends depends on phi, a row of features for "
        "each image in the buffer as well as T = sum of C_i Phi_i: noise on that protects nobody; that takes DP-SGD on "
        "phi, which is not there"
    )
    _warned = False

    @abstractmethod
    def generate(self, images: Tensor) -> dict[str, Tensor]:
        """E (B, e) as `features` and W (B, P) as `weights`."""

    def pair(self, weights: Tensor) -> LowRank:
        """W (B, P) as the LoRA that adapts the ViT."""
        return LowRank(self.block, self.generator.split(weights), scale=self.scale)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note the length of the gradient of each part (cnn, generator, head) in some steps, as Adam was given it."""
        if batch_idx % EVERY:
            return
        lengths = {}
        for name, part in self.named_children():
            if gradients := [p.grad for p in part.parameters() if p.grad is not None]:
                lengths[f"gradient/{name}"] = nn.utils.get_total_norm(gradients)
        self.tally(lengths)

    def diagnose(self) -> dict[str, float]:
        """How much E and W differ between images, what the LoRA changes, and what it costs to mix W up.

        On at most 32 images, evenly from the buffer and the current task, in evaluation mode. Under `generated/`:

            feature_distance     mean over pairs of images of ||E_i - E_j||
            feature_variance     1 - ||mean E||^2 / mean ||E||^2
            weight_variance      the same of W
            product_variance     the same of the LoRA's product B A
            qkv_change           mean over images of ||(alpha / r) B A h|| / ||W h + c||, over all tokens h
            class_token_change   mean over 8 of them of ||f - f_0|| / ||f_0||, f_0 the frozen ViT's feature

        and after a task's last round, in points of accuracy among the classes seen, on 16 of them, on which
        `class_token_change` is taken then:

            shuffled_cost        when these images' W are shuffled among them
            mean_cost            when every image is given their mean W
        """
        images = evenly(torch.cat([self.memory.buffer, self.current]))
        if len(images) < 2:
            return {}
        seen = self.observe(images, self._generated)
        features, weights = seen["features"], seen["weights"]
        rows = evenly(torch.arange(len(images)), 2 * THROUGH if self.round.ends_task else THROUGH)
        few, own = images[rows], weights[rows]
        through = self.observe(few, self._with_and_without(own))
        found = {
            "feature_distance": distance(features),
            "feature_variance": varying(inner(features)),
            "weight_variance": varying(inner(weights)),
            "product_variance": varying(products(self.generator.split(weights))),
            "qkv_change": float(seen["qkv"].mean()),
            "class_token_change": float(through["class_token"].mean()),
        }
        if self.round.ends_task:
            accuracy = self._accuracy(through["logits"], few)
            shuffled = own[torch.randperm(len(own), generator=self.rng("diagnosis"))]
            found["shuffled_cost"] = accuracy - self._accuracy(self._logits_under(shuffled, few), few)
            mean = own.mean(0).expand_as(own)
            found["mean_cost"] = accuracy - self._accuracy(self._logits_under(mean, few), few)
            self._warn_if_alike(found["feature_distance"])
        return {f"generated/{name}": value for name, value in found.items()}

    def _generated(self, images: Images) -> dict[str, Tensor]:
        """E and W of some images, and how far the LoRA moves (B,) the `qkv` projection."""
        generated = self.generate(images.pixels)
        given, before = self.vit.projected(self.frozen(images)["tokens"], self.block)
        lora = self.pair(generated["weights"]).lora
        return {**generated, "qkv": relative(self.scale * (given @ lora.a.mT @ lora.b.mT), before)}

    def _with_and_without(self, weights: Tensor) -> Callable[[Images], dict[str, Tensor]]:
        """What says, with W (n, P), of n images, batch by batch: logits, and how far the `class_token` (B,) moves."""
        given = iter(torch.split(weights, self.evaluation_batch_size))

        def compute(batch: Images) -> dict[str, Tensor]:
            tokens = self.frozen(batch)["tokens"]
            adapted = self.vit.upper(tokens, self.block, [self.pair(next(given).to(self.device))])
            frozen = self.vit.upper(tokens, self.block)
            return {"logits": self.head(adapted), "class_token": relative(adapted - frozen, frozen)}

        return compute

    def _logits_under(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits (n, K) of training images (n,) with W (n, P) of others in the place of their own."""
        given = iter(torch.split(weights, self.evaluation_batch_size))

        def compute(batch: Images) -> dict[str, Tensor]:
            tokens = self.frozen(batch)["tokens"]
            adapted = self.vit.upper(tokens, self.block, [self.pair(next(given).to(self.device))])
            return {"logits": self.head(adapted)}

        return self.observe(images, compute)["logits"]

    def _accuracy(self, logits: Tensor, images: Tensor) -> float:
        """In % among the classes seen."""
        chosen = logits.masked_fill(~self.seen_mask.cpu(), -torch.inf).argmax(1)
        return 100 * float((chosen == self.data.labels(images)).double().mean())

    def _warn_if_alike(self, distance: float) -> None:
        """Say once that the small model says the same of every image."""
        if distance < ALIKE and not self._warned:
            self._warned = True
            log.warning(
                "the small model of client %d says the same of every image after task %d: two images' features are "
                "%.2g apart in the mean, of at most 2; their LoRA is then one and the same (said once; generated/* in "
                "metrics.csv has all clients)",
                self.index,
                self.round.task,
                distance,
            )
