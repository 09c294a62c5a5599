"""Differential privacy of sums: how much noise, from where, and what is then promised.

The promise is that of the Gaussian mechanism: if what one image (or one client) adds to a release is at most of length
1, a release with noise N(0, z^2) in every coordinate is (epsilon, delta)-differentially private exactly where

    delta >= Phi(1 / (2 z) - epsilon z) - e^epsilon Phi(-1 / (2 z) - epsilon z)

(Balle and Wang, 2018, Theorem 8). k releases are together as good as one with z / sqrt(k), since the two differ by a
rotation (Dong et al., 2022, Corollary 3.3): nothing is lost in composition, and no numerical accountant is needed.

Neighbours are data sets of which one has an image (a client) where the other has none, in whose place nothing is added
("zero-out", Kairouz et al., 2021): the number of images of a client and task is public.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

from fedlscl import seeds
from fedlscl.checks import positive

GRID = 2.0**-24
"""What leaves a client is a multiple of this, before noise and after it."""

_MOST = 100.0  # epsilon


@dataclass(frozen=True)
class Privacy:
    """What is promised to the images, or to the clients.

    Args:
        epsilon: how much may become known over all tasks and rounds; the smaller, the more noise.
        delta: with what probability it may be more; far below one over the number of images.
        unit: to whom it is promised: each `image`, or each `client` with all its images of all tasks.
        clip: for the unit `client`: to what length its sums of a task are scaled down, in images; as many alike would
            have this length.
        noise: `system` draws noise from the operating system. `seed` draws it from the run's seed, so that the run can
            be repeated to the same numbers; whoever knows the seed, as the server does, can take the noise off again,
            so that nothing is promised to anybody.
    """

    epsilon: float
    delta: float = 1e-5
    unit: Literal["image", "client"] = "image"
    clip: float | None = None
    noise: Literal["system", "seed"] = "system"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: if one is impossible, or does not go with another.
        """
        positive("model.privacy", epsilon=self.epsilon)
        if self.epsilon > _MOST:
            raise ValueError(f"model.privacy.epsilon is {self.epsilon}, must be at most {_MOST:g}; that is no promise")
        if not 0 < self.delta < 1:
            raise ValueError(f"model.privacy.delta is {self.delta}, must be above 0 and below 1, such as 1e-5")
        if (self.unit == "client") != (self.clip is not None):
            wanted = "a number of images" if self.unit == "client" else "null; features have their length anyway"
            raise ValueError(f"model.privacy.clip is {self.clip}, must for the unit {self.unit} be {wanted}")
        if self.clip is not None:
            positive("model.privacy", clip=self.clip)

    def releases(self, tasks: int) -> int:
        """In how many releases one unit is, when everything goes well: an image is in one task, a client in all."""
        return tasks if self.unit == "client" else 1

    def multiplier(self, tasks: int) -> float:
        """z, the standard deviation of the noise where one unit adds at most 1."""
        return noise_multiplier(self.epsilon, self.delta) * math.sqrt(self.releases(tasks))

    def spent(self, tasks: int, repeated: int) -> float:
        """The epsilon of a run in which a unit was released `repeated` times more than was planned."""
        return epsilon_of(self.multiplier(tasks) / math.sqrt(self.releases(tasks) + repeated), self.delta)

    def noisy(
        self, tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor], deviation: float, key: bytes
    ) -> dict[str, Tensor]:
        """Sums of a client as they may leave it.

        Noise is rounded to the grid on which the exact sums are. What leaves is thus the sum plus noise, rounded, as if
        both were real numbers: the last bits of floating-point noise, which can give a value away (Mironov, 2012), are
        not there.

        Args:
            tensors: the exact sums, multiples of `GRID`.
            scales: of each, the noise of each value, such that one image divided by these has a length of at most 1.
            deviation: by what these are multiplied.
            key: 32 bytes, used for nothing else.
        """
        if self.clip is not None:
            tensors, deviation = clipped(tensors, scales, self.clip), deviation * self.clip
        sizes = [scale.numel() for scale in scales.values()]
        drawn = torch.split(torch.from_numpy(normal(key, sum(sizes))), sizes)
        return {
            name: tensors[name] + (part.reshape(scale.shape) * scale * (deviation / GRID)).round() * GRID
            for (name, scale), part in zip(scales.items(), drawn, strict=True)
        }

    def key(self, seed: int, client: int, round: int) -> bytes:
        """Of the noise of a client in a round."""
        if self.noise == "system":
            return secrets.token_bytes(32)
        return hashlib.sha256(f"noise {seeds.derive(seed, 'noise', client, round)}".encode()).digest()


