"""MFCL's generator, and how the server trains it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl import checks
from fedlscl.methods.data_free import DataFreeFit, Generator, Met, batch_statistics
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.cnn import SmallModel

LATENT = 1000  # numbers in z
INNER_EPSILON = 0.8  # of the generator's inner batch normalisations


@dataclass(frozen=True)
class GeneratorSettings:
    """How a generator is trained.

    Args:
        steps: of the generator after each task.
        batch_size: images in each of them.
        learning_rate: of Adam.
        temperature: by which the logits of the cross-entropy are flattened.
        balance: weight of the term that spreads the images over the classes.
        statistics: weight of the distance to the running statistics of batch normalisation.
        smoothness: weight of the distance to the blurred images.
    """

    steps: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    temperature: float = 1000.0
    balance: float = 1.0
    statistics: float = 50.0
    smoothness: float = 1e-3

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ValueError: for one that is out of range.
        """
        checks.at_least(1, "server", steps=self.steps)
        checks.at_least(2, "server", batch_size=self.batch_size)  # batch normalisation cannot train on one image
        checks.at_least(0, "server", learning_rate=self.learning_rate, **self.weights)
        checks.positive("server", temperature=self.temperature)

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of L, by name."""
        free = {"balance": self.balance, "statistics": self.statistics, "smoothness": self.smoothness}
        return {"cross_entropy": 1.0, **free}


class GeneratorTraining(DataFreeFit):
    """One task's training of the generator.

    Args:
        teacher: the model whose classes are to be shown; it stays as it is.
        learned: (K,) true for these classes.
        settings: how it is trained.
    """

    teacher: FedAvgClient
    blurring: Tensor  # (s, s)

    def __init__(self, teacher: FedAvgClient, learned: Tensor, settings: GeneratorSettings) -> None:
        super().__init__(teacher, learned)
        self.settings = settings
        self.generator = ImageGenerator(teacher.cnn.image_size)
        self.generator.to(memory_format=torch.channels_last)  # a fifth faster, on a CPU too
        self.register_buffer("blurring", blurring(teacher.cnn.image_size))
        self.record: dict[str, Tensor] = {}  # what is logged, of the last step

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
            logits = self.logits(self.teacher, as_pixels(x, self.teacher.cnn))
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
    for one in met:
        (running_mean, running_variance), (mean, variance) = one.running, one.now
        eps = one.layer.eps  # with it the variance is what the layer divides by, and not 0 for a constant channel
        found.append(normal_divergence(running_mean, running_variance + eps, mean, variance + eps).mean())
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


class ImageGenerator(Generator):
    """Images in the normalised space of a CNN.

    Args:
        size: s, their side in pixels.

    Raises:
        ValueError: if the stages cannot double up to that size.
    """

    def __init__(self, size: int) -> None:
        widths = (128, 128, 64) if size < 64 else (128, 128, 128, 64) if size < 128 else (64,) * 6
        factor = 2 ** (len(widths) - 1)
        if size < factor or size % factor:
            raise ValueError(f"cnn.image_size is {size}, but MFCL's generator needs a multiple of {factor} there")
        super().__init__(LATENT, widths, size, [nn.Tanh(), nn.BatchNorm2d(3, affine=False)], epsilon=INNER_EPSILON)


def as_pixels(x: Tensor, cnn: SmallModel) -> Tensor:
    """Floats that `cnn` normalises to x (B, 3, s, s), s being the size it works at."""
    return x.float() * cnn.std + cnn.mean


def without_numbers(size: int) -> ImageGenerator:
    """A generator whose tensors have shapes only; it draws nothing."""
    with torch.device("meta"):
        return ImageGenerator(size)
