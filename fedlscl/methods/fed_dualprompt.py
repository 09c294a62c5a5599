"""FedDualPrompt (FedDualP): DualPrompt (Wang et al., 2022), with prompts, keys and head averaged.

See docs/methods/fed_dualprompt.md. The ViT is frozen. Prefixes are L keys and values that the tokens of a block attend
to besides their own. G-prefixes are common to all images; E-prefixes come in M slots with a key kappa_m each. The slot
of task n is trained on the images of task n, and starts from that of task n - 1; a test image takes the slot whose key
points most in the direction of its query q(x), its feature under the unprompted ViT. Objective, on the images of the
current task n of client i, with C(i, n) its classes (`train_mask: task`):

    CE(z, y; C(i, n)) - lambda * mean over x of cos(q(x), kappa_n).

Aggregation: w <- sum over i of p_i w_i, as FedAvg.

What travels: G-prefixes, E-prefixes and keys of all slots, and the head, both ways.

Logged: collaborate/cross_entropy, collaborate/pull (the second term, between -lambda and lambda).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.checks import at_least
from fedlscl.data.splits import Split
from fedlscl.messages import Download
from fedlscl.methods.fed_l2p import PoolClient, PromptClient, similarities
from fedlscl.models.adapters import Prefixes
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

GENERAL_BLOCKS, EXPERT_BLOCKS = (0, 1), (2, 3, 4)  # as published


class TaskPoolClient(PoolClient):
    """A client that trains another part of its pool in each task."""

    def check(self, split: Split) -> None:
        """Refuse more tasks than there are slots."""
        if (tasks := split.spec.tasks) > self.pool_size:
            raise ValueError(f"model.pool_size is {self.pool_size}, must be at least the number of tasks, {tasks}")

    def reached(self) -> int:
        """The last task that the model has been trained in, by this client or those whose model it received."""
        return max(self.memory.begun, int(self.memory.received.get("task", torch.tensor(0))))

    def download(self, message: Download) -> None:
        """Also remember which task the model is of."""
        super().download(message)
        self.memory.received["task"] = torch.tensor(message.task)


class FedDualPromptClient(PromptClient, TaskPoolClient):
    """Prefixes in the blocks of the frozen ViT, common ones and one slot for each task, and a linear head.

    Args:
        pool_size: M, slots of the E-prefixes, at least one for each task.
        length: L, keys and values of an E-prefix; 0 for none.
        general_length: L_g, keys and values of a G-prefix; 0 for none.
        general_blocks: indices of the blocks with G-prefixes; by default those of 0 and 1 that exist.
        expert_blocks: indices of the blocks with E-prefixes; by default those of 2, 3 and 4 that exist.
        pull: lambda, weight of the pull on the task's key.
        legacy_reshape: mix up the chosen E-prefixes of a batch as the ports do.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(
        self,
        pool_size: int = 10,
        length: int = 5,
        general_length: int = 5,
        general_blocks: list[int] | None = None,
        expert_blocks: list[int] | None = None,
        pull: float = 1.0,
        legacy_reshape: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(pool_size, pull, **kwargs)
        at_least(0, "model", length=length, general_length=general_length)
        self.length, self.general_length, self.legacy_reshape = length, general_length, legacy_reshape
        self.general_blocks, self.expert_blocks = general_blocks, expert_blocks

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Prefixes, keys and head."""
        general = blocks_of("general_blocks", self.general_blocks, GENERAL_BLOCKS, vit.depth)
        experts = blocks_of("expert_blocks", self.expert_blocks, EXPERT_BLOCKS, vit.depth)
        if not experts:
            raise ValueError(f"model.expert_blocks is {experts} for a ViT of {vit.depth} blocks, must name one or more")
        self.blocks = [*general, *experts]
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"model.expert_blocks is {experts} and model.general_blocks {general}, but a block can take one prefix"
            )
        self.first = min(self.blocks)
        head = (vit.heads, vit.width // vit.heads)
        self.general = nn.Parameter(torch.empty(len(general), 2, self.general_length, *head).uniform_(-1, 1))
        self.experts = nn.Parameter(torch.empty(len(experts), 2, self.pool_size, self.length, *head).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(self.pool_size, vit.width).uniform_(-1, 1))
        self.head = nn.Linear(vit.width, num_classes)

    # ---- from task to task

    def begin_round(self, round: Round) -> None:
        """Also let a new task begin with the prefixes of the task before."""
        known = self.reached()
        super().begin_round(round)
        if known:
            with torch.no_grad():
                self.experts[:, :, known : round.task] = self.experts[:, :, known - 1 : known]

    # ---- the model

    def choose(self, similarity: Tensor) -> Tensor:
        """In training the slot of the task, otherwise the most similar one."""
        if self.training:
            return similarity.new_full((len(similarity), 1), self.round.task - 1, dtype=torch.int64)
        return similarity.argmax(dim=1, keepdim=True)

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the features under both kinds of prefixes."""
        slots = self.choose(similarities(frozen["query"], self.keys)).squeeze(1)
        chosen = self.experts[:, :, slots]
        experts = legacy_reshape(chosen) if self.legacy_reshape else chosen.transpose(1, 2)
        general = self.general.unsqueeze(1).expand(-1, len(slots), -1, -1, -1, -1)
        injections = [Prefixes(*pair) for pair in zip(self.blocks, [*general, *experts], strict=True)]
        features = self.vit.upper(frozen["tokens"], self.first, injections)
        return Output(self.head(features), features)


def blocks_of(field: str, wanted: list[int] | None, published: tuple[int, ...], depth: int) -> list[int]:
    """The blocks to adapt: those wanted, or the published ones as far as a ViT of `depth` blocks has them.

    Raises:
        ValueError: a block is wanted that does not exist.
    """
    if wanted is None:
        return [block for block in published if block < depth]
    if missing := [block for block in wanted if not 0 <= block < depth]:
        raise ValueError(f"model.{field} holds {missing[0]}, but the ViT has the blocks 0 to {depth - 1}")
    return wanted


def legacy_reshape(chosen: Tensor) -> Tensor:
    """The ports' mistake: the chosen prefixes (E, 2, B, ...) read in their order in memory as (E, B, 2, ...).

    Image b gets, of the keys of all images followed by the values of all images, the entry 2 b as its keys and the
    entry 2 b + 1 as its values. Right is the exchange of the two dimensions.
    """
    return chosen.reshape(len(chosen), chosen.shape[2], 2, *chosen.shape[3:])
