"""A client of the federation: one LightningModule, fitted once a round over a collaborative and a replay phase.

Shapes: B batch, K classes of the whole federation, m buffered samples, n samples of the current task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, ImageBatches, Images, Output, TrainingBatches, split_evenly
from fedlscl.continual import Continual, Step
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.source import Part
from fedlscl.data.splits import Split
from fedlscl.evaluation import MASKS, masked_correct
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import SELECTIONS, Memory, below, select
from fedlscl.messages import Download, Schema, TensorSpec, Upload
from fedlscl.models.cache import Lookup
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


class Client(LightningModule, ABC):
    """What the clients of all methods have in common: two phases, a buffer, state on disk, evaluation.

    A method subclasses it with its networks (`build`), its forward pass, and what travels (`shared`; where that is not
    all, `outgoing`, `download` and their schemas). The object that a configuration builds holds settings only;
    `assemble` gives it networks, and `enter` makes it one client or another, so that one object serves all clients in
    turn.

    Args:
        continual: what a round does against forgetting.
        learning_rate: of Adam, whose moments start afresh in each round.
        epochs: passes over the current task's images in each round.
        batch_size: largest batch of both phases.
        evaluation_batch_size: largest batch where nothing is trained; the larger, the more memory and, on a GPU, speed.
        gradient_clip: largest L2 norm of a step's gradient over all that is trained; a larger one is scaled down.
        train_mask: the classes that compete in the collaborative phase: of the current `task`, or all `seen` so far.
        buffer_size: M, the samples kept of each class; 0 for no buffer.
        selection: which samples those are.
        snapshot: the model whose outputs `continual` preserves: as `deployed` after the last task's last download, or
            `local`, before it.
    """

    automatic_optimization = False
    # the masks under which a test image is classified with parameters that the task it belongs to has chosen
    task_aware: ClassVar[tuple[str, ...]] = ()
    vit: FrozenViT
    precomputed: Lookup
    current_mask: Tensor  # (K,) true for the classes of the current task
    seen_mask: Tensor  # (K,) true for all classes of this client up to the current task
    task_masks: Tensor  # (tasks, K) true for the classes of each task under evaluation
    task_of_class: Tensor  # (K,) number of the task that has a class
    hits: Tensor  # (masks, tasks) correct predictions
    tested: Tensor  # (tasks,) images
    learned_mask: Tensor  # (K,) true for the classes of this client's finished tasks

    def __init__(
        self,
        continual: Continual,
        learning_rate: float = 1e-3,
        epochs: int = 5,
        batch_size: int = 16,
        evaluation_batch_size: int = 128,
        gradient_clip: float | None = None,
        train_mask: Literal["task", "seen"] = "seen",
        buffer_size: int = 20,
        selection: Literal["lowest_loss", "herding", "random"] = "lowest_loss",
        snapshot: Literal["deployed", "local"] = "deployed",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("learning_rate", learning_rate, 0.0),
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 2),  # batch normalisation cannot train on one image
            ("evaluation_batch_size", evaluation_batch_size, 1),
            ("buffer_size", buffer_size, 0),
        ):
            if not value >= least:
                raise ValueError(f"model.{name} is {value}, must be at least {least}")
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"model.gradient_clip is {gradient_clip}, must be positive, or null for none")
        if snapshot == "local" and continual.observes == "current":
            raise ValueError(
                "model.snapshot is local, but model.continual compares with outputs on images that are not there "
                "before the next task; take deployed"
            )
        self.continual = continual
        self.learning_rate, self.epochs, self.batch_size = learning_rate, epochs, batch_size
        self.evaluation_batch_size, self.gradient_clip = evaluation_batch_size, gradient_clip
        self.train_mask, self.buffer_size, self.selection = train_mask, buffer_size, selection
        self.snapshot = snapshot
        # Buffers follow the module to its device; these belong to one fit or test and to no state
        for name in ("current_mask", "seen_mask", "learned_mask", "task_masks", "task_of_class", "hits", "tested"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    # ---- what a method defines

    @abstractmethod
    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Create, or create anew, the networks that are trained, as submodules."""

    @abstractmethod
    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """Outputs for uint8 images (B, 3, H, W), given what `precompute` returned for them."""

    def check(self, split: Split) -> None:
        """Raise ValueError, before any training, if the method cannot work with this split."""

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """What of `forward` depends on nothing trained, (B, ...) each by name: computed once per image."""
        return {}

    def shared(self) -> dict[str, Tensor]:
        """The live tensors with which all clients start alike, and which then travel, by name; none by default."""
        return {}

    def outgoing(self) -> dict[str, Tensor]:
        """The tensors of an upload; the shared ones by default."""
        return self.shared()

    def upload_schema(self) -> Schema:
        """What an upload must look like."""
        return self.shared_schema()

    def download(self, message: Download) -> None:
        """Take over what the server answered: new values of the shared tensors by default."""
        self.adopt(message.tensors)

    def download_schema(self) -> Schema:
        """What a download must look like."""
        return self.shared_schema()

    # ---- identity and state

    def assemble(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> Self:
        """Build the networks. The ViT stays outside the module tree: it is shared, frozen and part of no state."""
        self.__dict__["vit"] = vit
        self.num_classes = num_classes
        self._parts = (vit, cnn, cnn_name, num_classes)
        self.build(*self._parts)
        return self

    def initial_state(self, seed: int) -> dict[str, Tensor]:
        """The state of a client that has learned nothing, its networks initialised from `seed`."""
        with seeds.seeded(seed):
            self.build(*self._parts)
        self.memory = Memory()
        return self.state()

    def state(self) -> dict[str, Tensor]:
        """Everything of this client that must survive a round, as named tensors on the CPU."""
        model = {f"model.{name}": tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return model | {f"memory.{name}": tensor for name, tensor in self.memory.to_tensors().items()}

    def enter(self, index: int, data: FederatedDataModule, precomputed: Lookup, state: Mapping[str, Tensor]) -> None:
        """Become client `index` in the state that `state` returned for it."""
        self.index, self.data, self.precomputed = index, data, precomputed
        self.load(state)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over networks and memory from what `state` returned."""
        self.load_state_dict(below(state, "model."))
        self.memory = Memory.from_tensors(below(state, "memory."))

    # ---- one round

    def begin_round(self, round: Round) -> None:
        """Get ready for `Trainer.fit` in this round."""
        before = self.memory.learned
        self.memory.begin(round.task)
        self.round = round
        self.finished = self._images_of(before, self.memory.learned)
        self.finished_mask = self._class_mask(before, self.memory.learned)
        self.learned_mask = self._class_mask(0, self.memory.learned)
        self.current, self.current_mask, self.seen_mask = self.training_set()
        self.plan = self._plan()
        self.train()

    def training_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n,) of the current task, its classes (K,), and all classes seen (K,)."""
        learned, task = self.memory.learned, self.round.task
        return self._images_of(learned, task), self._class_mask(learned, task), self._class_mask(0, task)

    def epoch(self, buffered: int, current: int) -> Tensor:
        """The samples of an epoch of the collaborative phase, as positions into the buffered and then the current ones.

        All current ones by default.
        """
        return torch.arange(buffered, buffered + current)

    def rng(self, purpose: str) -> torch.Generator:
        """A generator for what this client draws in this round."""
        return seeds.generator(self.round.seed, purpose, self.index, self.round.number)

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The passes of this round, one after another: the phase, and the samples as `epoch` gives them.

        The epochs on the current task, then those of the replay phase; a method may have phases of its own.
        """
        m = len(self.memory.buffer)
        for _ in range(self.epochs):
            yield "collaborate", self.epoch(m, len(self.current))
        for samples in self.continual.passes_over(m, self._labels(self.current), self.buffer_size, rng):
            yield "replay", samples

    def _plan(self) -> list[tuple[str, Tensor]]:
        """The steps of this round as positions into the buffered and then the current samples."""
        rng = self.rng("order")
        plan: list[tuple[str, Tensor]] = []
        for phase, samples in self.passes(rng):
            order = samples[torch.randperm(len(samples), generator=rng)]
            plan.extend((phase, part) for part in split_evenly(order, self.batch_size))
        return plan

    def train_dataloader(self) -> TrainingBatches:
        """The batches of this round, pass after pass."""
        memory, observes = self.memory, self.continual.observes
        return TrainingBatches(
            self.data, self.plan, memory.buffer, self.current, memory.snapshot, observes, self.device
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all that is trained, fresh in each round."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)

    def on_train_start(self) -> None:
        """Let `continual` keep what it needs of the finished tasks, and set the mode, which Lightning leaves alone."""
        self._place_vit()
        if len(self.finished):
            self.eval()
            self.memory.kept = self.continual.consolidate(self._trained(), self._losses(), self.memory.kept)
        nothing = self.current[:0]
        observed = {"nothing": nothing, "buffer": self.memory.buffer, "current": self.current}[self.continual.observes]
        if self.memory.learned and len(observed) and not self.memory.snapshot:
            # in place: Lightning has asked for this round's batches before, and they look it up here
            self.memory.snapshot.update(self.observe(observed, self._preserved))
        self.kept = {name: tensor.to(self.device) for name, tensor in self.memory.kept.items()}
        self.train()

    def _losses(self) -> Iterator[Tensor]:
        """The cross-entropy of each image of the tasks just finished, in random order, each with its graph."""
        classes = (self.finished_mask if self.train_mask == "task" else self.learned_mask).to(self.device)
        order = self.finished[torch.randperm(len(self.finished), generator=self.rng("consolidation"))]
        with self.trainer.precision_plugin.forward_context():
            for image in ImageBatches(self.data, "train", order, 1, self.device):
                yield masked_cross_entropy(self._output(image, "train").logits, image.labels, classes)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of manual optimization, in the phase to which the batch belongs."""
        terms = self.losses(batch)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # there is one
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        if self.gradient_clip is not None:
            if scaler := getattr(self.trainer.precision_plugin, "scaler", None):  # of 16-mixed
                scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip)
        optimizer.step()
        logged = {f"{batch.phase}/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(batch.images.labels))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms whose sum a step minimises, by name."""
        return self.phase_losses(self._output(batch.images, "train"), batch)

    def phase_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of the phase that the batch is of, by name."""
        of_phase = self.collaborative_losses if batch.phase == "collaborate" else self.replay_losses
        return of_phase(output, batch)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of stage 1 by name (Fed-LSCL, Eq. 3), and what `continual` adds."""
        cross_entropy = masked_cross_entropy(output.logits, batch.images.labels, self._training_classes())
        return {"cross_entropy": cross_entropy, **self.continual.collaborative_losses(self._step(output, batch))}

    def replay_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of stage 2 by name (Fed-LSCL, Eq. 4)."""
        return self.continual.replay_losses(self._step(output, batch))

    def _step(self, output: Output, batch: Batch) -> Step:
        return Step(
            output=output,
            labels=batch.images.labels,
            seen=self.seen_mask,
            learned=self.learned_mask,
            snapshot=batch.snapshot,
            observed=batch.observed,
            parameters=self._trained(),
            kept=self.kept,
        )

    def _trained(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def on_train_end(self) -> None:
        """Choose the current samples that would enter the buffer now (Fed-LSCL, section 4.3.2)."""
        if self.buffer_size == 0:
            return
        outputs = self.observe(self.current, self._classify)
        labels = self._labels(self.current)
        losses = masked_cross_entropy(outputs["logits"], labels, self._training_classes().cpu(), reduction="none")
        ranking = SELECTIONS[self.selection]
        chosen = select(ranking, losses, outputs["representation"], labels, self.buffer_size, self.rng("selection"))
        self.memory.candidates = self.current[chosen]
        if self.snapshot == "local" and self.continual.observes == "buffer":
            self.memory.upcoming = self.observe(self.remembered, self._preserved)

    @property
    def remembered(self) -> Tensor:
        """Indices of the training images in the buffer, and of those that would enter it now."""
        return torch.cat([self.memory.buffer, self.memory.candidates])

    def observe(self, indices: Tensor, compute: Callable[[Images], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Outputs of `compute` on training images during a fit: evaluation mode, float32, on the CPU."""
        self.eval()
        parts = []
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for images in ImageBatches(self.data, "train", indices, self.evaluation_batch_size, self.device):
                parts.append(compute(images))
        return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}

    # ---- messages

    def upload(self) -> Upload:
        """What the server gets of this round."""
        return Upload(self.index, self.memory.begun, self.round.number, len(self.current), self.outgoing())

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the shared tensors."""
        shared = self.shared()
        with torch.no_grad():
            for name, tensor in tensors.items():
                shared[name].copy_(tensor)

    def shared_schema(self) -> Schema:
        """What the shared tensors look like."""
        return {name: TensorSpec.like(tensor) for name, tensor in self.shared().items()}

    # ---- evaluation

    def begin_evaluation(self, task: int) -> None:
        """Get ready for `Trainer.test` on the test images of tasks 1 to `task`."""
        tasks = self.data.split.clients[self.index].tasks[:task]
        self.test_images = torch.cat([torch.as_tensor(part.test) for part in tasks])
        self.task_masks = torch.stack([self._class_mask(number, number + 1) for number in range(task)])
        self.task_of_class = self.task_masks.int().argmax(dim=0)
        self.seen_mask = self._class_mask(0, task)
        self.hits, self.tested = torch.zeros(len(MASKS), task), torch.zeros(task)

    def test_dataloader(self) -> ImageBatches:
        """Test images of all tasks up to the one that evaluation began with."""
        part, size = self.data.split.evaluate_on, self.evaluation_batch_size
        return ImageBatches(self.data, part, self.test_images, size, self.device)

    def on_test_start(self) -> None:
        """Put the frozen model where the client is."""
        self._place_vit()
        self.eval()

    def test_step(self, batch: Images, batch_idx: int) -> None:
        """Count the hits in each task under each mask."""
        tasks = self.task_of_class[batch.labels]
        logits = self.test_logits(batch, tasks)
        hits = masked_correct(logits, batch.labels, self.task_masks[tasks], self.seen_mask)
        # not index_add_, which on a GPU would wait for the indices to be checked
        of_task = tasks.unsqueeze(1) == torch.arange(len(self.tested), device=tasks.device)
        self.tested += of_task.sum(dim=0)
        self.hits += (torch.stack([hits[mask] for mask in MASKS]).unsqueeze(2) & of_task).sum(dim=1)

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        """Logits (B, K) for test images.

        Args:
            batch: the images.
            tasks: (B,) number of the task that each image's class belongs to, from 0. What follows from it must not
                count under a mask that is not in `task_aware`.
        """
        return self._output(batch, self.data.split.evaluate_on).logits

    def accuracy(self) -> dict[str, list[float]]:
        """For each mask the accuracy in % on every task that was tested last."""
        percent = 100 * self.hits.double() / self.tested.double()
        return dict(zip(MASKS, percent.tolist(), strict=True))

    # ---- helpers

    def _place_vit(self) -> None:
        """Put the frozen model where the client is, which moves it once in a run."""
        if self.vit.mean.device != self.device:
            self.vit.to(self.device)

    def _class_mask(self, first: int, last: int) -> Tensor:
        """(K,) true for this client's classes of the tasks numbered `first` + 1 to `last`."""
        mask = torch.zeros(self.num_classes, dtype=torch.bool)
        for part in self.data.split.clients[self.index].tasks[first:last]:
            mask[list(part.classes)] = True
        return mask

    def _images_of(self, first: int, last: int) -> Tensor:
        """(n,) this client's training images of the tasks numbered `first` + 1 to `last`."""
        tasks = self.data.split.clients[self.index].tasks[first:last]
        return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.as_tensor(part.train) for part in tasks)])

    def _output(self, images: Images, part: Part) -> Output:
        output: Output = self(images.pixels, self.precomputed(part, images.indices, self.device))
        return output

    def _preserved(self, images: Images) -> dict[str, Tensor]:
        return self.continual.preserved(self._output(images, "train"))

    def _classify(self, images: Images) -> dict[str, Tensor]:
        output = self._output(images, "train")
        return {"logits": output.logits, "representation": output.representation}

    def _training_classes(self) -> Tensor:
        return self.current_mask if self.train_mask == "task" else self.seen_mask

    def _labels(self, indices: Tensor) -> Tensor:
        return torch.as_tensor(self.data.dataset.train.labels[indices.numpy()])
