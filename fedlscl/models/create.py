"""What both kinds of model need: making one with timm, and images of the right size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlscl.models import hub

LARGEST_IMAGE = 4096
"""Side in pixels above which an image size is taken for a mistake."""


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in uint8, or as floats in 0..1, to floats (B, 3, size, size) in 0..1.

    Bicubic with antialiasing, as timm's evaluation.
    """
    x = images if images.is_floating_point() else images.float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return x


def check_image_size(group: str, size: int) -> None:
    """Raise ValueError if no image is of this size."""
    if not 1 <= size <= LARGEST_IMAGE:
        raise ValueError(f"{group}.image_size is {size}, must be 1 to {LARGEST_IMAGE} pixels")


def check_patches(group: str, name: str, model: Any, size: int) -> None:
    """Raise ValueError if a ViT's patches do not fill an image: what is beyond the last one would be cut off."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and any(size % side for side in patch):
        side = max(patch)
        fits = f"{size - size % side} or {size - size % side + side}" if size > side else f"{side} or {2 * side}"
        raise ValueError(f"{group}.image_size is {size}, must be a multiple of {side}, the patches of '{name}': {fits}")


def check_args(group: str, model_args: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuse arguments of timm that are not known to describe an architecture and nothing else.

    A configuration may come from somebody else, and timm has arguments that read files and fetch from addresses.

    Args:
        group: what stands before `model_args` in a configuration.
        model_args: the arguments.
        allowed: those that may be given.

    Raises:
        ValueError: names the first that may not, and those that may.
    """
    for name, value in model_args.items():
        if name not in allowed:
            raise ValueError(
                f"{group}.model_args has '{name}', none of those that may be given: {', '.join(sorted(allowed))}"
            )
        several = isinstance(value, list | tuple)
        for each in value if several else [value]:
            if not isinstance(each, str | int | float | None):
                raise ValueError(
                    f"{group}.model_args.{name} is {value}, must be a number, a text, true, false, null, or a list "
                    "of these"
                )
            if several and isinstance(each, int | float) and not each > 0:
                raise ValueError(f"{group}.model_args.{name} is {value}, must be numbers above 0")


def create(group: str, name: str, pretrained: bool, model_args: Mapping[str, Any]) -> nn.Module:
    """A model of timm without classifier.

    Args:
        group: what stands before the fields' names in a configuration.
        name: which.
        pretrained: with timm's weights.
        model_args: further arguments of its constructor.

    Raises:
        ValueError: if there is none of this name, or it cannot be made like that.
    """
    import timm  # takes seconds, which only building a model is worth

    return _made(timm.create_model, group, name, pretrained, model_args)


def outline(group: str, name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """As `create`, on the device `meta`: shapes without numbers, in no time even for the largest model."""
    import timm.models

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _made(timm.models.create_model, group, name, False, model_args)


def _made(
    make: Callable[..., nn.Module], group: str, name: str, pretrained: bool, model_args: Mapping[str, Any]
) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(f"{group}.name: timm has no model '{name}'; similar names: {', '.join(close) or 'none'}")
    try:
        if pretrained:
            _check_weights(name)
        return make(name, pretrained=pretrained, num_classes=0, **model_args)
    except Exception as error:  # timm checks little: what does not fit fails anywhere, in any way
        if pretrained and isinstance(error, OSError):  # of the network, the hub or its cache
            raise ValueError(
                f"{group}.pretrained: the weights of '{name}' are not on this disk and cannot be fetched "
                f"({hub.in_short(error)}); give a file of them: --{group}.weights FILE.safetensors"
            ) from error
        raise ValueError(f"{group}.name, {group}.model_args: timm cannot make '{name}' ({reason(error)})") from error


def _check_weights(name: str) -> None:
    """Raise OSError if the weights of a model are neither on this disk nor on the hub, where timm has them there."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or config.file or hub.cached(config.hf_hub_id):
        return
    if (why := hub.unreachable(config.hf_hub_id)) is not None:
        raise OSError(why)


def reason(error: Exception) -> str:
    """Why a model could not be made or used."""
    text = str(error).split("\n")[0]
    return text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"
