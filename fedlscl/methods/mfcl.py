"""MFCL (Babakniya et al., 2023): when a task ends, the server trains a generator on the global model, for replay.

The generator sees no data: it learns to make images that the global model takes for the classes learned so far. Clients
get it with the model and, while they learn what comes, replay fresh samples of it in every step, with that model as
the teacher.

Objective, with C(i, n) the classes of the current task (`train_mask: task`): CE(z, y; C(i, n)) on the current images
x; from the second task on, with Old the classes that any client had learned when the generator was trained, also

    + `head_weight` CE(H(sg f(x')), y'; Old and C(i, n)), sg: no gradient, so that only the head H learns from it
    + `distillation_weight` mean ||h_old(f(x')) - h_old(f_old(x'))||^2 / |Old|

over x', the current images and `samples` images of the generator, drawn anew in each step. y' is the label of a
current image, and for a generated one the class of Old that the teacher prefers; h_old are the rows of the teacher's
head for Old, frozen. The published weights are 1 and 0.1, under SGD from 0.1 to 0.01, 10 epochs of batches of 32 and
100 rounds; here Adam, as for every method.

Aggregation: the uniform mean. After the last round of every task (of the last one too, since the server does not
know how many follow) the generator goes on from where it stopped, with a new Adam, `steps` steps of `batch_size`
images down

    L = CE(z / `temperature`, argmax z; Old)
      + `balance` [1 + sum over c in Old of p_c ln p_c / ln |Old|],  p the batch's mean of softmax(z; Old)
      + `statistics` / L_BN sum over batch normalisations of KL(N(mu_run, var_run) || N(mu, var)), mean over channels
      + `smoothness` MSE(x, blur(x))

with the published 1000, 1, 50 and 1e-3, 100 steps, 128 images. blur is 5 x 5 with weights exp(-d^2 / 4), edges
reflected. A temperature of 1000 makes the first term about ln |Old| whatever the images are: the balance and the
statistics decide. **A CNN without batch normalisation, such as that of the small settings, has no statistics**: then
the images need only spread over the classes, and look like nothing. The second term is 0 for a single class.

The generator is linear in z ~ N(0, I_1000), to 128 x (s/4)^2, then by doubling and convolution to 128 and 64 x s^2
and to 3 x s^2 (the published one for CIFAR, up to 32 px: 8.42 million parameters), at 64 px from 128 x (s/8)^2 by one
stage more (Tiny ImageNet), above that from 64 x (s/32)^2 by five stages of 64 (at 224 px 3.33 million). Its output, by
tanh and a batch normalisation without weights, is in the CNN's normalised space; x std + mean makes pixels of it, not
clamped to 0..1, which the small model turns back into the very x. The inner normalisations add 0.8 to the variance, as
published. Clients use it in evaluation mode, as the published code does: a sample then depends on its own z alone and
drawing changes nothing; its running statistics lag some ten steps behind, which matters with few steps.

What travels: up CNN and head as with FedAvg, and a mask of the classes of this client's current task, K bytes more.
From it the server, which needs it for Old, gets to know which classes a client has. Down CNN and head; after the last
round of a task also Old (K bytes) and the generator, to everyone, absent or not. The teacher is the model in the same
download, so it does not travel twice. A generator has 4 (P + 2 C) + 8 B bytes, with P parameters, B batch
normalisations over C channels in all: 33,698,372 bytes at 32 px, 13,308,252 at 224 px.

What the client keeps on its disk: Old, the generator, and the teacher, as large as its own model.

What to expect: a class that only absent clients hold is in Old, but its row was averaged with those of clients that
never trained it; the teacher's argmax is unreliable there, and so are y' and the balance. 100 steps are few at 224 px.

Ours, where neither publication nor code fits or was followed: Old is the union over clients whose tasks have other
classes (published: tasks are the same for all), so a class can be new to one client and old to another; current and
generated images pass the networks one after the other, not as one batch, so batch normalisation normalises each by
itself; in the KL the layer's own epsilon is added to both variances. The file experiments/methods/mfcl.yaml has a
smaller budget, for CPUs: take its lines out for the published one.

Logged: collaborate/cross_entropy, collaborate/head and collaborate/distillation (weighted); after the last round of a
task, of the generator's last step, server/cross_entropy, server/balance, server/statistics, server/smoothness
(weighted) and server/shown (share of Old that the teacher sees in the batch).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from fedlscl.batches import Batch, Output
from fedlscl.federation.trainer import fit_once
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import below
from fedlscl.messages import Download, Schema, TensorSpec, Upload
from fedlscl.methods.data_free import Met, batch_statistics
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg

LATENT = 1000  # numbers in z
INNER_EPSILON = 0.8  # of the generator's inner batch normalisations


class Past(NamedTuple):
    """What a client replays from; a tuple keeps the networks out of the client's module tree."""

    generator: ImageGenerator
    cnn: SmallModel  # f_old
    weight: Tensor  # (|Old|, e) of h_old
    bias: Tensor  # (|Old|,) of h_old
    labels: Tensor  # (|Old|,) class numbers
    classes: Tensor  # (K,) true for Old


