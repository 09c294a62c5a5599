"""What the small model contributed in a finished run, read from what `methods.instruments` has left in its metrics."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlscl.evaluation import ALIKE
from fedlscl.files import content_of
from fedlscl.run.folder import METRICS

log = logging.getLogger(__name__)

_MEASURED = re.compile(r"client/(\d+)/generated/(shuffled_cost|mean_cost|feature_distance|product_variance)")
NAMES = ("shuffled_cost", "mean_cost", "feature_distance", "product_variance")


@dataclass(frozen=True)
class Contribution:
    """What it costs to mix up the weights W that the small models generate for each image, after the last task.

    Args:
        shuffled: points of accuracy that are lost when W are shuffled over images, mean over clients.
        mean: likewise when every image has the mean W.
        differs: the share of the LoRA product B A that is not the same for all images, in %, mean over clients.
        alike: the clients whose small model says the same of every image.
        clients: how many clients were looked at.
    """

    shuffled: float
    mean: float
    differs: float
    alike: tuple[int, ...]
    clients: int

    @property
    def text(self) -> str:
        """All of it in a line."""
        if len(self.alike) == self.clients:
            same = "it says the same of every image"
        elif self.alike:
            named = ", ".join(map(str, self.alike[:8])) + (" ..." if len(self.alike) > 8 else "")
            same = f"in {len(self.alike)} of {self.clients} clients ({named}) it says the same of every image"
        else:
            same = "it tells images apart in every client"
        return (
            f"{lost(self.shuffled)} when W are shuffled over images, {lost(self.mean)} with the mean W; "
            f"{share(self.differs)} of the LoRA differs between images: {same}"
        )


def lost(points: float) -> str:
    """A loss of accuracy in words."""
    rounded = abs(round(points, 1))
    return f"{rounded:.1f} points {'won' if points < 0 and rounded else 'lost'}"


def share(percent: float) -> str:
    """A percentage of which small ones are told from nothing."""
    return "below 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"


def read_contribution(folder: Path) -> Contribution | None:
    """What the small models of a finished run contributed after its last task.

    Args:
        folder: the run's.

    Returns:
        None where nothing was measured: the method has no such small model, or the metrics are not there. With a
        warning in the log where the metrics are damaged.
    """
    try:
        content = content_of(folder / METRICS)
        if content is None or b"/generated/mean_cost," not in content:
            return None
        found = _last(content.decode())
    except (ValueError, OSError) as error:
        log.warning("%s: what the small model contributed is left out, for %s", folder / METRICS, error)
        return None
    whole = {client: of for client, of in found.items() if set(of) == set(NAMES)}
    if not whole:
        return None

    def average(name: str) -> float:
        return math.fsum(of[name] for of in whole.values()) / len(whole)

    alike = tuple(client for client, of in sorted(whole.items()) if of["feature_distance"] < ALIKE)
    differs = 100 * average("product_variance")
    return Contribution(average("shuffled_cost"), average("mean_cost"), differs, alike, len(whole))


def _last(metrics: str) -> Mapping[int, dict[str, float]]:
    """By client the last value of each number; the costs are measured after each task.

    Raises:
        ValueError: if one of them is no finite number.
    """
    found: dict[int, dict[str, float]] = {}
    for row in csv.reader(io.StringIO(metrics)):
        if len(row) == 4 and (named := _MEASURED.fullmatch(row[2])):
            if not math.isfinite(value := float(row[3])):
                raise ValueError(f"{row[2]} is {row[3]}")
            found.setdefault(int(named[1]), {})[named[2]] = value
    return found
