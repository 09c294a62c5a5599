"""TARGET's server: the mean, and after each task the images that it is inverted into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.federation.trainer import fit_once
from fedlscl.messages import AtMost, Schema, Upload
from fedlscl.methods.target.synthesis import Inversion, InversionSettings
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg


class TARGETServer(FedAvg):
    """The mean of the clients' models, and after each task synthetic images that the mean was inverted into.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
        **inversion: how the images are made, see `InversionSettings`.
    """

    def __init__(self, weighting: Literal["samples", "uniform"] = "uniform", **inversion: Any) -> None:
        super().__init__(weighting)
        self.settings = InversionSettings(**inversion)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """For clients that say which classes they learned and take synthetic images."""
        super().begin(uploads, downloads, model)
        if "classes" not in uploads or not {"images", "classes"} <= set(downloads):
            raise ValueError(
                "server: TARGETServer hands out synthetic images of the classes that clients learned, which is not "
                "what model exchanges; take fedlscl.server.FedAvg or the client of the method"
            )
        count, _, side, _ = downloads["images"].shape
        assert isinstance(count, AtMost)
        assert isinstance(side, AtMost)
        rounds, size = self.settings.synthesis_rounds, self.settings.batch_size
        if rounds * size > count.limit:
            raise ValueError(
                f"server.synthesis_rounds is {rounds} and server.batch_size {size}, but "
                f"their product must not be above the {count.limit} images that a client takes"
            )
        self.image_size, self.side = side.limit, 4 * (min(self.settings.gen_size, side.limit) // 4)
        self.model = model
        self.learned = torch.zeros(uploads["classes"].shape, dtype=torch.bool)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        """The classes that any client has learned."""
        return {"learned": self.learned}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.learned = state["learned"]

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """One mean for all clients, and with the last of a task the images that it was inverted into."""
        for upload in uploads.values():
            self.learned = self.learned | upload.tensors["classes"]
        answers = super().aggregate(uploads, clients, round, trainer)
        self.metrics = {}
        if not round.ends_task:
            return answers
        mean = next(iter(answers.values()))
        teacher = self.model()
        teacher.load_state_dict(dict(mean))
        inversion = Inversion(teacher, self.model(), self.learned, self.settings, self.side, self.image_size)
        fit_once(trainer(), inversion)
        self.metrics = inversion.means()
        answer = {**mean, "images": torch.cat(inversion.images), "classes": self.learned}
        inversion.images = []  # the Trainer holds the module for some time
        return dict.fromkeys(answers, answer)
