"""CCVR (Luo et al., 2021) after FedAvg: the averaged model's head is trained anew on Gaussians of its features.

See docs/methods/ccvr.md. Objective of all rounds of a task but the last: that of the method beneath, FedAvg or
FedAvg-LoRA. In the last nothing is trained: with f the features (d) that the averaged model's head sees, each client
sends n_c, the sum of f and that of f f^T for each class c of the current task, and the server minimises

    CE(W f + b, c) over classes c of which it has sums and f drawn from N(mu_c, Sigma_c).

Aggregation: w <- sum over i of p_i w_i of what the method beneath shares; in a task's last round the rows of the head
for these classes are those of W and b.

What travels: as beneath; up in a task's last round also the sums, in float64.

Logged: as beneath; server/images, the images behind the sums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlscl.batches import Batch, Images
from fedlscl.client import Client
from fedlscl.memory import above, below
from fedlscl.messages import Schema, Upload
from fedlscl.methods.fed_lora import FedLoRAClient
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.statistics.client import numbers_of, rounded
from fedlscl.methods.statistics.heads import ClosedFormHead, added
from fedlscl.methods.statistics.server import StatisticsServer
from fedlscl.schedule import Round
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics, Total

log = logging.getLogger(__name__)


class Calibrated(Client):
    """What sends sums over the features of the averaged model in the last round of a task, in which it trains nothing.

    Args:
        calibration: which sums, and how a head follows from them.
        **kwargs: settings of every client, see `Client`.
    """

    head: nn.Linear

    def __init__(self, calibration: ClosedFormHead, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calibration = calibration

    def begin_round(self, round: Round) -> None:
        """No sums yet."""
        super().begin_round(round)
        self.sums: dict[str, Tensor] = {}

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Those of the method beneath; one in a task's last round, for a fit must have steps."""
        if not self.round.ends_task:
            return super().passes(rng)
        return iter([("collaborate", self.epoch(len(self.memory.buffer), len(self.current)))])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """That of the method beneath; none in a task's last round."""
        if not self.round.ends_task:
            super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        """Sum up what the head sees of the current images."""
        super().on_train_end()
        if self.round.ends_task:
            self.observe(self.current, self._add)

    def _add(self, images: Images) -> dict[str, Tensor]:
        features = rounded(self.output(images).representation.float().cpu())
        labels, numbers = images.labels.cpu(), numbers_of(images.pixels).cpu()
        self.sums = added([self.sums, self.calibration.sums(features, labels, numbers, self.num_classes)])
        return {"labels": labels}

    def outgoing(self) -> dict[str, Tensor]:
        """Also the sums, if there are any."""
        return {**super().outgoing(), **above(self.sums, "calibration.")}

    def upload_schema(self) -> Schema:
        """Also what the new head needs."""
        sums = self.calibration.schema(self.head.in_features, self.num_classes)
        return {**super().upload_schema(), **above(sums, "calibration.")}


class CalibratedFedAvgClient(Calibrated, FedAvgClient):
    """FedAvg's client; for the settings see `Calibrated`."""


class CalibratedFedLoRAClient(Calibrated, FedLoRAClient):
    """FedAvg-LoRA's client; for the settings see `Calibrated` and `FedLoRAClient`."""


class CalibratingServer(FedAvg):
    """FedAvg, whose head follows from the clients' sums when a task ends; for the settings see `FedAvg`."""

    serves, needs, gives = "CalibratedFedAvgClient", ("calibration",), ("head",)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """The clients say what follows from the sums."""
        super().begin(uploads, downloads, model)
        client = model()
        assert isinstance(client, Calibrated)
        self.statistics = StatisticsServer()
        self.statistics.expect(client.calibration, below(uploads, "calibration."))

    def check(self, upload: Upload) -> None:
        """All sums or none, and over as many images as there are."""
        self.statistics.check(_sums(upload))

    def state(self) -> dict[str, Tensor]:
        """Also the sums of all tasks."""
        return {**super().state(), **above(self.statistics.state(), "calibration.")}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        super().load({name: tensor for name, tensor in state.items() if not name.startswith("calibration.")})
        self.statistics.load(below(state, "calibration."))

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One model for all clients, absent ones included."""
        if context.round.ends_task and context.round.number == 1:
            log.warning("federation.rounds is 1, and the last round of a task trains nothing; take 2 or more")
        answers, metrics = super().aggregate(uploads, context)
        sums = self.statistics.aggregate({n: _sums(upload) for n, upload in uploads.items()}, context)
        return self._calibrated((answers, metrics), sums)

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """What FedAvg adds up, and the sums."""
        return {**super().terms(upload), **above(self.statistics.terms(_sums(upload)), "calibration.")}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """One model for all clients, from sums alone."""
        sums = total._replace(tensors=below(total.tensors, "calibration."))
        return self._calibrated(super().from_sums(total, context), self.statistics.from_sums(sums, context))

    def _calibrated(self, averaged: tuple[Answers, Metrics], sums: tuple[Answers, Metrics]) -> tuple[Answers, Metrics]:
        """The averaged model, whose head follows from the sums if there are any."""
        (answers, metrics), (solved, measured) = averaged, sums
        if not solved:
            return answers, metrics
        model, found = dict(answers[0].tensors), solved[0].tensors
        known = found["known"].unsqueeze(1)
        model["head.weight"] = torch.where(known, found["weight"], model["head.weight"])
        model["head.bias"] = torch.where(found["known"], found["bias"], model["head.bias"])
        return dict.fromkeys(answers, Answer(model)), {**metrics, **measured}


def _sums(upload: Upload) -> Upload:
    """An upload with nothing but its sums."""
    return replace(upload, tensors=below(upload.tensors, "calibration."))
