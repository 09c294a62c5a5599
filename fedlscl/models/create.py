"""What both kinds of model need: making one with timm, and images of the right size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in uint8, or as floats in 0..1, to floats (B, 3, size, size) in 0..1.

    Bicubic with antialiasing, as timm's evaluation.
    """
    x = images if images.is_floating_point() else images.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return x


def _create(group: str, name: str, pretrained: bool, model_args: Mapping[str, Any]) -> nn.Module:
    import timm  # takes seconds, which only building a model is worth

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(f"{group}.name: timm has no model '{name}'; similar names: {', '.join(close) or 'none'}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **model_args)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{group}.name, {group}.model_args: timm cannot make '{name}' ({error})") from error
    return model
