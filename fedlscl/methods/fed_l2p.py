"""FedL2P: learning to prompt (Wang et al., 2022), with pool and head averaged.

See docs/methods/fed_l2p.md. The ViT is frozen. A pool holds M prompts P_m (L tokens each) with a key kappa_m. The query
q(x) of an image, its feature under the unprompted ViT, chooses the k prompts whose keys point most in its direction;
the head sees the mean of what leaves the last block in their k L places. Objective, on the images of the current task n
of client i, with C(i, n) its classes (`train_mask: task`):

    s_m(x) = cos(q(x), kappa_m),    CE(z, y; C(i, n)) - lambda * mean over x of sum over the k chosen m of s_m(x).

Aggregation: prompts, keys and head as FedAvg, w <- sum over i of p_i w_i.

What travels: prompts (M, L, d), keys (M, d) and head, both ways.

Logged: collaborate/cross_entropy, collaborate/pull (the second term, between -lambda k and lambda k).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.batches import Batch, Output
from fedlscl.checks import at_least
from fedlscl.client import Client
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT


class PoolClient(Client):
    """A client with a pool that the images' queries address; all that it trains is shared.

    Args:
        pool_size: M, slots of the pool.
        **kwargs: settings of every client, see `Client`.
    """

    first = 0  # the first block that is adapted

    def __init__(self, pool_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(1, "model", pool_size=pool_size)
        self.pool_size = pool_size

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """The query (B, d), a feature of the unprompted ViT, and the tokens (B, T, d) that enter the first block."""
        tokens = self.vit.lower(self.vit.prepare(images), self.first)
        return {"query": self.vit.upper(tokens, self.first), "tokens": tokens}

    def shared(self) -> dict[str, Tensor]:
        """The pool and the head."""
        return self.state_dict(keep_vars=True)


class PromptClient(PoolClient):
    """A client whose images choose among the slots of a pool by its keys.

    Args:
        pool_size: M, slots of the pool.
        pull: lambda, weight of the pull on the chosen keys.
        **kwargs: settings of every client, see `Client`.
    """

    keys: nn.Parameter  # (M, d)

    def __init__(self, pool_size: int, pull: float, **kwargs: Any) -> None:
        super().__init__(pool_size, **kwargs)
        at_least(0, "model", pull=pull)
        self.pull = pull

    @abstractmethod
    def choose(self, similarity: Tensor) -> Tensor:
        """The k slots (B, k) of each image, from the similarity (B, M) of its query and the keys."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the phase, and the pull."""
        frozen = self.frozen(batch.images)
        terms = self.phase_losses(self(batch.images.pixels, frozen), batch)
        similarity = similarities(frozen["query"], self.keys)
        return {**terms, "pull": -self.pull * chosen_similarity(similarity, self.choose(similarity))}


class FedL2PClient(PromptClient):
    """A pool of input prompts and a linear head on what becomes of the chosen ones.

    Args:
        pool_size: M, prompts in the pool.
        length: L, tokens of a prompt.
        top_k: k, prompts that an image chooses.
        pull: lambda, weight of the pull on the chosen keys.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(self, pool_size: int = 10, length: int = 5, top_k: int = 5, pull: float = 0.1, **kwargs: Any) -> None:
        super().__init__(pool_size, pull, **kwargs)
        at_least(1, "model", length=length)
        if not 1 <= top_k <= pool_size:
            raise ValueError(f"model.top_k is {top_k}, must be between 1 and model.pool_size {pool_size}")
        self.length, self.top_k = length, top_k

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Prompts, keys and head."""
        self.prompts = nn.Parameter(torch.empty(self.pool_size, self.length, vit.width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(self.pool_size, vit.width).uniform_(-1, 1))
        self.head = nn.Linear(vit.width, num_classes)

    def choose(self, similarity: Tensor) -> Tensor:
        """The k most similar ones."""
        return similarity.topk(self.top_k, dim=1).indices

    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """The head on the mean of the prompts' outputs."""
        prompts = prompts_of(self.prompts, self.choose(similarities(frozen["query"], self.keys)))
        start = self.vit.num_prefix_tokens
        end = start + prompts.shape[1]
        encoded = self.vit.encode(self.vit.prompted(frozen["tokens"], prompts), 0, count=end)
        features = encoded[:, start:end].mean(dim=1)
        return Output(self.head(features), features)


def similarities(query: Tensor, keys: Tensor) -> Tensor:
    """Cosines (B, M) of queries (B, d) and keys (M, d), in float32 under autocast too."""
    return F.cosine_similarity(query.float().unsqueeze(1), keys.float(), dim=2)


def chosen_similarity(similarity: Tensor, chosen: Tensor) -> Tensor:
    """The mean over the images of the summed similarity (B, M) of their chosen slots (B, k), a scalar in [-k, k]."""
    return similarity.gather(1, chosen).sum(dim=1).mean()


def prompts_of(pool: Tensor, chosen: Tensor) -> Tensor:
    """The chosen prompts one behind another, (B, k L, d), from the pool (M, L, d) and the choice (B, k)."""
    return pool[chosen].flatten(1, 2)