class MFCLClient(FedAvgClient):
    """FedAvg's client with replay from a generator.

    Args:
        head_weight: of the cross-entropy from which only the head learns.
        distillation_weight: of the distance to the teacher.
        samples: generated images in each step.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(
        self, head_weight: float = 1.0, distillation_weight: float = 0.1, samples: int = 128, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value, least in (
            ("head_weight", head_weight, 0.0),
            ("distillation_weight", distillation_weight, 0.0),
            ("samples", samples, 2),  # batch normalisation cannot train on one image
        ):
            if not value >= least:
                raise ValueError(f"model.{name} is {value}, must be at least {least}")
        self.head_weight, self.distillation_weight, self.samples = head_weight, distillation_weight, samples
        self.past: Past | None = None

    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """CNN and head; of the generator only what it will look like."""
        super().build(vit, cnn, cnn_name, num_classes)
        generator = _without_numbers(cnn.image_size).state_dict()
        self.generator_schema = {f"generator.{name}": _optional(tensor) for name, tensor in generator.items()}

    def outgoing(self) -> dict[str, Tensor]:
        """CNN, head, and the classes of the current task."""
        return {**self.shared(), "classes": self._class_mask(self.memory.learned, self.memory.begun)}

    def upload_schema(self) -> Schema:
        """Also a mask over the classes."""
        return {**self.shared_schema(), "classes": TensorSpec((self.num_classes,), torch.bool)}

    def download_schema(self) -> Schema:
        """After a task also a generator and the classes it stands for."""
        classes = TensorSpec((self.num_classes,), torch.bool, optional=True)
        return {**self.shared_schema(), **self.generator_schema, "classes": classes}

    def download(self, message: Download) -> None:
        """Take over CNN and head; if a generator comes along, keep it, and the model as its teacher."""
        model = {name: message.tensors[name] for name in self.shared()}
        extra = {name: tensor for name, tensor in message.tensors.items() if name not in model}
        if extra:
            self.memory.received = {**extra, **{f"teacher.{name}": tensor for name, tensor in model.items()}}
        self.adopt(model)

    def on_train_start(self) -> None:
        """Set up generator and teacher, once there are any."""
        super().on_train_start()
        self.past = self._past() if self.memory.received else None
        self.latent_rng = self.rng("latent")

    def on_train_end(self) -> None:
        """Let go of them."""
        super().on_train_end()
        self.past = None

    def _past(self) -> Past:
        received = self.memory.received
        generator = _without_numbers(self.cnn.image_size)
        generator.load_state_dict(below(received, "generator."), assign=True)
        generator.to(memory_format=torch.channels_last)
        cnn = copy.deepcopy(self.cnn)
        cnn.load_state_dict(below(received, "teacher.cnn."))
        for network in (generator, cnn):
            network.requires_grad_(False).eval().to(self.device)
        old = received["classes"]
        weight, bias, labels = (
            rows[old].to(self.device)
            for rows in (received["teacher.head.weight"], received["teacher.head.bias"], torch.arange(len(old)))
        )
        return Past(generator, cnn, weight, bias, labels, old.to(self.device))

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and the terms of replay once there is a generator."""
        terms = super().collaborative_losses(output, batch)
        if (past := self.past) is None:
            return terms
        with torch.no_grad():
            z = torch.randn(self.samples, LATENT, generator=self.latent_rng).to(self.device)
            generated = as_pixels(past.generator(z), self.cnn)
            before = [F.linear(past.cnn(images), past.weight, past.bias) for images in (batch.images.pixels, generated)]
        labels = torch.cat([batch.images.labels, past.labels[before[1].argmax(dim=1)]])
        features = torch.cat([output.representation, self(generated, {}).representation])
        head = head_loss(self.head, features, labels, past.classes | self.current_mask)
        kept = distillation(features, torch.cat(before), past.weight, past.bias)
        return {**terms, "head": self.head_weight * head, "distillation": self.distillation_weight * kept}


