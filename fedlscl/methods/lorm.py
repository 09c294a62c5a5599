"""LoRM (Salami et al., 2025): LoRA factors trained one at a time, so that merging them has a closed form.

Every linear map of every block of the frozen ViT (attn.qkv, attn.proj, mlp.fc1, mlp.fc2) gets a fixed LoRA of rank r,

    (W_0 + B A) x + c,

without a scale; a linear head on the class token is trained along. Each task has new factors: A (r, in) uniform within
+-1 / sqrt(in), which is Kaiming's with a = sqrt(5), and B (out, r) zero. In the first, third and fifth round of a task
all clients train B and have A in common, in the rounds between they train A and have B in common. The server merges
what was trained so that each map's outputs change least, in squares, from what each client had made of them. For a
product of which one factor is common that has a closed form; a mean of both factors would not be the mean of the
products.

Objective, on the images of the current task n of client i, with C(i, n) its classes (`train_mask: task`):

    CE(z, y; C(i, n)) = -z_y + log sum over c in C(i, n) of exp(z_c),

where z is computed with W_0 + B A of the current task alone: what earlier tasks have learned is absent from training.

Gram matrices. After training a client goes once over its current images, in evaluation batches, and sums up x x^T over
all tokens x that enter a map: G_i, of which only the diagonal is kept and sent. The more images, the larger: clients
are weighted by their images without another factor. The ViT then runs with the plain mean of the products just trained
and of all earlier tasks. For the head, x are its inputs and all of the matrix H_i is sent.

Aggregation, in float64, with ^+ the pseudo-inverse, and sums over the clients i of a round:

    B <- (sum B_i A G_i) A^T (A (sum G_i) A^T)^+,
    A <- (sum A_i G_i) (sum G_i)^+, with diagonal G a mean of each column, weighted by its entries of G_i,
    head weight <- (sum W_i H'_i) (sum H'_i)^+, H' = alpha H + (1 - alpha) diag(H),
    head bias <- sum p_i b_i, p_i the client's share of the training images.

Rows of the head take part for all clients; for a class that a client does not train now as the client received them.

An input that is zero for all tokens of all clients loses its column under ^+: the merged factor is zero there, which
does no harm as long as the input stays zero. A client whose G is all zero has no part in a merge.

Deployment. Before a task's first merge and after its last one, the finished tasks s count by their inputs,

    W_0 + U V^+,  U = sum over s of B_s A_s G_s,  V = sum over s of G_s,  G_s = sum G_i of the task's last round,

and after any other merge all products, that of the current task included, have the same weight. With diagonal G, U V^+
is the sum of B_s A_s with the columns of A_s scaled by G_s / V: all finished tasks together are one LoRA of rank
(number of tasks) r, and nobody needs the matrix of full size. Clients keep B_s, A_s and G_s of all tasks.

What travels. Up: B or A, the diagonals, the head, H_i; with the base ViT's d = 768 and 12 blocks, 82,944 r values of B
or 64,512 r of A, 64,512 of G, 769 K, 768^2: with r = 16 and K = 100 classes 8,233,360 bytes in a round of B and
7,053,712 in one of A. Down: the merged factor and the head, 5,616,016 and 4,436,368 bytes; at a task's end also G_s,
another 258,048 bytes. That is less than the scaled A_s would take, since the scale of all tasks changes with each new
one. The first A and B come with the common start, and with them a number of 8 bytes from which everyone, the server
too, draws the A of each task. Nobody is told which factor is next: all clients, absent ones too, get every answer, and
the answers since the task began say how many rounds it has had. A client that catches up learns what it missed as one
task, with the factors of the task in which it comes back.

Followed of the released code: Gram matrices under the just-trained product averaged with earlier ones, diagonal in the
ViT (its settings; the default there is not), alpha = 0.5 in the head; AdamW without decay, which is Adam. Ours: the
code goes over the images anew at a task's end, under the merged model, for G_s; that would be a second exchange within
a round, so the diagonals that came with the last round's uploads stand in, which have been measured before the merge
and of the clients of that round. Gram matrices are of the images without augmentation, in one pass (the code: of
augmented images, one pass for CIFAR-100, two for ImageNet-R). Hyper-parameters published with the code: r from 1 to 32
and learning rates from 3e-4 to 3e-3, chosen for each data set and split, 5 rounds of 5 epochs with batches of 16; ours
r = 16 and the training budget of all other methods.

Of `Client`'s settings, `buffer_size` and `selection` have no part in the method.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Images, Output
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.memory import below
from fedlscl.messages import Download, Schema, TensorSpec, Upload
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answers, Server

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
Factor = Literal["a", "b"]


class LoRMClient(Client):
    """The frozen ViT with fixed LoRA in all of its linear maps, and a linear head.

    What belongs to the maps is named by layer, with all blocks in one tensor: b (blocks, out, r), a (blocks, r, in),
    gram (blocks, in).

    Args:
        rank: r.
        **kwargs: settings of every client, see `Client`.
    """

    origin: Tensor  # from which the A of all tasks are drawn

    def __init__(self, rank: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rank < 1:
            raise ValueError(f"model.rank is {rank}, must be at least 1")
        if type(self.continual) is not NoReplay:
            kind = type(self.continual).__name__
            raise ValueError(
                f"model.continual is {kind}, must be NoReplay: every task is trained with factors of its own"
            )
        self.rank = rank

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """The factors of the first task, and the head.

        Raises:
            ValueError: if the ViT lacks one of the maps, or one has fewer inputs than the rank.
        """
        maps = {layer: dict(vit.vit.blocks[0].named_modules()).get(layer) for layer in LAYERS}
        linear = {layer: module for layer, module in maps.items() if isinstance(module, nn.Linear)}
        if missing := sorted(set(LAYERS) - set(linear)):
            raise ValueError(
                f"backbone.name: blocks of '{vit.name}' have no linear layer {missing[0]}; take another ViT"
            )
        if self.rank > (limit := min(module.in_features for module in linear.values())):
            raise ValueError(f"model.rank is {self.rank}, must be between 1 and the width {limit} of the ViT")
        self.register_buffer("origin", torch.randint(2**62, (), device="cpu"))
        outputs, inputs = [m.out_features for m in linear.values()], [m.in_features for m in linear.values()]
        self.b = nn.ParameterList(torch.zeros(vit.depth, size, self.rank) for size in outputs)
        self.a = nn.ParameterList(torch.zeros(vit.depth, self.rank, size) for size in inputs)
        self._begin_factors(1)
        self.head = nn.Linear(vit.width, num_classes)
        # of finished tasks, (tasks, ...) each by name
        self.past = {name: torch.zeros(0, *tensor.shape) for name, tensor in self._of_a_task().items()}
        self.merges = 0  # answers since the current task began

    @torch.no_grad()
    def _begin_factors(self, task: int) -> None:
        """New A and B."""
        for layer, a, b in zip(LAYERS, self.a, self.b, strict=True):
            a.copy_(initial(a.shape, int(self.origin), task, layer))
            b.zero_()

    def _factors(self, which: Factor) -> dict[str, Tensor]:
        parameters = self.a if which == "a" else self.b
        return {f"{which}.{layer}": parameter for layer, parameter in zip(LAYERS, parameters, strict=True)}

    def _of_a_task(self) -> dict[str, Tensor]:
        """What is kept of a task, by name; in place of the Gram diagonals zeros."""
        grams = {f"gram.{layer}": torch.zeros_like(a[:, 0]) for layer, a in zip(LAYERS, self.a, strict=True)}
        return {**self._factors("a"), **self._factors("b"), **grams}

    # ---- the adapted ViT

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens (B, T, d) that enter the first block."""
        return {"tokens": self.vit.lower(self.vit.prepare(images), 0)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """In training with the current task's factors alone, else with what is deployed."""
        if self.training:
            pairs = [LoRA(a, b) for a, b in zip(self.a, self.b, strict=True)]
        else:
            pairs = self._deployed(current=self.merges > 0)
        features = self.vit.upper(frozen["tokens"], 0, injections(pairs))
        return Output(self.head(features), features)

    def _deployed(self, current: bool) -> list[LoRA]:
        """For each layer finished tasks as one LoRA, or the plain mean of them and the current one."""
        self.past = {name: tensor.to(self.device) for name, tensor in self.past.items()}
        pairs = []
        for layer, own_a, own_b in zip(LAYERS, self.a, self.b, strict=True):
            a, b, grams = (self.past[f"{kind}.{layer}"] for kind in ("a", "b", "gram"))
            if current:
                a, b = torch.cat([a, own_a[None]]), torch.cat([b, own_b[None]])
                pairs.append(joined(a, b, a.new_full((len(a), 1, 1), 1 / len(a))))
            else:
                pairs.append(joined(a, b, divided(grams, grams.sum(0))))
        return pairs

    # ---- one round

    def begin_round(self, round: Round) -> None:
        """Also hold the factor whose turn it is not."""
        super().begin_round(round)
        self.a.requires_grad_(turn(self.merges) == "a")
        self.b.requires_grad_(turn(self.merges) == "b")

    def on_train_end(self) -> None:
        """Measure the Gram matrices; no sample needs to be remembered."""
        sums = self.observe(self.current, self._moments)  # a row for each batch
        self.grams = {name: parts.double().sum(0).float() for name, parts in sums.items()}

    def _moments(self, images: Images) -> dict[str, Tensor]:
        """The Gram matrices of a batch, (1, ...) each by name."""
        adapted = injections(self._deployed(current=True))
        listening = {layer: [Listening(block, layer) for block in range(self.vit.depth)] for layer in LAYERS}
        everyone = [one for ones in listening.values() for one in ones]
        tokens = self.precomputed("train", images.indices, self.device)["tokens"]
        features = self.vit.upper(tokens, 0, [*adapted, *everyone]).float()
        with torch.autocast(features.device.type, enabled=False):
            head = features.mT @ features
        grams = {f"gram.{layer}": torch.stack([one.squares for one in ones]) for layer, ones in listening.items()}
        return {name: gram[None] for name, gram in {**grams, "gram.head": head}.items()}

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """Also the finished tasks, and where in the current one the federation is."""
        past = {f"past.{name}": tensor.cpu() for name, tensor in self.past.items()}
        return {**super().state(), **past, "merges": torch.tensor(self.merges)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also these."""
        super().load(state)
        self.past, self.merges = below(state, "past."), int(state["merges"])

    # ---- messages

    def _head(self) -> dict[str, Tensor]:
        return {"head.weight": self.head.weight, "head.bias": self.head.bias}

    def shared(self) -> dict[str, Tensor]:
        """Both factors, the head, and the number from which further A are drawn."""
        return {**self._factors("a"), **self._factors("b"), **self._head(), "origin": self.origin}

    def outgoing(self) -> dict[str, Tensor]:
        """The factor that was trained, the head, and the Gram matrices."""
        return {**self._factors(turn(self.merges)), **self._head(), **self.grams}

    def upload_schema(self) -> Schema:
        """Factors of one kind, the head, and the Gram matrices."""
        width = self.head.in_features
        return {**self._news(), **self._diagonals(), "gram.head": TensorSpec((width, width))}

    def download(self, message: Download) -> None:
        """Take over what was merged; with Gram diagonals the task is over, and new factors begin."""
        self.adopt(below(message.tensors, "merged."))
        self.merges += 1
        if grams := {name: tensor for name, tensor in message.tensors.items() if name.startswith("gram.")}:
            finished = {name: tensor.detach().cpu() for name, tensor in {**self._of_a_task(), **grams}.items()}
            self.past = {name: torch.cat([self.past[name].cpu(), tensor[None]]) for name, tensor in finished.items()}
            self._begin_factors(message.task + 1)
            self.merges = 0

    def download_schema(self) -> Schema:
        """Factors of one kind and the head, merged; perhaps Gram diagonals."""
        merged = {f"merged.{name}": spec for name, spec in self._news().items()}
        return {**merged, **{name: replace(spec, optional=True) for name, spec in self._diagonals().items()}}

    def _news(self) -> dict[str, TensorSpec]:
        factors = {**self._factors("a"), **self._factors("b")}
        optional = {name: replace(TensorSpec.like(tensor), optional=True) for name, tensor in factors.items()}
        return {**optional, **{name: TensorSpec.like(tensor) for name, tensor in self._head().items()}}

    def _diagonals(self) -> dict[str, TensorSpec]:
        return {f"gram.{layer}": TensorSpec((len(a), a.shape[2])) for layer, a in zip(LAYERS, self.a, strict=True)}


class Listening:
    """Adds up the squares of all that enters a linear layer of a block, and changes nothing.

    Args:
        block: index of the block.
        layer: which linear layer of the block.
    """

    squares: Tensor  # (in,) sum of x^2 over all tokens x, once there were some

    def __init__(self, block: int, layer: str) -> None:
        self.block, self.layer = block, layer

    @contextmanager
    def into(self, block: nn.Module) -> Iterator[None]:
        """Listen inside the context, to one batch."""

        def hear(_: nn.Module, inputs: tuple[Tensor]) -> None:
            self.squares = inputs[0].float().square().flatten(0, -2).sum(0)

        handle = block.get_submodule(self.layer).register_forward_pre_hook(hear)
        try:
            yield
        finally:
            handle.remove()


class LoRMServer(Server):
    """Merges the factor whose turn it is in closed form.

    Args:
        alpha: how much of the head's Gram matrix outside its diagonal counts.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"server.alpha is {alpha}, must be between 0 and 1")
        self.alpha = alpha

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that send factors and Gram matrices."""
        if "gram.head" not in uploads:
            raise ValueError(
                "server: LoRMServer merges LoRA factors by their Gram matrices, but model sends none; take FedAvg"
            )
        body = model()
        assert isinstance(body, LoRMClient)
        self.origin = int(body.origin)
        self.a = {layer: a.detach().clone() for layer, a in zip(LAYERS, body.a, strict=True)}
        self.merges = 0

    def state(self) -> dict[str, Tensor]:
        """The common A, and the rounds of the current task so far."""
        return {"merges": torch.tensor(self.merges), **{f"a.{layer}": a for layer, a in self.a.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over both."""
        self.merges, self.a = int(state["merges"]), below(state, "a.")

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """The merged factor and head for everyone, absent clients included, and at a task's end its Gram diagonals."""
        which = turn(self.merges)
        grams = {layer: torch.zeros((), dtype=torch.float64) for layer in LAYERS}

        def sent() -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
            for upload in uploads.values():
                tensors, found = upload.tensors, {}
                for layer in LAYERS:
                    gram = tensors[f"gram.{layer}"].double()
                    grams[layer] = grams[layer] + gram
                    seen = gram if which == "a" else projected(self.a[layer], gram)
                    found[f"{which}.{layer}"] = tensors[f"{which}.{layer}"], seen
                found["head.weight"] = tensors["head.weight"], shrunk(tensors["gram.head"], self.alpha)
                # to a bias the input is 1, and so its Gram matrix the number of images
                found["head.bias"] = tensors["head.bias"][:, None], torch.tensor([float(upload.samples)])
                yield found

        merged = merge(sent())
        merged["head.bias"] = merged["head.bias"].squeeze(1)
        answer = {f"merged.{name}": tensor for name, tensor in merged.items()}
        self.merges += 1
        if which == "a":
            self.a = {layer: merged[f"a.{layer}"] for layer in LAYERS}
        if round.ends_task:
            answer |= {f"gram.{layer}": gram.float() for layer, gram in grams.items()}
            self.a = {layer: initial(a.shape, self.origin, round.task + 1, layer) for layer, a in self.a.items()}
            self.merges = 0
        return dict.fromkeys(range(clients), answer)


def turn(merges: int) -> Factor:
    """The factor that is trained after so many merges in a task."""
    return "b" if merges % 2 == 0 else "a"


def initial(shape: Sequence[int], origin: int, task: int, layer: str) -> Tensor:
    """The A (blocks, r, in) of a layer when a task begins, the same wherever it is drawn."""
    bound = 1 / math.sqrt(shape[-1])
    rng = seeds.generator(origin, "lorm", task, layer)
    return torch.empty(*shape, device="cpu").uniform_(-bound, bound, generator=rng)


def injections(pairs: Sequence[LoRA]) -> list[LowRank]:
    """For each layer a pair of a (blocks, r, in) and b (blocks, out, r) in its places."""
    return [
        LowRank(block, LoRA(a, b), layer)
        for layer, pair in zip(LAYERS, pairs, strict=True)
        for block, (a, b) in enumerate(zip(pair.a, pair.b, strict=True))
    ]


def joined(a: Tensor, b: Tensor, weights: Tensor) -> LoRA:
    """The sum over tasks s of B_s A_s diag(w_s) as one pair.

    Args:
        a: (tasks, blocks, r, in).
        b: (tasks, blocks, out, r).
        weights: (tasks, blocks, in), or what broadcasts to it.

    Returns:
        a (blocks, tasks r, in) and b (blocks, out, tasks r).
    """
    scaled = a * weights.unsqueeze(-2)
    return LoRA(scaled.transpose(0, 1).flatten(1, 2), b.permute(1, 2, 0, 3).flatten(2))


def merge(clients: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """By name X = (sum X_i G_i) (sum G_i)^+, which minimises sum ||(X - X_i) G_i^(1/2)||^2; in float64.

    B comes about with `projected` Gram matrices, A and the head with their own, and the deployed weights if the sums
    run over tasks.

    Args:
        clients: of each client by name X_i (..., m, n) and G_i, symmetric (..., n, n) or its diagonal (..., n). The
            same names for all. Gone through once.

    Returns:
        (..., m, n) each, in the dtype of X_i. What no client's G_i has in its range is zero.
    """
    products: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for client in clients:
        for name, (x, gram) in client.items():
            dtypes[name] = x.dtype
            products[name] = products.get(name, 0) + times(x.double(), gram.double())
            grams[name] = grams.get(name, 0) + gram.double()
    merged = {}
    for name, product in products.items():
        if is_diagonal(grams[name], product):
            x = divided(product, grams[name].unsqueeze(-2))
        else:
            x = product @ torch.linalg.pinv(grams[name], hermitian=True)
        merged[name] = x.to(dtypes[name])
    return merged


def projected(a: Tensor, gram: Tensor) -> Tensor:
    """A G A^T (..., r, r), the Gram matrix of what enters B, from A (..., r, in) and G or its diagonal; in float64."""
    return times(a.double(), gram.double()) @ a.double().mT


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    """alpha G + (1 - alpha) diag(G), (n, n)."""
    return alpha * gram + (1 - alpha) * gram.diag().diag()


def times(x: Tensor, gram: Tensor) -> Tensor:
    """X G (..., m, n), from G (..., n, n) or its diagonal (..., n)."""
    return x * gram.unsqueeze(-2) if is_diagonal(gram, x) else x @ gram


def is_diagonal(gram: Tensor, x: Tensor) -> bool:
    """Whether of the Gram matrix that goes with X (..., m, n) the diagonal (..., n) is given."""
    return gram.ndim < x.ndim


def divided(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / y, 0.0)
