"""Fed-LSCL: a small CNN generates, for every image, the LoRA weights that adapt a frozen ViT.

See docs/methods/fed_lscl.md. On client i an image x gives E = theta(x) / ||theta(x)||, W = phi(E) and the logits
H(ViT adapted by W, x). A round trains theta, phi and H on the current task (Eq. 3), then on the buffer (Eq. 4).

Aggregation: the server answers every client with a phi of its own (Eq. 5, one-by-one distillation, O2D), in closed
form (`ExactO2D`) or by gradient descent as published (`IterativeO2D`).

What travels: up phi and the features FS of the buffered samples, sorted by their values, down phi; no image, label,
CNN or head.

Logged: collaborate/cross_entropy; replay/cross_entropy, replay/features (lambda_E ||E - E'||^2), replay/weights
(lambda_W ||W - W'||^2); server/objective_before and server/objective_after (Eq. 5, mean over the students); gradient/*
and generated/*, see `instruments.Generating`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, Output
from fedlscl.checks import at_least
from fedlscl.federation.trainer import fit_once
from fedlscl.losses import masked_cross_entropy, o2d_loss
from fedlscl.messages import AtMost, Schema, TensorSpec, Upload, schema_of, unit_rows
from fedlscl.methods import o2d as distillation
from fedlscl.methods.frozen_vit import make_head
from fedlscl.methods.instruments import Generating
from fedlscl.methods.o2d import Generator, Student
from fedlscl.models.adapters import ParameterGenerator
from fedlscl.models.cnn import SmallModel, SmallModelSpec, Standard
from fedlscl.models.vit import FrozenViT
from fedlscl.server import Answer, Answers, Context, Metrics, OnDemand, Server


class FedLSCL(Generating):
    """A client of Fed-LSCL (sections 4.2 and 4.3).

    Args:
        block: index of the adapted ViT block.
        rank: r of the LoRA pairs.
        alpha: the LoRA product is scaled by alpha / r; r by default.
        standardise: what is done to E before its length is set: nothing, standardised within each image (`layer`, with
            a trained map behind it `layer_affine`), or over images (`batch`).
        linear: let the CNN end in a linear map even where its features, which a ReLU has left, are as wide as E.
        own_loss: weight of a loss of the CNN's own, the cross-entropy of a linear head on E.
        start: standard deviation with which the part of phi that makes B of E is drawn; 0 starts at the frozen ViT.
        cnn_rate: learning rate of the CNN, as a multiple of `learning_rate`.
        generator_rate: that of phi.
        head_rate: that of the head, and of the CNN's own.
        head_hidden: width of the head's hidden layer; 0 for a linear head.
        **kwargs: settings of every client, see `Client`.
    """

    discloses = "buffer"

    def __init__(
        self,
        block: int = 3,
        rank: int = 4,
        alpha: float | None = None,
        standardise: Standard = "none",
        linear: bool = False,
        own_loss: float = 0.0,
        start: float = 0.0,
        cnn_rate: float = 1.0,
        generator_rate: float = 1.0,
        head_rate: float = 1.0,
        head_hidden: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, "model", rank=rank)
        at_least(0, "model", own_loss=own_loss, start=start, head_hidden=head_hidden)
        at_least(0, "model", cnn_rate=cnn_rate, generator_rate=generator_rate, head_rate=head_rate)
        if self.buffer_size < 1:
            raise ValueError("model.buffer_size is 0, but the uploaded features are those of the buffer: at least 1")
        self.block, self.rank = block, rank
        self.scale = 1.0 if alpha is None else alpha / rank
        self.standardise: Standard = standardise
        self.linear, self.own_loss, self.start, self.head_hidden = linear, own_loss, start, head_hidden
        self.rates = {"cnn": cnn_rate, "generator": generator_rate, "head": head_rate, "own_head": head_rate}

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """theta, phi and H."""
        if not 0 <= self.block < vit.depth:
            raise ValueError(f"model.block is {self.block}, but {vit.name} has blocks 0 to {vit.depth - 1}")
        self.cnn: nn.Module = SmallModel(cnn, cnn_name, standardise=self.standardise, linear=self.linear)
        self.generator = ParameterGenerator(cnn.features, vit.width, self.rank, self.start)
        self.head = make_head(vit.width, self.head_hidden, num_classes)
        if self.own_loss > 0:
            self.own_head = nn.Linear(cnn.features, num_classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, fresh in each round, with the rate of each part."""
        groups = [
            {"params": list(getattr(self, name).parameters()), "lr": rate * self.learning_rate}
            for name, rate in self.rates.items()
            if hasattr(self, name)
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], fused=True)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of a step, by name; the CNN is in evaluation mode where Eq. 4 compares its E with E'.

        E' was taken in that mode, and batch normalisation alone would hold the two apart in another. In such a step its
        statistics stay, and no dropout acts.
        """
        self.cnn.train(batch.phase != "replay" or not batch.snapshot)
        output = self.output(batch.images)
        terms = self.phase_losses(output, batch)
        if self.own_loss > 0:
            classes = self.competing_mask if batch.phase == "collaborate" else self.seen_mask
            features = output.generated["features"]
            logits = self.own_head(features * features.shape[1] ** 0.5)  # E's entries are then of the order of 1
            terms["own"] = self.own_loss * masked_cross_entropy(logits, batch.images.labels, classes)
        return terms

    def images_kept(self, classes: int, exchanged: bool) -> int | None:
        """Those in the buffer, replayed or not, where their features travel."""
        return self.buffer_size if exchanged else super().images_kept(classes, exchanged)

    def generate(self, images: Tensor) -> dict[str, Tensor]:
        """E (B, e) and W (B, P) of Eq. 2."""
        features = self.features(images)
        return {"features": features, "weights": self.generator(features)}

    def features(self, images: Tensor) -> Tensor:
        """E (B, e), of length 1."""
        features: Tensor = self.cnn(images)
        return features

    def disclosed(self, images: Tensor) -> Tensor:
        """E, whose set or whose moments travel."""
        return self.features(images)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens that enter the adapted block (B, T, d)."""
        return {"tokens": self.vit.lower(self.vit.prepare(images), self.block)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """H(Theta adapted by phi(theta(x)))."""
        generated = self.generate(images)
        adapted = self.vit.upper(frozen["tokens"], self.block, [self.pair(generated["weights"])])
        return Output(self.head(adapted), adapted, generated)

    def shared(self) -> dict[str, Tensor]:
        """phi."""
        return {"weight": self.generator.weight, "bias": self.generator.bias}

    def on_train_end(self) -> None:
        """Also compute FS, the features of the buffered samples and of those that would enter the buffer now."""
        super().on_train_end()
        features = self.observe(self.memory.remembered, lambda images: {"features": self.features(images.pixels)})
        self.feature_set = features["features"]

    def outgoing(self) -> dict[str, Tensor]:
        """phi and FS (n, e)."""
        # In the order of the buffer they would tell the server which are of one class, and it knows the run's seed, and
        # so every shuffle that is drawn from it. In ascending order they are a set and nothing else, on all engines
        order = np.lexsort(self.feature_set.numpy().T[::-1])
        return {**self.shared(), "features": self.feature_set[torch.from_numpy(order)]}

    def upload_schema(self) -> Schema:
        """FS holds at most M features of each class, of unit length (Eq. 2)."""
        features = TensorSpec((AtMost(self.buffer_size * self.num_classes), self.generator.in_features), rule=unit_rows)
        return {**schema_of(self.shared()), "features": features}


class O2D(Server):
    """One-by-one distillation: every client that sent a generator gets one of its own back (Eq. 5).

    Args:
        strength: lambda, which holds a student to its own generator.
    """

    serves, needs = "FedLSCL", Generator._fields

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__()
        at_least(0, "server", strength=strength)
        self.strength = strength

    @abstractmethod
    def fuse(
        self, index: int, uploads: Mapping[int, Upload], student: Student, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias for one student."""

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """A generator for each client that sent one; about the absent ones the server knows nothing."""
        everyone = distillation.total(_generator(upload) for upload in uploads.values())

        def answer(index: int) -> Answer:
            own = _generator(uploads[index])
            moments = distillation.second_moments(own.features)
            student = Student(own.weight, own.bias, moments, everyone, self.strength)
            weight, bias = self.fuse(index, uploads, student, context)
            objectives = {"objective_before": student.start, "objective_after": student.objective(weight, bias)}
            return Answer({"weight": weight, "bias": bias}, objectives)

        return OnDemand(uploads, answer), {}


def _generator(upload: Upload) -> Generator:
    return Generator(*(upload.tensors[name] for name in Generator._fields))


class ExactO2D(O2D):
    """O2D solved as the ridge regression that it is."""

    def fuse(
        self, index: int, uploads: Mapping[int, Upload], student: Student, context: Context
    ) -> tuple[Tensor, Tensor]:
        """The minimiser of Eq. 5."""
        return student.exact()


class IterativeO2D(O2D):
    """O2D by gradient descent, one teacher after another, as published.

    Args:
        strength: lambda.
        epochs: passes over each teacher's features.
        learning_rate: of Adam.
        batch_size: features per step.
    """

    def __init__(
        self, strength: float = 0.5, epochs: int = 20, learning_rate: float = 1e-3, batch_size: int = 32
    ) -> None:
        super().__init__(strength)
        at_least(1, "server", epochs=epochs, batch_size=batch_size)
        at_least(0, "server", learning_rate=learning_rate)
        self.epochs, self.learning_rate, self.batch_size = epochs, learning_rate, batch_size

    def fuse(
        self, index: int, uploads: Mapping[int, Upload], student: Student, context: Context
    ) -> tuple[Tensor, Tensor]:
        """What the student is after its fit; a client without teachers keeps its own generator."""
        teachers = [_generator(upload) for other, upload in uploads.items() if other != index]
        rng = seeds.generator(context.round.seed, "distillation", index, context.round.number)
        fit = Distillation(_generator(uploads[index]), teachers, self, rng)
        if teachers:
            fit_once(context.trainer(), fit)
        fit.teachers = []
        return fit.weight.detach(), fit.bias.detach()


class Distillation(LightningModule):
    """One student's fit: for one teacher after another, the distance of the outputs on that teacher's features."""

    own_weight: Tensor
    own_bias: Tensor

    def __init__(self, own: Generator, teachers: list[Generator], settings: IterativeO2D, rng: torch.Generator) -> None:
        super().__init__()
        self.settings, self.rng, self.teachers = settings, rng, teachers
        self.weight, self.bias = nn.Parameter(own.weight.clone()), nn.Parameter(own.bias.clone())
        self.register_buffer("own_weight", own.weight)
        self.register_buffer("own_bias", own.bias)

    def train_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, e) with their teacher's outputs (B, P), teacher after teacher."""
        for teacher in self.teachers:
            for _ in range(self.settings.epochs):
                order = torch.randperm(len(teacher.features), generator=self.rng)
                for rows in torch.split(order, self.settings.batch_size):
                    x = teacher.features[rows]
                    yield x, F.linear(x, teacher.weight, teacher.bias)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Eq. 5 with one teacher and its share of lambda."""
        own = self.own_weight, self.own_bias
        # Eq. 5 has lambda once for all teachers, and each of them gets as many steps as its features need
        return o2d_loss(self.weight, self.bias, own, *batch, self.settings.strength / len(self.teachers))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.settings.learning_rate)
