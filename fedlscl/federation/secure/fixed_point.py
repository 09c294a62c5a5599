"""Real numbers as integers modulo 2^64, whose sum does not depend on the order and never wraps.

A value x is round(x 2^bits), negative ones from 2^64 downwards. With n clients each value must be below
2^(63 - bits) / n, so that no sum leaves the range; the error of a sum is at most n 2^-(bits + 1). Each tensor has its
own bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
Shapes = Mapping[str, torch.Size]

BITS, MOST_BITS = 30, 52
"""Behind the point: by default, and at most."""

LARGEST = 2**8
"""The bound of what a network has learned, before it is multiplied by anything; its weights are far below."""


def most_bits(clients: int, factor: int) -> int:
    """The most bits with which so many clients' values below `LARGEST`, each times `factor` at most, can be added up.

    A float32 times a whole number is then held exactly unless it is tiny, and so is the sum: it has no other last bit
    than it would have otherwise, and training goes on as it would.
    """
    bound = clients * factor * LARGEST
    return max(1, min(MOST_BITS, 63 - (bound - 1).bit_length()))


def largest(bits: int, clients: int) -> float:
    """The bound below which the values of so many clients must be."""
    return 2.0 ** (63 - bits) / clients


def encode(tensors: Mapping[str, Tensor], bits: Sequence[int], clients: int) -> Words:
    """All values of some tensors, one behind another.

    Args:
        tensors: by name, of any numbers.
        bits: how many behind the point, for each tensor.
        clients: how many may be added up.

    Raises:
        ValueError: if a value is too large, or none, by the name of its tensor.
    """
    words = []
    for (name, tensor), of_tensor in zip(tensors.items(), bits, strict=True):
        limit = largest(of_tensor, clients)
        found = float(tensor.double().abs().max()) if tensor.numel() else 0.0
        if not found < limit:
            fitting = math.ceil(63 - math.log2(clients * found)) - 1 if math.isfinite(found) else 0
            instead = f"; take federation.fraction_bits {fitting}" if fitting > 0 else ""
            raise ValueError(
                f"'{name}' holds {found:g}, but a secure sum over {clients} clients with {of_tensor} bits behind the "
                f"point takes values below {limit:g}{instead}"
            )
        values = tensor.detach().cpu().double().flatten().numpy()
        words.append(np.rint(values * 2.0**of_tensor).astype(np.int64).view(np.uint64))
    return np.concatenate(words)


def layout(shapes: Shapes) -> bytes:
    """32 bytes that tell apart what is behind one another."""
    return hashlib.sha256(repr([(name, *shape) for name, shape in shapes.items()]).encode()).digest()


def decode(words: Words, bits: Sequence[int], shapes: Shapes) -> dict[str, Tensor]:
    """The tensors, in float64, whose values these are."""
    values = torch.from_numpy(words.view(np.int64).astype(np.float64))
    parts = torch.split(values, [shape.numel() for shape in shapes.values()])
    return {
        name: part.reshape(shape) / 2.0**of_tensor
        for (name, shape), part, of_tensor in zip(shapes.items(), parts, bits, strict=True)
    }
