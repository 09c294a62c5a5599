"""What the small model of Fed-LSCL is good for, as numbers for the record: nothing that is computed here is used.

Shapes: n images, e feature width, r LoRA rank, d ViT width.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.batches import Batch, Images
from fedlscl.client import Client
from fedlscl.models.adapters import LoRA, LowRank, ParameterGenerator

log = logging.getLogger(__name__)

SAMPLE = 32
"""How many images are looked at, at most."""

EVERY = 16
"""Of how many steps one has its gradient measured."""

ALIKE = 0.02
"""Mean distance of features of unit length, a degree, below which the small model says the same of every image."""


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


@dataclass
class Overheard:
    """Injected into a block, it changes nothing and keeps what goes into the qkv projection and what comes out.

    Args:
        block: index of the block.
    """

    block: int
    inputs: Tensor = field(init=False)  # (n, T, d)
    outputs: Tensor = field(init=False)  # (n, T, 3d)

    @contextmanager
    def into(self, block: nn.Module) -> Iterator[None]:
        """Listen inside the context."""

        def listen(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.inputs, self.outputs = inputs[0], output

        handle = block.get_submodule("attn.qkv").register_forward_hook(listen)
        try:
            yield
        finally:
            handle.remove()


class Generating(Client):
    """A client whose small model generates the LoRA weights of every image, and what is looked at in it."""

    block: int  # index of the adapted ViT block
    scale: float  # of the LoRA's product, alpha / r
    generator: ParameterGenerator  # phi
    head: nn.Module
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
            class_token_change   mean over images of ||f - f_0|| / ||f_0||, f_0 the frozen ViT's feature

        and after a task's last round, in points of accuracy among the classes seen, on the same images:

            shuffled_cost        when the images' W are shuffled among them
            mean_cost            when every image is given the mean W
        """
        images = evenly(torch.cat([self.memory.buffer, self.current]))
        if len(images) < 2:
            return {}
        seen = self.observe(images, self._with_and_without)
        features, weights = seen["features"], seen["weights"]
        found = {
            "feature_distance": distance(features),
            "feature_variance": varying(inner(features)),
            "weight_variance": varying(inner(weights)),
            "product_variance": varying(products(self.generator.split(weights))),
            "qkv_change": float(seen["qkv"].mean()),
            "class_token_change": float(seen["class_token"].mean()),
        }
        if self.round.ends_task:
            own = self._accuracy(seen["logits"], images)
            shuffled = weights[torch.randperm(len(images), generator=self.rng("diagnosis"))]
            found["shuffled_cost"] = own - self._accuracy(self._logits_under(shuffled, images), images)
            mean = weights.mean(0).expand_as(weights)
            found["mean_cost"] = own - self._accuracy(self._logits_under(mean, images), images)
            self._warn_if_alike(found["feature_distance"])
        return {f"generated/{name}": value for name, value in found.items()}

    def _with_and_without(self, images: Images) -> dict[str, Tensor]:
        """E, W and logits of some images, and how far the LoRA moves (B,) `qkv` and `class_token`."""
        tokens = self.frozen(images)["tokens"]
        generated, heard = self.generate(images.pixels), Overheard(self.block)
        frozen = self.vit.upper(tokens, self.block, [heard])
        pair = self.pair(generated["weights"])
        adapted = self.vit.upper(tokens, self.block, [pair])
        added = self.scale * (heard.inputs @ pair.lora.a.mT @ pair.lora.b.mT)
        return {
            **generated,
            "logits": self.head(adapted),
            "qkv": relative(added, heard.outputs),
            "class_token": relative(adapted - frozen, frozen),
        }

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
