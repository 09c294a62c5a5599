"""FedWeIT (Yoon et al., 2021): shared weights under masks, sparse weights of each task, attention to those of others.

For task n a client runs the small model with, for every convolution and linear map of the CNN,

    theta_n = W * sigmoid(m_n) + A_n + sum over j of alpha_nj A_j.

W is shared by all clients and tasks; m_n (one number for each output channel), A_n (the shape of W) and alpha_n (one
number for each map and each j) are the client's own. The A_j are the knowledge base: what other clients had as A when
the task before ended. Whatever else the CNN has (biases, normalisation and its running statistics) and the head belong
to the task as well. When a task is over, all of this but W is frozen, and its test images are classified with it.

Objective, on the images of the current task n of client i, with C(i, n) its classes (`train_mask: task`):

    CE(z, y; C(i, n)) + decay / 2 (||A_n||^2 + ||m_n||^2, and ||W||^2 in the first task) + sparsity ||A_n||_1
        + drift sum over s < n of 1/2 ||W * sigmoid(m_s) + A_s - theta*_s||^2.

theta*_s is W * sigmoid(m_s) + A_s when task n begins; with m_s and A_s frozen, as in the released code (whose
`retroactive` is off), the last sum is 1/2 ||(W - W*) * sigmoid(m_s)||^2 with W* the W of that moment. ||A_s||_1 of
finished tasks, which the published objective also has, is then constant and left out.

Aggregation, element by element: W <- sum over i of W_i * M_i / sum over i of M_i, clients counting alike, with M_i = 1
in the channels that client i sent. In a channel that nobody sent the server answers zeros, and a zero tells a client to
keep its own value.

What travels: up, of each map the channels with |m| above its quantile `pruned` (all, if there are none) and a byte for
each channel that says which, 4 nnz(W * M) + c bytes; at a task's end also the entries of A_n beyond `sparsity` in
absolute value, each with its place, 8 nnz(A_n) bytes (a single zero if there are none). Down: W; at a task's end also
the A_j of all other clients that sent one, 8 bytes an entry and 4 a client. With ResNet-18, W has 11,166,912 values
in c = 4,800 channels. Masks, attention, normalisation and head stay. A client absent when a task ends is in nobody's
knowledge base for the next; one that catches up learns what it missed as one task, with one set of parameters.

Evaluation is task-aware: a test image is classified with the parameters of its task, of whose head only the rows of the
task's classes exist, so all three masks give the same accuracy. The head has K rows here; those of other tasks get no
gradient and stay as they are. `fedlscl predict` does not know the task and uses the newest parameters.

Followed of the released code: A_n is thresholded in evaluation, not in training; attention is not normalised; channels
are chosen by |m|, although a gate is a half where m is zero; A_n starts at W / 3, m_n and alpha_n at normal numbers of
variance 1/c (of the map) and 1/(number of j). Not followed: it has the client itself among the j, starts every A_n from
the W of the very first round, and takes theta*_s from the client's W before the download; here both are of the W with
which the task begins. In the publication the j run over all earlier tasks of the others. Ours: ResNet instead of LeNet,
normalisation that starts each task where it ended the last, and the training budget of all other methods (published:
Adam with learning rate 1e-3 / 3, divided by 3 after 3 epochs without progress; 20 rounds of one epoch, batch 100).
decay = 1e-4, sparsity = 1e-3, drift = 100 and pruned = 0.3 are those of the released code.

Kept on the client's disk for each finished task: m_s, thresholded A_s + sum alpha_sj A_j (dense, 4 bytes a value) and
its normalisation; for the current one also W*, the A_j of its knowledge base and, once there, those of the next.

Logged: collaborate/cross_entropy, collaborate/decay, collaborate/sparsity, collaborate/drift (from the second task on).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl.batches import Batch, Images, Output
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.evaluation import MASKS
from fedlscl.memory import below
from fedlscl.messages import AtMost, Download, MessageError, Schema, TensorSpec, Upload
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answers, OnDemand, Server

CLIENTS = 1000  # for the limits of the messages, since a schema does not know how many clients there are


class Sparse(NamedTuple):
    """Some flat vectors, the entries of one after those of another."""

    places: Tensor  # (entries,) int32, each in its vector
    values: Tensor  # (entries,)
    counts: Tensor  # (vectors,) int32, how many of the entries are of each


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
    knowledge: Tensor  # (J, n) the A_j
    adaptive: nn.Parameter  # (n,) A
    mask: nn.Parameter  # (c,) m
    attention: nn.Parameter  # (J, L) alpha

    def __init__(
        self, decay: float = 1e-4, sparsity: float = 1e-3, drift: float = 100.0, pruned: float = 0.3, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("decay", decay), ("sparsity", sparsity), ("drift", drift)):
            if not value >= 0:
                raise ValueError(f"model.{name} is {value}, must not be negative")
        if not 0 <= pruned < 1:
            raise ValueError(f"model.pruned is {pruned}, must be at least 0 and below 1")
        if self.train_mask != "task":
            raise ValueError(f"model.train_mask is {self.train_mask}, must be task: each task has a head of its own")
        if type(self.continual) is not NoReplay:
            kind = type(self.continual).__name__
            raise ValueError(f"model.continual is {kind}, must be NoReplay: finished tasks keep their parameters")
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
        # of finished tasks, by the number of the last one that a set is for: mask, added and, by their names, what
        # else the CNN has
        self.sets: dict[int, dict[str, Tensor]] = {}

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
        rest = {name: t for name, t in self.cnn.state_dict().items() if name not in self.shapes}
        mine = {"mask": self.mask, "added": self._added(training=False), **rest}
        self.sets[last] = {name: tensor.detach().clone() for name, tensor in mine.items()}

    @torch.no_grad()
    def _start_set(self) -> None:
        rng = self.rng("parameters of a task")
        weights = self._flat_weights()
        self.adaptive.copy_(weights / 3)
        self.mask.copy_(torch.cat([torch.randn(c, generator=rng) / math.sqrt(c) for c in self.channels]))
        reference = {"reference": weights.cpu()} if self.sets else {}
        self.memory.received = {**reference, **below(self.memory.received, "next.")}
        self.knowledge = self._knowledge().to(self.device)
        others = len(self.knowledge)
        alpha = torch.randn(others, len(self.shapes), generator=rng) / math.sqrt(max(1, others))
        self.attention = nn.Parameter(alpha.to(self.device))

    def _knowledge(self) -> Tensor:
        """(J, n) the knowledge base of the current task, dense."""
        received, size = self.memory.received, sum(self.sizes)
        if "counts" not in received:
            return torch.zeros(0, size)
        return dense(Sparse(*(received[name] for name in Sparse._fields)), size)

    def state(self) -> dict[str, Tensor]:
        """Also the parameters of finished tasks."""
        sets = {f"set.{last}.{name}": t.cpu() for last, one in self.sets.items() for name, t in one.items()}
        return {**super().state(), **sets}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also the parameters of finished tasks; the knowledge base has its size from the state."""
        self.attention = nn.Parameter(torch.zeros_like(state["model.attention"], device=self.device))
        super().load(state)
        self.knowledge = self._knowledge().to(self.device)
        self.sets = {}
        for name, tensor in below(state, "set.").items():
            last, own = name.split(".", 1)
            self.sets.setdefault(int(last), {})[own] = tensor

    # ---- training

    def on_train_start(self) -> None:
        """Also fetch what the drift is measured by."""
        super().on_train_start()
        if self.sets:
            self.reference = self.memory.received["reference"].to(self.device)
            gates = [one["mask"].to(self.device).sigmoid().square() for one in self.sets.values()]
            self.held = torch.stack(gates).sum(0)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and the terms on the weights."""
        weights = list(self._weights().values())
        decayed = [self.adaptive, self.mask, *([] if self.sets else weights)]
        terms = {
            **super().collaborative_losses(output, batch),
            "decay": self.decay / 2 * torch.stack([tensor.square().sum() for tensor in decayed]).sum(),
            "sparsity": self.sparsity * self.adaptive.abs().sum(),
        }
        if self.sets:
            parts = torch.split(self.reference, self.sizes)
            before = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
            terms["drift"] = self.drift * drift(weights, before, torch.split(self.held, self.channels))
        return terms

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """W."""
        return {f"cnn.{name}": weight for name, weight in self._weights().items()}

    def outgoing(self) -> dict[str, Tensor]:
        """The channels of W that count for the current task; A when the task ends."""
        sent: dict[str, Tensor] = {}
        masks = torch.split(self.mask.detach(), self.channels)
        for (name, weight), mask in zip(self.shared().items(), masks, strict=True):
            kept = kept_channels(mask, self.pruned)
            sent |= {name: weight[kept], f"{name}.kept": kept}
        if self.round.ends_task:
            places, values = entries(beyond(self.adaptive.detach(), self.sparsity))
            sent |= {"adaptive.places": places, "adaptive.values": values}
        return sent

    def upload_schema(self) -> Schema:
        """Of each map any number of channels, and which; perhaps a sparse A."""
        schema = {}
        for name, weight in self.shared().items():
            schema[name] = TensorSpec((AtMost(len(weight)), *weight.shape[1:]), weight.dtype)
            schema[f"{name}.kept"] = TensorSpec((len(weight),), torch.bool)
        limit = AtMost(sum(self.sizes))
        schema["adaptive.places"] = TensorSpec((limit,), torch.int32, optional=True)
        schema["adaptive.values"] = TensorSpec((limit,), optional=True)
        return schema

    def download(self, message: Download) -> None:
        """Take over W where somebody sent it, and keep the A of others for the next task."""
        own = self.shared()
        with torch.no_grad():
            for name, weight in own.items():
                sent = message.tensors[name].to(weight.device)
                weight.copy_(torch.where(sent != 0, sent, weight))
        others = below(message.tensors, "others.")
        self.memory.received |= {f"next.{name}": tensor for name, tensor in others.items()}

    def download_schema(self) -> Schema:
        """W, and perhaps the A of all others."""
        limit = AtMost(CLIENTS * sum(self.sizes))
        return {
            **self.shared_schema(),
            "others.places": TensorSpec((limit,), torch.int32, optional=True),
            "others.values": TensorSpec((limit,), optional=True),
            "others.counts": TensorSpec((AtMost(CLIENTS),), torch.int32, optional=True),
        }

    # ---- evaluation

    def on_test_start(self) -> None:
        """Also put the parameters of finished tasks where the client is."""
        super().on_test_start()
        self.sets = {last: {name: t.to(self.device) for name, t in one.items()} for last, one in self.sets.items()}

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        """Logits under the parameters of each image's task, minus infinity outside the task's classes."""
        logits = torch.zeros(len(tasks), self.num_classes, device=self.device)
        for task in torch.unique(tasks).tolist():
            rows = tasks == task
            logits[rows] = self._classify_as(batch.pixels[rows], task + 1).float()
        return logits.masked_fill(~self.task_masks[tasks], -torch.inf)

    def _classify_as(self, images: Tensor, task: int) -> Tensor:
        """Logits under the parameters of the set that learned `task`, from 1; of the newest if none has."""
        ends = [last for last in self.sets if last >= task]
        if not ends:
            return self._run(images, self._theta(self.mask, self._added(training=False))).logits
        one = self.sets[min(ends)]
        rest = {name: tensor for name, tensor in one.items() if name not in ("mask", "added")}
        return self._run(images, {**self._theta(one["mask"], one["added"]), **rest}).logits


class FedWeITServer(Server):
    """Averages what was sent of W, and at the end of a task hands everyone the A of all others."""

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that send channels and say which."""
        self.names = tuple(name for name, spec in downloads.items() if not spec.optional)
        if not self.names or any(f"{name}.kept" not in uploads for name in self.names):
            raise ValueError(
                "server: FedWeITServer merges channels of W, but model does not say which it sends; "
                "take FedWeITClient or FedAvg"
            )
        (entries,) = uploads["adaptive.places"].shape
        assert isinstance(entries, AtMost)
        self.entries = entries.limit

    def check(self, upload: Upload) -> None:
        """As many channels as are said to be kept, and of A as many values as places, which there are."""
        sent = upload.tensors
        for name in self.names:
            if int(sent[f"{name}.kept"].sum()) != len(sent[name]):
                raise MessageError(f"upload: '{name}' has not as many channels as '{name}.kept' says")
        places, values = sent.get("adaptive.places"), sent.get("adaptive.values")
        if (places is None) != (values is None):
            raise MessageError("upload has 'adaptive.places' or 'adaptive.values' without the other")
        if places is None or values is None:
            return
        if len(places) != len(values) or places.min() < 0 or places.max() >= self.entries:
            raise MessageError(
                f"upload: 'adaptive.places' must be a number from 0 to {self.entries - 1} for each of 'adaptive.values'"
            )

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """One W for all clients, absent ones included, and to each the others' A."""
        adaptives: dict[int, tuple[Tensor, Tensor]] = {}

        def channels() -> Iterable[dict[str, tuple[Tensor, Tensor]]]:
            for index, upload in uploads.items():
                sent = upload.tensors
                if "adaptive.places" in sent:
                    adaptives[index] = sent["adaptive.places"], sent["adaptive.values"]
                yield {name: (sent[name], sent[f"{name}.kept"]) for name in self.names}

        merged = merge(channels())

        def answer(index: int) -> dict[str, Tensor]:
            others = [part for other, part in adaptives.items() if other != index]
            if not others:
                return merged
            joined = join(others)
            return {**merged, **{f"others.{name}": tensor for name, tensor in joined._asdict().items()}}

        return OnDemand(range(clients), answer)


