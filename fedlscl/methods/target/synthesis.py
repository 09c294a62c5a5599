"""TARGET's synthetic images: the inversion of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fedlscl import checks
from fedlscl.methods.data_free import DataFreeFit, Generator, Met, batch_statistics

LATENT = 256  # numbers in z
MIXTURE = 0.9  # weight of the earlier rounds' statistics in L_BN
BETAS = (0.5, 0.999)  # of the generator's Adam

Statistics = list[Tensor]  # mean and variance, (2, C), of what each batch normalisation is given


@dataclass(frozen=True)
class InversionSettings:
    """How synthetic images are made.

    Args:
        synthesis_rounds: batches of synthetic images that are made.
        steps: of Adam for each of them.
        batch_size: images in each of them.
        gen_size: their side in pixels, if the CNN takes images as large.
        warm_up: number of the round after which the student is first trained; later rounds have L_adv.
        statistics: weight of L_BN.
        cross_entropy: weight of the teacher's cross-entropy.
        adversarial: weight of L_adv.
        generator_rate: learning rate of the generator's copy; the generator's own is `steps` times that.
        latent_rate: learning rate of z.
        meta: how the generator follows its copies.
        student_temperature: by which the softmaxes are flattened when the student learns.
        student_steps: of SGD for the student after a round.
        student_rate: learning rate of the student.
    """

    synthesis_rounds: int = 10
    steps: int = 10
    batch_size: int = 256
    gen_size: int = 64
    warm_up: int = 20
    statistics: float = 10.0
    cross_entropy: float = 0.5
    adversarial: float = 1.0
    generator_rate: float = 2e-3
    latent_rate: float = 0.01
    meta: Literal["maml", "reptile"] = "maml"
    student_temperature: float = 20.0
    student_steps: int = 400
    student_rate: float = 0.2

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ValueError: for one that is out of range.
        """
        checks.at_least(1, "server", synthesis_rounds=self.synthesis_rounds, steps=self.steps)
        checks.at_least(2, "server", batch_size=self.batch_size)  # batch normalisation cannot train on one image
        checks.at_least(4, "server", gen_size=self.gen_size)
        checks.positive("server", student_temperature=self.student_temperature)
        checks.at_least(0, "server", **{name: value for name, value in vars(self).items() if name != "meta"})
        if self.meta not in ("maml", "reptile"):
            raise ValueError(f"server.meta is {self.meta}, must be maml or reptile")

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of L, by name."""
        return {"statistics": self.statistics, "cross_entropy": self.cross_entropy, "adversarial": self.adversarial}

    def side(self, image_size: int) -> int:
        """s for models that take images of `image_size` px: a multiple of 4, no larger than that."""
        return 4 * (min(self.gen_size, image_size) // 4)


class Inversion(DataFreeFit):
    """The making of one task's synthetic images: a fit of as many steps as there are synthesis rounds.

    Args:
        teacher: the model to be inverted; it stays as it is.
        student: an untrained model of the same kind.
        learned: (K,) true for the classes that the images are to show.
        settings: how they are made.
        image_size: S, at which the models take them.
    """

    automatic_optimization = False
    enlarging: Tensor  # (S, s)

    def __init__(
        self, teacher: nn.Module, student: nn.Module, learned: Tensor, settings: InversionSettings, image_size: int
    ) -> None:
        super().__init__(teacher, learned)
        self.settings, self.student, side = settings, student.train(), settings.side(image_size)
        self.generator, self.copied = ImageGenerator(side), ImageGenerator(side)
        self.to(memory_format=torch.channels_last)  # half the time on a CPU
        self.latent = nn.Parameter(torch.empty(settings.batch_size, LATENT))
        self.register_buffer("enlarging", enlarging(side, image_size))
        self.mixture: Statistics = []
        self.images: list[Tensor] = []  # (batch_size, 3, s, s) uint8, of each round
        self.record: list[dict[str, float]] = []  # what is logged, of each round

    def train_dataloader(self) -> list[int]:
        """The numbers of the synthesis rounds, from 1."""
        return list(range(1, self.settings.synthesis_rounds + 1))

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, torch.optim.Optimizer]:
        """Of the generator's copy with z, of the generator, of the student."""
        settings, rate = self.settings, self.settings.generator_rate
        fast = torch.optim.Adam(self.copied.parameters(), lr=rate, betas=BETAS)
        fast.add_param_group({"params": [self.latent], "lr": settings.latent_rate})
        slow = torch.optim.Adam(self.generator.parameters(), lr=rate * settings.steps, betas=BETAS)
        return fast, slow, torch.optim.SGD(self.student.parameters(), lr=settings.student_rate)

    def training_step(self, number: int, batch_idx: int) -> None:
        """One synthesis round, and the student's training after it."""
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)  # there are three
        fast, slow, student = optimizers
        self.student.eval()  # it learns in its own training alone
        self._synthesise(number, fast, slow)
        if self.settings.warm_up <= number < self.settings.synthesis_rounds:  # nobody asks the student after the last
            self._train_student(student)

    def _synthesise(self, number: int, fast: LightningOptimizer, slow: LightningOptimizer) -> None:
        """Train a copy of the generator, keep its best batch, and let the generator follow."""
        settings = self.settings
        self.copied.load_state_dict(self.generator.state_dict())
        fast.optimizer.state.clear()  # each copy is a new one, with moments of its own
        with torch.no_grad():
            self.latent.normal_()
        targets = torch.randint(len(self.classes), (settings.batch_size,), device=self.device)
        slow.zero_grad()
        kept: tuple[float, Tensor, dict[str, float]] | None = None
        met: Statistics = []
        for _ in range(settings.steps):
            images = self.copied(self.latent).float()
            terms, recognised, met = self._objective(images, targets, number)
            loss = torch.stack(list(terms.values())).sum()
            value = float(loss.detach())
            if kept is None or value < kept[0]:
                record = {name: float(term.detach()) for name, term in terms.items()} | {"recognised": recognised}
                kept = value, images.detach(), record
            fast.zero_grad()
            self.manual_backward(loss, inputs=[*self.copied.parameters(), self.latent])
            if settings.meta == "maml":
                follow_gradients(self.generator, self.copied)
            fast.step()
        if settings.meta == "reptile":
            follow_copy(self.generator, self.copied)
        slow.step()
        self.mixture = mixed(self.mixture, met)
        assert kept is not None  # there is at least one step
        self.images.append((255 * kept[1]).round().to(torch.uint8).cpu())
        self.record.append(kept[2])

    def _objective(self, images: Tensor, targets: Tensor, number: int) -> tuple[dict[str, Tensor], float, Statistics]:
        """The weighted terms of L, the share of recognised images, and what batch normalisation met."""
        settings = self.settings
        shown = augment(images)
        with batch_statistics(self.teacher) as met:
            logits = self._see(self.teacher, shown)
        terms = {
            "statistics": statistics_distance(met, self.mixture, logits),
            "cross_entropy": F.cross_entropy(logits, targets),
        }
        if number > settings.warm_up:
            terms["adversarial"] = adversarial(self._see(self.student, shown), logits)
        recognised = float((logits.argmax(dim=1) == targets).float().mean())
        weighted = {name: settings.weights[name] * term for name, term in terms.items()}
        return weighted, recognised, [one.now.detach() for one in met]

    def _see(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, |Old|) of images (B, 3, s, s) in 0..1."""
        if images.shape[-1] != len(self.enlarging):
            images = (self.enlarging @ images @ self.enlarging.T).clamp(0, 1)
        return self.logits(model, images)

    def _train_student(self, optimizer: LightningOptimizer) -> None:
        """Teach the student what the teacher says of the images so far."""
        self.student.train()
        pool = torch.cat(self.images)
        for _ in range(self.settings.student_steps):
            rows = torch.randint(len(pool), (self.settings.batch_size,))
            images = augment(pool[rows].to(self.device).float() / 255)
            with torch.no_grad():
                teacher = self._see(self.teacher, images)
            loss = softened_divergence(self._see(self.student, images), teacher, self.settings.student_temperature)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def means(self) -> dict[str, float]:
        """What is logged, as means over the rounds that have it."""
        names = dict.fromkeys(name for record in self.record for name in record)
        values = {name: [record[name] for record in self.record if name in record] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}


class ImageGenerator(Generator):
    """Images in 0..1; no bias before batch normalisation, which has its own.

    Args:
        size: s, their side in pixels, a multiple of 4.
    """

    def __init__(self, size: int) -> None:
        super().__init__(LATENT, (128, 128, 64), size, [nn.Sigmoid()], bias=False)


def statistics_distance(met: list[Met], mixture: Statistics, like: Tensor) -> Tensor:
    """L_BN: how far what batch normalisation meets is from what it met in training, a scalar like `like`.

    Args:
        met: by layer what it meets now.
        mixture: by layer what it met in the rounds before; empty in the first.
        like: says dtype and device; without batch normalisation the result is 0.
    """
    total = like.new_zeros(())
    for one, now in zip(met, mixed(mixture, [one.now for one in met]), strict=True):
        mean, variance = one.running - now
        total = total + variance.norm() + mean.norm()
    return total


def mixed(mixture: Statistics, met: Statistics) -> Statistics:
    """0.9 of the mixture so far and 0.1 of what was met; what was met if there is no mixture yet."""
    if not mixture:
        return met
    return [MIXTURE * before + (1 - MIXTURE) * now for before, now in zip(mixture, met, strict=True)]


def adversarial(student: Tensor, teacher: Tensor) -> Tensor:
    """L_adv from logits (B, C): minus the mean over all images of KL(teacher || student), 0 where they disagree."""
    divergence = F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="none", log_target=True)
    agree = student.argmax(dim=1) == teacher.argmax(dim=1)
    return -(divergence.sum(dim=1) * agree).mean()


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) from logits (B, C), the mean over the images."""
    ours, wanted = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(ours, wanted, reduction="batchmean", log_target=True)


