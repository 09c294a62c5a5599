"""What generators without data need of a trained network: the statistics that its batch normalisation meets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Met(NamedTuple):
    """What one layer of batch normalisation was given."""

    layer: nn.modules.batchnorm._BatchNorm  # with `running_mean` and `running_var` (C,)
    mean: Tensor  # (C,) of the batch
    variance: Tensor  # (C,) of the batch, biased


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[list[Met]]:
    """Collect what each batch normalisation of `model` meets in the forward passes inside, with its graph.

    The list is in the order of the passes; a model without batch normalisation leaves it empty.
    """
    met: list[Met] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        met.append(Met(layer, x.mean(dims), x.var(dims, unbiased=False)))

    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()
