"""TARGET's client: distillation on the synthetic images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl import checks
from fedlscl.batches import Batch, Output
from fedlscl.messages import AtMost, Schema, TensorSpec
from fedlscl.methods.data_free import DataFreeClient

LARGEST_SET = 2**16  # synthetic images that a client accepts at once


class TARGETClient(DataFreeClient):
    """FedAvg's client with distillation on synthetic images.

    Args:
        strength: weight of the distillation.
        temperature: by which both softmaxes are flattened.
        **kwargs: settings of every client, see `Client`.
    """

    uncapturable = "it draws synthetic images on the CPU"

    def __init__(self, strength: float = 25.0, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checks.at_least(0, "model", strength=strength)
        checks.positive("model", temperature=temperature)
        self.strength, self.temperature = strength, temperature

    def uploaded_classes(self) -> Tensor:
        """The classes learned."""
        return self.data.class_mask(0, self.memory.begun)

    def replay_schema(self) -> Schema:
        """Synthetic images, no larger than the CNN takes them."""
        side = AtMost(self.cnn.image_size)
        return {"images": TensorSpec((AtMost(LARGEST_SET), 3, side, side), torch.uint8, optional=True)}

    def on_download_end(self) -> None:
        """The model that came with synthetic images is their teacher: note its logits."""
        received = self.memory.received
        if received and "logits" not in received:
            batches = torch.split(received["images"], self.evaluation_batch_size)
            with self.trainer.precision_plugin.forward_context():
                received["logits"] = torch.cat([self.old_logits(batch).cpu() for batch in batches])

    def old_logits(self, images: Tensor) -> Tensor:
        """Logits (B, |Old|) of the old classes, ascending, for synthetic images, in float32."""
        logits: Tensor = self(images.to(self.device), {}).logits
        return logits[:, self.memory.received["classes"].to(self.device)].float()

    def on_train_start(self) -> None:
        """Get ready to draw synthetic images."""
        super().on_train_start()
        self.synthetic_rng = self.rng("synthetic")

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and the distillation once there are synthetic images."""
        terms = super().collaborative_losses(output, batch)
        received = self.memory.received
        if received:
            rows = torch.randint(len(received["images"]), (len(batch.images.labels),), generator=self.synthetic_rng)
            student, teacher = self.old_logits(received["images"][rows]), received["logits"][rows].to(self.device)
            terms["distillation"] = self.strength * distillation(student, teacher, self.temperature)
        return terms


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KD: the cross-entropy of the student's softened prediction to the teacher's, a scalar.

    Args:
        student: its logits (B, |Old|).
        teacher: its logits (B, |Old|).
        temperature: by which both are divided.
    """
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))
