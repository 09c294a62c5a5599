"""TARGET (Zhang et al., 2023): when a task ends, the server inverts the global model into images for replay.

A generator without data makes images that the global model takes for the classes learned so far. Clients get them with
the model, note the logits that this model, the teacher z^T, gives them, and distil these while they learn what comes.

Objective, with C(i, n) the classes of the current task (`train_mask: task`) and Old those that any client had learned
when the images were made: CE(z, y; C(i, n)) on the current images in the first task; later + `strength` KD, where

    KD = - mean over b of the sum over c in Old of softmax(z^T / 2)_c log softmax(z / 2)_c

over as many synthetic images, drawn anew in each step. Both softmaxes run over Old alone; there is no factor T^2. The
published strength is 25 (under SGD 0.01, momentum 0.9, decay 5e-4; here Adam, as for every method).

Aggregation: the uniform mean. After the last round of every task (of the last one too, since the server does not
know how many follow) the server replaces the synthetic images. Its generator takes z in R^256 by a linear map to
128 x (s/4)^2, by two stages of doubling, convolution, batch normalisation and LeakyReLU to 64 x s^2, and by a
convolution and a sigmoid to an image of s px. It is new for each task. In each of `synthesis_rounds` rounds targets t
are drawn uniformly from Old; a copy of the generator (Adam, `generator_rate`) and a z of its own for each of
`batch_size` images (`latent_rate`) take `steps` steps down

    L = 10 L_BN + 0.5 CE(teacher(aug(x)), t; Old) + 1.0 L_adv
    L_BN = sum over batch normalisations of ||var_run - var||_2 + ||mu_run - mu||_2
    L_adv = - mean over b of [student and teacher predict the same] KL(teacher || student)

and the batch of lowest L is kept. In L_BN the batch's mean and variance count for 0.1 and their running mixture over
the earlier rounds for 0.9. The generator then makes one step of Adam at `generator_rate` times `steps`: against the
sum of the copy's gradients (`meta: maml`, of first order) or towards where the copy went (`reptile`). A student,
re-initialised for each task, learns from the teacher on the images so far (KL at T = `student_temperature`, times
T^2; `student_steps` steps of SGD at `student_rate`) after each round from number `warm_up` on, and L_adv counts in the
rounds after that. **With the published 10 rounds and a warm-up of 20 neither ever happens**, and there are 2,560
images. For larger images the published code has 200 rounds of 50 steps, weights 0.1 for L_BN and CE, `generator_rate`
2e-4, `student_temperature` 5 and `meta: reptile`. The defaults here are those for CIFAR, but for CPUs
experiments/methods/target.yaml sets `batch_size` to 24: `--server.init_args.batch_size 256` is the published one.

The images have s = `gen_size` px, but never more than the CNN takes (and a multiple of 4), and are enlarged like all
images, by bicubic interpolation. At 224 px the generator's first layer would have 103 million numbers and a published
set of 8,000 images 1.2 GB; at the default 64 px it is 98 MB. A CNN without batch normalisation, such as that of the
small settings, has L_BN = 0: then nothing but the classes holds the images to what was learned from.

What travels: up CNN and head as with FedAvg, and a mask of the classes that this client has learned, K bytes more. From
it the server, which needs it for Old, gets to know which classes a client has. Down CNN and head; after the last round
of a task also N uint8 images and Old, 3 N s^2 + K bytes more, to everyone, absent or not.

What the client keeps on its disk: these images, 3 N s^2 bytes, the teacher's N |Old| logits in float32, computed once
before the model is first evaluated, and Old; no second model.

Ours, where neither publication nor code fits or was followed: Old and the restriction of CE, KL and predictions to it
(the heads here have rows for classes that nobody has learned); aug is a shift by up to s/8 px, with zeros around, and
a flip in half of the cases; the images of a step pass the client's network apart from the real ones; plain SGD.

Logged: collaborate/cross_entropy, collaborate/distillation (25 KD); after the last round of a task, as means over the
kept batches, server/statistics (10 L_BN), server/cross_entropy (0.5 CE), server/adversarial (1.0 L_adv) and
server/recognised (share that the teacher takes for its target).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fedlscl.batches import Batch, Output
from fedlscl.federation.trainer import fit_once
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, Upload
from fedlscl.methods.data_free import Met, batch_statistics
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg

LARGEST_SET = 2**16  # synthetic images that a client accepts at once
LATENT = 256  # numbers in z
MIXTURE = 0.9  # weight of the earlier rounds' statistics in L_BN
BETAS = (0.5, 0.999)  # of the generator's Adam

Statistics = list[tuple[Tensor, Tensor]]  # mean and variance (C,) of what each batch normalisation is given


class TARGETClient(FedAvgClient):
    """FedAvg's client with distillation on synthetic images.

    Args:
        strength: weight of the distillation.
        temperature: by which both softmaxes are flattened.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(self, strength: float = 25.0, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not strength >= 0:
            raise ValueError(f"model.strength is {strength}, must not be negative")
        if not temperature > 0:
            raise ValueError(f"model.temperature is {temperature}, must be positive")
        self.strength, self.temperature = strength, temperature

    def outgoing(self) -> dict[str, Tensor]:
        """CNN, head, and the classes learned."""
        return {**self.shared(), "classes": self._class_mask(0, self.memory.begun)}

    def upload_schema(self) -> Schema:
        """Also a mask over the classes."""
        return {**self.shared_schema(), "classes": TensorSpec((self.num_classes,), torch.bool)}

    def download_schema(self) -> Schema:
        """After a task also synthetic images, no larger than the CNN takes them, and the classes they stand for."""
        side = AtMost(self.cnn.image_size)
        return {
            **self.shared_schema(),
            "images": TensorSpec((AtMost(LARGEST_SET), 3, side, side), torch.uint8, optional=True),
            "classes": TensorSpec((self.num_classes,), torch.bool, optional=True),
        }

    def download(self, message: Download) -> None:
        """Take over CNN and head; new synthetic images replace the old ones."""
        synthetic = {name: message.tensors[name] for name in ("images", "classes") if name in message.tensors}
        if synthetic:
            self.memory.received = synthetic
        self.adopt({name: tensor for name, tensor in message.tensors.items() if name not in synthetic})

    def on_test_start(self) -> None:
        """The model that came with synthetic images is their teacher: note its logits."""
        super().on_test_start()
        received = self.memory.received
        if received and "logits" not in received:
            # training will use what is computed here, so it must not come of the test's inference mode
            with torch.inference_mode(False), torch.no_grad(), self.trainer.precision_plugin.forward_context():
                parts = [self._old(batch) for batch in torch.split(received["images"], self.evaluation_batch_size)]
            received["logits"] = torch.cat([part.cpu() for part in parts])

    def _old(self, images: Tensor) -> Tensor:
        """Logits of the old classes for synthetic images, in float32."""
        logits: Tensor = self(images.to(self.device), {}).logits
        return logits[:, self.memory.received["classes"].to(self.device)].float()

    def on_train_start(self) -> None:
        """Get ready to draw synthetic images."""
        super().on_train_start()
        self.synthetic_rng = self.rng("synthetic")

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and the distillation once there are synthetic images."""
        terms = super().collaborative_losses(output, batch)
        received = self.memory.received
        if received:
            rows = torch.randint(len(received["images"]), (len(batch.images.labels),), generator=self.synthetic_rng)
            teacher = received["logits"][rows].to(self.device)
            logits = self(received["images"][rows].to(self.device), {}).logits
            old = received["classes"].to(self.device)
            terms["distillation"] = self.strength * distillation(logits, teacher, old, self.temperature)
        return terms


def distillation(logits: Tensor, teacher: Tensor, old: Tensor, temperature: float) -> Tensor:
    """KD: the cross-entropy of the student's softened prediction among the old classes to the teacher's, a scalar.

    Args:
        logits: (B, K) of the student; classes that are not `old` get no gradient.
        teacher: (B, |Old|) of the teacher, for the old classes in ascending order.
        old: (K,) true for the old classes.
        temperature: by which both are divided.
    """
    return F.cross_entropy(logits[:, old].float() / temperature, (teacher / temperature).softmax(dim=1))


class TARGET(FedAvg):
    """The mean of the clients' models, and after each task synthetic images that the mean was inverted into.

    Args:
        weighting: of the mean: `uniform`, or by the number of training `samples`.
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

    def __init__(
        self,
        weighting: Literal["samples", "uniform"] = "uniform",
        synthesis_rounds: int = 10,
        steps: int = 10,
        batch_size: int = 256,
        gen_size: int = 64,
        warm_up: int = 20,
        statistics: float = 10.0,
        cross_entropy: float = 0.5,
        adversarial: float = 1.0,
        generator_rate: float = 2e-3,
        latent_rate: float = 0.01,
        meta: Literal["maml", "reptile"] = "maml",
        student_temperature: float = 20.0,
        student_steps: int = 400,
        student_rate: float = 0.2,
    ) -> None:
        super().__init__(weighting)
        for name, value, least in (
            ("synthesis_rounds", synthesis_rounds, 1),
            ("steps", steps, 1),
            ("batch_size", batch_size, 2),  # the generator's batch normalisation cannot train on one image
            ("gen_size", gen_size, 4),
            ("warm_up", warm_up, 0),
            ("statistics", statistics, 0.0),
            ("cross_entropy", cross_entropy, 0.0),
            ("adversarial", adversarial, 0.0),
            ("generator_rate", generator_rate, 0.0),
            ("latent_rate", latent_rate, 0.0),
            ("student_steps", student_steps, 0),
            ("student_rate", student_rate, 0.0),
        ):
            if not value >= least:
                raise ValueError(f"server.{name} is {value}, must be at least {least}")
        if not student_temperature > 0:
            raise ValueError(f"server.student_temperature is {student_temperature}, must be positive")
        if meta not in ("maml", "reptile"):
            raise ValueError(f"server.meta is {meta}, must be maml or reptile")
        self.synthesis_rounds, self.steps, self.batch_size = synthesis_rounds, steps, batch_size
        self.gen_size, self.warm_up, self.meta = gen_size, warm_up, meta
        self.weights = {"statistics": statistics, "cross_entropy": cross_entropy, "adversarial": adversarial}
        self.generator_rate, self.latent_rate = generator_rate, latent_rate
        self.student_temperature, self.student_steps, self.student_rate = (
            student_temperature,
            student_steps,
            student_rate,
        )

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        """For clients that say which classes they learned and take synthetic images."""
        super().begin(uploads, downloads, model)
        if "classes" not in uploads or not {"images", "classes"} <= set(downloads):
            raise ValueError(
                "server: TARGET hands out synthetic images of the classes that clients learned, which is not what "
                "model exchanges; take FedAvg or the client of the method"
            )
        count, _, side, _ = downloads["images"].shape
        assert isinstance(count, AtMost)
        assert isinstance(side, AtMost)
        if self.synthesis_rounds * self.batch_size > count.limit:
            raise ValueError(
                f"server.synthesis_rounds is {self.synthesis_rounds} and server.batch_size {self.batch_size}, but "
                f"their product must not be above the {count.limit} images that a client takes"
            )
        self.image_size, self.side = side.limit, 4 * (min(self.gen_size, side.limit) // 4)
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
        inversion = Inversion(teacher, self.model(), self.learned, self)
        fit_once(trainer(), inversion)
        self.metrics = inversion.means()
        answer = {**mean, "images": torch.cat(inversion.images), "classes": self.learned}
        inversion.images = []  # the Trainer holds the module for some time
        return dict.fromkeys(answers, answer)


class Inversion(LightningModule):
    """The making of one task's synthetic images: a fit of as many steps as there are synthesis rounds.

    Args:
        teacher: the model to be inverted; it stays as it is.
        student: an untrained model of the same kind.
        learned: (K,) true for the classes that the images are to show.
        settings: those of the server.
    """

    automatic_optimization = False
    classes: Tensor  # (|Old|,) class numbers
    enlarging: Tensor  # (S, s)

    def __init__(self, teacher: nn.Module, student: nn.Module, learned: Tensor, settings: TARGET) -> None:
        super().__init__()
        self.settings = settings
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.generator, self.copied = ImageGenerator(settings.side), ImageGenerator(settings.side)
        self.to(memory_format=torch.channels_last)  # half the time on a CPU
        self.latent = nn.Parameter(torch.empty(settings.batch_size, LATENT))
        self.register_buffer("classes", learned.nonzero().squeeze(1))
        self.register_buffer("enlarging", enlarging(settings.side, settings.image_size))
        self.train()  # Lightning warns of what is not when a fit begins
        self.mixture: Statistics = []
        self.images: list[Tensor] = []  # (batch_size, 3, s, s) uint8, of each round
        self.record: list[dict[str, float]] = []  # what is logged, of each round

    def on_train_start(self) -> None:
        """Neither teacher nor student learns from the batches that are to be inverted."""
        self.teacher.eval()
        self.student.eval()

    def train_dataloader(self) -> list[int]:
        """The numbers of the synthesis rounds, from 1."""
        return list(range(1, self.settings.synthesis_rounds + 1))

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, torch.optim.Optimizer]:
        """Of the generator's copy with z, of the generator, of the student."""
        rate, steps = self.settings.generator_rate, self.settings.steps
        groups: list[dict[str, Any]] = [
            {"params": self.copied.parameters()},
            {"params": [self.latent], "lr": self.settings.latent_rate},
        ]
        return (
            torch.optim.Adam(groups, lr=rate, betas=BETAS),
            torch.optim.Adam(self.generator.parameters(), lr=rate * steps, betas=BETAS),
            torch.optim.SGD(self.student.parameters(), lr=self.settings.student_rate),
        )

    def training_step(self, number: int, batch_idx: int) -> None:
        """One synthesis round, and the student's training after it."""
        fast, slow, student = self._optimizers()
        self._synthesise(number, fast, slow)
        if self.settings.warm_up <= number < self.settings.synthesis_rounds:  # nobody asks the student after the last
            self._train_student(student)

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        return optimizers

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
        return weighted, recognised, [(one.mean.detach(), one.variance.detach()) for one in met]

    def _see(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, |Old|) of images (B, 3, s, s) in 0..1."""
        if images.shape[-1] != len(self.enlarging):
            images = (self.enlarging @ images @ self.enlarging.T).clamp(0, 1)
        logits: Tensor = model(images, {}).logits
        return logits[:, self.classes].float()

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
        self.student.eval()

    def means(self) -> dict[str, float]:
        """What is logged, as means over the rounds that have it."""
        names = dict.fromkeys(name for record in self.record for name in record)
        values = {name: [record[name] for record in self.record if name in record] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}


class ImageGenerator(nn.Module):
    """Images in 0..1 from random numbers.

    Args:
        size: s, their side in pixels, a multiple of 4.
    """

    def __init__(self, size: int) -> None:
        super().__init__()

        def stage(wide: int, out: int) -> tuple[nn.Module, ...]:
            convolution = nn.Conv2d(wide, out, 3, padding=1, bias=False)  # batch normalisation has a bias
            return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)

        self.layers = nn.Sequential(
            nn.Linear(LATENT, 128 * (size // 4) ** 2),
            nn.Unflatten(1, (128, size // 4, size // 4)),
            nn.BatchNorm2d(128),
            *stage(128, 128),
            *stage(128, 64),
            nn.Conv2d(64, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Images (B, 3, s, s) from z (B, 256)."""
        images: Tensor = self.layers(latent)
        return images


def statistics_distance(met: list[Met], mixture: Statistics, like: Tensor) -> Tensor:
    """L_BN: how far what batch normalisation meets is from what it met in training, a scalar like `like`.

    Args:
        met: by layer what it meets now.
        mixture: by layer what it met in the rounds before; empty in the first.
        like: says dtype and device; without batch normalisation the result is 0.
    """
    total = like.new_zeros(())
    for one, (mean, variance) in zip(met, mixed(mixture, [(one.mean, one.variance) for one in met]), strict=True):
        assert one.layer.running_mean is not None
        assert one.layer.running_var is not None
        total = total + (one.layer.running_var - variance).norm() + (one.layer.running_mean - mean).norm()
    return total


def mixed(mixture: Statistics, met: Statistics) -> Statistics:
    """0.9 of the mixture so far and 0.1 of what was met; what was met if there is no mixture yet."""
    if not mixture:
        return met
    pairs = zip(mixture, met, strict=True)
    return [
        (MIXTURE * mean + (1 - MIXTURE) * now[0], MIXTURE * variance + (1 - MIXTURE) * now[1])
        for (mean, variance), now in pairs
    ]


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
