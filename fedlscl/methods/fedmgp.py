"""FedMGP: a coarse prompt fused by the server, and fine prompts, one for each class, that stay with the client.

The ViT is frozen. The global prompt P (L tokens) enters it right behind the class token, at the class token's
position; features are the mean of what leaves the last block in its L places. Its key kappa has the ViT's width d.
The local prompts are prefixes, `local_length` keys and values for every head of some blocks, with a slot and a key
kappa_c for each class c. With q the frozen ViT's own feature of an image, f its features under P alone and f_c those
under P and the prefixes of slot c, each round has two phases on the images of the current task n of client i, with
C(i, n) its classes (`train_mask: task`) and G and H the global and the local head (d -> 512 -> ReLU -> K):

    global, E epochs, moves P, kappa and G:              CE(G(f); C(i, n)) - lambda cos(q, kappa)
    local, E epochs, moves the slots, their keys and H:  CE(H(f_y); C(i, n)) - lambda cos(f, kappa_y).

In training the label y says which slot; slots of other classes stay as they are. In tests it is the class among those
learned whose key is most like f; every image chooses for itself. Each phase has the E epochs that other methods have
in all: **local compute is twice theirs**, and a local step also runs the ViT once more, without gradient, for f.

Every task has a local head of its own, new when the task begins. Those of finished tasks are kept in the client's
state, with the number of the task that has each class. A test image gets the logits of all of them: column c is that
of the head of c's task. Under the mask `task` therefore the head of the image's task alone counts: `task_aware`. Under
`seen` the heads, never trained against each other, compete, and nothing depends on the task of the image. Columns of
classes that the client has not seen are minus infinity, since no local head knows them: `none` is the same as `seen`.
The global head classifies no test image. `fedlscl predict` works as under `seen`. A client that missed tasks learns
them as one, with one head; before that, the newest head answers for their classes.

Aggregation (`fusion: distil`), the same for everyone, absent clients included, on `surrogates` labelled images of each
class: the student starts from the prompt of the lowest-numbered client that sent one and minimises by Adam

    sum over the other clients j of the mean over images of ||z(x; P) - z(x; P_j)||^2

with z all tokens that leave the last block; then the head, from the clients' mean, learns the labels of these images
by CE over all K classes, on features under the fused prompt. Keys are averaged by p_i, like the heads before. `fusion:
client0` returns the prompt and the key of that first client to everyone and holds no images.

**The server holds labelled images of every class**, drawn from the training images, those that no client has first.
Where all are dealt out it holds some that clients have: their owners then have no privacy for these. A server that is
to see no data cannot run this method. Published code draws them from the test split, which the accuracies are measured
on. They show all K classes from the start, later tasks' too (published code takes the classes current in the round,
which clients would have to tell), so G has heard of classes that nobody has learned; P and G start the next round.

What travels: up P, kappa and G, 4 (L d + d) bytes, 49,152 at d = 768, and 4 (512 (d + 1) + 513 K) for G, 1,780,112 at
K = 100. Down the same, under `client0` without G. On the client's disk: the slots, 4 K b 2 L d bytes on b blocks
(28 MB at d = 768, K = 100), their keys, the current heads and one for each finished task. Cached for each image: q and
the tokens that enter the first block. While it fuses the server keeps the latter and what teachers say, 4 (2 T + L) d
bytes an image.

**As published, fusion does nothing**, by reading: the prompt is copied into the model, so the gradient reaches the
copy, the optimiser owns the original, and every client gets client 0's prompt. `client0` is that, `distil` what was
intended. Not followed either: the fused head is never returned; a test batch makes one choice of slots for all its
images, by majority; prefixes are reshaped without permuting, which mixes keys and values; global and local head are at
first one object, and one ViT carries the head's start from client to client. The filter of prompts by their accuracy
is commented out there and absent here.

Published: L = 15, a global pool of one prompt, prefixes of 15 on blocks 2 to 4 (here those of them that the ViT has),
lambda = 0.1, gradients clipped at norm 1 (`gradient_clip`, in the YAML), 5 epochs and batches of 16, for the clients
and for both steps of the fusion, Adam at 0.001875 with weight decay 1e-3, 20 surrogates a class; 100 slots whatever K.
Here Adam at 1e-3 without decay, as for all methods, and prompts and keys start from U(-1, 1). Of the fusion,
experiments/methods/fedmgp.yaml sets `surrogates` to 10 and `epochs` to 2, for CPUs; the defaults are those published.
A step of Adam is about as long as its learning rate: prompts closer to each other than that come no closer.

Logged: global/cross_entropy, global/pull, local/cross_entropy, local/pull (pulls with their weight, at least -lambda);
under `distil` server/fusion_before and server/fusion_after (the distillation's objective over all surrogates) and
server/head (the fused head's CE).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.federation.trainer import fit_once
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import below
from fedlscl.messages import Schema, TensorSpec, Upload
from fedlscl.methods.fed_l2p import similarities
from fedlscl.methods.frozen_vit import make_head
from fedlscl.models.adapters import Prefixes
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answers, Server, average


class FedMGPClient(Client):
    """A global prompt with its head, and local prefixes with a head for each task.

    Args:
        length: L, tokens of the global prompt.
        local_length: keys and values in the prefix of a class.
        blocks: which blocks have prefixes; those that the ViT does not have are left out.
        hidden: width of the heads' hidden layer; 0 for linear heads.
        pull: lambda, weight of the pull on the keys.
        **kwargs: settings of every client, see `Client`.
    """

    task_aware = ("task",)
    owner: Tensor  # (K,) int64, number of the last task that the head of a class is for; 0 for classes not learned

    def __init__(
        self,
        length: int = 15,
        local_length: int = 15,
        blocks: tuple[int, ...] = (2, 3, 4),
        hidden: int = 512,
        pull: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, least in (
            ("length", length, 1),
            ("local_length", local_length, 1),
            ("hidden", hidden, 0),
            ("pull", pull, 0.0),
        ):
            if not value >= least:
                raise ValueError(f"model.{name} is {value}, must be at least {least}")
        if not blocks or min(blocks) < 0 or len(set(blocks)) < len(blocks):
            raise ValueError(f"model.blocks is {list(blocks)}, must name blocks, counted from 0, each once")
        if self.train_mask != "task":
            raise ValueError(f"model.train_mask is {self.train_mask}, must be task: each task has a head of its own")
        if type(self.continual) is not NoReplay:
            kind = type(self.continual).__name__
            raise ValueError(f"model.continual is {kind}, must be NoReplay: finished tasks keep their parameters")
        self.length, self.local_length, self.blocks, self.hidden, self.pull = length, local_length, blocks, hidden, pull

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Global prompt, key and head; local slots, keys and the head of the current task."""
        self.adapted = [block for block in self.blocks if block < vit.depth]
        if not self.adapted:
            raise ValueError(
                f"model.blocks is {list(self.blocks)}, but the backbone has blocks 0 to {vit.depth - 1}; "
                "name at least one of them"
            )

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1))

        self.prompt, self.key = uniform(1, self.length, vit.width), uniform(1, vit.width)
        self.global_head = make_head(vit.width, self.hidden, num_classes)
        per_head = vit.width // vit.heads
        self.slots = uniform(num_classes, len(self.adapted), 2, self.local_length, vit.heads, per_head)
        self.slot_keys = uniform(num_classes, vit.width)
        self.local_head = make_head(vit.width, self.hidden, num_classes)
        self.register_buffer("owner", torch.zeros(num_classes, dtype=torch.int64))
        # local heads of finished tasks, by the number of the last task that each is for
        self.sets: dict[int, dict[str, Tensor]] = {}

    # ---- the two passes

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """q (B, d), the feature without any prompt, and the tokens (B, T, d) that enter the first block."""
        tokens = self.vit.lower(self.vit.prepare(images), 0)
        return {"query": self.vit.upper(tokens, 0), "tokens": tokens}

    def entering(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Tokens (B, T + L, d) that enter the first block with a prompt (1, L, d) among them."""
        return self.vit.prompted(tokens, prompt.expand(len(tokens), -1, -1))

    def pooled(self, encoded: Tensor) -> Tensor:
        """Features (B, d): the mean over the prompt's places in (B, T + L, d)."""
        start = self.vit.num_prefix_tokens
        return encoded[:, start : start + self.length].mean(dim=1)

    def prefixed(self, entering: Tensor, slots: Tensor) -> Tensor:
        """f_c (B, d), from the prompted tokens (B, T + L, d) and the class (B,) whose slot each image takes."""
        chosen = self.slots[slots].unbind(1)
        prefixes = [Prefixes(block, part) for block, part in zip(self.adapted, chosen, strict=True)]
        return self.pooled(self.vit.encode(entering, 0, prefixes))

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """As in tests: the slot is that of the nearest key, and each class is judged by the head of its task."""
        tokens = (frozen or self.precompute(images))["tokens"]
        entering = self.entering(tokens, self.prompt)
        slots = nearest(self.pooled(self.vit.encode(entering, 0)), self.slot_keys, self.owner > 0)
        features = self.prefixed(entering, slots)
        logits: Tensor = self.local_head(features)
        for last, one in self.sets.items():
            logits = torch.where(self.owner == last, functional_call(self.local_head, one, (features,)), logits)
        return Output(logits, features)

    # ---- training

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The epochs of the global phase, then those of the local one."""
        for phase in ("global", "local"):
            for _ in range(self.epochs):
                yield phase, self.epoch(len(self.memory.buffer), len(self.current))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and pull of the phase."""
        frozen = self.precomputed("train", batch.images.indices, self.device)
        of_phase = self.global_losses if batch.phase == "global" else self.local_losses
        return of_phase(frozen, batch.images.labels)

    def global_losses(self, frozen: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The terms that move prompt, key and global head, and nothing else."""
        features = self.pooled(self.vit.encode(self.entering(frozen["tokens"], self.prompt), 0))
        return {
            "cross_entropy": masked_cross_entropy(self.global_head(features), labels, self.current_mask),
            "pull": -self.pull * similarity(frozen["query"], self.key),
        }

    def local_losses(self, frozen: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The terms that move the slots of the labels, their keys and the local head, and nothing else."""
        with torch.no_grad():
            entering = self.entering(frozen["tokens"], self.prompt)
            query = self.pooled(self.vit.encode(entering, 0))
        logits = self.local_head(self.prefixed(entering, labels))
        return {
            "cross_entropy": masked_cross_entropy(logits, labels, self.current_mask),
            "pull": -self.pull * similarity(query, self.slot_keys[labels]),
        }

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""

    # ---- from task to task

    def begin_round(self, round: Round) -> None:
        """Also put the local head away, and begin with a new one, when a task is new."""
        last = self.memory.begun
        if 0 < last < round.task:
            self.sets[last] = {name: t.detach().clone() for name, t in self.local_head.state_dict().items()}
            with seeds.seeded(round.seed, "local head", self.index, round.number):
                self.local_head = make_head(self.vit.width, self.hidden, self.num_classes).to(self.device)
        super().begin_round(round)
        self.owner[self.current_mask.to(self.owner.device)] = round.task

    def state(self) -> dict[str, Tensor]:
        """Also the heads of finished tasks."""
        sets = {f"set.{last}.{name}": t.cpu() for last, one in self.sets.items() for name, t in one.items()}
        return {**super().state(), **sets}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also the heads of finished tasks."""
        super().load(state)
        self.sets = {}
        for name, tensor in below(state, "set.").items():
            last, own = name.split(".", 1)
            self.sets.setdefault(int(last), {})[own] = tensor

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """Global prompt, key and head."""
        named = {f"global_head.{name}": parameter for name, parameter in self.global_head.named_parameters()}
        return {"prompt": self.prompt, "key": self.key, **named}

    def download_schema(self) -> Schema:
        """The head may be missing: then the client goes on with its own."""
        schema = {name: TensorSpec(s.shape, s.dtype, optional=True) for name, s in self.shared_schema().items()}
        return {**schema, "prompt": TensorSpec.like(self.prompt), "key": TensorSpec.like(self.key)}

    # ---- evaluation

    def on_test_start(self) -> None:
        """Also put the heads of finished tasks where the client is."""
        super().on_test_start()
        self.sets = {last: {name: t.to(self.device) for name, t in one.items()} for last, one in self.sets.items()}

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        """Logits of all heads, minus infinity for classes that this client has not seen; the task decides nothing."""
        return super().test_logits(batch, tasks).float().masked_fill(~self.seen_mask, -torch.inf)


def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """The mean cosine of queries (B, d) and their keys, (B, d) or one for all (1, d), a scalar in [-1, 1]."""
    return F.cosine_similarity(query.float(), keys.float(), dim=1).mean()


def nearest(query: Tensor, keys: Tensor, learned: Tensor) -> Tensor:
    """The class (B,) whose key is most like each query.

    Args:
        query: (B, d).
        keys: (K, d).
        learned: (K,) true for the classes to choose from; with none the first class, whose slot is as good as any.
    """
    return similarities(query, keys).masked_fill(~learned, -torch.inf).argmax(dim=1)


class FedMGPServer(Server):
    """Fuses the clients' prompts on images of its own.

    Args:
        fusion: `distil` the prompts into one, or hand everyone that of the first client, as published code does.
        surrogates: images of each class that the server holds for the distillation.
        epochs: over these, for the prompt and again for the head.
        batch_size: images of a step.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        fusion: Literal["distil", "client0"] = "distil",
        surrogates: int = 20,
        epochs: int = 5,
        batch_size: int = 16,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        if fusion not in ("distil", "client0"):
            raise ValueError(f"server.fusion is {fusion}, must be distil or client0")
        for name, value, least in (
            ("surrogates", surrogates, 1),
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 1),
            ("learning_rate", learning_rate, 0.0),
        ):
            if not value >= least:
                raise ValueError(f"server.{name} is {value}, must be at least {least}")
        self.fusion, self.epochs, self.batch_size, self.learning_rate = fusion, epochs, batch_size, learning_rate
        self.public_images = surrogates if fusion == "distil" else 0

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients with a global prompt."""
        if not isinstance(model(), FedMGPClient):
            raise ValueError(
                "server: FedMGPServer fuses global prompts, which model does not have; take FedMGPClient or FedAvg"
            )
        self.model = model

    def hold(self, images: Tensor, labels: Tensor) -> None:
        """Keep the surrogate images."""
        self.images, self.labels = images, labels

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """The same for all clients."""
        if self.fusion == "client0":
            sent = uploads[min(uploads)].tensors
            answer = {name: sent[name] for name in ("prompt", "key")}
            return dict.fromkeys(range(clients), answer)
        student, *teachers = [uploads[index].tensors["prompt"] for index in sorted(uploads)]
        mean = average((upload.tensors, upload.samples) for upload in uploads.values())
        model = self.model()
        assert isinstance(model, FedMGPClient)  # `begin` has looked
        model.adopt({**mean, "prompt": student})
        rng = seeds.generator(round.seed, "fusion", round.number)
        distillation = Distillation(model, self._batches(rng), self.epochs, self.learning_rate, teachers)
        fit_once(trainer(), distillation)
        training = HeadTraining(model, self._batches(rng), self.epochs, self.learning_rate)
        fit_once(trainer(), training)
        self.metrics = {
            "fusion_before": distillation.before,
            "fusion_after": distillation.after,
            "head": training.after,
        }
        answer = {name: tensor.detach().cpu() for name, tensor in model.shared().items()}
        return dict.fromkeys(range(clients), answer)

    def _batches(self, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """The surrogates and their labels in random order, in parts of nearly equal size."""
        order = torch.randperm(len(self.labels), generator=rng)
        parts = order.tensor_split(-(-len(order) // self.batch_size))
        return [(self.images[part], self.labels[part]) for part in parts]


class Fusion(LightningModule, ABC):
    """A fit of some parameters of a client's model on the surrogates, always in the same batches.

    A kernel may round differently in a batch of another size, and Adam makes full steps of such differences: in the
    same batches a student that equals its teachers to the last bit stays where it is.

    Args:
        model: a client's model, part of which is trained.
        batches: images (b, 3, H, W) in uint8 and labels (b,).
        epochs: how often each batch is taken.
        learning_rate: of Adam.
    """

    before: float  # the objective over all images at the start, and in the end
    after: float

    def __init__(
        self, model: FedMGPClient, batches: Sequence[tuple[Tensor, Tensor]], epochs: int, learning_rate: float
    ) -> None:
        super().__init__()
        self.model, self.batches, self.epochs, self.learning_rate = model, batches, epochs, learning_rate

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
        return list(range(len(self.batches))) * self.epochs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.trained(), lr=self.learning_rate)

    def on_train_start(self) -> None:
        """Put the frozen model where the others are, and compute what stays."""
        self.model.vit.to(self.device)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.kept = [self.fixed(images.to(self.device)) for images, _ in self.batches]
        self.before = self._mean()

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        """One batch."""
        return self._of(number).mean()

    def on_train_end(self) -> None:
        """Take stock, and let go of what is large: the Trainer holds the module for some time."""
        self.after = self._mean()
        self.kept = []

    def _of(self, number: int) -> Tensor:
        _, labels = self.batches[number]
        return self.objective(labels.to(self.device), self.kept[number])

    def _mean(self) -> float:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return float(torch.cat([self._of(number) for number in range(len(self.batches))]).mean())


class Distillation(Fusion):
    """The prompts of many clients into that of one, the model's.

    Args:
        model: with the student's prompt.
        batches: see `Fusion`.
        epochs: see `Fusion`.
        learning_rate: see `Fusion`.
        teachers: prompts (1, L, d) of the others; without any the student stays as it is.
    """

    def __init__(
        self,
        model: FedMGPClient,
        batches: Sequence[tuple[Tensor, Tensor]],
        epochs: int,
        learning_rate: float,
        teachers: Sequence[Tensor],
    ) -> None:
        super().__init__(model, batches, epochs, learning_rate)
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
        return model.pooled(model.vit.encode(model.entering(tokens, model.prompt), 0))

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
