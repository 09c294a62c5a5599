"""What a study ends with: which method to take, by how much, and what it costs; chosen on held-out training images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlscl.analysis.results import Run
from fedlscl.run.console import human_bytes

MASK = "seen"
"""The accuracy that decides: all classes that a client has learned so far compete."""


@dataclass(frozen=True)
class Standing:
    """What is known of a method.

    Args:
        method: its name.
        values: by seed the accuracy in % after the last task, over all of a client's tasks, mean over clients.
        up: bytes that a client sends in the whole run, mean over clients and seeds.
        down: bytes that it receives.
        seconds: of a run, mean over seeds.
        images: that the accuracy of a seed is of.
    """

    method: str
    values: Mapping[int, float]
    up: float
    down: float
    seconds: float
    images: int

    @classmethod
    def of(cls, method: str, runs: Sequence[Run], images: int) -> Standing:
        """The standing of a method by its finished runs, at least one."""

        def mean(values: Sequence[float]) -> float:
            return statistics.mean(values)

        return cls(
            method,
            {run.seed: run.final_average[MASK] for run in runs},
            mean([mean(run.summary.bytes_up.by_client) for run in runs]),
            mean([mean(run.summary.bytes_down.by_client) for run in runs]),
            mean([run.seconds for run in runs]),
            images,
        )

    @property
    def mean(self) -> float:
        """Over seeds, in %."""
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float:
        """Sample deviation over seeds in points; of one seed the standard error of a share of so many images.

        That is of the share with two images added that are right and two that are wrong (Agresti and Coull, 1998), so
        that it is not 0 where all are right.
        """
        if len(self.values) > 1:
            return statistics.stdev(self.values.values())
        share = (self.mean / 100 * self.images + 2) / (self.images + 4)
        return 100 * math.sqrt(share * (1 - share) / (self.images + 4))

    @property
    def exchanges(self) -> bool:
        """Whether anything leaves a client."""
        return self.up > 0

    @property
    def text(self) -> str:
        """Mean and deviation in words."""
        return f"{self.mean:.1f} ± {self.deviation:.1f} %"


class Choice(NamedTuple):
    """What is to be taken, what it is compared with, and what is as good.

    Args:
        chosen: the method.
        reference: the best method of the other kind, that exchanges nothing if the chosen one does; None if there is
            none.
        level: names of the methods whose deviations overlap with those of the best, the chosen one not among them.
    """

    chosen: str
    reference: str | None
    level: tuple[str, ...]


def overlap(one: Standing, other: Standing) -> bool:
    """Whether mean ± deviation of two methods overlap."""
    return abs(one.mean - other.mean) <= one.deviation + other.deviation


def choose(standings: Sequence[Standing]) -> Choice:
    """The method that sends least among those that are level with the best; of equal bytes the most accurate.

    Args:
        standings: at least one, all on images held out of training.
    """
    best = max(standings, key=lambda standing: standing.mean)
    level = [standing for standing in standings if overlap(standing, best)]
    chosen = min(level, key=lambda standing: (standing.up + standing.down, -standing.mean))
    others = [standing for standing in standings if standing.exchanges != chosen.exchanges]
    others = others or [standing for standing in standings if standing != chosen]
    reference = max(others, key=lambda standing: standing.mean).method if others else None
    return Choice(
        chosen.method, reference, tuple(standing.method for standing in level if standing.method != chosen.method)
    )


def lines(
    choice: Choice, tested: Mapping[str, Standing], methods: Mapping[str, Mapping[str, str]], seeds: int
) -> tuple[str, str, str]:
    """The answer: what to take, by how much, and what it costs.

    Args:
        choice: what was chosen on held-out images.
        tested: by name the chosen method and the one that it is compared with, on test images.
        methods: by name `what` it is and what `leaves` a client.
        seeds: of which the choice was made.
    """
    mine = tested[choice.chosen]
    take = f"Take {choice.chosen}: {methods[choice.chosen]['what']}."
    if choice.level:
        cheapest = "of these it sends least" if mine.exchanges else "and it sends nothing"
        take += f" Level with it on held-out training images: {', '.join(choice.level)}; {cheapest}."
    elif choice.reference is None:
        take += " It is the only method that was run."
    else:
        take += f" On held-out training images ({_seeds(seeds)}) it is ahead of all others."
    much = f"It has {mine.text} of the test images right ({_seeds(len(mine.values))})"
    if (other := tested.get(choice.reference or "")) is not None:
        kind = "the next" if other.exchanges == mine.exchanges else "the best that exchanges something"
        kind = kind if other.exchanges or not mine.exchanges else "the best without any exchange"
        much += f"; {other.method}, {kind}, has {other.text}: {_difference(mine, other)}"
    if len(mine.values) == 1:
        much += ". With one seed ± is that of so many test images only; give more --minutes for three"
    cost = (
        f"A client sends {human_bytes(mine.up)} and receives {human_bytes(mine.down)} in all. What leaves it: "
        f"{' '.join(methods[choice.chosen]['leaves'].split())}."
    )
    if mine.exchanges:
        cost += " Nothing hides that from the server here; for which methods it can be hidden says docs/privacy.md."
    return take, f"{much}.", cost


def _difference(mine: Standing, other: Standing) -> str:
    """How far apart two methods are: by seed where both have the same ones."""
    shared = sorted(mine.values.keys() & other.values.keys())
    apart = [mine.values[seed] - other.values[seed] for seed in shared] or [mine.mean - other.mean]
    mean = statistics.mean(apart)
    spread = f" ± {statistics.stdev(apart):.1f}" if len(apart) > 1 else ""
    far = f"{abs(mean):.1f}{spread} points {'more' if mean >= 0 else 'less'}"
    if overlap(mine, other):
        return f"level, since the deviations overlap ({far})"
    # what was chosen is not changed by test images, but nobody should be left in the dark
    return far if mean >= 0 else f"{far}, so that the choice was not the best for these images"


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def ranking(standings: Sequence[Standing], choice: Choice) -> list[tuple[str, ...]]:
    """Rows of a table, best first: method, accuracy, level or not, seeds, bytes up and down, seconds."""
    level = {choice.chosen, *choice.level}
    return [
        (
            standing.method,
            standing.text,
            "level" if standing.method in level and len(level) > 1 else "",
            str(len(standing.values)),
            human_bytes(standing.up),
            human_bytes(standing.down),
            f"{standing.seconds:.0f}",
        )
        for standing in sorted(standings, key=lambda standing: -standing.mean)
    ]


HEADER = ("method", "held-out images", "with the best", "seeds", "sent", "received", "seconds")
"""What the columns of `ranking` hold; accuracies are on held-out training images, bytes a client's in the run."""
