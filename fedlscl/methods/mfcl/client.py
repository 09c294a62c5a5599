"""MFCL's client: replay from the generator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl import checks
from fedlscl.batches import Batch, Output
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import above, below
from fedlscl.messages import Schema, optional, schema_of
from fedlscl.methods.data_free import DataFreeClient
from fedlscl.methods.mfcl.generator import LATENT, ImageGenerator, as_pixels, without_numbers
from fedlscl.models.cnn import SmallModel


class Past(NamedTuple):
    """What a client replays from; a tuple keeps the networks out of the client's module tree."""

    generator: ImageGenerator
    cnn: SmallModel  # f_old
    weight: Tensor  # (|Old|, e) of h_old
    bias: Tensor  # (|Old|,) of h_old
    labels: Tensor  # (|Old|,) class numbers
    classes: Tensor  # (K,) true for Old


class MFCLClient(DataFreeClient):
    """FedAvg's client with replay from a generator.

    Args:
        head_weight: of the cross-entropy from which only the head learns.
        distillation_weight: of the distance to the teacher.
        samples: generated images in each step.
        **kwargs: settings of every client, see `Client`.
    """

    uncapturable = "it draws what the generator is given on the CPU"

    def __init__(
        self, head_weight: float = 1.0, distillation_weight: float = 0.1, samples: int = 128, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        checks.at_least(0, "model", head_weight=head_weight, distillation_weight=distillation_weight)
        checks.at_least(2, "model", samples=samples)  # batch normalisation cannot train on one image
        self.head_weight, self.distillation_weight, self.samples = head_weight, distillation_weight, samples
        self.past: Past | None = None

    def uploaded_classes(self) -> Tensor:
        """The classes of the current task."""
        return self.data.class_mask(self.memory.learned, self.memory.begun)

    def replay_schema(self) -> Schema:
        """A generator."""
        return optional(schema_of(above(without_numbers(self.cnn.image_size).state_dict(), "generator.")))

    def to_keep(self, made: dict[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Generator and Old, and the model that came with them, which is the teacher."""
        return {**made, **above(model, "teacher.")}

    def on_train_start(self) -> None:
        """Set up generator and teacher, once there are any."""
        super().on_train_start()
        self.past = self._past() if self.memory.received else None
        self.latent_rng = self.rng("latent")

    def on_train_end(self) -> None:
        """Let go of them."""
        super().on_train_end()
        self.past = None

    def _past(self) -> Past:
        received = self.memory.received
        generator = without_numbers(self.cnn.image_size)
        generator.load_state_dict(below(received, "generator."), assign=True)
        generator.to(memory_format=torch.channels_last)
        cnn = copy.deepcopy(self.cnn)
        cnn.load_state_dict(below(received, "teacher.cnn."))
        for network in (generator, cnn):
            network.requires_grad_(False).eval().to(self.device)
        old = received["classes"]
        weight, bias, labels = (
            rows[old].to(self.device)
            for rows in (received["teacher.head.weight"], received["teacher.head.bias"], torch.arange(len(old)))
        )
        return Past(generator, cnn, weight, bias, labels, old.to(self.device))

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and the terms of replay once there is a generator."""
        terms = super().collaborative_losses(output, batch)
        if (past := self.past) is None:
            return terms
        with torch.no_grad():
            z = torch.randn(self.samples, LATENT, generator=self.latent_rng).to(self.device)
            generated = as_pixels(past.generator(z), self.cnn)
            before = [F.linear(past.cnn(images), past.weight, past.bias) for images in (batch.images.pixels, generated)]
        labels = torch.cat([batch.images.labels, past.labels[before[1].argmax(dim=1)]])
        features = torch.cat([output.representation, self(generated, {}).representation])
        head = head_loss(self.head, features, labels, past.classes | self.current_mask)
        kept = distillation(features, torch.cat(before), past.weight, past.bias)
        return {**terms, "head": self.head_weight * head, "distillation": self.distillation_weight * kept}


def head_loss(head: nn.Linear, features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The cross-entropy among some classes from which only the head learns, a scalar.

    Args:
        head: features to K logits.
        features: (B, e); no gradient goes back into them.
        labels: (B,) class numbers, every one of them among `classes`.
        classes: (K,) true for those that compete.
    """
    return masked_cross_entropy(head(features.detach()), labels, classes)


def distillation(features: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """mean ||h_old(f) - h_old(f_old)||^2 / |Old|, a scalar.

    Args:
        features: f (B, e) of the model in training.
        before: h_old(f_old) (B, |Old|).
        weight: (|Old|, e) of h_old, which gets no gradient.
        bias: (|Old|,) of h_old, likewise.
    """
    return F.mse_loss(F.linear(features, weight, bias).float(), before.float())
