"""Small-model continual fine-tuning (Fed-LSCL, section 4.3.1) as a replaceable strategy.

A strategy says what is added to the loss on the current task, and what follows the training on it in every round: on
which samples, how often, and under which loss. It holds only its settings; what must survive a round belongs to the
client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedlscl.batches import Output
from fedlscl.checks import at_least
from fedlscl.losses import continual_penalty, masked_cross_entropy


class Step(NamedTuple):
    """What a strategy sees of a training step."""

    output: Output  # of the model in training
    labels: Tensor  # (B,) class numbers
    seen: Tensor  # (K,) true for every class the client has seen
    learned: Tensor  # (K,) true for those of finished tasks
    snapshot: Mapping[str, Tensor]  # (B, ...) each of `preserved`, arbitrary where not observed
    observed: Tensor  # (B,) 1.0 for samples that the snapshot was taken of, 0.0 for others
    parameters: Mapping[str, Tensor]  # all that is trained, by name
    kept: Mapping[str, Tensor]  # what `consolidate` returned last


class Continual:
    """What a client does in a round against forgetting; this one does nothing.

    `observes` says of which images the outputs of the model of the finished tasks are taken, once a task: those in the
    `buffer`, for the replay phase, or those of the `current` task, for the collaborative phase.
    """

    observes: ClassVar[Literal["nothing", "buffer", "current"]] = "nothing"

    def passes_over(self, buffered: int, current: Tensor, per_class: int, rng: torch.Generator) -> list[Tensor]:
        """The passes of this round's replay phase; an empty list, the default, skips the phase.

        Args:
            buffered: number m of samples in the buffer.
            current: (n,) class numbers of the current task's training samples.
            per_class: M, what the buffer holds of a class at most.
            rng: for what is drawn.

        Returns:
            For each pass the samples it takes, as positions into the m buffered and then the n current samples.
        """
        return []

    def preserved(self, output: Output) -> dict[str, Tensor]:
        """Which of these outputs make the snapshot, (B, ...) each by name."""
        return {}

    def consolidate(
        self, parameters: Mapping[str, Tensor], losses: Iterator[Tensor], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is kept of finished tasks, by name; called when a task begins and others have been finished.

        Args:
            parameters: all that is trained, as received last.
            losses: the cross-entropy of each image of the tasks finished since the last call, in evaluation mode and
                random order, a scalar each; it is computed when it is asked for, with its graph.
            kept: what the last call returned; empty in the first.
        """
        return {}

    def collaborative_losses(self, step: Step) -> dict[str, Tensor]:
        """The terms added to the loss of a step on the current task, by name; none by default."""
        return {}

    def replay_losses(self, step: Step) -> dict[str, Tensor]:
        """The terms whose sum a replay step minimises, by name."""
        raise NotImplementedError(f"{type(self).__name__} has no replay phase")


class NoReplay(Continual):
    """Train on the current task and nothing else (Table 2 without SM-CF)."""


class Replay(Continual):
    """Cross-entropy on the buffer, plus the distances of Eq. 4 to the snapshot's features and generated weights.

    Args:
        lambda_e: weight of ||E - E'||^2.
        lambda_w: weight of ||W - W'||^2.
        passes: how often the buffer is gone through in each round.
        current: also draw, in each pass and class for class, as many current samples as the buffer holds of a class.
    """

    observes = "buffer"

    def __init__(self, lambda_e: float = 0.1, lambda_w: float = 0.01, passes: int = 5, current: bool = True) -> None:
        at_least(0, "continual", lambda_e=lambda_e, lambda_w=lambda_w, passes=passes)
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

    def preserved(self, output: Output) -> dict[str, Tensor]:
        """Features and generated weights, as far as the client has them."""
        return dict(output.generated)

    def replay_losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy among all seen classes on the whole batch, the penalties of Eq. 4 on its buffered samples."""
        terms = {"cross_entropy": masked_cross_entropy(step.output.logits, step.labels, step.seen)}
        for name, before in step.snapshot.items():
            terms[name] = self.weights[name] * continual_penalty(step.output.generated[name], before, step.observed)
        return terms
