"""PILoRA (Guo et al., 2024): a LoRA of its own for each task, orthogonal to the earlier ones, and learnable prototypes.

The frozen ViT is adapted in one block. For the q and for the v part of its fused qkv map, task n has a pair A_n (r, d)
and B_n (d, r), and the map returns W h + sum over s <= n of B_s A_s h; k is left alone. Each class c has a prototype
(d), and the logits are -delta:

    delta_c = sqrt(||f - c||^2 / d),   f (d) the feature of the adapted ViT.

Only the current pair is trained, and of the prototypes those of the client's current classes of which it has images.
When a task is over its pair is frozen, as the server averaged it last; the next A starts from Kaiming-uniform numbers,
the same for all clients, the next B from zero.

Objective, for task n:

    CE(-delta, y; all K) + compactness * mean of delta_y + sparsity (||A_q,n||_1 + ||A_v,n||_1)
        + orthogonality * sum over s < n and both parts of ||A_n A_s^T||_1.

All K classes compete here, as in the released code, and `train_mask` has no part in it: the prototypes of other classes
are not moved by that, but keep the features at a distance. Below the smallest normal float32, ||f - c||^2 / d is taken
for a constant, since the root has no gradient at 0.

Aggregation. The pair: sum over i of p_i (A_i, B_i), p_i the client's share of the training images, A and B each for
itself. The prototype of a class c: with f_j the mean feature of client j's images of c under the model that it trained,

    D_i = sum over j of ||c_i - f_j||,   r_i = 1 / D_i, scaled to 0..1 from the smallest to the largest,
    u = softmax(r / temperature),   c <- sum over i of u_i c_i.

Where all D_i are equal, u is uniform. The c_i are those of the clients that train c now (`proto_clients: training`); a
class may be current for one client and old for another, which keeps its prototype as it learned it. With
`proto_clients: all`, every other client counts as well, with the copy that the server answered last or, before that,
the common start. Alone among five, the client that trains c then gets e^5 / (e^5 + 4) = 0.974, as in the released code,
where everybody has every class. Of two candidates the nearer always gets 0.993.

What travels: up the current pair, prototypes and class means of the current classes and their numbers; down the pair
and these prototypes, in the order in which the numbers came. With r = 4 and 8 current classes that is
4 (16 d + 8 d + 8 d) + 64 bytes up (98,368 with d = 768) and 4 (16 d + 8 d) down (73,728). A class of which the client
has no image is among its numbers, after the others, without prototype and mean, and is answered with what the server
has of it. A client that was absent gets the pair alone, since the server does not know its classes; one that catches up
learns what it missed under the pair of the current task. The server learns which classes a client trains now, and the
mean feature of each.

For that price no client hears of the prototypes of others' classes. One that comes to a public class later starts from
the common start and meets what others train of it in that round; and since the rows of classes that a client never had
stay where they started, they hardly compete under the mask `none`. At the start everyone gets all K prototypes, once.

Followed of the released code: r = 4 in block 0 without scaling, prototypes from 0.1 N(0, 1), compactness 0.001,
sparsity 0.01, orthogonality 0.5, temperature 0.2. Not followed: its averaged model has (B_0 + B_t)(A_0 + A_t), which
omits tasks and adds products across tasks, where here all tasks' products are summed; it stops early by looking at test
images; its Adam has a weight decay of 1e-5, which would move frozen prototypes; its learning rates are 2e-3 for
prototypes and 1e-5 for LoRA under a cosine over 30 rounds. The YAML pilora has the rate of all other methods for both,
1e-3; pilora_own_rate has the published rates, held constant, since here the optimizer starts afresh in every round. The
ViT is that of the setting (published: DINO), the training budget that of all other methods (published: 10 epochs, batch
64).

On the client's disk: the pairs of finished tasks, 4 * 4 r d bytes each.

Logged: collaborate/cross_entropy, collaborate/compactness, collaborate/sparsity, collaborate/orthogonality (from the
second task on), each with its factor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.messages import AtMost, Download, MessageError, Schema, TensorSpec, Upload
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answers, Server, average

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
        for name, value in {**self.rates, **self.weights}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"model.{name} is {value}, must not be negative")
        if rank < 1:
            raise ValueError(f"model.rank is {rank}, must be at least 1")
        if type(self.continual) is not NoReplay:
            kind = type(self.continual).__name__
            raise ValueError(f"model.continual is {kind}, must be NoReplay: finished tasks keep LoRA and prototypes")
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
        pairs = torch.cat([self.earlier_a, self.a], 1), torch.cat([self.earlier_b, self.b], 2)
        features = self.vit.upper(frozen["tokens"], self.block, [LowRank(self.block, fused(*pairs))])
        prototypes = torch.where(self.trained[:, None], self.prototypes, self.prototypes.detach())
        return Output(-distances(features, prototypes), features)

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
            joined = torch.cat([self.earlier_a, self.a.detach()], 1), torch.cat([self.earlier_b, self.b.detach()], 2)
            self.memory.received |= {name: tensor.cpu() for name, tensor in zip(PAIR, joined, strict=True)}
            self._fetch()
        return opened > 0

    def _fetch(self) -> None:
        """Take the pairs of finished tasks from the memory."""
        if self.memory.received:
            self.earlier_a, self.earlier_b = (self.memory.received[name].to(self.a.device) for name in PAIR)
        else:
            self.earlier_a, self.earlier_b = self.earlier_a[:, :0], self.earlier_b[:, :, :0]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also fetch the pairs of finished tasks."""
        super().load(state)
        self._fetch()

    def _classes(self) -> tuple[Tensor, Tensor]:
        """Numbers of the current classes, ascending: those of which there are images, and the others."""
        first, last = self.memory.learned, self.memory.begun
        held = torch.unique(self._labels(self._images_of(first, last)))
        rest = self._class_mask(first, last)
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
        labels = self._labels(self.current)
        self.means = torch.stack([features[labels == label].mean(0) for label in torch.unique(labels)])

    def _features(self, images: Images) -> dict[str, Tensor]:
        return {"features": self._output(images, "train").representation}

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
        shared = self.shared_schema()
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
        return {**self.shared_schema(), "prototypes": rows}


