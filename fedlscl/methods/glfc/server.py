"""GLFC's server: the uniform mean, and the proxy that picks the teacher."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fedlscl import checks, seeds
from fedlscl.federation.trainer import fit_once
from fedlscl.memory import above, below
from fedlscl.messages import Schema, Upload
from fedlscl.methods.glfc.client import TEACHERS
from fedlscl.methods.glfc.gradients import SIDE, encoded, encoding_net, labels_of
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

    serves, needs = "GLFCClient", ("gradients",)

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
        """As yet without teachers and monitor images."""
        super().begin(uploads, downloads, model)
        self.model = model().eval()
        self.classes, _ = uploads["gradients"].largest
        self.teachers: dict[str, Tensor] = {}
        self.images, self.labels = torch.empty(0, 3, SIDE, SIDE), torch.empty(0, dtype=torch.int64)
        self.best = torch.zeros(1)

    def state(self) -> dict[str, Tensor]:
        """Both teachers, the monitor images with their labels, and the score to beat."""
        monitors = {"monitor.images": self.images, "monitor.labels": self.labels}
        return {**super().state(), **self.teachers, **monitors, "best": self.best}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over all of that."""
        super().load(state)
        self.teachers = {name: tensor for name, tensor in state.items() if name.split(".")[0] in TEACHERS}
        self.images, self.labels, self.best = state["monitor.images"], state["monitor.labels"], state["best"]

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """The mean for everyone, and the teachers that have changed."""
        answers, _ = super().aggregate(uploads, context)
        mean, metrics, changed = answers[0].tensors, dict[str, float](), dict[str, Tensor]()
        sent = (upload.tensors for upload in uploads.values())
        if pool := [tensors["gradients"] for tensors in sent if "gradients" in tensors]:
            rng = seeds.generator(context.round.seed, "proxy", context.round.number)
            metrics |= self._reconstruct(torch.cat(pool), rng, context.trainer)
            self.best = torch.zeros(1)
            changed |= above(below(self.teachers, "latest."), "previous.")
        if len(self.labels):
            score = self._score(mean, context.trainer)
            metrics["score"] = 100 * float(score)
            if score >= self.best:
                self.best = score
                changed |= {f"latest.{name}": tensor.clone() for name, tensor in mean.items()}
        self.teachers |= changed
        return dict.fromkeys(answers, Answer({**mean, **above(changed, "teacher.")})), metrics

    def _reconstruct(self, gradients: Tensor, rng: torch.Generator, trainer: Callable[[], Trainer]) -> Metrics:
        """Make monitor images of gradients (n, P); with metrics of it."""
        fit = Reconstruction(gradients, self.classes, self, rng)
        fit_once(trainer(), fit)
        images, labels = torch.cat([torch.cat(list(last)) for last in fit.last]), fit.labels.cpu()
        sound = images.flatten(1).isfinite().all(dim=1)  # L-BFGS without a line search can diverge
        self.images, self.labels = images[sound].clamp(0, 1), labels.repeat_interleave(self.monitors)[sound]
        finite = [value for value in fit.mismatches if math.isfinite(value)]
        return {"mismatch": sum(finite) / len(finite)} if finite else {}

    def _score(self, model: Mapping[str, Tensor], trainer: Callable[[], Trainer]) -> Tensor:
        """The accuracy (1,) of a model on the monitor images, in 0..1."""
        one = trainer()
        device = one.strategy.root_device
        self.model.to(device).load_state_dict(dict(model))
        with torch.no_grad(), one.precision_plugin.forward_context():
            logits = [self.model(images.to(device), {}).logits for images in torch.split(self.images, 128)]
        self.model.cpu()
        hits = torch.cat(logits).argmax(dim=1).cpu() == self.labels
        return hits.double().mean(dim=0, keepdim=True)


class Reconstruction(LightningModule):
    """Fits images to the gradients that they left, one after another.

    Args:
        gradients: (n, P).
        classes: K.
        settings: how they are fitted, and how many of the last iterates are kept.
        rng: draws what an image begins with.
    """

    automatic_optimization = False
    gradients: Tensor
    labels: Tensor

    def __init__(self, gradients: Tensor, classes: int, settings: GLFCServer, rng: torch.Generator) -> None:
        super().__init__()
        self.iterations, self.learning_rate = settings.iterations, settings.learning_rate
        self.encoder = encoding_net(classes)
        self.register_buffer("gradients", gradients)
        self.register_buffer("labels", labels_of(gradients, classes))
        self.images = nn.ParameterList(torch.randn(1, 3, SIDE, SIDE, generator=rng) for _ in gradients)
        self.last: list[deque[Tensor]] = [deque(maxlen=settings.monitors) for _ in gradients]
        self.mismatches = [0.0] * len(gradients)

    def train_dataloader(self) -> range:
        """The numbers of all iterations, image after image."""
        return range(len(self.images) * self.iterations)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """L-BFGS for each image, since none has a part in the curvature of another."""
        return [torch.optim.LBFGS([image], lr=self.learning_rate) for image in self.images]

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One iteration for one image."""
        number = batch // self.iterations
        image, wanted, label = self.images[number], self.gradients[number], self.labels[number, None]

        def closure() -> float:
            mismatch = (encoded(self.encoder, image, label, differentiable=True) - wanted).square().sum()
            (image.grad,) = torch.autograd.grad(mismatch, [image])
            return float(mismatch.detach())

        # Lightning's own wrap would let the Trainer's precision in; here it is float32
        self.mismatches[number] = self.trainer.optimizers[number].step(closure)
        self.last[number].append(image.detach().cpu().clone())
