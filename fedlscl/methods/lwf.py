"""LwF (Li and Hoiem, 2016): what the model of the old tasks says about the new images is to stay as it was.

Two strategies, neither a method of its own. `LwF` keeps the outputs for old classes and is, over FedAvg, the baseline
`lwf`. `GeneratedLwF` takes the place of Fed-LSCL's continual fine-tuning (`fed_lscl_lwf`) and keeps what the small
model generates. Both compare with the model that was received when the task began, on the current images; there is
no replay phase. The buffer of Fed-LSCL remains, since the uploaded features are those of the buffer.

Objective of `LwF`, with z' the logits of the received model and O the classes of the client's own finished tasks:

    CE(z, y) + lambda mean over x of -sum over c in O of q_c log p_c,
    p = softmax over O of z / T,   q = softmax over O of z' / T.

Objective of `GeneratedLwF`, Eq. 4 on current images in place of the buffer, for E and W of Eq. 2:

    CE(z, y) + lambda_E mean over x of ||E - E'||^2 + lambda_W mean over x of ||W - W'||^2.

In a client's first task only the cross-entropy is left. It is that of the method, with the classes of its
`train_mask`: `task`, the new classes alone, in `lwf`, as in TARGET; in `fed_lscl_lwf` all seen ones, as in Fed-LSCL.

Aggregation and what travels: as the method alone, nothing more. On the client's disk: the outputs for the current
images, 4 K bytes an image with K classes, or 4 (e + P) with e features and P generated numbers.

Sources and differences: T = 2 and lambda = 3 are TARGET's (Mammoth has lambda = 0.5, and trains the new rows of the
head alone at first, which we do not). The second term is not multiplied by T^2, in neither of them. A published port
compares the columns of the current classes, which is another method. The publications have one set of old classes for
everyone; here the classes differ from client to client, and columns that a client has not learned itself are left
to those who have. lambda_E and lambda_W are those of Fed-LSCL's replay. The received model is seen in evaluation
mode, the model in training is not, so with batch normalisation the two differ from the first step on.

Logged, from a client's second task on: collaborate/lwf (the second term); collaborate/features and
collaborate/weights (those with lambda_E and lambda_W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlscl.batches import Output
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
        if not strength >= 0:
            raise ValueError(f"continual.strength is {strength}, must not be negative")
        if not temperature > 0:
            raise ValueError(f"continual.temperature is {temperature}, must be positive")
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
        for name, value in (("lambda_e", lambda_e), ("lambda_w", lambda_w)):
            if not value >= 0:
                raise ValueError(f"continual.{name} is {value}, must not be negative")
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
    wanted = (before.detach()[:, classes].float() / temperature).softmax(dim=1)
    losses = -(wanted * (now[:, classes].float() / temperature).log_softmax(dim=1)).sum(dim=1)
    return torch.where(known > 0, losses, 0.0).sum() / known.sum().clamp(min=1)
