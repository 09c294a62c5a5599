"""FedProx (Li et al., 2020): FedAvg whose clients are held to the model with which the round began.

See docs/methods/fedprox.md. Objective: CE(z, y; C(i, n)) + mu / 2 ||w - w_g||^2, where w_g are the parameters at the
start of the round (no running statistics), and the norm runs over all of them. mu = 0 is FedAvg, bit for bit.

Aggregation and what travels: as FedAvg.

Logged: collaborate/cross_entropy, collaborate/proximal (mu / 2 ||w - w_g||^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlscl.batches import Batch, Output
from fedlscl.checks import at_least
from fedlscl.methods.fedavg import FedAvgClient


class FedProxClient(FedAvgClient):
    """FedAvg's client with a proximal term.

    Args:
        mu: weight of the proximal term.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(self, mu: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(0, "model", mu=mu)
        self.mu = mu

    def on_train_start(self) -> None:
        """Note the parameters of the model that was received."""
        super().on_train_start()
        self.received = [parameter.detach().clone() for parameter in self.parameters()]

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and the proximal term."""
        return {**super().collaborative_losses(output, batch), **self._proximal()}

    def replay_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Those of the continual strategy and the proximal term."""
        return {**super().replay_losses(output, batch), **self._proximal()}

    def _proximal(self) -> dict[str, Tensor]:
        return {"proximal": self.mu / 2 * proximal(list(self.parameters()), self.received)}


def proximal(parameters: list[torch.nn.Parameter], received: list[Tensor]) -> Tensor:
    """||w - w_g||^2 over all parameters, a scalar."""
    distances = [(now - before).square().sum() for now, before in zip(parameters, received, strict=True)]
    return torch.stack(distances).sum()
