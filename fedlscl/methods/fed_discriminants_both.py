"""Linear discriminants on the features of both models, the frozen ViT and a small CNN that all clients share: ours.

See docs/methods/fed_discriminants.md. In all rounds of the first task but its last, each client minimises

    CE(H E, y) among the classes of the task, with E = 16 f(x; theta) / |f(x; theta)|,

with its own head H. From then on theta is frozen, nothing is trained, and E / 16 is one more vector of each image
beside those of `fed_discriminants`: with discriminants of its own, from sums over all clients and tasks, and a weight
that each client chooses with all else, 0 included, by leaving each of its training images out.

Aggregation: theta <- sum over i of p_i theta_i, then a sum over clients and tasks.

What travels: theta, both ways, until the last round of the first task; from there on as in `fed_discriminants`.

Logged: collaborate/cross_entropy; as `fed_discriminants`; discriminants/small, the chosen weight of the small model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedlscl.batches import Batch, Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import above, below
from fedlscl.messages import Download, MessageError, Schema, TensorSpec, Upload, schema_of
from fedlscl.methods.fed_discriminants import Discriminants, DiscriminantsClient, DiscriminantsServer
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.robust import ALL, CHANGE, Robust, Sizes
from fedlscl.schedule import Round
from fedlscl.server import WEIGHT, Answers, Context, FedAvg, Metrics, OnDemand, Total

log = logging.getLogger(__name__)

T = TypeVar("T")

SCALE = 16.0
"""Factor on the small model's features, of unit length, before the head with which it is trained."""


def trains(round: Round) -> bool:
    """Whether the small model is trained and averaged in this round, and no sum is made."""
    return round.task == 1 and not round.ends_task


class BothDiscriminantsClient(DiscriminantsClient):
    """Trains the small model in the first task, then sends sums over its images, once a task, and solves for its head.

    Args:
        learning_rate: of Adam, whose moments start afresh in each round.
        epochs: passes over the first task's images in each of its rounds but the last.
        batch_size: largest batch of these.
        evaluation_batch_size: largest batch where nothing is trained; the larger, the more memory and, on a GPU, speed.
    """

    uncapturable = "it trains in the first task alone, and then adds up on the CPU"
    since: Tensor  # () the last task whose images were in a sum when the current one began

    def __init__(
        self,
        learning_rate: float = 1e-3,
        epochs: int = 5,
        batch_size: int = 16,
        evaluation_batch_size: int = 128,
    ) -> None:
        super().__init__(evaluation_batch_size)
        at_least(0, "model", learning_rate=learning_rate)
        at_least(1, "model", epochs=epochs)
        at_least(2, "model", batch_size=batch_size)  # batch normalisation cannot train on one image
        self.learning_rate, self.epochs = learning_rate, epochs
        self.training_batch_size, self.train_mask = batch_size, "task"

    # ---- the networks

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """theta and H."""
        super().build(vit, cnn, cnn_name, num_classes)
        self.cnn = SmallModel(cnn, cnn_name)
        self.own = nn.Linear(cnn.features, num_classes)
        self.register_buffer("since", torch.tensor(0))

    def made_head(self, groups: int, cnn: SmallModelSpec) -> Discriminants:
        """Discriminants of the ViT's G vectors and of the small model's features."""
        return Discriminants(groups, cnn.features)

    def disclosed(self, images: Tensor) -> Tensor:
        """What the head sees, in float64."""
        return self.seen_by_head(self.both(images, self.precompute(images)))

    def both(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Tensor:
        """(B, p) the frozen features, and the small model's behind them."""
        return torch.cat([frozen["features"].float(), self.cnn(images).float()], dim=1)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features of both; before there is one, H."""
        if not self.memory.received:
            features = self.cnn(images)
            return Output(self.own(SCALE * features), features)
        return super().forward(images, {"features": self.both(images, frozen)})

    def output_features(self, images: Images) -> Tensor:
        """(B, p) of training images."""
        return self.both(images.pixels, self.frozen(images))

    # ---- one round

    @classmethod
    def sends_images(cls, round: Round) -> bool:
        """Not while the small model is trained: the images are then in no sum yet."""
        return not trains(round)

    @property
    def behind(self) -> int:
        """Earlier than the last task learned where this client was not there when sums of that were made."""
        return int(self.since)

    def begin_round(self, round: Round) -> None:
        """Train, or make ready for sums, with the small model that all have in common."""
        if self.memory.kept:  # no server answered what was trained from it
            self.adopt(self.memory.kept)
            self.memory.kept = {}
        self.trains = trains(round)
        self.batch_size = self.training_batch_size if self.trains else max(2, self.evaluation_batch_size)
        collected = int(self.collected)
        if collected < round.task:
            self.since.fill_(collected)
        super().begin_round(round)
        if self.trains:
            self.new = False
            self.collected.fill_(collected)
            self.memory.kept = {name: tensor.detach().clone() for name, tensor in self.shared().items()}

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Every current image once, or in each epoch where the small model is trained."""
        for _ in range(self.epochs if self.trains else 1):
            yield from super().passes(rng)

    def configure_optimizers(self) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:  # type: ignore[override]
        """Adam over theta and H, where they are trained."""
        return Client.configure_optimizers(self) if self.trains else super().configure_optimizers()

    def on_train_start(self) -> None:
        """Also log how much the small model counts, and use it as it is where it is not trained."""
        super().on_train_start()
        self.log("discriminants/small", self.head.choices[self.choice()].small)
        self.train(self.trains)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of the small model and its own head, or a batch more in the sums."""
        if self.trains:
            Client.training_step(self, batch, batch_idx)
            return
        with torch.no_grad():
            super().training_step(batch, batch_idx)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy among the task's classes."""
        logits = self.own(SCALE * self.cnn(batch.images.pixels))
        return {"cross_entropy": masked_cross_entropy(logits, batch.images.labels, self.competing_mask)}

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """theta, with the running statistics of its batch normalisation."""
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name.startswith("cnn.")}

    def outgoing(self) -> dict[str, Tensor]:
        """theta while it is trained, and then the sums over images that were not sent before."""
        return self.shared() if self.trains else super().outgoing()

    def upload_schema(self) -> Schema:
        """The one or the other."""
        return {**_optional(schema_of(self.shared())), **super().upload_schema()}

    def download(self, message: Download) -> None:
        """theta, or the sums, which are kept until the images are at hand."""
        theta, _ = _parted(message.tensors)
        whole = {*self.shared()} if theta else {*super().download_schema()}
        if {*message.tensors} != whole:
            raise MessageError(f"download: has {sorted(message.tensors)[:3]}, must be a small model or all sums")
        self.adopt(theta)
        if theta:
            self.memory.kept = {}
        else:
            super().download(message)

    def on_download_end(self) -> None:
        """Choose, and solve for the head, if there are sums."""
        if "class_sums" in self.memory.received:
            super().on_download_end()

    def download_schema(self) -> Schema:
        """theta, or the sums over all images."""
        return {**_optional(schema_of(self.shared())), **_optional(super().download_schema())}


