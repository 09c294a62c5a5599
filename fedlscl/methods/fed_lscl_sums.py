"""Fed-LSCL whose clients solve one-by-one distillation themselves, from two sums over all of them.

See docs/methods/fed_lscl_sums.md. Objective: as Fed-LSCL. Aggregation: Eq. 5 is a ridge regression whose data are sums
over the clients (`fedlscl.methods.o2d`). The server adds up what clients send, S = sum C_i and T = sum G_i, without
seeing any of it if sums are secure (docs/privacy.md), and a client takes out its own terms and solves for itself, with
`strength: auto` for several lambda, of which it takes the best on its buffer.

What travels: up C_i and G_i = C_i Phi_i, down S and T.

Logged: as Fed-LSCL, without the server's objectives, and o2d/strength, the lambda of the last answer unless the client
kept its own generator. The solution is found at the start of the evaluation, and its time counted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedlscl.losses import masked_cross_entropy
from fedlscl.messages import Download, Schema, TensorSpec, semidefinite
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.o2d import Student, Sums, matrix, second_moments
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT

STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)


class FedLSCLSums(FedLSCL):
    """A client of Fed-LSCL that solves one-by-one distillation itself.

    Args:
        strength: lambda, or `auto` to choose it anew in each round.
        **kwargs: settings of `FedLSCL`.
    """

    moments: Tensor  # (e + 1, e + 1) float64, C_i of the last upload

    def __init__(self, strength: float | Literal["auto"] = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if strength != "auto" and not strength > 0:
            raise ValueError(f"model.strength is {strength}, must be positive or auto")
        self.strength = strength
        self.answer: Mapping[str, Tensor] = {}

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """theta, phi and H, and room for C_i."""
        super().build(vit, cnn, cnn_name, num_classes)
        size = cnn.features + 1
        self.moments = torch.zeros(size, size, dtype=torch.float64)  # no buffer: some devices have no float64
        self.chosen = torch.tensor(0.0)  # lambda of the last answer; 0 for the own generator

    def state(self) -> dict[str, Tensor]:
        """Also C_i, which belongs to what was uploaded, and the lambda of the last answer."""
        return {**super().state(), "moments": self.moments, "chosen": self.chosen}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Also C_i and lambda."""
        super().load(state)
        self.moments, self.chosen = state["moments"], state["chosen"]

    def on_train_start(self) -> None:
        """Also log the lambda of the last answer."""
        super().on_train_start()
        if self.chosen > 0:
            self.log("o2d/strength", self.chosen)

    def on_train_end(self) -> None:
        """Also compute C_i."""
        super().on_train_end()
        self.moments = second_moments(self.feature_set)

    def outgoing(self) -> dict[str, Tensor]:
        """C_i and G_i."""
        with torch.no_grad():
            gram = self.moments.float()
            target = gram.double() @ matrix(self.generator.weight.cpu(), self.generator.bias.cpu())
        return {"gram": gram, "target": target.float()}

    def upload_schema(self) -> Schema:
        """Matrices of e + 1 rows; C_i is that of features of unit length (Eq. 2)."""
        return {**self._matrices(), "gram": replace(self._matrices()["gram"], rule=of_unit_length)}

    def download_schema(self) -> Schema:
        """S and T are as large as C_i and G_i."""
        return {f"{name}_sum": spec for name, spec in self._matrices().items()}

    def _matrices(self) -> dict[str, TensorSpec]:
        size = len(self.moments)
        return {"gram": TensorSpec((size, size)), "target": TensorSpec((size, self.generator.out_features))}

    def download(self, message: Download) -> None:
        """Keep S and T until the device is at hand."""
        self.answer = message.tensors

    def on_download_end(self) -> None:
        """Solve for the generator."""
        self._solve(Sums(self.answer["gram_sum"].double(), self.answer["target_sum"].double(), torch.zeros(())))
        self.answer = {}

    def _solve(self, everyone: Sums) -> None:
        weight, bias = self.generator.weight.detach().cpu(), self.generator.bias.detach().cpu()
        # what was added to the sums had been rounded
        own = self.moments.float().double()
        fixed = 1.0 if self.strength == "auto" else self.strength
        student = Student(weight, bias, own, everyone, fixed)
        if self.strength != "auto":
            self.chosen = torch.tensor(self.strength)
            self._adopt(*student.exact())
            return
        best, lowest, chosen = (weight.clone(), bias.clone()), self._loss(), 0.0
        for strength, solution in zip(STRENGTHS, student.path(STRENGTHS), strict=True):
            self._adopt(*solution)
            if (loss := self._loss()) < lowest:
                best, lowest, chosen = solution, loss, strength
        self.chosen = torch.tensor(chosen)
        self._adopt(*best)

    def _adopt(self, weight: Tensor, bias: Tensor) -> None:
        self.adopt({"weight": weight, "bias": bias})

    def _loss(self) -> float:
        """Mean cross-entropy among the seen classes on the buffer and on what would enter it now."""
        logits = self.observe(self.memory.remembered)["logits"]
        seen = self.data.class_mask(0, self.memory.begun)
        return float(masked_cross_entropy(logits, self.data.labels(self.memory.remembered), seen))


def of_unit_length(gram: Tensor) -> str | None:
    """A mean of x x^T (e + 1, e + 1), x features of length 1 (or 0) with a 1 behind them."""
    lengths, one = float(gram.diagonal()[:-1].sum()), float(gram[-1, -1])
    if not (0 <= lengths < 1 + 1e-3 and abs(one - 1) < 1e-3):
        return f"is of features whose mean squared length is {lengths:g}, with {one:g} behind them; both must be 1"
    return semidefinite(gram)
