"""A client of LoRM: the factors of the current task, those of finished ones, and Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.continual import NoReplay, Replay
from fedlscl.memory import above, below
from fedlscl.messages import Download, Schema, TensorSpec, not_negative, optional, schema_of, semidefinite
from fedlscl.methods.lorm.merging import divided
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
Factor = Literal["a", "b"]


class LoRMClient(Client):
    """The frozen ViT with fixed LoRA in all of its linear maps, and a linear head.

    What belongs to the maps is named by layer, with all blocks in one tensor: b (blocks, out, r), a (blocks, r, in),
    gram (blocks, in).

    Args:
        rank: r.
        a_learning_rate: of A; `learning_rate`, which is the head's, by default.
        b_learning_rate: of B; likewise.
        **kwargs: settings of every client, see `Client`.
    """

    # every task is trained with factors of its own, so that what else a strategy would hold on to is not there
    required = (("continual", (NoReplay, Replay)),)
    origin: Tensor  # from which the A of all tasks are drawn

    def __init__(
        self,
        rank: int = 16,
        a_learning_rate: float | None = None,
        b_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, "model", rank=rank)
        self.rank, self.rates = rank, {"a_learning_rate": a_learning_rate, "b_learning_rate": b_learning_rate}
        at_least(0, "model", **{name: rate for name, rate in self.rates.items() if rate is not None})

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

    # ---- the adapted ViT

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The tokens (B, T, d) that enter the first block."""
        return {"tokens": self.vit.lower(self.vit.prepare(images), 0)}

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """In training with the current task's factors alone, else with what is deployed."""
        features = self.lora_features(frozen["tokens"], 0, self._current if self.training else self._deployed)
        return Output(self.head(features), features)

    def _current(self) -> list[LowRank]:
        return injections([LoRA(a, b) for a, b in zip(self.a, self.b, strict=True)])

    def _deployed(self, measuring: bool = False) -> list[LowRank]:
        """For each layer finished tasks as one LoRA, or the plain mean of them and the current one."""
        current = measuring or self.merges > 0
        archive, pairs = self.memory.archive, []
        for layer, own_a, own_b in zip(LAYERS, self.a, self.b, strict=True):
            a, b = archive.stacked(f"a.{layer}", own_a), archive.stacked(f"b.{layer}", own_b)
            if current:
                a, b = torch.cat([a, own_a[None]]), torch.cat([b, own_b[None]])
                pairs.append(joined(a, b, a.new_full((len(a), 1, 1), 1 / len(a))))
            else:
                grams = archive.stacked(f"gram.{layer}", own_a[:, 0])
                pairs.append(joined(a, b, divided(grams, grams.sum(0))))
        return injections(pairs)

    # ---- one round

    def begin_round(self, round: Round) -> None:
        """Also hold the factor whose turn it is not."""
        super().begin_round(round)
        self.a.requires_grad_(turn(self.merges) == "a")
        self.b.requires_grad_(turn(self.merges) == "b")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, fresh in each round, with learning rates for A, B and the head."""
        rates = [self.learning_rate if rate is None else rate for rate in (*self.rates.values(), None)]
        parts = [self.a, self.b, self.head]
        groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in zip(parts, rates, strict=True)]
        return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)

    def on_train_end(self) -> None:
        """Measure the Gram matrices; samples are remembered where they are replayed."""
        if self.continual.observes == "buffer":
            super().on_train_end()
        sums = self.observe(self.current, self._moments)  # a row for each batch
        self.grams = {name: parts.double().sum(0).float() for name, parts in sums.items()}

    def _moments(self, images: Images) -> dict[str, Tensor]:
        """The Gram matrices of a batch, (1, ...) each by name."""
        listening = {layer: [Listening(block, layer) for block in range(self.vit.depth)] for layer in LAYERS}
        everyone = [one for ones in listening.values() for one in ones]
        tokens = self.frozen(images)["tokens"]
        features = self.lora_features(tokens, 0, lambda: self._deployed(measuring=True), everyone).float()
        with torch.autocast(features.device.type, enabled=False):
            head = features.mT @ features
        grams = {f"gram.{layer}": torch.stack([one.squares for one in ones]) for layer, ones in listening.items()}
        return {name: gram[None] for name, gram in {**grams, "gram.head": head}.items()}

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """Also where in the current task the federation is."""
        return {**super().state(), "merges": torch.tensor(self.merges)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also that."""
        super().load(state)
        self.merges = int(state["merges"])

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
        return {**self._news(), **self._diagonals(), "gram.head": TensorSpec((width, width), rule=semidefinite)}

    def download(self, message: Download) -> None:
        """Take over what was merged; with Gram diagonals the task is over, and new factors begin."""
        self.adopt(below(message.tensors, "merged."))
        self.merges += 1
        if grams := {name: tensor for name, tensor in message.tensors.items() if name.startswith("gram.")}:
            self.memory.archive.keep(message.task, {**self._factors("a"), **self._factors("b"), **grams})
            self._begin_factors(message.task + 1)
            self.merges = 0

    def download_schema(self) -> Schema:
        """Factors of one kind and the head, merged; perhaps Gram diagonals."""
        return {**above(self._news(), "merged."), **optional(self._diagonals())}

    def _news(self) -> Schema:
        factors = {**self._factors("a"), **self._factors("b")}
        return {**optional(schema_of(factors)), **schema_of(self._head())}

    def _diagonals(self) -> Schema:
        """Sums of squares."""
        shapes = {layer: (len(a), a.shape[2]) for layer, a in zip(LAYERS, self.a, strict=True)}
        return {f"gram.{layer}": TensorSpec(shape, rule=not_negative) for layer, shape in shapes.items()}


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