def clipped(tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Multiples of `GRID`, scaled down alike so that, divided by their scales, they have at most a certain length."""
    length = math.sqrt(sum(float((tensors[name] / scale).square().sum()) for name, scale in scales.items()))
    if length <= limit * (1 - 2**-20):
        return dict(tensors)
    factor = limit / length * (1 - 2**-20)  # so that no rounding makes it longer
    return {name: (tensors[name] * (factor / GRID)).trunc() * GRID for name in scales}


def delta_of(epsilon: float, multiplier: float) -> float:
    """The least delta of one release with noise N(0, multiplier^2) (Balle and Wang, 2018, Eq. 6)."""
    half, shift = 0.5 / multiplier, epsilon * multiplier
    tail = _log_phi(-half - shift)
    return max(0.0, math.exp(_log_phi(half - shift)) - math.exp(min(epsilon + tail, 0.0)))


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The least standard deviation of noise that is enough for one release of sensitivity 1."""
    return _least(lambda z: delta_of(epsilon, z) <= delta)


def epsilon_of(multiplier: float, delta: float) -> float:
    """The least epsilon of one release with noise N(0, multiplier^2)."""
    if delta_of(0.0, multiplier) <= delta:
        return 0.0
    return _least(lambda epsilon: delta_of(epsilon, multiplier) <= delta)


def most_found(false_positives: float, multiplier: float) -> float:
    """The largest part of members that any attack finds in a release with noise N(0, multiplier^2).

    Phi(Phi^-1(f) + 1 / z) at f false positives, the trade-off of the Gaussian mechanism (Dong et al., 2022, Eq. 6).
    """
    return _ndtr(_ndtri(false_positives) + 1 / multiplier)


def most_found_under(false_positives: float, epsilon: float, delta: float) -> float:
    """The same for whatever is (epsilon, delta)-differentially private (Kairouz et al., 2015, Theorem 2.1)."""
    other_way = 1 - math.exp(-epsilon) * (1 - delta - false_positives)
    return min(math.exp(epsilon) * false_positives + delta, other_way, 1.0)


def best_auc(multiplier: float) -> float:
    """The largest area under the ROC curve of `most_found`: Phi(1 / (sqrt(2) z))."""
    return _ndtr(math.sqrt(0.5) / multiplier)


def normal(key: bytes, size: int) -> NDArray[np.float64]:
    """(size,) standard normal numbers from a key stream of ChaCha20, by Box and Muller (1958).

    Their uniform numbers have 64 bits, so that none is beyond 9.5; a true one is so with a probability of 2e-21.
    """
    pairs = (size + 1) // 2
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16 * pairs))
    uniform = (np.frombuffer(stream, "<u8").astype(np.float64) + 0.5) * 2.0**-64
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    found: NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
    return found


def _ndtr(x: float) -> float:
    return float(torch.special.ndtr(torch.tensor(x, dtype=torch.float64)))


def _ndtri(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


def _log_phi(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def _least(enough: Callable[[float], bool]) -> float:
    """The least positive number that is enough, where all larger ones are, or one that is larger by a part of 1e-9."""
    low, high = 1e-6, 1.0
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
