"""How GLFC's proxy makes images of gradients."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlscl.methods.glfc.gradients import SIDE, encoded, encoding_net, labels_of


class Reconstruction(LightningModule):
    """Fits images to the gradients that they left, one after another.

    Args:
        gradients: (n, P).
        classes: K.
        iterations: of L-BFGS for each gradient.
        learning_rate: of L-BFGS.
        monitors: how many of the last iterates are kept.
        rng: draws what an image begins with.
    """

    automatic_optimization = False
    gradients: Tensor
    labels: Tensor

    def __init__(
        self,
        gradients: Tensor,
        classes: int,
        iterations: int,
        learning_rate: float,
        monitors: int,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.iterations, self.learning_rate = iterations, learning_rate
        self.encoder = encoding_net(classes)
        self.register_buffer("gradients", gradients)
        self.register_buffer("labels", labels_of(gradients, classes))
        shape = (1, 3, SIDE, SIDE)
        self.images = nn.ParameterList(torch.randn(shape, generator=rng) for _ in gradients)
        self.last: list[deque[Tensor]] = [deque(maxlen=monitors) for _ in gradients]
        self.mismatches = [0.0] * len(gradients)

    def train_dataloader(self) -> range:
        """The numbers of all iterations, image after image."""
        return range(len(self.images) * self.iterations)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """L-BFGS for each image, since none has a part in the curvature of another."""
        return [torch.optim.LBFGS([image], lr=self.learning_rate) for image in self.images]

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One iteration for one image."""
        number = batch // self.iterations
        image, wanted, label = self.images[number], self.gradients[number], self.labels[number, None]

        def closure() -> Tensor:
            mismatch = (encoded(self.encoder, image, label, differentiable=True) - wanted).square().sum()
            (image.grad,) = torch.autograd.grad(mismatch, [image])
            return mismatch.detach()

        optimizers = self.optimizers(use_pl_optimizer=False)  # in float32 whatever the Trainer's precision is
        optimizer: Any = optimizers[number] if isinstance(optimizers, list) else optimizers
        self.mismatches[number] = float(optimizer.step(closure))
        self.last[number].append(image.detach().cpu().clone())
