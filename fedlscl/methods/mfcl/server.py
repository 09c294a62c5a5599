"""MFCL's server: the mean, and after each task a generator trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.federation.trainer import fit_once
from fedlscl.memory import above, below
from fedlscl.messages import Schema
from fedlscl.methods.data_free import DataFreeServer
from fedlscl.methods.mfcl.client import MFCLClient
from fedlscl.methods.mfcl.generator import GeneratorSettings, GeneratorTraining
from fedlscl.robust import Robust
from fedlscl.server import Metrics


class MFCLServer(DataFreeServer):
    """The mean of the clients' models, and after each task a generator trained on it.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
        robust: how the mean is made, see `FedAvg`.
        trim: the fraction that a trimmed mean leaves out at either end.
        **training: of the generator, see `GeneratorSettings`.
    """

    serves, gives = "MFCLClient", ("generator",)

    def __init__(
        self,
        weighting: Literal["samples", "uniform"] = "uniform",
        robust: Robust = "none",
        trim: float = 0.2,
        **training: Any,
    ) -> None:
        super().__init__(weighting, robust, trim)
        self.settings = GeneratorSettings(**training)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """As yet without a generator."""
        super().begin(uploads, downloads, model)
        self.generator: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Also the generator, once there is one."""
        return {**super().state(), **above(self.generator, "generator.")}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take both over."""
        super().load(state)
        self.generator = below(state, "generator.")

    def make_replay(self, teacher: nn.Module, trainer: Callable[[], Trainer]) -> tuple[dict[str, Tensor], Metrics]:
        """The generator, trained on from where it stopped."""
        assert isinstance(teacher, MFCLClient)  # nobody else takes a generator
        training = GeneratorTraining(teacher, self.learned, self.settings)
        if self.generator:
            training.generator.load_state_dict(self.generator)
        fit_once(trainer(), training)
        state = training.generator.state_dict()
        self.generator = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metrics = {name: float(value) for name, value in training.record.items()}
        return above(self.generator, "generator."), metrics
