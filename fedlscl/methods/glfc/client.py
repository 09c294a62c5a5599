"""GLFC's client: exemplars, the start of a task, prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl import checks
from fedlscl.batches import Batch, Images, Output, make_plan
from fedlscl.memory import below, herding
from fedlscl.messages import AtMost, Download, Schema, TensorSpec, schema_of
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.glfc.gradients import SIDE, encoded, encoding_net
from fedlscl.methods.glfc.losses import binary, entropy, gradient_compensation, one_hot, relation_distillation
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
            buffer, learned = self.memory.buffer, self.data.class_mask(0, self.memory.begun)
            self.memory.buffer = buffer[first_of_each(self.data.labels(buffer), self._per_class(learned))]
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
            rng = self.rng("order")  # as if the round had begun with this
            self.plan = make_plan(self.passes(rng), self.batch_size, rng)
            self.train()

    def _old_mask(self) -> Tensor:
        """(K,) true for the classes that the client knows it has learned."""
        if self.task_detect == "oracle":
            return self.data.class_mask(0, self.memory.learned)
        return self.data.class_mask(0, int(self.memory.received.get("tasks", torch.zeros(1))))

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
        return {**terms, **self.continual.collaborative_losses(self.step_of(output, batch))}

    def on_train_end(self) -> None:
        """Herd the current images, and after a signal prepare the gradients of the prototypes."""
        features = self.observe(self.current)["representation"]
        labels, rng = self.data.labels(self.current), self.rng("selection")
        ranked = []
        for label in torch.unique(labels):
            members = (labels == label).nonzero().squeeze(1)
            ranked.append(self.current[members[herding(torch.empty(0), features[members], rng)]])
        seen = self.data.class_mask(0, self.memory.begun)
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
        return self.output(images).logits

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


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` of each label in labels (n,), in their order."""
    parts = [(labels == label).nonzero().squeeze(1)[:count] for label in torch.unique(labels)]
    return torch.cat([labels[:0], *parts]).sort().values
