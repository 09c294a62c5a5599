"""What fits into some minutes: how many images, of what size, for how many rounds, and which runs.

Time is predicted from the passes of images through the frozen ViT, whose time is measured, and from the runs that are
finished. A prediction decides what is run, and no number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlscl.data.splits import SplitSpec

MARGIN = 1.3
"""Times a prediction: a machine has other things to do."""


@dataclass(frozen=True)
class Images:
    """What passes through the models in a run: training and test images of all clients and tasks.

    Args:
        train: training images.
        test: test images, each counted for every client that is tested on it.
        tasks: tasks of a client.
    """

    train: float
    test: float
    tasks: int

    @classmethod
    def of(cls, counts: Sequence[int], tests: Sequence[int], spec: SplitSpec) -> Images:
        """What a split uses, where its classes have as many images as the mean class."""
        held = spec.clients * spec.private_classes + spec.public_classes
        each = spec.clients * (spec.private_classes + spec.public_classes)
        train = np.minimum(counts, spec.train_per_class or max(counts)).mean()
        test = np.minimum(tests, spec.test_per_class or max(tests)).mean()
        return cls(float(held * train), float(each * test), spec.tasks)


def seconds_of(cost: Mapping[str, float], images: Images, rounds: int, per_image: float, start: float) -> float:
    """How long a run takes.

    Args:
        cost: of the method, as in choices.yaml.
        images: what passes through.
        rounds: of each task.
        per_image: seconds of one image's pass through the frozen ViT.
        start: seconds until a run begins.
    """
    passes = cost["once"] * (images.train + images.test) + cost["round"] * rounds * images.train
    passes += cost["test"] * rounds * images.test * (images.tasks + 1) / 2  # after each round, all tasks so far
    return start + per_image * passes


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        size: one of the budgets.
        seeds: how many.
        methods: names, in the order of the predictions.
        seconds: predicted for a run of each method.
        left_out: names that do not fit, with the seconds that a run would take.
    """

    size: Mapping[str, Any]
    seeds: int
    methods: tuple[str, ...]
    seconds: Mapping[str, float]
    left_out: Mapping[str, float]


def fit(
    predictions: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]],
    extras: Collection[str],
    seeds: int,
    seconds: float,
    jobs: int,
) -> Plan:
    """The largest size at which all methods fit with all seeds, or else with one; or else without the slowest ones.

    Args:
        predictions: for each size, the largest first, the seconds of a run of each method.
        extras: methods that decide nothing: they are run if they fit beside the others.
        seeds: how many there should be.
        seconds: that there are.
        jobs: runs at the same time.
    """

    def fits(runs: Mapping[str, float], count: int) -> bool:
        return MARGIN * total(runs, count) / jobs <= seconds

    def without(every: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in every.items() if name not in extras}

    options = [(count, size, every) for count in dict.fromkeys((seeds, 1)) for size, every in predictions]
    fitting = (option for option in options if fits(without(option[2]), option[0]))
    count, size, every = next(fitting, options[-1])
    runs = without(every)
    while len(runs) > 1 and not fits(runs, count):
        del runs[max(reversed([*runs]), key=lambda name: runs[name])]
    for name in extras:
        if fits({**runs, name: every[name]}, count):
            runs[name] = every[name]
    left = {name: value for name, value in every.items() if name not in runs}
    return Plan(size, count, tuple(name for name in every if name in runs), every, left)


def total(runs: Mapping[str, float], seeds: int) -> float:
    """Seconds of all runs, one after another: to choose, each method; to test, the chosen and the one without exchange.

    Args:
        runs: seconds by method.
        seeds: of each.
    """
    return seeds * (sum(runs.values()) + testing(runs))


def testing(runs: Mapping[str, float]) -> float:
    """Seconds of the tests with one seed, whatever is chosen: the most expensive and the cheapest method."""
    return max(runs.values()) + min(runs.values())


def duration(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
