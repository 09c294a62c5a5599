"""LwF (Li and Hoiem, 2016): what the model of the old tasks says about the new images is to stay as it was.

See docs/methods/lwf.md. Two strategies, neither a method of its own: `LwF` over FedAvg is the baseline `lwf`,
`GeneratedLwF` takes the place of Fed-LSCL's continual fine-tuning (`fed_lscl_lwf`). Objective of the first, with z' the
logits of the model received when the task began and O the classes of the client's finished tasks, and of the second:

    CE(z, y) + lambda mean over x of -sum over c in O of q_c log p_c,
    p = softmax over O of z / T,   q = softmax over O of z' / T;
    CE(z, y) + lambda_E mean over x of ||E - E'||^2 + lambda_W mean over x of ||W - W'||^2.

Aggregation and what travels: as the method alone, nothing more.

Logged, from a client's second task on: collaborate/lwf (the second term); collaborate/features and
collaborate/weights (those with lambda_E and lambda_W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlscl.batches import Output
from fedlscl.checks import at_least, positive
from fedlscl.continual import Continual, Step
from fedlscl.losses import continual_penalty


class LwF(Continual):
    """Distillation from the received model, on current images and over the learned classes.

    Args:
        strength: lambda.
        temperature: T, by which the logits of both models are divided.
    """

    observes = "current"

    def __init__(self, strength: float = 3.0, temperature: float = 2.0) -> None:
        at_least(0, "continual", strength=strength)
        positive("continual", temperature=temperature)
        self.strength, self.temperature = strength, temperature

    def preserved(self, output: Output) -> dict[str, Tensor]:
        """The logits."""
        return {"logits": output.logits}

    def collaborative_losses(self, step: Step) -> dict[str, Tensor]:
        """The distillation loss, once a task is finished."""
        if not step.snapshot:
            return {}
        before = step.snapshot["logits"]
        loss = softened_cross_entropy(step.output.logits, before, step.learned, step.observed, self.temperature)
        return {"lwf": self.strength * loss}


class GeneratedLwF(Continual):
    """Eq. 4's distances to the features and weights that the received model generates, on current images.

    Args:
        lambda_e: weight of ||E - E'||^2.
        lambda_w: weight of ||W - W'||^2.
    """

    observes = "current"

    def __init__(self, lambda_e: float = 0.1, lambda_w: float = 0.01) -> None:
        at_least(0, "continual", lambda_e=lambda_e, lambda_w=lambda_w)
        self.weights = {"features": lambda_e, "weights": lambda_w}

    def preserved(self, output: Output) -> dict[str, Tensor]:
        """Features and generated weights."""
        return dict(output.generated)

    def collaborative_losses(self, step: Step) -> dict[str, Tensor]:
        """Both distances, once a task is finished."""
        now = step.output.generated
        if not now:
            raise ValueError("model generates nothing that continual could keep; take LwF")
        return {
            name: self.weights[name] * continual_penalty(now[name], before, step.observed)
            for name, before in step.snapshot.items()
        }


def softened_cross_entropy(now: Tensor, before: Tensor, classes: Tensor, known: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between two models' softened predictions among some classes, averaged over the known samples.

    Args:
        now: (B, K) logits of the model in training.
        before: (B, K) those of the other model, which gets no gradient; rows that are not `known` are ignored.
        classes: (K,) true for the classes that count.
        known: (B,) 1.0 for samples that the other model has seen, 0.0 for others.
        temperature: T > 0.

    Returns:
        A scalar, 0 if no class counts or no sample is known.
    """
    # not by `now[:, classes]`: how many that are a GPU would be asked in every step
    lowest = torch.finfo(torch.float32).min
    softened, wanted = ((x.float() / temperature).masked_fill(~classes, lowest) for x in (now, before.detach()))
    losses = -(wanted.softmax(dim=1) * softened.log_softmax(dim=1)).masked_fill(~classes, 0.0).sum(dim=1)
    return torch.where(known > 0, losses, 0.0).sum() / known.sum().clamp(min=1)
