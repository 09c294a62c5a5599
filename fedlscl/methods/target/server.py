"""TARGET's server: the mean, and after each task the images that it is inverted into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.federation.trainer import fit_once
from fedlscl.messages import Schema
from fedlscl.methods.data_free import DataFreeServer
from fedlscl.methods.target.synthesis import Inversion, InversionSettings
from fedlscl.robust import Robust
from fedlscl.server import Metrics


class TARGETServer(DataFreeServer):
    """The mean of the clients' models, and after each task synthetic images that the mean was inverted into.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
        robust: how the mean is made, see `FedAvg`.
        trim: the fraction that a trimmed mean leaves out at either end.
        **inversion: how the images are made, see `InversionSettings`.
    """

    serves, gives = "TARGETClient", ("images",)

    def __init__(
        self,
        weighting: Literal["samples", "uniform"] = "uniform",
        robust: Robust = "none",
        trim: float = 0.2,
        **inversion: Any,
    ) -> None:
        super().__init__(weighting, robust, trim)
        self.settings = InversionSettings(**inversion)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """For clients that take as many images as are made."""
        super().begin(uploads, downloads, model)
        most, _, self.image_size, _ = downloads["images"].largest
        rounds, size = self.settings.synthesis_rounds, self.settings.batch_size
        if rounds * size > most:
            raise ValueError(
                f"server.synthesis_rounds is {rounds} and server.batch_size {size}, but their product must not be "
                f"above the {most} images that a client takes"
            )

    def make_replay(self, teacher: nn.Module, trainer: Callable[[], Trainer]) -> tuple[dict[str, Tensor], Metrics]:
        """Images that the mean is inverted into."""
        inversion = Inversion(teacher, self.model(), self.learned, self.settings, self.image_size)
        fit_once(trainer(), inversion)
        images = torch.cat(inversion.images)
        inversion.images = []  # the Trainer holds the module for some time
        return {"images": images}, inversion.means()
