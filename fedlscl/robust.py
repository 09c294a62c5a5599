"""Averages that one upload cannot take over, and a look at the uploads of a round beside each other.

Neither finds a clever client: one that stays within the bounds still moves what is averaged, and where half of the
clients or more send what is bad, the median is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from fedlscl.memory import below

Robust = Literal["none", "clip", "median", "trimmed_mean"]
Model = tuple[Mapping[str, Tensor], int]
"""Named tensors and their weight."""

Sizes = Mapping[str, float]
"""How large what a client sent is: by name the root mean square of a tensor's values, see `sizes`."""

ALL, CHANGE, SAMPLES = "all of it", "the change", "the number of samples"


class Averaging:
    """How a server averages the clients' tensors.

    Args:
        robust: `none` for the weighted mean (`average`); `clip` scales each client's update, which is what it sent
            minus what the server answered last, down to the median of the updates' L2 norms before the weighted mean
            (Sun et al., 2019, with the median for their constant); `median` and `trimmed_mean` take that of each
            number alone, whatever the weights (Yin et al., 2018).
        trim: the fraction of the clients, rounded up, that a trimmed mean leaves out at either end; at least one client
            always counts.

    Raises:
        ValueError: if one of them is wrong.
    """

    def __init__(self, robust: Robust = "none", trim: float = 0.2) -> None:
        if robust not in ("none", "clip", "median", "trimmed_mean"):
            raise ValueError(f"server.robust is {robust}, must be none, clip, median or trimmed_mean")
        if not 0 < trim < 0.5:
            raise ValueError(f"server.trim is {trim}, must be above 0 and below 0.5")
        self.robust, self.trim = robust, trim
        self._answered: Mapping[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """What was answered last, where updates are clipped."""
        return {f"answered.{name}": tensor for name, tensor in self._answered.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take that over."""
        self._answered = below(state, "answered.")

    def __call__(self, models: Iterable[Model], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average; see `average` for what must hold of `models`, which are all in memory unless `robust` is none.

        Args:
            models: what the clients sent.
            start: what all clients start with, by name, for the first round; zeros where it names nothing.
        """
        if self.robust == "none":
            return average(models)
        everyone = list(models)
        if self.robust == "clip":
            everyone = _clipped(everyone, {**start, **self._answered})
            self._answered = average(everyone)
            return dict(self._answered)
        return {name: self._middle(torch.stack([model[name] for model, _ in everyone])) for name in everyone[0][0]}

    def _middle(self, values: Tensor) -> Tensor:
        """The median or trimmed mean (...) of values (clients, ...); of whole numbers always the (lower) median."""
        ordered = values.sort(dim=0).values
        clients = len(ordered)
        cut = (clients - 1) // 2
        if not values.is_floating_point():
            return ordered[cut]
        if self.robust == "trimmed_mean":
            cut = min(math.ceil(self.trim * clients), cut)
        return ordered[cut : clients - cut].double().mean(0).to(values.dtype)


def _clipped(models: Sequence[Model], start: Mapping[str, Tensor]) -> list[Model]:
    """The models, each moved towards `start` until it is no farther from it than the median of them."""

    def origin(name: str, like: Tensor) -> Tensor:
        return start[name].double() if name in start else like.new_zeros(()).double()

    def distance(model: Mapping[str, Tensor]) -> float:
        moved = [(t.double() - origin(n, t)).square().sum() for n, t in model.items() if t.is_floating_point()]
        return math.sqrt(float(torch.stack(moved).sum()))

    far = [distance(model) for model, _ in models]
    most = median(far)
    clipped: list[Model] = []
    for (model, weight), length in zip(models, far, strict=True):
        if length > most:
            model = {
                name: (origin(name, t) + (t.double() - origin(name, t)) * (most / length)).to(t.dtype)
                if t.is_floating_point()
                else t
                for name, t in model.items()
            }
        clipped.append((model, weight))
    return clipped


def average(models: Iterable[Model]) -> dict[str, Tensor]:
    """Tensor by tensor the weighted mean, summed up in float64; of integer tensors (counters) the maximum.

    Args:
        models: named tensors, the same names and shapes in each, with their weight. No weight is negative and not all
            are zero; they are divided by their sum. Gone through once.

    Raises:
        ValueError: if the weights make no mean.
    """
    weights: list[int] = []
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for model, weight in models:
        weights.append(weight)
        for name, tensor in model.items():
            if name not in sums:
                dtypes[name] = tensor.dtype
                sums[name] = tensor.double() * weight if tensor.is_floating_point() else tensor.clone()
            elif tensor.is_floating_point():
                sums[name].add_(tensor, alpha=weight)
            else:
                torch.maximum(sums[name], tensor, out=sums[name])
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ValueError(f"weights {weights} must not be negative and must have a positive sum")
    return {n: (s / total).to(dtypes[n]) if dtypes[n].is_floating_point else s for n, s in sums.items()}


# ---- uploads beside each other

_IN_WORDS = {SAMPLES: SAMPLES, CHANGE: "the root mean square of what it changed of the common model"}


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of each floating-point tensor's values, by name, and under `ALL` of all of them together."""
    squares = {n: (float(t.double().square().sum()), t.numel()) for n, t in tensors.items() if t.is_floating_point()}
    found = {name: math.sqrt(total / max(count, 1)) for name, (total, count) in squares.items()}
    if squares:
        sums, counts = zip(*squares.values(), strict=True)
        found[ALL] = math.sqrt(sum(sums) / max(sum(counts), 1))
    return found


def change(tensors: Mapping[str, Tensor], common: Mapping[str, Tensor]) -> dict[str, float]:
    """How far what a client sent is from what all had in common: the root mean square of the differences, as `CHANGE`.

    It is bounded as well as sizes, since a mean that one client makes larger by the same factor in each round grows
    without end, though no upload is far larger than the others.

    Args:
        tensors: what it sent.
        common: what all clients had last; only what is in both, with the same shape and floating point, is compared.

    Returns:
        Nothing, where there is nothing to compare.
    """
    both = [
        (tensor, common[name])
        for name, tensor in tensors.items()
        if name in common and tensor.is_floating_point() and tensor.shape == common[name].shape
    ]
    count = sum(tensor.numel() for tensor, _ in both)
    if not count:
        return {}
    return {CHANGE: math.sqrt(sum(float((t.double() - c.double()).square().sum()) for t, c in both) / count)}


def outliers(found: Mapping[int, Sizes], before: Sizes, factor: float) -> dict[int, str]:
    """Who sent a tensor, or a change, that is more than `factor` times as large as is usual, and which.

    Usual is the median over the clients that sent it. Of fewer than three values nobody can say which is wrong: then
    `before` stands in for the third, and a single client is compared with that. Where this gives nothing, or zero, and
    there are two clients at least, `ALL` of what they sent is taken for it.

    Args:
        found: of each client what `sizes` and `change` give; under `SAMPLES` its number of images, where nobody knows
            that.
        before: the medians of the last round with at least three clients, or sizes of what all clients start with.
        factor: how many times.

    Returns:
        By client the reason, in words.
    """

    def usual(name: str) -> float:
        values = [one[name] for one in found.values() if name in one]
        if len(values) < 3:
            if name not in before:
                return 0.0
            values = [*values, before[name]] if len(values) == 2 else [before[name]]
        return median(values)

    limits: dict[str, float] = {}
    reasons: dict[int, str] = {}
    for client, one in found.items():
        for name, size in one.items():
            if name not in limits:
                instead = usual(ALL) if len(found) > 1 and name != SAMPLES else 0.0
                limits[name] = factor * (usual(name) or instead)
            if name != ALL and size > limits[name] > 0:
                what = _IN_WORDS.get(name, f"the root mean square of '{name}'")
                reasons[client] = (
                    f"{what} is {size:.3g}, more than {factor:g} times the {limits[name] / factor:.3g} that is usual"
                )
                break
    return reasons


def medians(found: Mapping[int, Sizes]) -> dict[str, float]:
    """By name the median of the clients' sizes."""
    names = dict.fromkeys(name for one in found.values() for name in one)
    return {name: median(one[name] for one in found.values() if name in one) for name in names}