def merge(clients: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Channel by channel the mean over the clients that sent it, summed up in float64; zeros where nobody did.

    Args:
        clients: of each client by name the channels that it sent (kept, ...) and which they are (c,). Gone through
            once.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for client in clients:
        for name, (channels, kept) in client.items():
            if name not in sums:
                sums[name] = torch.zeros(len(kept), *channels.shape[1:], dtype=torch.float64)
                counts[name], dtypes[name] = torch.zeros(len(kept)), channels.dtype
            sums[name][kept] += channels
            counts[name] += kept
    return {n: (s / per_channel(counts[n].clamp(min=1), s)).to(dtypes[n]) for n, s in sums.items()}


def drift(weights: Sequence[Tensor], before: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
    """Sum over s of 1/2 ||(W - W*) * sigmoid(m_s)||^2, a scalar.

    Args:
        weights: W of each map, (c, ...) each.
        before: W* of each map, (c, ...) each.
        held: of each map the sum over s of sigmoid(m_s)^2, (c,) each.
    """
    moved = [((w - b).square().flatten(1).sum(1) * h).sum() for w, b, h in zip(weights, before, held, strict=True)]
    return torch.stack(moved).sum() / 2


def attended(attention: Tensor, knowledge: Tensor, sizes: Sequence[int]) -> Tensor:
    """(n,) sum over j of alpha_j A_j, from alpha (J, L), A (J, n) and the sizes of the L maps."""
    parts = torch.split(knowledge, list(sizes), dim=1)
    return torch.cat([alpha @ part for alpha, part in zip(attention.unbind(1), parts, strict=True)])


def beyond(adaptive: Tensor, threshold: float) -> Tensor:
    """A where its absolute value is above the threshold, elsewhere zero."""
    return torch.where(adaptive.abs() > threshold, adaptive, 0.0)


def kept_channels(mask: Tensor, pruned: float) -> Tensor:
    """(c,) true where |m| is above its quantile `pruned`; everywhere if it is nowhere, as with a single channel."""
    size = mask.abs()
    kept = size > size.quantile(pruned)
    return kept if bool(kept.any()) else torch.ones_like(kept)


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """(c,) in a shape that multiplies the channels of (c, ...)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def entries(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Places (int32) and values of what is not zero in (n,); those of the first entry if all is."""
    places = flat.nonzero().squeeze(1)
    if not len(places):
        places = places.new_zeros(1)
    return places.int(), flat[places]


def join(parts: Sequence[tuple[Tensor, Tensor]]) -> Sparse:
    """Several vectors as `entries` gives them, in one."""
    places, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return Sparse(places, values, torch.tensor([len(one) for one, _ in parts], dtype=torch.int32))


def dense(sparse: Sparse, size: int) -> Tensor:
    """The reverse of `join` and `entries`: (vectors, n)."""
    vectors = torch.zeros(len(sparse.counts), size)
    owners = torch.arange(len(sparse.counts)).repeat_interleave(sparse.counts.long())
    vectors[owners, sparse.places.long()] = sparse.values
    return vectors
