"""GLFC's client: exemplars, the start of a task, prototypes, and the losses."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl import checks
from fedlscl.batches import Batch, Images, Output
from fedlscl.memory import above, below, herding, ranked
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, optional, schema_of
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.glfc.gradients import SIDE, encoded, encoding_net
from fedlscl.models.create import resize
from fedlscl.schedule import Round

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

    uncapturable = "it looks up what the teacher said of these very images"

    required = (("snapshot", "deployed"),)  # the lists of exemplars are shortened after a local one was taken
    unaugmented = "the teacher was asked once about"
    soft: Tensor  # (n, K) what the teacher says of the samples `asked` about, (n,) ascending; empty without a teacher

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
        checks.at_least(0, "model", memory_size=memory_size, threshold=threshold)
        checks.at_least(0, "model", perturbation_steps=perturbation_steps, perturbation_rate=perturbation_rate)
        self.memory_size, self.task_detect, self.threshold = memory_size, task_detect, threshold
        self.perturbation_steps, self.perturbation_rate = perturbation_steps, perturbation_rate

    def images_kept(self, classes: int, exchanged: bool) -> int | None:
        """An equal share of `memory_size`."""
        return self.memory_size // classes

    # ---- the start of a task

    def begin_round(self, round: Round) -> None:
        """Shorten the lists of exemplars if others are about to join them."""
        self.signal = round.task > self.memory.begun
        if self.signal:
            buffer = self.memory.buffer
            self.memory.buffer = buffer[first_of_each(self.data.labels(buffer), self._per_class())]
        super().begin_round(round)

    def on_fit_start(self) -> None:
        """Look for the start of a task, which decides on the samples of this round; only now is there a device."""
        if self.task_detect == "entropy":
            received, seen = self.memory.received, self.seen_mask
            found = self.observe(self.current, lambda images: {"entropy": entropy(self.output(images).logits, seen)})
            now = found["entropy"].mean().reshape(1)
            self.signal = bool(now - received.get("entropy", torch.zeros(1)) > self.threshold)
            received["entropy"] = now
            if self.signal:
                received["tasks"] = torch.tensor([self.memory.learned])
            self.draw_plan()  # as if the round had begun with this
            self.train()

    def _old_mask(self) -> Tensor:
        """(K,) true for the classes that the client knows it has learned."""
        noticed = int(self.memory.received.get("tasks", torch.zeros(1)))
        return self.data.class_mask(0, {"oracle": self.memory.learned, "entropy": noticed}[self.task_detect])

    def epoch(self, buffered: int, current: int) -> Tensor:
        """The exemplars of learned classes and all current images."""
        exemplars = self._old_mask()[self.data.labels(self.memory.buffer)].nonzero().squeeze(1)
        return torch.cat([exemplars, torch.arange(buffered, buffered + current)])

    # ---- training

    def on_train_start(self) -> None:
        """Ask the teacher about all images of this round, once for all epochs."""
        super().on_train_start()
        self.old = self._old_mask().to(self.device)
        teacher = below(self.memory.received, "latest." if self.signal else "previous.")
        tensors = {name: tensor.to(self.device) for name, tensor in teacher.items()}

        def probabilities(images: Images) -> dict[str, Tensor]:
            return {"soft": torch.func.functional_call(self, tensors, (images.pixels, {})).logits.float().sigmoid()}

        self.asked = torch.cat([self.memory.buffer, self.current]).sort().values
        self.soft = self.observe(self.asked, probabilities)["soft"].to(self.device) if teacher else torch.empty(0)
        if self.task_detect == "entropy":
            self.log("detection/entropy", self.memory.received["entropy"])
        self.train()

    def targets(self, images: Images) -> Tensor:
        """The teacher's probabilities (B, K) for some of the samples that it was asked about."""
        return self.soft[torch.searchsorted(self.asked, torch.from_numpy(images.indices)).to(self.device)]

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """L_GC and L_RD, and what the continual strategy adds."""
        logits, labels, masks = output.logits.float(), batch.images.labels, (self.seen_mask, self.old)
        terms = {"compensation": gradient_compensation(logits, labels, *masks)}
        if len(self.soft):
            terms["relation"] = relation_distillation(logits, labels, *masks, self.targets(batch.images))
            terms = {name: term / 2 for name, term in terms.items()}
        return {**terms, **self.continual.collaborative_losses(self.step_of(output, batch))}

    def on_train_end(self) -> None:
        """Herd the current images, and after a signal prepare the gradients of the prototypes."""
        features, labels = self.observe(self.current)["representation"], self.data.labels(self.current)
        no_losses = torch.zeros(len(labels))  # herding asks for none
        herded = [self.current[rows] for rows in ranked(herding, no_losses, features, labels, self.rng("selection"))]
        self.memory.candidates = torch.cat([members[: self._per_class()] for members in herded])
        # the first that herding takes is the image nearest the class mean
        prototypes = torch.stack([members[0] for members in herded])
        self.gradients = {"gradients": self._share(prototypes)} if self.signal else {}

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

    def _per_class(self) -> int:
        """How many exemplars of each class are kept, by the number of classes begun."""
        return self.memory_size // max(1, int(self.data.class_mask(0, self.memory.begun).sum()))

    # ---- messages

    def outgoing(self) -> dict[str, Tensor]:
        """The model, and after a signal the gradients of the prototypes."""
        return {**self.shared(), **self.gradients}

    def upload_schema(self) -> Schema:
        """One gradient at most of each class."""
        length = sum(parameter.numel() for parameter in encoding_net(self.num_classes).parameters())
        gradients = TensorSpec((AtMost(self.num_classes), length), optional=True)
        return {**schema_of(self.shared()), "gradients": gradients}

    def download(self, message: Download) -> None:
        """Take over the model, and keep the teachers that have changed."""
        self.memory.received |= below(message.tensors, "teacher.")
        self.adopt({name: tensor for name, tensor in message.tensors.items() if not name.startswith("teacher.")})

    def download_schema(self) -> Schema:
        """The model, and perhaps either teacher."""
        model = schema_of(self.shared())
        latest, previous = (above(optional(model), f"teacher.{which}.") for which in TEACHERS)
        return {**model, **latest, **previous}


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` of each label in labels (n,), in their order."""
    parts = [(labels == label).nonzero().squeeze(1)[:count] for label in torch.unique(labels)]
    return torch.cat([labels[:0], *parts]).sort().values


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
    of_learned, of_new = ((size * group).sum() / group.sum().clamp(min=1) for group in (learned, ~learned))
    return torch.where(old.any(), size / torch.where(learned, of_learned, of_new), 1.0)


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
