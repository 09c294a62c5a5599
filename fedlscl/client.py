"""A client of the federation: one LightningModule, fitted once a round over a collaborative and a replay phase.

Shapes: B batch, K classes of the whole federation, m buffered samples, n samples of the current task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.batches import Batch, ImageBatches, Output, TrainingBatches, make_plan
from fedlscl.checks import at_least
from fedlscl.client_inference import InferenceClient
from fedlscl.continual import Continual, Step
from fedlscl.losses import masked_cross_entropy
from fedlscl.memory import SELECTIONS, select
from fedlscl.messages import Upload
from fedlscl.privacy import Privacy
from fedlscl.schedule import Round

TALLIES = 64
"""How many numbers of its steps a fit can note."""


class Client(InferenceClient):
    """What the clients of all methods have in common: two phases and a buffer.

    A method subclasses it with its networks (`build`), its forward pass, and what travels (`shared`; where that is not
    all, `outgoing`, `download` and their schemas), see `ClientModel`.

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
        augment: `crop_flip` shows each training image as a random crop, moved by up to an eighth of its size with black
            around, and flipped in half of the cases; null as it is. Test images, and what is measured between steps,
            stay as they are, and so do images that `continual` compares with outputs kept of them. What a frozen model
            makes of an image is then computed in every step and not once.
        privacy: differential privacy of what is sent, for heads in closed form alone; null for none.
    """

    automatic_optimization = False
    # settings of which the method allows one value, or some: the name, and the words or the classes of the object
    required: ClassVar[tuple[tuple[str, str | type | tuple[str | type, ...]], ...]] = ()
    # why training images must be shown as they are, if they must
    unaugmented: ClassVar[str] = ""
    # why noise on what is sent would protect nobody
    unprotected: ClassVar[str] = (
        "sends what depends on parameters that it trains on the images in steps without noise, so that noise on sums "
        "of it protects nobody; that takes DP-SGD, which is not there, and gives a linear head far less accuracy than "
        "the closed form has at the same epsilon (docs/privacy.md)"
    )
    # whether all that it sends of a task's images goes out in the first round in which it sends any, and nothing after
    sends_once: ClassVar[bool] = False
    # why the training step does more than what can be recorded on a GPU and repeated, if it does: it looks at which
    # images those of a batch are, draws from a generator of its own, or waits for a number
    uncapturable: ClassVar[str] = ""
    current_mask: Tensor  # (K,) true for the classes of the current task
    learned_mask: Tensor  # (K,) true for the classes of this client's finished tasks
    competing_mask: Tensor  # (K,) true for the classes that compete in the collaborative phase, see `train_mask`

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
        augment: Literal["crop_flip"] | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        super().__init__()
        at_least(0, "model", learning_rate=learning_rate, buffer_size=buffer_size)
        at_least(1, "model", epochs=epochs, evaluation_batch_size=evaluation_batch_size)
        at_least(2, "model", batch_size=batch_size)  # batch normalisation cannot train on one image
        if gradient_clip is not None and not gradient_clip > 0:
            raise ValueError(f"model.gradient_clip is {gradient_clip}, must be positive, or null for none")
        if snapshot == "local" and continual.observes == "current":
            raise ValueError(
                "model.snapshot is local, but model.continual compares with outputs on images that are not there "
                "before the next task; take deployed"
            )
        compared = "model.continual compares with outputs kept of" if continual.observes == "current" else ""
        if augment is not None and (why := self.unaugmented or compared):
            raise ValueError(f"model.augment is {augment}, but {why} the images as they are; take null")
        if privacy is not None and self.unprotected:
            raise ValueError(
                f"model.privacy is set, but {type(self).__name__} {self.unprotected}; leave it out, or take "
                "StatisticsClient with the head Ridge or ClassMeans"
            )
        self.continual, self.privacy = continual, privacy
        self.learning_rate, self.epochs, self.batch_size = learning_rate, epochs, batch_size
        self.evaluation_batch_size, self.gradient_clip = evaluation_batch_size, gradient_clip
        self.train_mask, self.buffer_size, self.selection = train_mask, buffer_size, selection
        self.snapshot, self.augment = snapshot, augment
        for name, wanted in self.required:
            value = getattr(self, name)
            found = value if isinstance(value, str) else type(value)
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            if found not in allowed:
                given, *right = (one.__name__ if isinstance(one, type) else one for one in (found, *allowed))
                raise ValueError(f"model.{name} is {given}, must be {' or '.join(right)} for {type(self).__name__}")
        # Buffers follow the module to its device; these belong to one fit or test and to no state
        for name in ("current_mask", "seen_mask", "learned_mask", "competing_mask"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def images_kept(self, classes: int, exchanged: bool) -> int | None:
        """How many training images of each class, at most, a client keeps after their task, to train or answer with.

        A method with a use of its own for the buffer says so here; by default the continual strategy decides.

        Args:
            classes: all classes of a client.
            exchanged: whether the server takes uploads.

        Returns:
            M or 0; None where the question has no meaning, as for a client that sees all images all the time.
        """
        replayed = self.continual.passes_over(1, torch.zeros(1, dtype=torch.int64), 1, torch.Generator())
        return self.buffer_size if replayed else 0

    # ---- one round

    @classmethod
    def sends_images(cls, round: Round) -> bool:
        """Whether what a client sends in a round is of its images, so that the server counts them as sent."""
        return True

    @property
    def behind(self) -> int:
        """The last task whose images were behind what was sent before, by default the last one learned."""
        return self.memory.learned

    def begin_round(self, round: Round) -> None:
        """Get ready for `Trainer.fit` in this round."""
        before = self.memory.learned
        self.memory.begin(round.task)
        self.round = round
        self.finished = self.data.train_images(before, self.memory.learned)
        self.finished_mask = self.data.class_mask(before, self.memory.learned)
        self.learned_mask = self.data.class_mask(0, self.memory.learned)
        self.current, self.current_mask, self.seen_mask = self.training_set()
        self.competing_mask = self.current_mask if self.train_mask == "task" else self.seen_mask
        self.draw_plan()
        self.train()

    def draw_plan(self) -> None:
        """Lay down the steps of this round: the samples of each pass, in random order."""
        rng = self.rng("order")
        self.plan = make_plan(self.passes(rng), self.batch_size, rng)

    def training_set(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n,) of the current task, its classes (K,), and all classes seen (K,)."""
        learned, task = self.memory.learned, self.round.task
        images = self.data.train_images(self.behind, task)
        return images, self.data.class_mask(learned, task), self.data.class_mask(0, task)

    def rng(self, purpose: str) -> torch.Generator:
        """A generator for what this client draws in this round."""
        return seeds.generator(self.round.seed, purpose, self.index, self.round.number)

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The passes of this round, one after another.

        The epochs on the current task, then those of the replay phase; a method may have phases of its own.

        Yields:
            The phase, and the samples as positions into the m buffered and then the n current ones.
        """
        m = len(self.memory.buffer)
        for _ in range(self.epochs):
            yield "collaborate", self.epoch(m, len(self.current))
        for samples in self.continual.passes_over(m, self.data.labels(self.current), self.buffer_size, rng):
            yield "replay", samples

    def epoch(self, buffered: int, current: int) -> Tensor:
        """The samples of an epoch of the collaborative phase, as in `passes`; all current ones by default."""
        return torch.arange(buffered, buffered + current)

    def train_dataloader(self) -> TrainingBatches:
        """The batches of this round, pass after pass."""
        rng = None if self.augment is None else self.rng("augment")
        observes = self.continual.observes
        return TrainingBatches(self.data, self.plan, self.memory, self.current, observes, self.device, rng)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all that is trained, fresh in each round."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)

    def on_train_start(self) -> None:
        """Let `continual` keep what it needs of the finished tasks, and set the mode, which Lightning leaves alone."""
        self.follow()
        memory = self.memory
        if len(self.finished):
            self.eval()
            parameters = dict(self.named_parameters())
            memory.kept = self.continual.consolidate(parameters, self._finished_losses(), memory.kept)
        nothing = self.current[:0]
        observed = {"nothing": nothing, "buffer": memory.buffer, "current": self.current}[self.continual.observes]
        if memory.learned and len(observed) and not memory.snapshot:
            memory.snapshot = self.observe(observed, lambda images: self.continual.preserved(self.output(images)))
        self.kept = {name: tensor.to(self.device) for name, tensor in memory.kept.items()}
        self._tallies = torch.zeros(2, TALLIES, device=self.device)  # weighted sums, and the sums of the weights
        self._columns: dict[tuple[str, ...], slice] = {}
        self.train()

    def _finished_losses(self) -> Iterator[Tensor]:
        """The cross-entropy of each image of the tasks just finished, in random order, each with its graph."""
        classes = (self.finished_mask if self.train_mask == "task" else self.learned_mask).to(self.device)
        order = self.finished[torch.randperm(len(self.finished), generator=self.rng("consolidation"))]
        with self.trainer.precision_plugin.forward_context():
            for image in ImageBatches(self.data, "train", order, 1, self.device):
                yield masked_cross_entropy(self.output(image).logits, image.labels, classes)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Look up what the frozen model makes of the images of a training step; all else is on the device already."""
        if not isinstance(batch, Batch):
            return batch
        with self.trainer.precision_plugin.forward_context():
            return batch._replace(images=batch.images._replace(frozen=self.frozen(batch.images)))

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
        self.tally({f"{batch.phase}/{name}": term for name, term in terms.items()}, len(batch.images.labels))

    def tally(self, values: Mapping[str, Tensor], weight: int = 1) -> None:
        """Note numbers of a training step, scalars by name; their weighted means are logged when the fit ends.

        Unlike `log` it does the same in every step, in one place of the device's memory, and so can be recorded.

        Raises:
            ValueError: for more names in a fit than there is room for.
        """
        names = tuple(values)
        if names not in self._columns:
            start = sum(map(len, self._columns))
            if start + len(names) > TALLIES:
                raise ValueError(f"a fit notes {start + len(names)} numbers, there is room for {TALLIES}")
            self._columns[names] = slice(start, start + len(names))
        new = torch.stack([value.detach().float() for value in values.values()]) * weight
        self._tallies[:, self._columns[names]] += torch.stack([new, torch.full_like(new, weight)])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms whose sum a step minimises, by name."""
        return self.phase_losses(self.output(batch.images), batch)

    def phase_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of the phase that the batch is of, by name."""
        of_phase = self.collaborative_losses if batch.phase == "collaborate" else self.replay_losses
        return of_phase(output, batch)

    def collaborative_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of stage 1 by name (Fed-LSCL, Eq. 3), and what `continual` adds."""
        cross_entropy = masked_cross_entropy(output.logits, batch.images.labels, self.competing_mask)
        return {"cross_entropy": cross_entropy, **self.continual.collaborative_losses(self.step_of(output, batch))}

    def replay_losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of stage 2 by name (Fed-LSCL, Eq. 4)."""
        return self.continual.replay_losses(self.step_of(output, batch))

    def step_of(self, output: Output, batch: Batch) -> Step:
        """What the continual strategy sees of a training step."""
        return Step(
            output=output,
            labels=batch.images.labels,
            seen=self.seen_mask,
            learned=self.learned_mask,
            snapshot=batch.snapshot,
            observed=batch.observed,
            parameters=dict(self.named_parameters()),
            kept=self.kept,
        )

    def diagnose(self) -> dict[str, float]:
        """What is to be known of the model as this round's training leaves it, by name, for the record alone.

        Nothing by default. `observe` may be called here; nothing may be changed, and what is drawn comes from `rng`.
        """
        return {}

    def on_train_epoch_end(self) -> None:
        """Log what was tallied, and what `diagnose` finds: the last hook in which Lightning lets a model log."""
        sums: dict[str, Tensor] = {}
        for names, columns in self._columns.items():
            for name, tally in zip(names, self._tallies[:, columns].unbind(1), strict=True):
                sums[name] = sums[name] + tally if name in sums else tally
        self.log_dict({name: total / weight for name, (total, weight) in sums.items()})
        if found := self.diagnose():
            self.log_dict(found)
            self.train()

    def on_train_end(self) -> None:
        """Choose the current samples that would enter the buffer now (Fed-LSCL, section 4.3.2)."""
        if self.buffer_size == 0:
            return
        outputs, labels = self.observe(self.current), self.data.labels(self.current)
        losses = masked_cross_entropy(outputs["logits"], labels, self.competing_mask.cpu(), reduction="none")
        ranking = SELECTIONS[self.selection]
        chosen = select(ranking, losses, outputs["representation"], labels, self.buffer_size, self.rng("selection"))
        self.memory.candidates = self.current[chosen]
        if self.snapshot == "local" and self.continual.observes == "buffer":
            remembered = self.memory.remembered
            self.memory.upcoming = self.observe(remembered, lambda x: self.continual.preserved(self.output(x)))

    def upload(self) -> Upload:
        """What the server is to get of this round, before noise."""
        return Upload(self.index, self.memory.begun, self.round.number, len(self.current), self.outgoing())

    def protected_upload(self) -> Upload:
        """What leaves the client where the server sees each upload."""
        upload = self.upload()
        return replace(upload, tensors=self.protected(upload.tensors, 1))

    def protected(self, tensors: Mapping[str, Tensor], clients: int) -> Mapping[str, Tensor]:
        """Tensors that are sent, or added up, as they may leave the client: with noise where `privacy` is set.

        Args:
            tensors: as they are.
            clients: so many clients' noise together is enough, since what leaves them is seen as a sum alone.
        """
        return tensors