class BothDiscriminantsServer(DiscriminantsServer):
    """Averages the small models in the first task, then adds up and answers everybody with the sums.

    Args:
        robust: how the small models are averaged, see `FedAvg`; sums are sums.
        trim: the fraction that a trimmed mean leaves out at either end.
    """

    serves, needs, gives = "BothDiscriminantsClient", ("small_moments",), ("small_moments",)

    def __init__(self, robust: Robust = "none", trim: float = 0.2) -> None:
        super().__init__()
        self.averaging = FedAvg(robust=robust, trim=trim)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Tell what is averaged from what is added up."""
        theta, sums = _parted(uploads)
        wanted = {name: replace(spec, optional=False) for name, spec in theta.items()}
        self.averaging.begin(wanted, wanted, model)
        super().begin(uploads, downloads, model)
        self.shapes = {name: spec.largest for name, spec in sums.items()}
        zeros = {name: torch.zeros(spec.largest, dtype=torch.float64) for name, spec in theta.items()}
        self.nothing = {WEIGHT: torch.zeros((), dtype=torch.float64), **zeros}

    def check(self, upload: Upload) -> None:
        """All of the small model and nothing else, or all sums or none, over as many images as there are."""
        theta, sums = _parted(upload.tensors)
        if not theta:
            super().check(upload)
        elif sums or len(theta) < len(self.averaging.names):
            whole = len(self.averaging.names)
            raise MessageError(f"upload: has {len(theta)} of the small model's {whole} tensors, and {sorted(sums)}")

    def compare(self, found: Mapping[int, Sizes], before: Sizes) -> dict[int, str]:
        """Small models beside small models, and sums beside sums; who sends another kind than most is left out."""
        training = {client for client, one in found.items() if any(name.startswith("cnn.") for name in one)}
        wrong = training if 2 * len(training) < len(found) else (set(found) - training if training else set())
        alike = {client: one for client, one in found.items() if client not in wrong}
        if not training - wrong:  # what is known of small models says nothing of sums
            before = {n: size for n, size in before.items() if n not in (ALL, CHANGE) and not n.startswith("cnn.")}
        kind = "sums" if training - wrong else "a small model"
        return {**dict.fromkeys(wrong, f"it sent {kind}, unlike the others"), **super().compare(alike, before)}

    def state(self) -> dict[str, Tensor]:
        """Also what a robust average remembers."""
        return {**super().state(), **above(self.averaging.state(), "averaging.")}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.averaging.load(below(state, "averaging."))
        super().load({name: tensor for name, tensor in state.items() if not name.startswith("averaging.")})

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One small model for all clients, absent ones included, or the sums over all images so far."""
        training = trains(context.round)
        fitting = [client for client, upload in uploads.items() if bool(_parted(upload.tensors)[0]) == training]
        sent = OnDemand(fitting, uploads.__getitem__)
        if not training:
            if context.round.number == 1:
                log.warning(
                    "federation.rounds is 1, and the last round of the first task trains nothing; take 2 or more"
                )
            return super().aggregate(sent, context)
        return self.averaging.aggregate(sent, context) if sent else ({}, {})

    def beyond_sums(self) -> str | None:
        """A robust average compares uploads."""
        return self.averaging.beyond_sums() or super().beyond_sums()

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """What FedAvg adds up, and the sums; zeros in the place of those that are not there."""
        theta, sums = _parted(upload.tensors)
        found = self.averaging.terms(replace(upload, tensors=theta)) if theta else self.nothing
        return {**found, **super().terms(replace(upload, tensors=sums))}

    def factors(self, images: int) -> Mapping[str, int]:
        """The small model."""
        return self.averaging.factors(images)

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """The same from sums alone."""
        if trains(context.round):
            return self.averaging.from_sums(total, context)
        sums = {name: total.tensors[name] for name in self.shapes}
        return super().from_sums(total._replace(tensors=sums), context)


def _parted(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Those of the small model, and all others."""
    theta = {name: value for name, value in tensors.items() if name.startswith("cnn.")}
    return theta, {name: value for name, value in tensors.items() if name not in theta}


def _optional(schema: Schema) -> dict[str, TensorSpec]:
    """The same tensors, any of which may be missing."""
    return {name: replace(spec, optional=True) for name, spec in schema.items()}
