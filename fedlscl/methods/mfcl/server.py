"""MFCL's server: the mean, and after each task a generator trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.federation.trainer import fit_once
from fedlscl.memory import below
from fedlscl.messages import Schema, Upload
from fedlscl.methods.mfcl.client import MFCLClient
from fedlscl.methods.mfcl.generator import GeneratorSettings, GeneratorTraining
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg


class MFCLServer(FedAvg):
    """The mean of the clients' models, and after each task a generator trained on it.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
        **training: of the generator, see `GeneratorSettings`.
    """

    def __init__(self, weighting: Literal["samples", "uniform"] = "uniform", **training: Any) -> None:
        super().__init__(weighting)
        self.settings = GeneratorSettings(**training)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """For clients that say which classes they learn and take a generator."""
        super().begin(uploads, downloads, model)
        if not isinstance(model(), MFCLClient):
            raise ValueError(
                "server: MFCLServer hands out a generator of the classes that clients learned, which is not what model "
                "exchanges; take fedlscl.server.FedAvg or the client of the method"
            )
        self.model = model
        self.learned = torch.zeros(uploads["classes"].shape, dtype=torch.bool)  # type: ignore[arg-type]
        self.generator: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """The classes that any client has learned, and the generator once there is one."""
        return {"learned": self.learned, **_named(self.generator)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.learned, self.generator = state["learned"], below(state, "generator.")

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """One mean for all clients, and with the last of a task the generator that was trained on it."""
        for upload in uploads.values():
            self.learned = self.learned | upload.tensors["classes"]
        answers = super().aggregate(uploads, clients, round, trainer)
        self.metrics = {}
        if not round.ends_task:
            return answers
        mean = next(iter(answers.values()))
        teacher = self.model()
        teacher.load_state_dict(dict(mean))
        assert isinstance(teacher, MFCLClient)  # `begin` has looked
        training = GeneratorTraining(teacher, self.learned, self.settings)
        if self.generator:
            training.generator.load_state_dict(self.generator)
        fit_once(trainer(), training)
        state = training.generator.state_dict()
        self.generator = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        self.metrics = {name: float(value) for name, value in training.record.items()}
        answer = {**mean, **_named(self.generator), "classes": self.learned}
        return dict.fromkeys(answers, answer)


def _named(generator: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"generator.{name}": tensor for name, tensor in generator.items()}
