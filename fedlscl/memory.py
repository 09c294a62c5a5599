"""What a client remembers: samples for replay, class-balanced and at most M of each class, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
Ranking = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def lowest_loss(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples of one class from the lowest cross-entropy upwards (Fed-LSCL, section 4.3.2).

    Args:
        losses: (n,) cross-entropy of each sample.
        features: (n, d), unused here.
        rng: unused here.

    Returns:
        (n,) positions, the first to keep first; ties keep their order.
    """
    return torch.argsort(losses, stable=True)


def herding(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples in the order in which their running mean follows the class mean best (iCaRL), none twice."""
    x = F.normalize(features.double(), dim=1)
    mean, total = x.mean(dim=0), torch.zeros_like(x[0])
    free = torch.ones(len(x), dtype=torch.bool)
    order = []
    for count in range(1, len(x) + 1):
        distance = (mean - (total + x) / count).norm(dim=1).masked_fill(~free, torch.inf)
        best = int(distance.argmin())
        order.append(best)
        free[best] = False
        total = total + x[best]
    return torch.tensor(order)


def random(losses: Tensor, features: Tensor, rng: torch.Generator) -> Tensor:
    """Samples in random order."""
    return torch.randperm(len(losses), generator=rng)


SELECTIONS: dict[str, Ranking] = {"lowest_loss": lowest_loss, "herding": herding, "random": random}


def select(
    ranking: Ranking, losses: Tensor, features: Tensor, labels: Tensor, per_class: int, rng: torch.Generator
) -> Tensor:
    """The `per_class` first samples of every class under `ranking`, or all of a class that has fewer; see `ranked`.

    Returns:
        (at most M x classes,) positions into the n samples, ascending.
    """
    return torch.cat([one[:per_class] for one in ranked(ranking, losses, features, labels, rng)]).sort().values


def ranked(
    ranking: Ranking, losses: Tensor, features: Tensor, labels: Tensor, rng: torch.Generator
) -> Iterator[Tensor]:
    """The samples of every class in the order of `ranking`, class by class, ascending.

    Args:
        ranking: one of `SELECTIONS`.
        losses: (n,) cross-entropy of each sample.
        features: (n, d) representation of each sample.
        labels: (n,) class numbers.
        rng: for rankings that draw.

    Yields:
        (samples of the class,) positions into the n samples.
    """
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().squeeze(1)
        yield members[ranking(losses[members], features[members], rng)]


def _no_samples() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


class Archive(dict[int, dict[str, Tensor]]):
    """What finished tasks leave behind for a method: named tensors by the number of the task that was learned last."""

    def keep(self, task: int, tensors: Mapping[str, Tensor]) -> None:
        """Put copies of tensors in the archive under `task`, which need not have been the only one since the last."""
        self[task] = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def to(self, device: torch.device) -> None:
        """Move all tensors to a device."""
        for task, tensors in self.items():
            self[task] = {name: tensor.to(device) for name, tensor in tensors.items()}

    def stacked(self, name: str, like: Tensor) -> Tensor:
        """(tasks, ...) the tensors of one name, which are shaped like another, in the order of the tasks."""
        return torch.cat([like.new_zeros(0, *like.shape), *(tensors[name][None] for tensors in self.values())])

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors on the CPU."""
        return {f"{task}.{name}": tensor.cpu() for task, one in self.items() for name, tensor in one.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Archive:
        """The reverse of `to_tensors`."""
        archive = cls()
        for key, tensor in tensors.items():
            task, name = key.split(".", 1)
            archive.setdefault(int(task), {})[name] = tensor
        return cls(sorted(archive.items()))


_GROUPS = ("snapshot", "upcoming", "kept", "received")


@dataclass
class Memory:
    """What a client keeps between rounds besides its networks.

    A task counts as learned once its samples are in the buffer. Tasks from `learned` + 1 to `begun` are current: one
    in general, several for a client that was absent meanwhile and catches up.
    """

    learned: int = 0
    begun: int = 0
    buffer: Tensor = field(default_factory=_no_samples)  # (m,) indices of training images
    candidates: Tensor = field(default_factory=_no_samples)  # those that join it when the next task begins
    snapshot: dict[str, Tensor] = field(default_factory=dict)  # (n, ...) outputs of the last task's model
    upcoming: dict[str, Tensor] = field(
        default_factory=dict
    )  # the next snapshot, where it is taken before the download
    kept: dict[str, Tensor] = field(default_factory=dict)  # what the continual strategy keeps of finished tasks
    received: dict[str, Tensor] = field(default_factory=dict)  # what a method keeps of its downloads
    archive: Archive = field(default_factory=Archive)  # what a method keeps of finished tasks

    @property
    def remembered(self) -> Tensor:
        """Indices of the training images in the buffer, and of those that would enter it now."""
        return torch.cat([self.buffer, self.candidates])

    def begin(self, task: int) -> None:
        """Move on to `task` (1-based) if it is new: the candidates join the buffer, the snapshot is renewed."""
        if task > self.begun:
            self.buffer = torch.cat([self.buffer, self.candidates])
            self.candidates = _no_samples()
            self.snapshot, self.upcoming = self.upcoming, {}
            self.learned, self.begun = self.begun, task

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        return {
            "progress": torch.tensor([self.learned, self.begun]),
            "buffer": self.buffer,
            "candidates": self.candidates,
            **{f"{group}.{name}": value for group in _GROUPS for name, value in getattr(self, group).items()},
            **above(self.archive.to_tensors(), "archive."),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Memory:
        """The reverse of `to_tensors`."""
        learned, begun = tensors["progress"].tolist()
        groups = {group: below(tensors, f"{group}.") for group in _GROUPS}
        archive = Archive.from_tensors(below(tensors, "archive."))
        return cls(learned, begun, tensors["buffer"], tensors["candidates"], **groups, archive=archive)


def below(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The tensors whose names begin with `prefix`, or what they look like, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def above(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The reverse of `below`: tensors, or what they look like, under names that begin with `prefix`."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
