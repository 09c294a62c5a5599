"""GLFC's server: the uniform mean, and the proxy that picks the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fedlscl import checks, seeds
from fedlscl.federation.trainer import fit_once
from fedlscl.memory import below
from fedlscl.messages import AtMost, Schema, Upload
from fedlscl.methods.glfc.client import TEACHERS
from fedlscl.methods.glfc.gradients import SIDE
from fedlscl.methods.glfc.reconstruction import Reconstruction
from fedlscl.robust import Robust
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics


class GLFCServer(FedAvg):
    """The uniform mean, and the proxy that keeps the best one for a teacher.

    Args:
        iterations: of L-BFGS for each gradient.
        learning_rate: of L-BFGS.
        monitors: how many of the last iterates become monitor images.
        robust: how the mean is made, see `FedAvg`.
        trim: the fraction that a trimmed mean leaves out at either end.
    """

    def __init__(
        self,
        iterations: int = 250,
        learning_rate: float = 0.1,
        monitors: int = 20,
        robust: Robust = "none",
        trim: float = 0.2,
    ) -> None:
        super().__init__("uniform", robust, trim)
        checks.at_least(1, "server", iterations=iterations)
        checks.positive("server", learning_rate=learning_rate)
        if not 1 <= monitors <= iterations:
            raise ValueError(f"server.monitors is {monitors}, must be between 1 and the {iterations} iterations")
        self.iterations, self.learning_rate, self.monitors = iterations, learning_rate, monitors

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """Only for clients that send gradients of prototypes."""
        super().begin(uploads, downloads, model)
        if "gradients" not in uploads:
            raise ValueError(
                "server: GLFCServer needs the gradients that GLFC's clients send, but model sends none; take FedAvg"
            )
        self.model = model()
        limit = uploads["gradients"].shape[0]
        assert isinstance(limit, AtMost)
        self.classes = limit.limit
        self.teachers: dict[str, Mapping[str, Tensor]] = {which: {} for which in TEACHERS}
        self.images, self.labels = torch.empty(0, 3, SIDE, SIDE), torch.empty(0, dtype=torch.int64)
        self.best = torch.zeros(1)

    def state(self) -> dict[str, Tensor]:
        """Both teachers, the monitor images with their labels, and the score to beat."""
        teachers = {f"{which}.{name}": t for which in TEACHERS for name, t in self.teachers[which].items()}
        monitors = {"monitor.images": self.images, "monitor.labels": self.labels}
        return {**super().state(), **teachers, **monitors, "best": self.best}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over all of that."""
        super().load(state)
        self.teachers = {which: below(state, f"{which}.") for which in TEACHERS}
        self.images, self.labels, self.best = state["monitor.images"], state["monitor.labels"], state["best"]

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The mean for everyone, and the teachers that have changed."""
        answers, _ = super().aggregate(uploads, context)
        mean, metrics = answers[0].tensors, dict[str, float]()
        changed: dict[str, Mapping[str, Tensor]] = {}
        sent = (upload.tensors.get("gradients") for upload in uploads.values())
        if pool := [gradients for gradients in sent if gradients is not None]:
            rng = seeds.generator(context.round.seed, "proxy", context.round.number)
            metrics |= self._reconstruct(torch.cat(pool), rng, context.trainer)
            self.best = torch.zeros(1)
            if self.teachers["latest"]:
                changed["previous"] = self.teachers["latest"]
        if len(self.labels):
            score = self._score(mean, context.trainer)
            metrics["score"] = 100 * float(score)
            if score >= self.best:
                self.best, changed["latest"] = score, {name: tensor.clone() for name, tensor in mean.items()}
        self.teachers |= changed
        news = {f"teacher.{which}.{name}": t for which, model in changed.items() for name, t in model.items()}
        return dict.fromkeys(answers, Answer({**mean, **news})), metrics

    def _reconstruct(self, gradients: Tensor, rng: torch.Generator, trainer: Callable[[], Trainer]) -> Metrics:
        """Make monitor images of gradients (n, P); with metrics of it."""
        fit = Reconstruction(gradients, self.classes, self.iterations, self.learning_rate, self.monitors, rng)
        fit_once(trainer(), fit)
        images, labels = torch.cat([torch.cat(list(last)) for last in fit.last]), fit.labels.cpu()
        sound = images.flatten(1).isfinite().all(dim=1)  # L-BFGS without a line search can diverge
        self.images, self.labels = images[sound].clamp(0, 1), labels.repeat_interleave(self.monitors)[sound]
        finite = [value for value in fit.mismatches if math.isfinite(value)]
        return {"mismatch": sum(finite) / len(finite)} if finite else {}

    def _score(self, model: Mapping[str, Tensor], trainer: Callable[[], Trainer]) -> Tensor:
        """The accuracy (1,) of a model on the monitor images, in 0..1."""
        self.model.load_state_dict(dict(model))
        scoring = Scoring(self.model, self.images, self.labels)
        trainer().test(scoring, verbose=False)
        return scoring.hits.cpu().double() / len(self.labels)


class Scoring(LightningModule):
    """Counts what a model classifies rightly."""

    images: Tensor
    labels: Tensor
    hits: Tensor

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        for name, tensor in (("images", images), ("labels", labels), ("hits", torch.zeros(1))):
            self.register_buffer(name, tensor)

    def test_dataloader(self) -> range:
        """Where each batch begins."""
        return range(0, len(self.labels), 128)

    def test_step(self, batch: int, batch_idx: int) -> None:
        """One batch."""
        logits = self.model(self.images[batch : batch + 128], {}).logits
        self.hits += (logits.argmax(dim=1) == self.labels[batch : batch + 128]).sum()