def head_loss(head: nn.Linear, features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The cross-entropy among some classes from which only the head learns, a scalar.

    Args:
        head: features to K logits.
        features: (B, e); no gradient goes back into them.
        labels: (B,) class numbers, every one of them among `classes`.
        classes: (K,) true for those that compete.
    """
    return masked_cross_entropy(head(features.detach()), labels, classes)


def distillation(features: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """mean ||h_old(f) - h_old(f_old)||^2 / |Old|, a scalar.

    Args:
        features: f (B, e) of the model in training.
        before: h_old(f_old) (B, |Old|).
        weight: (|Old|, e) of h_old, which gets no gradient.
        bias: (|Old|,) of h_old, likewise.
    """
    return F.mse_loss(F.linear(features, weight, bias).float(), before.float())


def as_pixels(x: Tensor, cnn: SmallModel) -> Tensor:
    """Floats that `cnn` normalises to x (B, 3, s, s), s being the size it works at."""
    return x.float() * cnn.std + cnn.mean


class MFCL(FedAvg):
    """The mean of the clients' models, and after each task a generator trained on it.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
        steps: of the generator after each task.
        batch_size: images in each of them.
        learning_rate: of Adam.
        temperature: by which the logits of the cross-entropy are flattened.
        balance: weight of the term that spreads the images over the classes.
        statistics: weight of the distance to the running statistics of batch normalisation.
        smoothness: weight of the distance to the blurred images.
    """

    def __init__(
        self,
        weighting: Literal["samples", "uniform"] = "uniform",
        steps: int = 100,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        temperature: float = 1000.0,
        balance: float = 1.0,
        statistics: float = 50.0,
        smoothness: float = 1e-3,
    ) -> None:
        super().__init__(weighting)
        for name, value, least in (
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),  # the generator's batch normalisation cannot train on one image
            ("learning_rate", learning_rate, 0.0),
            ("balance", balance, 0.0),
            ("statistics", statistics, 0.0),
            ("smoothness", smoothness, 0.0),
        ):
            if not value >= least:
                raise ValueError(f"server.{name} is {value}, must be at least {least}")
        if not temperature > 0:
            raise ValueError(f"server.temperature is {temperature}, must be positive")
        self.steps, self.batch_size, self.learning_rate = steps, batch_size, learning_rate
        self.temperature = temperature
        self.weights = {"cross_entropy": 1.0, "balance": balance, "statistics": statistics, "smoothness": smoothness}

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """For clients that say which classes they learn and take a generator."""
        super().begin(uploads, downloads, model)
        if not isinstance(model(), MFCLClient):
            raise ValueError(
                "server: MFCL hands out a generator of the classes that clients learned, which is not what model "
                "exchanges; take FedAvg or the client of the method"
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
        training = GeneratorTraining(teacher, self.learned, self)
        if self.generator:
            training.generator.load_state_dict(self.generator)
        fit_once(trainer(), training)
        state = training.generator.state_dict()
        self.generator = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        self.metrics = {name: float(value) for name, value in training.record.items()}
        answer = {**mean, **_named(self.generator), "classes": self.learned}
        return dict.fromkeys(answers, answer)


class GeneratorTraining(LightningModule):
    """One task's training of the generator.

    Args:
        teacher: the model whose classes are to be shown; it stays as it is.
        learned: (K,) true for these classes.
        settings: those of the server.
    """

    classes: Tensor  # (|Old|,) class numbers
    blurring: Tensor  # (s, s)

    def __init__(self, teacher: MFCLClient, learned: Tensor, settings: MFCL) -> None:
        super().__init__()
        self.settings = settings
        self.teacher = teacher.requires_grad_(False)
        self.generator = ImageGenerator(teacher.cnn.image_size)
        self.generator.to(memory_format=torch.channels_last)  # a fifth faster, on a CPU too
        self.register_buffer("classes", learned.nonzero().squeeze(1))
        self.register_buffer("blurring", blurring(teacher.cnn.image_size))
        self.record: dict[str, Tensor] = {}  # what is logged, of the last step
        self.train()  # Lightning warns of what is not when a fit begins

    def on_train_start(self) -> None:
        """The teacher does not learn from the images that are to be like what it learned from."""
        self.teacher.eval()

    def train_dataloader(self) -> list[int]:
        """The numbers of the steps."""
        return list(range(self.settings.steps))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the generator."""
        return torch.optim.Adam(self.generator.parameters(), lr=self.settings.learning_rate)

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        """L on a batch of images."""
        x = self.generator(torch.randn(self.settings.batch_size, LATENT, device=self.device)).float()
        with batch_statistics(self.teacher) as met:
            logits = self.teacher(as_pixels(x, self.teacher.cnn), {}).logits[:, self.classes].float()
        preferred = logits.argmax(dim=1)
        terms = {
            "cross_entropy": F.cross_entropy(logits / self.settings.temperature, preferred),
            "balance": imbalance(logits),
            "statistics": statistics_divergence(met, logits),
            "smoothness": F.mse_loss(x, self.blurring @ x @ self.blurring.T),
        }
        weighted = {name: self.settings.weights[name] * term for name, term in terms.items()}
        self.record = {name: term.detach() for name, term in weighted.items()}
        self.record["shown"] = F.one_hot(preferred, len(self.classes)).amax(dim=0).float().mean()
        return torch.stack(list(weighted.values())).sum()


def imbalance(logits: Tensor) -> Tensor:
    """1 + sum of p_c ln p_c / ln C with p the mean prediction: 0 if it is uniform, 1 if it is a single class.

    Args:
        logits: (B, C); a single class is always balanced.

    Returns:
        A scalar in 0..1.
    """
    count, classes = logits.shape
    if classes == 1:
        return 0 * logits.sum()
    log_mean = logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(count)  # a p of 0 would have no logarithm
    return 1 + (log_mean.exp() * log_mean).sum() / math.log(classes)


def statistics_divergence(met: Iterable[Met], like: Tensor) -> Tensor:
    """The mean over the batch normalisations of KL(N(mu_run, var_run) || N(mu, var)), a scalar like `like`.

    Args:
        met: what each of them is given.
        like: says dtype and device; without batch normalisation the result is 0.
    """
    found = []
    for layer, mean, variance in met:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        running = layer.running_var + layer.eps  # what the layer divides by, and finite for a channel that is constant
        found.append(normal_divergence(layer.running_mean, running, mean, variance + layer.eps).mean())
    return torch.stack(found).mean() if found else like.new_zeros(())


def normal_divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of each entry; all of one shape, variances positive."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - ratio.log() + (mean - other_mean).square() / other_variance)


def blurring(size: int) -> Tensor:
    """The matrix A (size, size) with which A x A^T is x blurred: 5 x 5 weights exp(-d^2 / 4), edges reflected.

    Padding by reflection has no deterministic gradient on a GPU, a product with A has.
    """
    offsets = torch.arange(-2, 3)
    weights = (-offsets.square() / 4).exp()
    places = (torch.arange(size)[:, None] + offsets).abs()
    places = (size - 1) - (size - 1 - places).abs()
    return (F.one_hot(places, size) * (weights / weights.sum())[:, None]).sum(dim=1)


class ImageGenerator(nn.Module):
    """Images in the normalised space of a CNN from random numbers.

    Args:
        size: s, their side in pixels.

    Raises:
        ValueError: if the stages cannot double up to that size.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        widths = (128, 128, 64) if size < 64 else (128, 128, 128, 64) if size < 128 else (64,) * 6
        factor = 2 ** (len(widths) - 1)
        if size < factor or size % factor:
            raise ValueError(f"cnn.image_size is {size}, but MFCL's generator needs a multiple of {factor} there")

        def stage(wide: int, out: int) -> tuple[nn.Module, ...]:
            normalisation = nn.BatchNorm2d(out, eps=INNER_EPSILON)
            rectifier = nn.LeakyReLU(0.2, inplace=True)  # in place: at 224 px each image would need 17 MB more
            return nn.Upsample(scale_factor=2), nn.Conv2d(wide, out, 3, padding=1), normalisation, rectifier

        self.layers = nn.Sequential(
            nn.Linear(LATENT, widths[0] * (size // factor) ** 2),
            nn.Unflatten(1, (widths[0], size // factor, size // factor)),
            nn.BatchNorm2d(widths[0]),
            *(module for wide, out in pairwise(widths) for module in stage(wide, out)),
            nn.Conv2d(widths[-1], 3, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(3, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 3, s, s) from z (B, 1000)."""
        images: Tensor = self.layers(z)
        return images


def _without_numbers(size: int) -> ImageGenerator:
    """A generator whose tensors have shapes only; it draws nothing."""
    with torch.device("meta"):
        return ImageGenerator(size)


def _optional(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, optional=True)


def _named(generator: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"generator.{name}": tensor for name, tensor in generator.items()}
