"""Small-model continual fine-tuning (Fed-LSCL, section 4.3.1) as a replaceable strategy.

A strategy says what follows the training on the current task in every round: on which samples, how often, and under
which loss. It holds only its settings; what must survive a round belongs to the client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedlscl.losses import continual_penalty, masked_cross_entropy


class Output(NamedTuple):
    """What a client computes for a batch of images."""

    logits: Tensor  # (B, K)
    representation: Tensor  # (B, d), what the head sees
    generated: Mapping[str, Tensor] = {}  # by name what Eq. 4 keeps in place: features (B, e), weights (B, P)


class Continual(ABC):
    """What a client does in a round against forgetting, after it has trained on the current task."""

    @abstractmethod
    def passes_over(self, buffered: int, current: Tensor, per_class: int, rng: torch.Generator) -> list[Tensor]:
        """The passes of this round's replay phase; an empty list skips the phase.

        Args:
            buffered: number m of samples in the buffer.
            current: (n,) class numbers of the current task's training samples.
            per_class: M, what the buffer holds of a class at most.
            rng: for what is drawn.

        Returns:
            For each pass the samples it takes, as positions into the m buffered and then the n current samples.
        """

    @abstractmethod
    def losses(
        self, output: Output, labels: Tensor, classes: Tensor, snapshot: Mapping[str, Tensor], known: Tensor
    ) -> dict[str, Tensor]:
        """The terms whose sum a replay step minimises, by name.

        Args:
            output: of the model in training on a replay batch.
            labels: (B,) class numbers.
            classes: (K,) boolean, true for every class the client has seen.
            snapshot: what the snapshot generates for the batch, (B, ...) each, arbitrary where not `known`.
            known: (B,) 1.0 for the batch's buffered samples, 0.0 for its current ones.
        """


class NoReplay(Continual):
    """Train on the current task and nothing else (Table 2 without SM-CF)."""

    def passes_over(self, buffered: int, current: Tensor, per_class: int, rng: torch.Generator) -> list[Tensor]:
        """No pass."""
        return []

    def losses(
        self, output: Output, labels: Tensor, classes: Tensor, snapshot: Mapping[str, Tensor], known: Tensor
    ) -> dict[str, Tensor]:
        """Never called, since there is no pass."""
        raise NotImplementedError("NoReplay has no replay phase")


class Replay(Continual):
    """Cross-entropy on the buffer, plus the distances of Eq. 4 to the snapshot's features and generated weights.

    Args:
        lambda_e: weight of ||E - E'||^2.
        lambda_w: weight of ||W - W'||^2.
        passes: how often the buffer is gone through in each round.
        current: also draw, in each pass and class for class, as many current samples as the buffer holds of a class.
    """

    def __init__(self, lambda_e: float = 0.1, lambda_w: float = 0.01, passes: int = 5, current: bool = True) -> None:
        for name, value in (("lambda_e", lambda_e), ("lambda_w", lambda_w), ("passes", passes)):
            if not value >= 0:
                raise ValueError(f"continual.{name} is {value}, must not be negative")
        self.weights = {"features": lambda_e, "weights": lambda_w}
        self.passes, self.current = passes, current

    def passes_over(self, buffered: int, current: Tensor, per_class: int, rng: torch.Generator) -> list[Tensor]:
        """`passes` passes over the whole buffer, each with a fresh draw of current samples; none while it is empty."""
        if buffered == 0:
            return []
        return [self._one_pass(buffered, current, per_class, rng) for _ in range(self.passes)]

    def _one_pass(self, buffered: int, current: Tensor, per_class: int, rng: torch.Generator) -> Tensor:
        parts = [torch.arange(buffered)]
        if self.current:
            for label in torch.unique(current):
                members = (current == label).nonzero().squeeze(1)
                parts.append(buffered + members[torch.randperm(len(members), generator=rng)[:per_class]])
        return torch.cat(parts)

    def losses(
        self, output: Output, labels: Tensor, classes: Tensor, snapshot: Mapping[str, Tensor], known: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy among all seen classes on the whole batch, the penalties of Eq. 4 on its known samples."""
        terms = {"cross_entropy": masked_cross_entropy(output.logits, labels, classes)}
        for name, before in snapshot.items():
            terms[name] = self.weights[name] * continual_penalty(output.generated[name], before, known)
        return terms
