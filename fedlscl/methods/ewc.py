"""EWC (Kirkpatrick et al., 2017), in its online form (Schwarz et al., 2018): old tasks hold the weights they need.

See docs/methods/ewc.md. A strategy, not a method of its own: over FedAvg it is the baseline `ewc`, and in Fed-LSCL it
takes the place of the continual fine-tuning (`fed_lscl_ewc`).

Objective: CE(z, y) + lambda / 2 sum over j of F_j (w_j - w*_j)^2, over all that is trained. When a task begins, with w
the model received last, and n the images of the tasks just finished (at most `samples`):

    F_n = 1/n sum over x of (grad_w CE(z(x), y))^2, in evaluation mode, no entry above `clamp`;
    F <- gamma F + F_n;   w* <- w.

Aggregation and what travels: as the method alone, nothing more.

Logged: collaborate/ewc (lambda / 2 sum F (w - w*)^2), from a client's second task on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from fedlscl.checks import at_least, fraction, positive
from fedlscl.continual import Continual, Step


class EWC(Continual):
    """The quadratic penalty around the model of the finished tasks.

    Args:
        strength: lambda.
        gamma: what remains of the earlier tasks' F when another is added; 1 forgets nothing.
        clamp: upper bound of the entries of F_n.
        samples: of how many images of the finished tasks F_n is taken at most; null for all of them.
    """

    def __init__(
        self, strength: float = 1000.0, gamma: float = 1.0, clamp: float = 1e-4, samples: int | None = 200
    ) -> None:
        at_least(0, "continual", strength=strength)
        fraction("continual", gamma=gamma)
        positive("continual", clamp=clamp)
        if samples is not None and samples < 1:
            raise ValueError(f"continual.samples is {samples}, must be at least 1, or null for all images")
        self.strength, self.gamma, self.clamp, self.samples = strength, gamma, clamp, samples

    def consolidate(
        self, parameters: Mapping[str, Tensor], losses: Iterator[Tensor], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """F as `fisher.NAME` and w* as `anchor.NAME`, on the CPU."""
        anchors = {f"anchor.{name}": parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        found = fisher(parameters, islice(losses, self.samples))
        total = {f"fisher.{name}": entries.clamp(max=self.clamp).cpu() for name, entries in found.items()}
        for name, entries in total.items():
            if name in kept:
                entries.add_(kept[name], alpha=self.gamma)
        return {**total, **anchors}

    def collaborative_losses(self, step: Step) -> dict[str, Tensor]:
        """The penalty, once a task is finished."""
        return {"ewc": self.strength / 2 * penalty(step.parameters, step.kept)} if step.kept else {}


def fisher(parameters: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean of the squared gradients of some losses, each squared before the mean.

    Args:
        parameters: tensors by name, of any shape.
        losses: at least one scalar with its graph, each of one image.

    Returns:
        By name a tensor shaped like the parameter; 0 where no loss depends on it.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for loss in losses:
        count += 1
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for entries, gradient in zip(sums.values(), gradients, strict=True):
            entries.add_(gradient.square())
    return {name: entries / count for name, entries in sums.items()}


def penalty(parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """Sum over all entries of F (w - w*)^2, a scalar.

    Args:
        parameters: w by name.
        kept: for each of them `fisher.NAME` and `anchor.NAME`, of its shape.
    """
    terms = [
        (kept[f"fisher.{name}"] * (parameter - kept[f"anchor.{name}"]).square()).sum()
        for name, parameter in parameters.items()
    ]
    return torch.stack(terms).sum()
