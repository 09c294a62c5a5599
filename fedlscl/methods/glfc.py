"""GLFC (Dong et al., 2022): exemplars under rebalanced losses, and a proxy server that picks the teacher.

**The server reconstructs images of the clients, by design.** What a client sends of its prototypes is the gradient of a
small network that both sides know, and the proxy inverts it. The images are perturbed before, which keeps them no
secret. Who cannot accept that cannot use GLFC.

Objective on a batch of current images and exemplars, with pr = sigmoid(z), S the classes that the client has seen, and
O and W the samples of its learned and of its new classes:

    g_b = 1 - pr_b[y_b] (no gradient),  omega_b = g_b / mean of g over the group (O or W) of b,
    L_GC = mean over b and c in S of omega_b BCE(z_bc, [c = y_b]),
    L_RD = mean over b and c in S of BCE(z_bc, t_bc),  t = sigmoid(z of the teacher) for learned c, else [c = y_b],
    L = L_GC / 2 + L_RD / 2.

Without a teacher L is L_GC, without a learned class every omega is 1. An epoch goes over exemplars and current images.

*Start of a task.* With `task_detect: oracle` the client signals in its first round of a task. With `entropy` it signals
if H - H_prev > `threshold`, H being the mean over the current images of - sum p ln(p + 1e-5), p the softmax of the
received model over S, and H_prev that of the client's last round (0 before). H is at most ln |S|, 2.08 for 8 classes,
so that few classes need a lower threshold. A task that began without a signal leaves the classes of the last one
neither learned nor replayed until the next signal.

*Exemplars*: floor(`memory_size` / learned classes) of each class, herded on features of unit length. A list is chosen
at the end of the task's last round with the model trained there, so that the images need not outlive their task;
older lists are cut in herding order when it joins them.

*Prototypes.* In a round with a signal the client takes, after training, of each current class the image nearest the
class mean of the unit-length features, moves its pixels by `perturbation_steps` steps of size `perturbation_rate`
against the gradient of the BCE, scales it to 32 x 32, and sends the gradient of the cross-entropy with respect to the
weights of the encoding net: three convolutions (12 channels, 5 x 5, strides 2, 2, 1) with sigmoids and a linear map to
the K classes, its weights from U(-0.5, 0.5), the same in every run, never trained.

Aggregation: w <- mean over i of w_i, uniform. *Proxy*: the label of a gradient is the class whose row of the last layer
has the smallest sum (only that of the true class is negative). From N(0, 1), an image is fitted by L-BFGS to
||its gradient - the gradient||^2; the last `monitors` iterates, cut to 0..1, are monitor images. The averaged model is
scored on them in every round (accuracy among all K classes), and the best is kept, the later one where equal. When
gradients arrive, they replace the monitor images, the kept model becomes the previous best, and the best score starts
from 0. The teacher is the latest best in a round with a signal, otherwise the previous best: as long as all clients
signal together, both are the best model of the task before.

What travels: up the model, 4 (11,176,512 + 513 K + 9,600) + 160 bytes with ResNet-18 and 512 features, and in a round
with a signal `gradients` (c, P), 4 P bytes for each current class, P = 8,136 + 769 K (340,144 bytes with K = 100); no
labels. Down the model, and `teacher.latest.*` and `teacher.previous.*`, another model each, in rounds in which that one
has changed. Everyone gets every answer, and so knows both teachers whenever it comes back.

On the client's disk: the indices of the exemplars, both teachers, and for `entropy` H_prev and the number of tasks
learned.

Where publication and code differ, L_RD is the code's (BCE). Unlike the code: no exemplar twice, and the best score does
start anew with new gradients (there a stale teacher could stay for good). Ours are the columns S (over all K the
private classes of others would be negatives everywhere), in the entropy too; exemplars chosen before the last
download; a prototype perturbed at the CNN's input size and scaled to 32 pixels thereafter (at 224 its gradient would
take 15 MB); no CBAM in the CNN. The code trains with SGD at a rate of 2.0, and perturbs at a tenth of that, which
`perturbation_rate` keeps: a tenth of Adam's rate would not move a pixel. An iteration of L-BFGS is one step of torch's,
of up to 20 inner iterations at `learning_rate`: 250, as in the code, take about 25 seconds of one CPU core for each
gradient. The YAML has 8, and 5 monitors, which leaves the monitor images little more than noise; `--server.iterations
250 --server.monitors 20` gives the published budget.

Defaults from the publication's code: memory_size 2000, threshold 1.2, 50 perturbation steps of 0.2, 250 iterations at
0.1, 20 monitors. Of `Client`'s settings, `buffer_size`, `selection` and `train_mask` have no part in the method.

Logged: collaborate/compensation (L_GC, halved with a teacher), collaborate/relation (L_RD / 2), detection/entropy (H);
server/score (accuracy in % on the monitor images), server/mismatch (squared distance of the gradients as the last
iteration began, mean over those that arrived and did not diverge).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output
from fedlscl.federation.trainer import fit_once
from fedlscl.memory import below, herding
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.create import resize
from fedlscl.schedule import Round
from fedlscl.server import Answers, FedAvg

SIDE = 32  # of the images that the encoding net takes, in pixels
FEATURES = 12 * (SIDE // 4) ** 2  # that its last layer sees
TEACHERS = ("latest", "previous")


class GLFCClient(FedAvgClient):
    """FedAvg's client with GLFC's losses, exemplars and prototypes.

    Args:
        memory_size: exemplars of all learned classes together.
        task_detect: whether the client is told when a task begins, or looks at the `entropy` of its predictions.
        threshold: rise of the entropy, in nats, that is taken for the start of a task.
        perturbation_steps: steps of gradient descent on a prototype's pixels.
        perturbation_rate: their size, for pixels in 0..1.
        **kwargs: settings of every client, see `Client`.
    """

    def __init__(
        self,
        memory_size: int = 2000,
        task_detect: Literal["oracle", "entropy"] = "oracle",
        threshold: float = 1.2,
        perturbation_steps: int = 50,
        perturbation_rate: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("memory_size", memory_size),
            ("threshold", threshold),
            ("perturbation_steps", perturbation_steps),
            ("perturbation_rate", perturbation_rate),
        ):
            if not value >= 0:
                raise ValueError(f"model.{name} is {value}, must not be negative")
        if self.snapshot == "local":
            raise ValueError(
                "model.snapshot is local, but GLFC shortens its lists of exemplars after that was taken; take deployed"
            )
        self.memory_size, self.task_detect, self.threshold = memory_size, task_detect, threshold
        self.perturbation_steps, self.perturbation_rate = perturbation_steps, perturbation_rate

    # ---- the start of a task

    def begin_round(self, round: Round) -> None:
        """Shorten the lists of exemplars if others are about to join them."""
        self.signal = round.task > self.memory.begun
        if self.signal:
            buffer, learned = self.memory.buffer, self._class_mask(0, self.memory.begun)
            self.memory.buffer = buffer[first_of_each(self._labels(buffer), self._per_class(learned))]
        self.gradients: dict[str, Tensor] = {}
        super().begin_round(round)

    def on_fit_start(self) -> None:
        """Look for the start of a task, which decides on the samples of this round; only now is there a device."""
        if self.task_detect == "entropy":
            received, seen = self.memory.received, self.seen_mask
            found = self.observe(self.current, lambda images: {"entropy": entropy(self._logits(images), seen)})
            now = found["entropy"].mean().reshape(1)
            self.signal = bool(now - received.get("entropy", torch.zeros(1)) > self.threshold)
            received["entropy"] = now
            if self.signal:
                received["tasks"] = torch.tensor([self.memory.learned])
            self.plan = self._plan()
            self.train()

    def _old_mask(self) -> Tensor:
        """(K,) true for the classes that the client knows it has learned."""
        if self.task_detect == "oracle":
            return self._class_mask(0, self.memory.learned)
        return self._class_mask(0, int(self.memory.received.get("tasks", torch.zeros(1))))

    def epoch(self, buffered: int, current: int) -> Tensor:
        """The exemplars of learned classes and all current images."""
        exemplars = self._old_mask()[self._labels(self.memory.buffer)].nonzero().squeeze(1)
        return torch.cat([exemplars, torch.arange(buffered, buffered + current)])

    # ---- training

    def on_train_start(self) -> None:
        """Ask the teacher about all images of this round, once for all epochs."""
        super().on_train_start()
        self.old = self._old_mask().to(self.device)
        teacher = below(self.memory.received, "latest." if self.signal else "previous.")
        self.targets = Targets(self, teacher) if teacher else None
        if self.task_detect == "entropy":
            self.log("detection/entropy", self.memory.received["entropy"])
        self.train()

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """L_GC and L_RD, and what the continual strategy adds."""
        logits, labels = output.logits.float(), batch.images.labels
        terms = {"compensation": gradient_compensation(logits, labels, self.seen_mask, self.old)}
        if self.targets is not None:
            soft = self.targets(batch.images)
            terms["relation"] = relation_distillation(logits, labels, self.seen_mask, self.old, soft)
            terms = {name: term / 2 for name, term in terms.items()}
        return {**terms, **self.continual.collaborative_losses(self._step(output, batch))}

    def on_train_end(self) -> None:
        """Herd the current images, and after a signal prepare the gradients of the prototypes."""
        features = self.observe(self.current, self._classify)["representation"]
        labels, rng = self._labels(self.current), self.rng("selection")
        ranked = []
        for label in torch.unique(labels):
            members = (labels == label).nonzero().squeeze(1)
            ranked.append(self.current[members[herding(torch.empty(0), features[members], rng)]])
        seen = self._class_mask(0, self.memory.begun)
        self.memory.candidates = torch.cat([members[: self._per_class(seen)] for members in ranked])
        if self.signal:  # the first that herding takes is the image nearest the class mean
            self.gradients = {"gradients": self._share(torch.stack([members[0] for members in ranked]))}

    def _share(self, prototypes: Tensor) -> Tensor:
        """Gradients (c, P) for c training images, perturbed."""
        pixels, labels = (tensor.to(self.device) for tensor in self.data.batch("train", prototypes))
        # Perturbed at the size that the CNN takes: the way back through a resize is not deterministic on a GPU
        images = resize(self.perturb(resize(pixels, self.cnn.image_size), labels), SIDE)
        encoder = encoding_net(self.num_classes).to(self.device)
        shared = [encoded(encoder, image[None], label[None]) for image, label in zip(images, labels, strict=True)]
        return torch.stack(shared).cpu()

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (c, 3, S, S) of labels (c,), each moved towards a lower BCE of its own."""
        for _ in range(self.perturbation_steps):
            images = images.detach().requires_grad_()
            with self.trainer.precision_plugin.forward_context():
                logits = self(images, {}).logits.float()
            loss = binary(logits, one_hot(labels, logits), self.seen_mask).sum()
            (gradient,) = torch.autograd.grad(loss, [images])
            images = images - self.perturbation_rate * gradient
        return images.detach()

    def _per_class(self, classes: Tensor) -> int:
        return self.memory_size // max(1, int(classes.sum()))

    def _logits(self, images: Images) -> Tensor:
        return self._output(images, "train").logits

    # ---- messages

    def outgoing(self) -> dict[str, Tensor]:
        """The model, and after a signal the gradients of the prototypes."""
        return {**self.shared(), **self.gradients}

    def upload_schema(self) -> Schema:
        """One gradient at most of each class."""
        length = sum(parameter.numel() for parameter in encoding_net(self.num_classes).parameters())
        gradients = TensorSpec((AtMost(self.num_classes), length), optional=True)
        return {**self.shared_schema(), "gradients": gradients}

    def download(self, message: Download) -> None:
        """Take over the model, and keep the teachers that have changed."""
        self.memory.received |= below(message.tensors, "teacher.")
        self.adopt({name: tensor for name, tensor in message.tensors.items() if not name.startswith("teacher.")})

    def download_schema(self) -> Schema:
        """The model, and perhaps either teacher."""
        model = self.shared_schema()
        teachers = {
            f"teacher.{which}.{name}": replace(spec, optional=True)
            for which in TEACHERS
            for name, spec in model.items()
        }
        return {**model, **teachers}


