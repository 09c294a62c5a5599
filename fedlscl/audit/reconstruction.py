"""Reconstruction: images from features, by a decoder that was trained on public images.

Shapes: n images, e features of an image, C x S x S pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl import seeds

WIDTH, STEPS, BATCH, RATE = 256, 1000, 64, 1e-3


def small(images: Tensor, side: int) -> Tensor:
    """Images (n, 3, H, W) in uint8 as float (n, 3, S, S) in 0..1, no larger than `side` pixels."""
    pixels = images.float() / 255
    return pixels if pixels.shape[-1] <= side else F.interpolate(pixels, size=side, mode="area")


class Decoder:
    """A perceptron from a feature to the pixels of its image.

    Args:
        features: (n, e) of public images.
        images: (n, 3, S, S) in 0..1, these.
        seed: of its weights and the order of its steps.
    """

    def __init__(self, features: Tensor, images: Tensor, seed: int) -> None:
        self.shape = images.shape[1:]
        x = features.float()
        self.mean, self.scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
        targets = images.flatten(1)
        with seeds.seeded(seed, "decoder"):
            first, second, last = (
                nn.Linear(x.shape[1], WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, targets.shape[1]),
            )
            self.net = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last, nn.Sigmoid())
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=RATE, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            for _ in range(STEPS):
                rows = torch.randint(len(x), (min(BATCH, len(x)),))
                optimizer.zero_grad()
                F.mse_loss(self.net(self._standard(x[rows])), targets[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()

    def __call__(self, features: Tensor) -> Tensor:
        """Images (n, 3, S, S) of features (n, e)."""
        with torch.no_grad():
            made: Tensor = self.net(self._standard(features.float()))
        return made.reshape(len(features), *self.shape)

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """(n,) Pearson's correlation of the pixels of images (n, C, S, S) with those of others (n, C, S, S), in -1..1."""
    a, b = (
        images.double().flatten(1) - images.double().flatten(1).mean(dim=1, keepdim=True) for images in (one, other)
    )
    found: Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
    return found


def found_again(made: Tensor, true: Tensor, among: Tensor, labels: Tensor, of_others: Tensor) -> tuple[float, float]:
    """How often the image that a made one resembles most, among those of its class, is the true one; and by guessing.

    Args:
        made: (n, C, S, S).
        true: (n,) the positions of the true images in `among`.
        among: (m, C, S, S) the client's images.
        labels: (n,) classes of the made ones.
        of_others: (m,) classes of the client's images.
    """
    hits, chances = [], []
    for image, right, label in zip(made, true.tolist(), labels.tolist(), strict=True):
        places = (of_others == label).nonzero().flatten()
        alike = correlation(image.expand(len(places), *image.shape), among[places])
        hits.append(int(places[alike.argmax()]) == right)
        chances.append(1 / len(places))
    return sum(hits) / len(hits), sum(chances) / len(chances)
