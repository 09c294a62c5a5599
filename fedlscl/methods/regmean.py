"""RegMean (Jin et al., 2023) in rounds: FedAvg whose server merges linear layers by least squares on their inputs.

See docs/methods/regmean.md. Clients train and send the whole small model as in FedAvg, and beside it for each linear
layer the Gram matrix G_i = sum of x x^T over all inputs x that client i's current images give it. Objective: as FedAvg.

Aggregation of a linear layer's weight W (out, in), with G' = alpha G + (1 - alpha) diag(G) and ^+ the pseudo-inverse:

    M = sum over i of p_i W_i,    W <- M + (sum over i of (W_i - M) G'_i) (sum over i of G'_i)^+,

which is (sum W_i G'_i) (sum G'_i)^-1 where the sum can be inverted, and the mean where no input leads. All other
parameters, biases among them: w <- sum over i of p_i w_i.

What travels: CNN and head both ways, the Gram matrices (in, in) up.

Logged: collaborate/cross_entropy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedlscl.checks import fraction
from fedlscl.memory import above, below
from fedlscl.messages import Schema, TensorSpec, Upload, semidefinite
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.lorm.merging import merge, shrunk
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics

ROUNDING = 1e-6  # of the largest eigenvalue: below it a Gram matrix in float32 holds nothing but rounding


class RegMeanClient(FedAvgClient):
    """FedAvg's client, which also sends what enters its linear layers; for the settings see `Client`."""

    def linear_layers(self) -> dict[str, nn.Linear]:
        """All of CNN and head, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def on_train_end(self) -> None:
        """Measure the Gram matrices (in, in) on the current images; that of a layer that is not called is zero."""
        super().on_train_end()
        self.grams = {
            name: torch.zeros(layer.in_features, layer.in_features, device=self.device)
            for name, layer in self.linear_layers().items()
        }

        def hear(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            with torch.autocast(self.device.type, enabled=False):
                x = inputs[0].float().flatten(0, -2)
                self.grams[names[layer]] += x.mT @ x

        names: dict[nn.Module, str] = {layer: name for name, layer in self.linear_layers().items()}
        with ExitStack() as stack:
            for layer in names:
                stack.enter_context(layer.register_forward_pre_hook(hear))
            self.observe(self.current)

    def outgoing(self) -> dict[str, Tensor]:
        """CNN, head and the Gram matrices of this round."""
        return {**self.shared(), **above(self.grams, "gram.")}

    def upload_schema(self) -> Schema:
        """The same."""
        sizes = {name: layer.in_features for name, layer in self.linear_layers().items()}
        grams = {name: TensorSpec((size, size), rule=semidefinite) for name, size in sizes.items()}
        return {**super().upload_schema(), **above(grams, "gram.")}


class RegMeanServer(FedAvg):
    """FedAvg, and least squares for the weights of linear layers.

    Args:
        alpha: how much of the Gram matrices outside their diagonals counts.
    """

    serves, needs = "RegMeanClient", ("gram",)

    def __init__(self, alpha: float = 0.9) -> None:
        super().__init__()
        fraction("server", alpha=alpha)
        self.alpha = alpha

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One model for all clients, absent ones included."""
        answers, metrics = super().aggregate(uploads, context)
        mean = answers[0].tensors

        def sent() -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
            for upload in uploads.values():
                yield {
                    (weight := f"{name}.weight"): (
                        upload.tensors[weight].double() - mean[weight].double(),
                        shrunk(gram.double(), self.alpha),
                    )
                    for name, gram in below(upload.tensors, "gram.").items()
                }

        merged = {name: (mean[name].double() + change).float() for name, change in merge(sent(), ROUNDING).items()}
        return dict.fromkeys(range(context.clients), Answer({**mean, **merged})), metrics
