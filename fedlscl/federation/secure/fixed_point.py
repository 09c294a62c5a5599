"""Real numbers as integers modulo 2^64, whose sum does not depend on the order and never wraps.

A value x is round(x 2^bits), negative ones from 2^64 downwards. With n clients each value must be below
2^(63 - bits) / n, so that no sum leaves the range; the error of a sum is at most n 2^-(bits + 1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
Shapes = Mapping[str, torch.Size]


def largest(bits: int, clients: int) -> float:
    """The bound below which the values of so many clients must be."""
    return 2.0 ** (63 - bits) / clients


def encode(tensors: Mapping[str, Tensor], bits: int, clients: int) -> Words:
    """All values of some tensors, one behind another.

    Args:
        tensors: by name, of any numbers.
        bits: how many behind the point.
        clients: how many may be added up.

    Raises:
        ValueError: if a value is too large, or none, by the name of its tensor.
    """
    limit = largest(bits, clients)
    for name, tensor in tensors.items():
        found = float(tensor.double().abs().max()) if tensor.numel() else 0.0
        if not found < limit:
            fitting = math.ceil(63 - math.log2(clients * found)) - 1 if math.isfinite(found) else 0
            instead = f"; take federation.fraction_bits {fitting}" if fitting > 0 else ""
            raise ValueError(
                f"'{name}' holds {found:g}, but a secure sum over {clients} clients with {bits} bits behind the point "
                f"takes values below {limit:g}{instead}"
            )
    values = torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors.values()]).numpy()
    words: Words = np.rint(values * 2.0**bits).astype(np.int64).view(np.uint64)
    return words


def layout(shapes: Shapes) -> bytes:
    """32 bytes that tell apart what is behind one another."""
    return hashlib.sha256(repr([(name, *shape) for name, shape in shapes.items()]).encode()).digest()


def decode(words: Words, bits: int, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors, in float64, whose values these are."""
    values = torch.from_numpy(words.view(np.int64).astype(np.float64)) / 2.0**bits
    sizes = [shape.numel() for shape in shapes.values()]
    parts = torch.split(values, sizes)
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
