"""Images that stay on an accelerator, where every batch is gathered; on a CPU they need not be anywhere else.

Shapes: B batch, n images asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")
Fetch = Callable[[str, NDArray[np.int64]], tuple[Tensor, Tensor]]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. Nobody waits: from pinned memory a copy is queued as kernels are."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # there it would be read before it is written


class DeviceImages:
    """Images and labels on a device, each sent when it is first asked for.

    Args:
        fetch: a part's name and positions (n,) in it to images (n, 3, H, W) in uint8 and labels (n,) on the CPU.
        sizes: number of images of each part.
        limit_mib: memory that the images may take. First come, first kept; a batch with one that finds no room is
            sent anew whenever it is asked for.
        device: where they stay.
    """

    def __init__(self, fetch: Fetch, sizes: Mapping[str, int], limit_mib: float, device: torch.device) -> None:
        self.device, self._fetch = device, fetch
        self._rows = {part: np.full(size, -1) for part, size in sizes.items()}
        image = fetch(next(part for part, size in sizes.items() if size), np.zeros(1, dtype=np.int64))[0][0]
        self._room = min(int(limit_mib * 2**20) // image.nbytes, sum(sizes.values()))
        self._used = 0
        with torch.inference_mode(False):  # training uses what a test has sent
            self._images = torch.empty((self._room, *image.shape), dtype=image.dtype, device=device)
            self._labels = torch.empty(self._room, dtype=torch.int64, device=device)

    def __call__(self, part: str, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in uint8 and labels (B,) of one part, on the device."""
        rows = self._rows[part]
        if (missing := rows[positions] < 0).any():
            new = np.unique(positions[missing])[: self._room - self._used]
            if len(new):
                end = self._used + len(new)
                for kept, sent in zip((self._images, self._labels), self._fetch(part, new), strict=True):
                    kept[self._used : end] = send(sent, self.device)
                rows[new] = np.arange(self._used, end)
                self._used = end
            if (rows[positions] < 0).any():
                images, labels = self._fetch(part, positions)
                return send(images, self.device), send(labels, self.device)
        place = send(torch.from_numpy(rows[positions]), self.device)
        return self._images[place], self._labels[place]
