"""What the server of FedMGP fits: the fused prompt, then the head on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlscl.methods.fedmgp.client import FedMGPClient


class Steps(NamedTuple):
    """The steps of a fit."""

    batches: Sequence[tuple[Tensor, Tensor]]  # images (b, 3, H, W) in uint8 and labels (b,)
    epochs: int  # how often each batch is taken
    learning_rate: float  # of Adam


class Fusion(LightningModule, ABC):
    """A fit of some parameters of a client's model on the surrogates, always in the same batches.

    A kernel may round differently in a batch of another size, and Adam makes full steps of such differences: in the
    same batches a student that equals its teachers to the last bit stays where it is.

    Args:
        model: a client's model, part of which is trained.
        steps: on which batches, how often and how far.
    """

    before: float  # the objective over all images at the start, and in the end
    after: float

    def __init__(self, model: FedMGPClient, steps: Steps) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    @abstractmethod
    def trained(self) -> Iterable[nn.Parameter]:
        """What is trained."""

    @abstractmethod
    def fixed(self, images: Tensor) -> Any:
        """What of the objective no step changes, for a batch of images."""

    @abstractmethod
    def objective(self, labels: Tensor, fixed: Any) -> Tensor:
        """The objective (b,) of each image."""

    def train_dataloader(self) -> list[int]:
        """The numbers of the batches, epoch after epoch."""
        return list(range(len(self.steps.batches))) * self.steps.epochs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.trained(), lr=self.steps.learning_rate)

    def on_train_start(self) -> None:
        """Put the frozen model where the others are, and compute what stays."""
        self.model.vit.to(self.device)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.kept = [self.fixed(images.to(self.device)) for images, _ in self.steps.batches]
        self.before = self._mean()

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        """One batch."""
        return self._of(number).mean()

    def on_train_end(self) -> None:
        """Take stock, and let go of what is large: the Trainer holds the module for some time."""
        self.after = self._mean()
        self.kept = []

    def _of(self, number: int) -> Tensor:
        _, labels = self.steps.batches[number]
        return self.objective(labels.to(self.device), self.kept[number])

    def _mean(self) -> float:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return float(torch.cat([self._of(number) for number in range(len(self.steps.batches))]).mean())


class Distillation(Fusion):
    """The prompts of many clients into that of one, the model's.

    Args:
        model: with the student's prompt.
        steps: see `Fusion`.
        teachers: prompts (1, L, d) of the others; without any the student stays as it is.
    """

    def __init__(self, model: FedMGPClient, steps: Steps, teachers: Sequence[Tensor]) -> None:
        super().__init__(model, steps)
        self.teachers = teachers

    def trained(self) -> Iterable[nn.Parameter]:
        """The prompt."""
        return [self.model.prompt]

    def fixed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that enter the first block, and what the teachers say of a batch, see `consensus`."""
        tokens = self.model.vit.lower(self.model.vit.prepare(images), 0)
        return tokens, *consensus(self._encoded(tokens, teacher.to(self.device)) for teacher in self.teachers)

    def objective(self, labels: Tensor, fixed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The squared distances (b,) to all teachers."""
        tokens, mean, spread = fixed
        return distances(self._encoded(tokens, self.model.prompt), mean, spread, len(self.teachers))

    def _encoded(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        return self.model.vit.encode(self.model.entering(tokens, prompt), 0).float()


class HeadTraining(Fusion):
    """The global head on the features under the fused prompt."""

    def trained(self) -> Iterable[nn.Parameter]:
        """The global head."""
        return self.model.global_head.parameters()

    def fixed(self, images: Tensor) -> Tensor:
        """Features (b, d)."""
        model = self.model
        tokens = model.vit.lower(model.vit.prepare(images), 0)
        return model.pooled(model.entering(tokens, model.prompt))

    def objective(self, labels: Tensor, fixed: Tensor) -> Tensor:
        """Cross-entropies (b,) over all classes."""
        return F.cross_entropy(self.model.global_head(fixed).float(), labels, reduction="none")


def consensus(outputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean (b, T, d) of some outputs (b, T, d), and the sum of their squared distances to it (b,).

    Gone through once; without any output both are zero, as scalars. The mean of equal outputs is these to the last bit.
    """
    mean, spread = torch.zeros(()), torch.zeros(())
    for count, output in enumerate(outputs, 1):
        step = output - mean
        mean = mean + step / count
        spread = spread + (step * (output - mean)).sum(dim=(1, 2))
    return mean, spread


def distances(output: Tensor, mean: Tensor, spread: Tensor, count: int) -> Tensor:
    """The sum (b,) of squared distances of outputs (b, T, d) to `count` others, of which there is the `consensus`."""
    return count * (output - mean).square().sum(dim=(1, 2)) + spread