def follow_gradients(generator: nn.Module, copied: nn.Module) -> None:
    """Add the copy's gradients to the generator's (MAML of first order)."""
    for own, other in zip(generator.parameters(), copied.parameters(), strict=True):
        assert other.grad is not None
        own.grad = other.grad.clone() if own.grad is None else own.grad + other.grad


def follow_copy(generator: nn.Module, copied: nn.Module) -> None:
    """Make the way back from the copy the generator's gradient, so that it steps towards the copy (Reptile)."""
    for own, other in zip(generator.parameters(), copied.parameters(), strict=True):
        own.grad = (own - other).detach()


def augment(images: Tensor) -> Tensor:
    """Images (B, 3, s, s), each shifted by up to s/8 px in both directions, with zeros around, and perhaps flipped.

    As products with matrices, whose gradients, unlike those of indexing, are deterministic and fast everywhere.
    """
    count, size, device = len(images), images.shape[-1], images.device
    down, right = torch.randint(-(size // 8), size // 8 + 1, (2, count, 1, 1), device=device)
    flipped = torch.rand(count, 1, 1, device=device) < 0.5
    places = torch.arange(size, device=device)
    rows = (places[:, None] + down == places).float()  # (B, s, s); row i has its 1 where row i comes from
    columns = (torch.where(flipped, places.flip(0)[:, None], places[:, None]) + right == places).float()
    shown: Tensor = rows[:, None] @ images @ columns[:, None].mT
    return shown


def enlarging(size: int, wanted: int) -> Tensor:
    """The matrix A (wanted, size) with which `resize` is A x A^T, clamped to 0..1.

    Interpolation itself has no deterministic gradient on a GPU, a product with A has.
    """
    return F.interpolate(torch.eye(size)[None, None], (wanted, size), mode="bicubic", antialias=True)[0, 0]
