"""A client of FedWeIT: a small model with decomposed weights, and a set of them for each finished task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl.batches import Batch, Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.evaluation import MASKS
from fedlscl.memory import above, below
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, optional, schema_of
from fedlscl.methods.fedweit.decomposition import attended, beyond, dense, drift, entries, kept_channels, per_channel
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

CLIENTS = 1000  # for the limits of the messages, since a schema does not know how many clients there are


class FedWeITClient(Client):
    """A small model with decomposed weights.

    Flat vectors hold one after another what belongs to the L maps: n weights, c output channels.

    Args:
        decay: weight of the squared norms.
        sparsity: weight of the L1 norm of A, and the absolute value that an entry of A must exceed to count.
        drift: weight of the distance from the parameters of finished tasks.
        pruned: share of the channels of each map that is not sent.
        **kwargs: settings of every client, see `Client`.
    """

    task_aware = MASKS
    required = (("train_mask", "task"), ("continual", NoReplay))  # finished tasks keep their parameters
    knowledge: Tensor  # (J, n) the A_j
    adaptive: nn.Parameter  # (n,) A
    mask: nn.Parameter  # (c,) m
    attention: nn.Parameter  # (J, L) alpha

    def __init__(
        self, decay: float = 1e-4, sparsity: float = 1e-3, drift: float = 100.0, pruned: float = 0.3, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        at_least(0, "model", decay=decay, sparsity=sparsity, drift=drift)
        if not 0 <= pruned < 1:
            raise ValueError(f"model.pruned is {pruned}, must be at least 0 and below 1")
        self.decay, self.sparsity, self.drift, self.pruned = decay, sparsity, drift, pruned

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The CNN, which holds W and what else the current task has, A, m and alpha, and the head."""
        self.cnn = SmallModel(cnn, cnn_name, unit_length=False)
        self.head = nn.Linear(cnn.features, num_classes)
        decomposed = [n for n, module in self.cnn.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.shapes = {f"{name}.weight": self.cnn.get_parameter(f"{name}.weight").shape for name in decomposed}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.channels = [shape[0] for shape in self.shapes.values()]
        self.adaptive = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.mask = nn.Parameter(torch.zeros(sum(self.channels)))
        self.attention = nn.Parameter(torch.zeros(0, len(self.shapes)))
        self.register_buffer("knowledge", torch.zeros(0, sum(self.sizes)), persistent=False)

    # ---- weights

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The model with the parameters of the current task."""
        return self._run(images, self._theta(self.mask, self._added(self.training)))

    def _run(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Output:
        features: Tensor = functional_call(self.cnn, dict(parameters), (images,))
        return Output(self.head(features), features)

    def _theta(self, mask: Tensor, added: Tensor) -> dict[str, Tensor]:
        """W * sigmoid(m) + added by name, from (c,) and (n,)."""
        masks, parts = torch.split(mask.sigmoid(), self.channels), torch.split(added, self.sizes)
        return {
            name: w * per_channel(gate, w) + part.view_as(w)
            for (name, w), gate, part in zip(self._weights().items(), masks, parts, strict=True)
        }

    def _added(self, training: bool) -> Tensor:
        """(n,) A + sum over j of alpha_j A_j."""
        own = self.adaptive if training else beyond(self.adaptive, self.sparsity)
        if not len(self.knowledge):
            return own
        return own + attended(self.attention, self.knowledge, self.sizes)

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.cnn.get_parameter(name) for name in self.shapes}

    def _flat_weights(self) -> Tensor:
        return torch.cat([w.detach().flatten() for w in self._weights().values()])

    # ---- from task to task

    def begin_round(self, round: Round) -> None:
        """Also freeze the parameters of the task before, and begin with new ones, when a task is new."""
        last, new = self.memory.begun, round.task > self.memory.begun
        if new and last:
            self._freeze(last)
        super().begin_round(round)
        if new:
            self._start_set()

    @torch.no_grad()
    def _freeze(self, last: int) -> None:
        """Keep mask and added, and by their names what else the CNN has."""
        rest = {name: t for name, t in self.cnn.state_dict().items() if name not in self.shapes}
        mine = {"mask": self.mask, "added": self._added(training=False), **rest}
        self.memory.archive.keep(last, mine)

    @torch.no_grad()
    def _start_set(self) -> None:
        rng = self.rng("parameters of a task")
        weights = self._flat_weights()
        self.adaptive.copy_(weights / 3)
        self.mask.copy_(torch.cat([torch.randn(c, generator=rng) / math.sqrt(c) for c in self.channels]))
        reference = {"reference": weights.cpu()} if self.memory.archive else {}
        self.memory.received = {**reference, **below(self.memory.received, "next.")}
        self._fetch()
        others = len(self.knowledge)
        alpha = torch.randn(others, len(self.shapes), generator=rng) / math.sqrt(max(1, others))
        self.attention = nn.Parameter(alpha.to(self.device))

    def _fetch(self) -> None:
        """Take the knowledge base of the current task out of what was received."""
        received, size = self.memory.received, sum(self.sizes)
        known = dense(received, size) if "counts" in received else torch.zeros(0, size)
        self.knowledge = known.to(self.device)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The knowledge base has its size from the state."""
        self.attention = nn.Parameter(torch.zeros_like(state["model.attention"], device=self.device))
        super().load(state)
        self._fetch()

    # ---- training

    def on_train_start(self) -> None:
        """Also fetch what the drift is measured by."""
        super().on_train_start()
        if self.memory.archive:
            self.reference = self.memory.received["reference"].to(self.device)
            gates = [one["mask"].sigmoid().square() for one in self.memory.archive.values()]
            self.held = torch.stack(gates).sum(0)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and the terms on the weights."""
        weights = list(self._weights().values())
        decayed = [self.adaptive, self.mask, *([] if self.memory.archive else weights)]
        terms = {
            **super().collaborative_losses(output, batch),
            "decay": self.decay / 2 * torch.stack([tensor.square().sum() for tensor in decayed]).sum(),
            "sparsity": self.sparsity * self.adaptive.abs().sum(),
        }
        if self.memory.archive:
            before, held = torch.split(self.reference, self.sizes), torch.split(self.held, self.channels)
            terms["drift"] = self.drift * drift(weights, before, held)
        return terms

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """W."""
        return above(self._weights(), "cnn.")

    def outgoing(self) -> dict[str, Tensor]:
        """The channels of W that count for the current task; A when the task ends."""
        sent: dict[str, Tensor] = {}
        masks = torch.split(self.mask.detach(), self.channels)
        for (name, weight), mask in zip(self.shared().items(), masks, strict=True):
            kept = kept_channels(mask, self.pruned)
            sent |= {name: weight[kept], f"{name}.kept": kept}
        if self.round.ends_task:
            sent |= above(entries(beyond(self.adaptive.detach(), self.sparsity)), "adaptive.")
        return sent

    def upload_schema(self) -> Schema:
        """Of each map any number of channels, and which; perhaps a sparse A."""
        schema = {}
        for name, weight in self.shared().items():
            schema[name] = TensorSpec((AtMost(len(weight)), *weight.shape[1:]), weight.dtype)
            schema[f"{name}.kept"] = TensorSpec((len(weight),), torch.bool)
        return {**schema, **above(entries_schema(sum(self.sizes)), "adaptive.")}

    def download(self, message: Download) -> None:
        """Take over W where somebody sent it, and keep the A of others for the next task."""
        with torch.no_grad():
            for name, weight in self.shared().items():
                sent = message.tensors[name].to(weight.device)
                weight.copy_(torch.where(sent != 0, sent, weight))
        self.memory.received |= above(below(message.tensors, "others."), "next.")

    def download_schema(self) -> Schema:
        """W, and perhaps the A of all others."""
        counts = TensorSpec((AtMost(CLIENTS),), torch.int32, optional=True)
        others = {**entries_schema(CLIENTS * sum(self.sizes)), "counts": counts}
        return {**schema_of(self.shared()), **above(others, "others.")}

    # ---- evaluation

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        """Logits under the parameters of each image's task, minus infinity outside the task's classes."""
        logits = torch.zeros(len(tasks), self.num_classes, device=self.device)
        for task in torch.unique(tasks).tolist():
            rows = tasks == task
            logits[rows] = self._classify_as(batch.pixels[rows], task + 1).float()
        return logits.masked_fill(~self.accuracy.task_masks[tasks], -torch.inf)

    def _classify_as(self, images: Tensor, task: int) -> Tensor:
        """Logits under the parameters of the set that learned `task`, from 1; of the newest if none has."""
        ends = [last for last in self.memory.archive if last >= task]
        if not ends:
            return self._run(images, self._theta(self.mask, self._added(training=False))).logits
        one = self.memory.archive[min(ends)]
        rest = {name: tensor for name, tensor in one.items() if name not in ("mask", "added")}
        return self._run(images, {**self._theta(one["mask"], one["added"]), **rest}).logits


def entries_schema(most: int) -> Schema:
    """What `entries` gives looks like, of vectors with at most so many entries; none of it need be there."""
    return optional({"places": TensorSpec((AtMost(most),), torch.int32), "values": TensorSpec((AtMost(most),))})
