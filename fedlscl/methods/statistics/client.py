"""Clients of heads in closed form: those that send sums, those alone, and those that see all images.

Shapes: B batch, d features of the ViT, p features that the head sees, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.batches import Batch, Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.data.splits import Split
from fedlscl.memory import above, below
from fedlscl.messages import Download, Schema
from fedlscl.methods.joint import Pooled
from fedlscl.methods.statistics.heads import STEP, ClosedFormHead, added, as_message, head_schema
from fedlscl.methods.statistics.noisy import NOISE, NoisyHead, noisy, of_unit_length
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.privacy import Privacy
from fedlscl.schedule import Round


class StatisticsClient(Client):
    """Sends sums over its images, once a task, and takes a head back.

    The head is in `memory.received`: `weight` (K, p), `bias` (K,), and `known` (K,), true for the classes of which an
    image is behind it.

    Args:
        head: which sums, and how a head follows from them.
        projection: M, the number of random features relu(f R) that the head sees, R from N(0, 1 / d) and the same for
            all; 0 for the ViT's own features.
        evaluation_batch_size: largest batch; the larger, the more memory and, on a GPU, speed.
        privacy: differential privacy of the images or clients: noise on the sums, for `Ridge` and `ClassMeans`.
    """

    discloses = "task"
    sends_once = True
    uncapturable = "it adds up on the CPU and trains nothing"
    unprotected: ClassVar[str] = ""

    seed: Tensor  # () of R
    collected: Tensor  # () the last task whose images are in a sum

    def __init__(
        self,
        head: ClosedFormHead,
        projection: int = 0,
        evaluation_batch_size: int = 128,
        privacy: Privacy | None = None,
    ) -> None:
        size = max(2, evaluation_batch_size)
        super().__init__(
            NoReplay(),
            batch_size=size,
            evaluation_batch_size=evaluation_batch_size,
            buffer_size=0,
            privacy=privacy,
        )
        at_least(0, "model", projection=projection)
        self.head, self.projection = head if privacy is None else noisy(head), projection

    # ---- the head

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The seed of R; there is no head yet."""
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("collected", torch.tensor(0))
        self.drawn: dict[object, Tensor] = {}

    @property
    def features(self) -> int:
        """The number p of features that the head sees."""
        return self.projection or self.vit.width

    def matrix(self, like: Tensor) -> Tensor:
        """R (d, M), multiples of `STEP`, in the dtype and on the device of another tensor."""
        key = int(self.seed), like.dtype, like.device
        if key not in self.drawn:
            drawn = torch.randn(self.vit.width, self.projection, generator=torch.Generator().manual_seed(key[0]))
            self.drawn[key] = rounded(drawn / self.vit.width**0.5).to(like)
        return self.drawn[key]

    def seen_by_head(self, features: Tensor) -> Tensor:
        """(B, p) from the features (B, d) of the ViT, in float64 and without an error that the batch could change."""
        seen = rounded(features.cpu())
        if self.projection:
            seen = rounded((seen @ self.matrix(seen)).relu())
        # how long they are makes no difference to a head without intercept
        return seen if self.privacy is None else of_unit_length(seen)

    def disclosed(self, images: Tensor) -> Tensor:
        """What the head sees, in float64."""
        return self.seen_by_head(self.vit(images))

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The frozen features (B, d)."""
        return {"features": self.vit(images)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features; a class of which nobody has sent an image is never the answer."""
        features = frozen["features"].float()
        with torch.autocast(features.device.type, enabled=False):  # what was solved for in float64 is lost in bf16
            if self.projection:
                features = (features @ self.matrix(features)).relu()
            head = self.memory.received
            if not head:
                return Output(features.new_full((len(features), self.num_classes), -torch.inf), features)
            logits = F.linear(features, head["weight"].to(features), head["bias"].to(features))
        return Output(logits.masked_fill(~head["known"].to(logits.device), -torch.inf), features)

    # ---- one round

    def check(self, split: Split) -> None:
        """Any split will do; from its tasks follows how much noise there must be."""
        self.tasks = split.spec.tasks

    def begin_round(self, round: Round) -> None:
        """No sums yet."""
        super().begin_round(round)
        self.sums: dict[str, Tensor] = {}
        self.new = int(self.collected) < self.memory.begun
        self.collected.fill_(self.memory.begun)

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Every current image once."""
        yield "collaborate", torch.arange(len(self.current))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """None: there is nothing to train."""
        return []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        if self.new:
            features = self.seen_by_head(self.output_features(batch.images))
            labels, numbers = batch.images.labels.cpu(), numbers_of(batch.images.pixels).cpu()
            self.sums = added([self.sums, self.head.sums(features, labels, numbers, self.num_classes)])

    def output_features(self, images: Images) -> Tensor:
        """(B, d) the frozen features of training images."""
        return self.frozen(images)["features"]

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """The seed of R."""
        return {"seed": self.seed} if self.projection else {}

    def outgoing(self) -> dict[str, Tensor]:
        """The sums over images that were not sent before."""
        return self.sums

    def protected(self, tensors: Mapping[str, Tensor], clients: int) -> Mapping[str, Tensor]:
        """Sums with noise, and how much."""
        if self.privacy is None or not tensors:
            return tensors
        assert isinstance(self.head, NoisyHead)
        deviation = self.privacy.multiplier(self.tasks) / clients**0.5
        scales = self.head.scales(self.features, self.num_classes)
        key = self.privacy.key(self.round.seed, self.index, self.round.number)
        found = self.privacy.noisy(tensors, scales, deviation, key)
        return {**found, NOISE: torch.tensor((deviation * (self.privacy.clip or 1)) ** 2, dtype=torch.float64)}

    def upload_schema(self) -> Schema:
        """What the head needs."""
        return self.head.schema(self.features, self.num_classes)

    def download(self, message: Download) -> None:
        """The head."""
        self.memory.received = dict(message.tensors)

    def download_schema(self) -> Schema:
        """The head."""
        return head_schema(self.features, self.num_classes)


class LocalStatisticsClient(StatisticsClient):
    """A head from the client's own images alone; for the settings see `StatisticsClient`."""

    unprotected = "sends nothing"

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """No sums yet."""
        super().build(vit, cnn, cnn_name, num_classes)
        self.own: dict[str, Tensor] = {}  # no buffers: some devices have no float64

    def state(self) -> dict[str, Tensor]:
        """Also its sums over the images of all tasks."""
        return {**super().state(), **above(self.own, "sums.")}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also these sums."""
        self.own = below(state, "sums.")
        super().load({name: tensor for name, tensor in state.items() if not name.startswith("sums.")})

    def on_train_end(self) -> None:
        """Solve for the head."""
        if self.new:
            self.own = added([self.own, self.sums])
            self.memory.received = as_message(self.head.solve({self.index: self.own}), self.head.counts(self.own))

    def shared(self) -> dict[str, Tensor]:
        """Nothing: also R is its own."""
        return {}

    def upload_schema(self) -> Schema:
        """Nothing."""
        return {}

    def download_schema(self) -> Schema:
        """Nothing."""
        return {}


class JointStatisticsClient(Pooled, LocalStatisticsClient):
    """A head from all images of all clients and tasks: what a frozen ViT can do with these sums, as a reference."""

    unprotected = "has all images in one place"

    def begin_round(self, round: Round) -> None:
        """All images are there from the first task on."""
        there = int(self.collected) > 0
        super().begin_round(round)
        self.new = not there


def numbers_of(pixels: Tensor) -> Tensor:
    """(B,) a number for each image (B, 3, H, W) that is the same wherever the image is: the sum of its values."""
    return pixels.flatten(1).sum(dim=1, dtype=torch.int64)


def rounded(values: Tensor) -> Tensor:
    """The nearest multiples of `STEP`, in float64."""
    return (values.double() / STEP).round() * STEP