class Targets:
    """What a teacher says about the exemplars and the current images of a client's round.

    Args:
        client: in its fit.
        teacher: the shared tensors of the model to ask.
    """

    def __init__(self, client: GLFCClient, teacher: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.to(client.device) for name, tensor in teacher.items()}

        def ask(images: Images) -> dict[str, Tensor]:
            output: Output = torch.func.functional_call(client, tensors, (images.pixels, {}))
            return {"soft": output.logits.float().sigmoid()}

        samples = torch.cat([client.memory.buffer, client.current]).sort().values
        self.samples: NDArray[np.int64] = samples.numpy()
        self.soft = client.observe(samples, ask)["soft"].to(client.device)

    def __call__(self, images: Images) -> Tensor:
        """Its probabilities (B, K) for a batch of them."""
        return self.soft[torch.from_numpy(np.searchsorted(self.samples, images.indices)).to(self.soft.device)]


# ---- losses


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """[c = y_b], (B, K) in shape and dtype of `like`."""
    return torch.zeros_like(like).scatter_(1, labels[:, None], 1.0)


def binary(logits: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
    """The mean binary cross-entropy (B,) over some columns of logits (B, K), with targets (B, K) in 0..1."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * columns).sum(dim=1) / columns.sum()


def weights(logits: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """omega (B,): each sample's part of its group's gradient, 1 on average in each group; without gradient.

    Args:
        logits: (B, K).
        labels: (B,) class numbers.
        old: (K,) true for learned classes, whose samples are the one group; all 1 if there is none.
    """
    # sigmoid(-z) is 1 - sigmoid(z) without its rounding to 0
    size = torch.sigmoid(-logits.detach().gather(1, labels[:, None]).squeeze(1)).clamp(min=1e-30)
    learned = old[labels]
    omega = torch.ones_like(size)
    for group in (learned, ~learned):
        mean = (size * group).sum() / group.sum().clamp(min=1)
        omega = torch.where(group, size / mean, omega)
    return torch.where(old.any(), omega, 1.0)


def gradient_compensation(logits: Tensor, labels: Tensor, seen: Tensor, old: Tensor) -> Tensor:
    """L_GC, a scalar, from logits (B, K), labels (B,), and the seen and the learned classes (K,)."""
    return (weights(logits, labels, old) * binary(logits, one_hot(labels, logits), seen)).mean()


def relation_distillation(logits: Tensor, labels: Tensor, seen: Tensor, old: Tensor, soft: Tensor) -> Tensor:
    """L_RD, a scalar; as `gradient_compensation`, with the teacher's probabilities `soft` (B, K)."""
    return binary(logits, torch.where(old, soft, one_hot(labels, logits)), seen).mean()


def entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """The entropy (B,) in nats of the softmax of logits (B, K) over some classes (K,)."""
    p = logits.float().masked_fill(~classes, -torch.inf).softmax(dim=1)
    return -(p * (p + 1e-5).log()).sum(dim=1)


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` of each label in labels (n,), in their order."""
    parts = [(labels == label).nonzero().squeeze(1)[:count] for label in torch.unique(labels)]
    return torch.cat([labels[:0], *parts]).sort().values


# ---- gradients of prototypes


def encoding_net(classes: int) -> nn.Sequential:
    """The network whose gradients are shared, (B, 3, 32, 32) to (B, K): the same for everyone and in every run."""
    with seeds.seeded(0, "glfc encoding net"):
        layers: list[nn.Module] = []
        for channels, stride in ((3, 2), (12, 2), (12, 1)):
            layers += [nn.Conv2d(channels, 12, 5, stride, padding=2), nn.Sigmoid()]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(FEATURES, classes))
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def encoded(net: nn.Module, image: Tensor, label: Tensor, differentiable: bool = False) -> Tensor:
    """The gradient (P,) of the cross-entropy of an image (1, 3, 32, 32) with label (1,) in all weights of a network."""
    with torch.autocast(image.device.type, enabled=False):
        loss = F.cross_entropy(net(image), label)
        parts = torch.autograd.grad(loss, list(net.parameters()), create_graph=differentiable)
    return torch.cat([part.flatten() for part in parts])


def labels_of(gradients: Tensor, classes: int) -> Tensor:
    """The labels (n,) behind gradients (n, P): the sum over a row of the last layer is negative for the label alone."""
    last = gradients[:, -classes * (FEATURES + 1) : -classes]  # its weight, between the other layers and its bias
    return last.reshape(-1, classes, FEATURES).sum(dim=2).argmin(dim=1)


# ---- the proxy


class GLFCServer(FedAvg):
    """The uniform mean, and the proxy that keeps the best one for a teacher.

    Args:
        iterations: of L-BFGS for each gradient.
        learning_rate: of L-BFGS.
        monitors: how many of the last iterates become monitor images.
    """

    def __init__(self, iterations: int = 250, learning_rate: float = 0.1, monitors: int = 20) -> None:
        super().__init__("uniform")
        if iterations < 1:
            raise ValueError(f"server.iterations is {iterations}, must be at least 1")
        if not learning_rate > 0:
            raise ValueError(f"server.learning_rate is {learning_rate}, must be positive")
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
        return {**teachers, "monitor.images": self.images, "monitor.labels": self.labels, "best": self.best}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over all of that."""
        self.teachers = {which: below(state, f"{which}.") for which in TEACHERS}
        self.images, self.labels, self.best = state["monitor.images"], state["monitor.labels"], state["best"]

    def aggregate(
        self, uploads: Mapping[int, Upload], clients: int, round: Round, trainer: Callable[[], Trainer]
    ) -> Answers:
        """The mean for everyone, and the teachers that have changed."""
        (mean, *_) = super().aggregate(uploads, clients, round, trainer).values()
        self.metrics = {}
        changed: dict[str, Mapping[str, Tensor]] = {}
        sent = (upload.tensors.get("gradients") for upload in uploads.values())
        if pool := [gradients for gradients in sent if gradients is not None]:
            self._reconstruct(torch.cat(pool), seeds.generator(round.seed, "proxy", round.number), trainer)
            self.best = torch.zeros(1)
            if self.teachers["latest"]:
                changed["previous"] = self.teachers["latest"]
        if len(self.labels):
            score = self._score(mean, trainer)
            self.metrics["score"] = 100 * float(score)
            if score >= self.best:
                self.best, changed["latest"] = score, {name: tensor.clone() for name, tensor in mean.items()}
        self.teachers |= changed
        news = {f"teacher.{which}.{name}": t for which, model in changed.items() for name, t in model.items()}
        answer = {**mean, **news}
        return dict.fromkeys(range(clients), answer)

    def _reconstruct(self, gradients: Tensor, rng: torch.Generator, trainer: Callable[[], Trainer]) -> None:
        """Make monitor images of gradients (n, P)."""
        fit = Reconstruction(gradients, self.classes, self, rng)
        fit_once(trainer(), fit)
        images, labels = torch.cat([torch.cat(list(last)) for last in fit.last]), fit.labels.cpu()
        sound = images.flatten(1).isfinite().all(dim=1)  # L-BFGS without a line search can diverge
        self.images, self.labels = images[sound].clamp(0, 1), labels.repeat_interleave(self.monitors)[sound]
        if finite := [value for value in fit.mismatches if math.isfinite(value)]:
            self.metrics["mismatch"] = sum(finite) / len(finite)

    def _score(self, model: Mapping[str, Tensor], trainer: Callable[[], Trainer]) -> Tensor:
        """The accuracy (1,) of a model on the monitor images, in 0..1."""
        self.model.load_state_dict(dict(model))
        scoring = Scoring(self.model, self.images, self.labels)
        trainer().test(scoring, verbose=False)
        return scoring.hits.cpu().double() / len(self.labels)


class Reconstruction(LightningModule):
    """Fits images to the gradients that they left, one after another."""

    automatic_optimization = False
    gradients: Tensor
    labels: Tensor

    def __init__(self, gradients: Tensor, classes: int, settings: GLFCServer, rng: torch.Generator) -> None:
        super().__init__()
        self.settings, self.encoder = settings, encoding_net(classes)
        self.register_buffer("gradients", gradients)
        self.register_buffer("labels", labels_of(gradients, classes))
        shape = (1, 3, SIDE, SIDE)
        self.images = nn.ParameterList(torch.randn(shape, generator=rng) for _ in gradients)
        self.last: list[deque[Tensor]] = [deque(maxlen=settings.monitors) for _ in gradients]
        self.mismatches = [0.0] * len(gradients)

    def train_dataloader(self) -> range:
        """The numbers of all iterations, image after image."""
        return range(len(self.images) * self.settings.iterations)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """L-BFGS for each image, since none has a part in the curvature of another."""
        return [torch.optim.LBFGS([image], lr=self.settings.learning_rate) for image in self.images]

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One iteration for one image."""
        number = batch // self.settings.iterations
        image, wanted, label = self.images[number], self.gradients[number], self.labels[number, None]

        def closure() -> Tensor:
            mismatch = (encoded(self.encoder, image, label, differentiable=True) - wanted).square().sum()
            (image.grad,) = torch.autograd.grad(mismatch, [image])
            return mismatch.detach()

        optimizers = self.optimizers(use_pl_optimizer=False)  # in float32 whatever the Trainer's precision is
        optimizer: Any = optimizers[number] if isinstance(optimizers, list) else optimizers
        self.mismatches[number] = float(optimizer.step(closure))
        self.last[number].append(image.detach().cpu().clone())


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