class PILoRAServer(Server):
    """Averages the pairs and weighs the prototypes of each class anew.

    Args:
        proto_clients: whose copies of a class's prototype count, those of the clients `training` it now or of `all`.
        temperature: of the softmax that makes weights of them.
    """

    def __init__(self, proto_clients: Literal["training", "all"] = "training", temperature: float = 0.2) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"server.temperature is {temperature}, must be positive")
        self.proto_clients, self.temperature = proto_clients, temperature

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that send class means; the prototypes are those of the common start."""
        if "means" not in uploads:
            raise ValueError(
                "server: PILoRAServer weighs prototypes by class means, but model sends none; "
                "take PILoRAClient or FedAvg"
            )
        self.prototypes = model().get_parameter("prototypes").detach().clone()

    def check(self, upload: Upload) -> None:
        """Each class once, and of each that is held a prototype and a mean."""
        sent = upload.tensors
        classes, held = sent["classes"], len(sent["prototypes"])
        if len(torch.unique(classes)) < len(classes) or classes.min() < 0 or classes.max() >= len(self.prototypes):
            raise MessageError(f"upload: 'classes' must be different numbers from 0 to {len(self.prototypes) - 1}")
        if len(sent["means"]) != held or held > len(classes):
            raise MessageError(
                f"upload: {held} prototypes, {len(sent['means'])} means and {len(classes)} classes do not fit together"
            )

    def state(self) -> dict[str, Tensor]:
        """The prototypes (K, d) of all classes, as answered last."""
        return {"prototypes": self.prototypes}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the prototypes."""
        self.prototypes = state["prototypes"].clone()

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """The mean pair for everyone, absent clients included, and to each sender the prototypes of its classes."""
        classes: dict[int, Tensor] = {}
        candidates: dict[int, list[Tensor]] = defaultdict(list)
        means: dict[int, list[Tensor]] = defaultdict(list)

        def pairs() -> Iterator[tuple[dict[str, Tensor], int]]:
            for index, upload in uploads.items():
                sent = upload.tensors
                classes[index] = sent["classes"]
                held = sent["classes"][: len(sent["prototypes"])].tolist()
                for label, prototype, mean in zip(held, sent["prototypes"], sent["means"], strict=True):
                    candidates[label].append(prototype)
                    means[label].append(mean)
                yield {name: sent[name] for name in PAIR}, upload.samples

        pair = average(pairs())
        for label, copies in candidates.items():
            if self.proto_clients == "all":
                copies += [self.prototypes[label]] * (clients - len(copies))
            stacked = torch.stack(copies)
            u = weights(stacked, torch.stack(means[label]), self.temperature)
            self.prototypes[label] = u @ stacked.double()
        return {
            index: {**pair, "prototypes": self.prototypes[classes[index]]} if index in classes else pair
            for index in range(clients)
        }


def weights(candidates: Tensor, means: Tensor, temperature: float) -> Tensor:
    """u (m,) in float64, summing to 1, for candidates (m, d) and the class means (h, d) of those who hold the class."""
    far: Tensor = (candidates.double()[:, None] - means.double()).norm(dim=2).sum(dim=1)
    near = far.clamp(min=1e-30).reciprocal()
    span = near.max() - near.min()
    if span <= 1e-12 * near.max():  # nothing but rounding, or a single candidate
        return torch.full_like(near, 1 / len(near))
    return ((near - near.min()) / span / temperature).softmax(dim=0)


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """delta (B, K) in float32, of features (B, d) to prototypes (K, d); no gradient where both are the same."""
    squares = (features.float()[:, None] - prototypes).square().mean(dim=2)
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


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
