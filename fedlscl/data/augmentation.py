"""Random crops and flips of training images, drawn on the CPU and made where the images are.

Shapes: B batch, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlscl.data.device import send

PART = 8
"""The width of the border that crops reach into is a PART-th of an image's: 4 of 32 pixels."""


def draw(size: tuple[int, int], count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """What `crop_flip` wants, drawn evenly.

    Args:
        size: H and W.
        count: B.
        rng: a generator of the CPU.

    Returns:
        By how many pixels each crop is moved down and right (B, 2), each from -H // 8 to H // 8 or -W // 8 to W // 8,
        and which are flipped (B,), half of them on average.
    """
    moved = [torch.randint(-(side // PART), side // PART + 1, (count,), generator=rng) for side in size]
    return torch.stack(moved, 1), torch.randint(2, (count,), generator=rng).bool()


def crop_flip(images: Tensor, moved: Tensor, flipped: Tensor) -> Tensor:
    """Crops of the size of the images, which are black around, some of them then flipped from left to right.

    It is `RandomCrop(32, padding=4)` and `RandomHorizontalFlip` of torchvision at 32 px, for each image by itself.

    Args:
        images: (B, 3, H, W).
        moved: (B, 2) pixels by which each crop is moved down and right; see `draw`.
        flipped: (B,) true for those that are flipped.

    Returns:
        (B, 3, H, W) in the dtype and on the device of `images`.
    """
    count, _, height, width = images.shape
    moved, flipped = send(moved, images.device), send(flipped, images.device)
    rows = torch.arange(height, device=images.device) + moved[:, :1]  # (B, H), where in the image each row is from
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(flipped[:, None], columns.flip(1), columns) + moved[:, 1:]
    inside = [(places >= 0) & (places < side) for places, side in ((rows, height), (columns, width))]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    taken = images.gather(2, rows[:, None, :, None].expand_as(images))
    taken = taken.gather(3, columns[:, None, None, :].expand_as(images))
    return taken * (inside[0][:, None, :, None] & inside[1][:, None, None, :])
