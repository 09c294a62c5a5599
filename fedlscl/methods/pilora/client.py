"""A client of PILoRA: a LoRA pair for each task, and prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, schema_of
from fedlscl.methods.pilora.prototypes import distances
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

PAIR = ("a", "b")


class PILoRAClient(Client):
    """A frozen ViT with LoRA pairs, and prototypes. The two parts of a pair are q and v, in this order.

    Args:
        block: index of the adapted block.
        rank: r.
        compactness: weight of the mean distance to the own prototype.
        sparsity: weight of the L1 norm of A.
        orthogonality: weight of the products of A with those of finished tasks.
        lora_learning_rate: of the pair; `learning_rate` by default.
        prototype_learning_rate: of the prototypes; `learning_rate` by default.
        **kwargs: settings of every client, see `Client`.
    """

    required = (("continual", NoReplay),)  # finished tasks keep LoRA and prototypes
    opened: Tensor  # () number of the task that the current pair is for; 0 before the first
    earlier_a: Tensor  # (2, s r, d) those of the s finished tasks
    earlier_b: Tensor  # (2, d, s r)
    trained: Tensor  # (K,) true for the prototypes that this round trains

    def __init__(
        self,
        block: int = 0,
        rank: int = 4,
        compactness: float = 0.001,
        sparsity: float = 0.01,
        orthogonality: float = 0.5,
        lora_learning_rate: float | None = None,
        prototype_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rates = {"lora_learning_rate": lora_learning_rate, "prototype_learning_rate": prototype_learning_rate}
        self.weights = {"compactness": compactness, "sparsity": sparsity, "orthogonality": orthogonality}
        given = {name: rate for name, rate in self.rates.items() if rate is not None}
        at_least(0, "model", **given, **self.weights)
        at_least(1, "model", rank=rank)
        self.block, self.rank = block, rank

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The pair of the first task and all prototypes."""
        if not 0 <= self.block < vit.depth:
            raise ValueError(f"model.block is {self.block}, but {vit.name} has blocks 0 to {vit.depth - 1}")
        self.a = nn.Parameter(fresh_a(self.rank, vit.width))
        self.b = nn.Parameter(torch.zeros(2, vit.width, self.rank))
        self.prototypes = nn.Parameter(0.1 * torch.randn(num_classes, vit.width))
        self.register_buffer("opened", torch.tensor(0))
        self.register_buffer("earlier_a", self.a.new_zeros(2, 0, vit.width), persistent=False)
        self.register_buffer("earlier_b", self.b.new_zeros(2, vit.width, 0), persistent=False)
        self.register_buffer("trained", torch.zeros(num_classes, dtype=torch.bool), persistent=False)

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens that enter the adapted block (B, T, d)."""
        return {"tokens": self.vit.lower(self.vit.prepare(images), self.block)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """-delta under the pairs of all tasks."""
        features = self.lora_features(frozen["tokens"], self.block, self._pairs)
        prototypes = torch.where(self.trained[:, None], self.prototypes, self.prototypes.detach())
        return Output(-distances(features, prototypes), features)

    def _pairs(self) -> list[LowRank]:
        a, b = torch.cat([self.earlier_a, self.a], 1), torch.cat([self.earlier_b, self.b], 2)
        return [LowRank(self.block, fused(a, b))]

    # ---- tasks

    def begin_round(self, round: Round) -> None:
        """Also open the pair of a new task, and note which prototypes are trained."""
        if self._open(round.task):
            with torch.no_grad():
                self.a.copy_(fresh_a(self.rank, self.vit.width, seeds.generator(round.seed, "lora", round.task)))
                self.b.zero_()
        super().begin_round(round)
        held, _ = self._classes()
        self.trained = torch.isin(torch.arange(self.num_classes), held)

    def _open(self, task: int) -> bool:
        """Make the pair that of `task`; whether there was one of an earlier task, which is frozen then."""
        opened = int(self.opened)
        if task <= opened:
            return False
        self.opened.fill_(task)
        if opened:
            self.memory.archive.keep(opened, {"a": self.a, "b": self.b})
            self._fetch()
        return opened > 0

    def _fetch(self) -> None:
        """Join the pairs of finished tasks."""
        self.memory.archive.to(self.a.device)
        pairs = [(one["a"], one["b"]) for one in self.memory.archive.values()]
        self.earlier_a = torch.cat([self.a.detach()[:, :0], *(a for a, _ in pairs)], 1)
        self.earlier_b = torch.cat([self.b.detach()[:, :, :0], *(b for _, b in pairs)], 2)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also fetch the pairs of finished tasks."""
        super().load(state)
        self._fetch()

    def _classes(self) -> tuple[Tensor, Tensor]:
        """Numbers of the current classes, ascending: those of which there are images, and the others."""
        first, last = self.memory.learned, self.memory.begun
        held = torch.unique(self.data.labels(self.data.train_images(first, last)))
        rest = self.data.class_mask(first, last)
        rest[held] = False
        return held, rest.nonzero().squeeze(1)

    # ---- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, fresh in each round, with a learning rate for the pair and one for the prototypes."""
        parts: list[list[nn.Parameter]] = [[self.a, self.b], [self.prototypes]]
        rates = [self.learning_rate if rate is None else rate for rate in self.rates.values()]
        groups = [{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True)]
        return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy among all classes, and the terms on distances and weights."""
        labels = batch.images.labels
        terms = {
            "compactness": -output.logits.gather(1, labels[:, None]).mean(),
            "sparsity": self.a.abs().sum(),
        }
        if self.earlier_a.numel():
            terms["orthogonality"] = overlap(self.a, self.earlier_a)
        weighted = {name: self.weights[name] * term for name, term in terms.items()}
        return {"cross_entropy": F.cross_entropy(output.logits, labels), **weighted}

    def on_train_end(self) -> None:
        """Compute the class means; no sample needs to be remembered."""
        features = self.observe(self.current, self._features)["features"]
        labels = self.data.labels(self.current)
        self.means = torch.stack([features[labels == label].mean(0) for label in torch.unique(labels)])

    def _features(self, images: Images) -> dict[str, Tensor]:
        return {"features": self.output(images).representation}

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """The pair and all prototypes."""
        return {"a": self.a, "b": self.b, "prototypes": self.prototypes}

    def outgoing(self) -> dict[str, Tensor]:
        """The pair, and what is to be known of the current classes."""
        held, rest = self._classes()
        known = {"prototypes": self.prototypes[held], "means": self.means, "classes": torch.cat([held, rest])}
        return {**self.shared(), **known}

    def upload_schema(self) -> Schema:
        """Any number of classes."""
        shared = schema_of(self.shared())
        rows = TensorSpec((AtMost(self.num_classes), self.vit.width))
        numbers = TensorSpec((AtMost(self.num_classes),), torch.int64)
        return {**shared, "prototypes": rows, "means": rows, "classes": numbers}

    def download(self, message: Download) -> None:
        """Take over the pair, which may be the first of a task, and the prototypes of the current classes."""
        self._open(message.task)
        self.adopt({name: message.tensors[name] for name in PAIR})
        if "prototypes" in message.tensors:
            with torch.no_grad():
                rows = torch.cat(self._classes())
                self.prototypes[rows] = message.tensors["prototypes"].to(self.prototypes.device)

    def download_schema(self) -> Schema:
        """The pair, and perhaps prototypes of any number of classes."""
        rows = TensorSpec((AtMost(self.num_classes), self.vit.width), optional=True)
        return {**schema_of(self.shared()), "prototypes": rows}


def overlap(a: Tensor, earlier: Tensor) -> Tensor:
    """Sum over both parts of ||A_n A_s^T||_1, a scalar in float32, from (2, r, d) and (2, s r, d)."""
    products = a[:, :, None] * earlier[:, None]  # (2, r, s r, d); autocast would round a matrix product
    return products.sum(dim=3).abs().sum()


def fused(a: Tensor, b: Tensor) -> LoRA:
    """The pairs of q and v, (2, R, d) and (2, d, R), as one LoRA of rank 2 R for q, k and v together."""
    (q, v), rank = b, b.shape[2]
    q, v = F.pad(q, (0, rank)), F.pad(v, (rank, 0))
    return LoRA(a.flatten(0, 1), torch.cat([q, torch.zeros_like(q), v]))


def fresh_a(rank: int, width: int, rng: torch.Generator | None = None) -> Tensor:
    """A (2, r, d), Kaiming-uniform with a = sqrt(5) in each part."""
    return (2 * torch.rand(2, rank, width, generator=rng) - 1) / math.sqrt(width)
