"""What TARGET and MFCL share: when a task ends, the server makes something of the mean that clients replay.

No data are needed for it: a generator learns to make images that the mean takes for the classes learned so far, Old,
and whose statistics are those that the mean's batch normalisation has met in training.

Aggregation: the uniform mean (`weighting: samples` for that by training images).

What travels: up CNN and head as with FedAvg, and a mask of classes, K bytes more. From it the server, which needs it
for Old, gets to know which classes a client has. Down CNN and head; after the last round of every task (of the last
one too, since the server does not know how many follow) also Old and what was made, to everyone, absent or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fedlscl.messages import Download, MessageError, Schema, TensorSpec, Upload, schema_of
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics, Total


class DataFreeClient(FedAvgClient):
    """FedAvg's client that tells its classes and, until the next comes, keeps what the server made when a task ended.

    A method defines `uploaded_classes` and `replay_schema`, and trains with `memory.received`, which is empty in the
    first task.
    """

    @abstractmethod
    def uploaded_classes(self) -> Tensor:
        """(K,) true for the classes that the server is told of."""

    @abstractmethod
    def replay_schema(self) -> Schema:
        """What the tensors that the server makes look like; all of them are optional."""

    def outgoing(self) -> dict[str, Tensor]:
        """CNN, head, and a mask over the classes."""
        return {**self.shared(), "classes": self.uploaded_classes()}

    def upload_schema(self) -> Schema:
        """Also a mask over the classes."""
        return {**schema_of(self.shared()), "classes": TensorSpec((self.num_classes,), torch.bool)}

    def download_schema(self) -> Schema:
        """After a task also what was made, and the classes it stands for."""
        classes = TensorSpec((self.num_classes,), torch.bool, optional=True)
        return {**schema_of(self.shared()), **self.replay_schema(), "classes": classes}

    def download(self, message: Download) -> None:
        """Take over CNN and head; what comes with them replaces what came before."""
        model = {name: message.tensors[name] for name in self.shared()}
        if made := {name: tensor for name, tensor in message.tensors.items() if name not in model}:
            self.memory.received = self.to_keep(made, model)
        self.adopt(model)

    def to_keep(self, made: dict[str, Tensor], model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of a task's last download; by default all that came with CNN and head."""
        return made


CLASSES = "clients of each class"
"""Under which name the clients that have learned a class are added up."""


class DataFreeServer(FedAvg):
    """The mean of the clients' models, and after each task what is made of it without data.

    A method defines `make_replay`, `serves` and `gives`.
    """

    needs = ("classes",)

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """As yet no class has been learned."""
        super().begin(uploads, downloads, model)
        self.model = model
        self.learned = torch.zeros(uploads["classes"].largest, dtype=torch.bool)

    def check(self, upload: Upload) -> None:
        """Every client has learned something."""
        if not bool(upload.tensors["classes"].any()):
            raise MessageError("upload: 'classes' names no class")

    def state(self) -> dict[str, Tensor]:
        """Old, the classes that any client has told of."""
        return {**super().state(), "learned": self.learned}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        super().load(state)
        self.learned = state["learned"]

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        """One mean for all clients, and with the last of a task what was made of it."""
        for upload in uploads.values():
            self.learned = self.learned | upload.tensors["classes"]
        return self._with_replay(super().aggregate(uploads, context), context)

    def terms(self, upload: Upload) -> Mapping[str, Tensor]:
        """What FedAvg adds up, and of each class whether the client has it."""
        return {**super().terms(upload), CLASSES: upload.tensors["classes"]}

    def from_sums(self, total: Total, context: Context) -> tuple[Answers, Metrics]:
        """The same from sums alone: of each class how many clients have it."""
        self.learned = self.learned | (total.tensors[CLASSES] > 0.5)
        return self._with_replay(super().from_sums(total, context), context)

    def _with_replay(self, averaged: tuple[Answers, Metrics], context: Context) -> tuple[Answers, Metrics]:
        answers, metrics = averaged
        if not context.round.ends_task:
            return answers, metrics
        mean = answers[0].tensors
        teacher = self.model()
        teacher.load_state_dict(dict(mean))
        made, metrics = self.make_replay(teacher, context.trainer)
        answer = Answer({**mean, **made, "classes": self.learned})
        return dict.fromkeys(answers, answer), metrics

    @abstractmethod
    def make_replay(self, teacher: nn.Module, trainer: Callable[[], Trainer]) -> tuple[dict[str, Tensor], Metrics]:
        """Make what clients replay from, by name; with metrics of it.

        Args:
            teacher: the mean, as a model of the clients.
            trainer: makes a fresh Trainer.
        """


class DataFreeFit(LightningModule):
    """A fit that makes something of a model.

    Args:
        teacher: the model; it stays as it is.
        learned: (K,) true for Old, the classes that are to be shown.
    """

    classes: Tensor  # (|Old|,) class numbers

    def __init__(self, teacher: nn.Module, learned: Tensor) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False).train()  # Lightning warns of what is not when a fit begins
        self.register_buffer("classes", learned.nonzero().squeeze(1))

    def on_train_start(self) -> None:
        """The teacher does not learn from the images that are to be like what it learned from."""
        self.teacher.eval()

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, |Old|) in float32 that a model gives for images (B, 3, H, W)."""
        logits: Tensor = model(images, {}).logits
        return logits[:, self.classes].float()


class Generator(nn.Module):
    """Images from random numbers: a linear map, then by stages doubling, convolution, batch normalisation, LeakyReLU.

    Args:
        latent: numbers in z.
        widths: channels after the linear map and after each stage.
        size: s, the side of the images in pixels, a multiple of 2 to the power of the number of stages.
        last: what a last convolution's three channels pass.
        bias: whether the stages' convolutions have one.
        epsilon: what the stages' batch normalisations add to the variance.
    """

    def __init__(
        self,
        latent: int,
        widths: Sequence[int],
        size: int,
        last: Sequence[nn.Module],
        bias: bool = True,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        side = size // 2 ** (len(widths) - 1)

        def stage(wide: int, out: int) -> tuple[nn.Module, ...]:
            convolution = nn.Conv2d(wide, out, 3, padding=1, bias=bias)
            rectifier = nn.LeakyReLU(0.2, inplace=True)  # in place: at 224 px each image would need 17 MB more
            return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(out, eps=epsilon), rectifier

        self.layers = nn.Sequential(
            nn.Linear(latent, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            nn.BatchNorm2d(widths[0]),
            *(module for wide, out in pairwise(widths) for module in stage(wide, out)),
            nn.Conv2d(widths[-1], 3, 3, padding=1),
            *last,
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 3, s, s) from z (B, latent)."""
        images: Tensor = self.layers(z)
        return images


class Met(NamedTuple):
    """What one layer of batch normalisation was given."""

    layer: nn.modules.batchnorm._BatchNorm  # with `running_mean` and `running_var` (C,)
    now: Tensor  # (2, C) mean and variance of the batch, the latter biased

    @property
    def running(self) -> Tensor:
        """Mean and variance (2, C) of what the layer was given in training."""
        assert self.layer.running_mean is not None  # `batch_statistics` looks at such layers alone
        assert self.layer.running_var is not None
        return torch.stack([self.layer.running_mean, self.layer.running_var])


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[list[Met]]:
    """Collect what each batch normalisation of `model` meets in the forward passes inside, with its graph.

    The list is in the order of the passes; a model without batch normalisation leaves it empty.
    """
    met: list[Met] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        met.append(Met(layer, torch.stack([x.mean(dims), x.var(dims, unbiased=False)])))

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()
