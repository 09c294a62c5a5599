"""A client of FedMGP: the global phase, the local phase, and a head for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import above
from fedlscl.messages import Schema, optional, schema_of
from fedlscl.methods.fed_l2p import similarities
from fedlscl.methods.frozen_vit import make_head
from fedlscl.models.adapters import Prefixes
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


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
    required = (("train_mask", "task"), ("continual", NoReplay))  # each task has a head of its own
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
        at_least(1, "model", length=length, local_length=local_length)
        at_least(0, "model", hidden=hidden, pull=pull)
        if not blocks or min(blocks) < 0 or len(set(blocks)) < len(blocks):
            raise ValueError(f"model.blocks is {list(blocks)}, must name blocks, counted from 0, each once")
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

    # ---- the two passes

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """q (B, d), the feature without any prompt, and the tokens (B, T, d) that enter the first block."""
        tokens = self.vit.lower(self.vit.prepare(images), 0)
        return {"query": self.vit.upper(tokens, 0), "tokens": tokens}

    def entering(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Tokens (B, T + L, d) that enter the first block with a prompt (1, L, d) among them."""
        return self.vit.prompted(tokens, prompt.expand(len(tokens), -1, -1))

    def pooled(self, entering: Tensor, injections: Sequence[Prefixes] = ()) -> Tensor:
        """Features (B, d) of prompted tokens (B, T + L, d): the mean over the prompt's places behind the last block."""
        start = self.vit.num_prefix_tokens
        end = start + self.length
        return self.vit.encode(entering, 0, injections, count=end)[:, start:end].mean(dim=1)

    def prefixed(self, entering: Tensor, slots: Tensor) -> Tensor:
        """f_c (B, d), from the prompted tokens (B, T + L, d) and the class (B,) whose slot each image takes."""
        chosen = self.slots[slots].unbind(1)
        prefixes = [Prefixes(block, part) for block, part in zip(self.adapted, chosen, strict=True)]
        return self.pooled(entering, prefixes)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """As in tests: the slot is that of the nearest key, and each class is judged by the head of its task."""
        tokens = (frozen or self.precompute(images))["tokens"]
        entering = self.entering(tokens, self.prompt)
        slots = nearest(self.pooled(entering), self.slot_keys, self.owner > 0)
        features = self.prefixed(entering, slots)
        logits: Tensor = self.local_head(features)
        for last, one in self.memory.archive.items():
            logits = torch.where(self.owner == last, functional_call(self.local_head, one, (features,)), logits)
        return Output(logits, features)

    # ---- training

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The epochs of the global phase, then those of the local one."""
        for phase in ("global", "local"):
            for _ in range(self.epochs):
                yield phase, self.epoch(len(self.memory.buffer), len(self.current))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and pull, which move prompt, key and head of the phase, and nothing else."""
        frozen, labels = self.frozen(batch.images), batch.images.labels
        with torch.set_grad_enabled(batch.phase == "global"):
            entering = self.entering(frozen["tokens"], self.prompt)
            features = self.pooled(entering)
        if batch.phase == "local":
            logits, query, keys = self.local_head(self.prefixed(entering, labels)), features, self.slot_keys[labels]
        else:
            logits, query, keys = self.global_head(features), frozen["query"], self.key
        return {
            "cross_entropy": masked_cross_entropy(logits, labels, self.current_mask),
            "pull": -self.pull * similarity(query, keys),
        }

    def on_train_end(self) -> None:
        """No sample needs to be remembered."""

    # ---- from task to task

    def begin_round(self, round: Round) -> None:
        """Also put the local head away, and begin with a new one, when a task is new."""
        last = self.memory.begun
        if 0 < last < round.task:
            self.memory.archive.keep(last, self.local_head.state_dict())
            with seeds.seeded(round.seed, "local head", self.index, round.number):
                self.local_head = make_head(self.vit.width, self.hidden, self.num_classes).to(self.device)
        super().begin_round(round)
        self.owner[self.current_mask.to(self.owner.device)] = round.task

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """Global prompt, key and head."""
        head = above(dict(self.global_head.named_parameters()), "global_head.")
        return {"prompt": self.prompt, "key": self.key, **head}

    def download_schema(self) -> Schema:
        """The head may be missing: then the client goes on with its own."""
        needed = {"prompt": self.prompt, "key": self.key}
        return {**optional(schema_of(self.shared())), **schema_of(needed)}

    # ---- evaluation

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
