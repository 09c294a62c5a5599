"""What a training step is given and what a model gives back, and the batches of a client's round.

Shapes: B batch, K classes of the whole federation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.data.augmentation import crop_flip, draw
from fedlscl.data.device import CPU, send
from fedlscl.data.local import LocalData
from fedlscl.data.source import Part
from fedlscl.memory import Memory, above, below


class Output(NamedTuple):
    """What a client computes for a batch of images."""

    logits: Tensor  # (B, K)
    representation: Tensor  # (B, d), what the head sees
    generated: Mapping[str, Tensor] = {}  # by name what Eq. 4 keeps in place: features (B, e), weights (B, P)


class Images(NamedTuple):
    """Some images of the data set, on the client's device, with their places in it."""

    indices: NDArray[np.int64]  # (B,); an array, which stays on the CPU when the tensors go to a device
    pixels: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,)
    frozen: Mapping[str, Tensor] | None = None  # (B, ...) by name what `precompute` gives, where that is there already


class Augmented(Images):
    """Images of which some are shown otherwise than they are, so that no cache knows them."""

    __slots__ = ()


class Batch(NamedTuple):
    """One training step's samples."""

    phase: str
    images: Images
    snapshot: dict[str, Tensor]  # (B, ...) each, arbitrary where not observed
    observed: Tensor  # (B,) 1.0 for samples with a row in the snapshot

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is on the device, by name."""
        own = {"pixels": self.images.pixels, "labels": self.images.labels, "observed": self.observed}
        return {**own, **above(self.images.frozen or {}, "frozen."), **above(self.snapshot, "snapshot.")}

    @classmethod
    def of(cls, phase: str, tensors: Mapping[str, Tensor]) -> Batch:
        """The reverse of `tensors`, for images of which nobody knows which they are."""
        nowhere = np.full(len(tensors["labels"]), -1)
        images = Images(nowhere, tensors["pixels"], tensors["labels"], below(tensors, "frozen."))
        return cls(phase, images, below(tensors, "snapshot."), tensors["observed"])


class TrainingBatches:
    """The batches of one client's round, in the order of its plan.

    Args:
        data: where the images are.
        plan: the phase of each step, and its samples as positions into the buffered and then the current ones.
        memory: its buffer, and its snapshot as it is when the round's first batch is asked for.
        current: (n,) indices of the training images of the current task.
        observes: which images the snapshot is of, see `Continual`.
        device: where the batches are wanted.
        augment: for random crops and flips, which are drawn batch by batch; None shows the images as they are. An
            image that is compared with the snapshot, which is of the image as it is, is always shown so.
    """

    def __init__(
        self,
        data: LocalData,
        plan: Sequence[tuple[str, Tensor]],
        memory: Memory,
        current: Tensor,
        observes: str,
        device: torch.device,
        augment: torch.Generator | None = None,
    ) -> None:
        self.data, self.plan, self.memory, self.current = data, plan, memory, current
        self.observes, self.device, self.augment = observes, device, augment

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        memory, device = self.memory, self.device
        samples = torch.cat([memory.buffer, self.current])
        sizes = [len(positions) for _, positions in self.plan]
        rows = torch.cat([positions for _, positions in self.plan])
        rows = rows if self.observes == "buffer" else rows - len(memory.buffer)
        there = (rows >= 0) & (rows < len(next(iter(memory.snapshot.values()), ())))
        # sent once for all steps, and looked up where these run
        snapshot = {name: outputs.to(device) for name, outputs in memory.snapshot.items()}
        looked_up = (torch.split(send(t, device), sizes) for t in (torch.where(there, rows, 0), there.float()))
        for (phase, positions), row, observed in zip(self.plan, *looked_up, strict=True):
            images = gather(self.data, "train", samples[positions], device)
            compared: dict[str, Tensor] = {}
            if snapshot and (phase == "replay") == (self.observes == "buffer"):
                compared = {name: outputs[row] for name, outputs in snapshot.items()}
            else:
                observed = torch.zeros_like(observed)
            if self.augment is not None:
                images = augmented(images, observed > 0, self.augment)
            yield Batch(phase, images, compared, observed)


class ImageBatches:
    """Images and labels of some samples in their order, on a device."""

    def __init__(
        self, data: LocalData, part: Part, indices: Tensor, batch_size: int, device: torch.device = CPU
    ) -> None:
        self.data, self.part, self.device = data, part, device
        self.batches = torch.split(indices, batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Images]:
        for indices in self.batches:
            yield gather(self.data, self.part, indices, self.device)


def augmented(images: Images, kept: Tensor, rng: torch.Generator) -> Images:
    """Some images cropped and flipped at random, but for those to be kept (B,) as they are."""
    pixels = images.pixels
    changed = crop_flip(pixels, *draw((pixels.shape[2], pixels.shape[3]), len(pixels), rng))
    shown = torch.where(kept[:, None, None, None], pixels, changed)
    return Augmented(images.indices, shown, images.labels)


def gather(data: LocalData, part: Part, indices: Tensor, device: torch.device) -> Images:
    """Images of one part by their indices (B,), on a device."""
    return Images(indices.numpy(), *data.batch(part, indices, device))


def split_evenly(order: Tensor, largest: int) -> tuple[Tensor, ...]:
    """Parts of nearly equal size, none of a single image if there are more: batch normalisation refuses that."""
    return order.tensor_split(max(1, min(-(-len(order) // largest), len(order) // 2)))


def make_plan(passes: Iterable[tuple[str, Tensor]], batch_size: int, rng: torch.Generator) -> list[tuple[str, Tensor]]:
    """The steps of some passes, one after another: the phase of each, and its samples in random order.

    Args:
        passes: the phase of each pass, and its samples; drawn from one by one, before `rng` orders the samples.
        batch_size: largest number of samples in a step.
        rng: for the order.
    """
    plan: list[tuple[str, Tensor]] = []
    for phase, samples in passes:
        order = samples[torch.randperm(len(samples), generator=rng)]
        plan.extend((phase, part) for part in split_evenly(order, batch_size))
    return plan
