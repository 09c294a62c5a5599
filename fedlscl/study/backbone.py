"""The foundation model of a study: the best that is there, and why it is taken."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fedlscl.checks import path as path_of
from fedlscl.models import hub
from fedlscl.models.vit import FrozenViT

WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""timm's names of plain ViTs by their width."""

MEASURED = 16
"""Images of which the passes are timed."""


class Backbone(NamedTuple):
    """A foundation model, and the small model that goes with it.

    Args:
        fields: of `backbone` in a configuration; without an image size if that is free.
        cnn: of `cnn`.
        why: what was taken and why, in a line.
    """

    fields: dict[str, Any]
    cnn: dict[str, Any]
    why: str


def choose(weights: str | None, choices: Mapping[str, Any], gpu: bool) -> Backbone:
    """Take the file that is named, or of timm's those in the local cache, or on the hub, or the one that is shipped.

    Args:
        weights: a safetensors file, or None.
        choices: `backbones`, `cnn` and `shipped` of choices.yaml.
        gpu: whether large models are worth it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of no plain ViT of timm that can be told by its name or its tensors.
    """
    if weights is not None:
        file = file_of(weights)
        name = name_of(file)
        return Backbone({"name": name, "weights": str(file.resolve())}, choices["cnn"], f"{name}, of the file given")
    names = [entry["name"] for entry in choices["backbones"] if gpu or not entry["gpu"]]
    for name in names:
        if hub.cached(f"timm/{name}"):
            return Backbone({"name": name, "pretrained": True}, choices["cnn"], f"{name}, from the local hub cache")
    reason = hub.unreachable(f"timm/{names[0]}")
    if reason is None:
        return Backbone({"name": names[0], "pretrained": True}, choices["cnn"], f"{names[0]}, from Hugging Face's hub")
    shipped = choices["shipped"]
    return Backbone(
        dict(shipped["backbone"]),
        shipped["cnn"],
        f"the shipped {shipped['backbone']['weights']}, pretrained on drawn signs at 32 px, since --weights names no "
        f"file, no ViT is in the local hub cache, and the hub gives none ({reason}); of photos it knows nothing",
    )


def file_of(weights: str) -> Path:
    """The file that a user names.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (file := path_of(weights, "weights")).is_file():
        raise FileNotFoundError(f"weights: there is no file '{weights}'")
    return file


def name_of(file: Path) -> str:
    """timm's name of the ViT whose weights a file holds: by the file's name, or else by the shapes of its tensors.

    Raises:
        ValueError: if neither tells.
    """
    import timm

    parts = file.name.removesuffix(".safetensors").split(".")
    known = {*timm.list_models(), *timm.list_pretrained()}
    for count in range(len(parts), 0, -1):
        if (name := ".".join(parts[:count])) in known:
            return name
    try:
        with safe_open(file, "pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"weights: '{file}' is not a safetensors file, the only kind that is read ({error})"
        ) from error
    patch = shapes.get("patch_embed.proj.weight", (0, 0, 0, 0))
    depth = len({name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)})
    guess = f"vit_{WIDTHS.get(patch[0], '?')}_patch{patch[-1]}_224"
    if not timm.is_model(guess) or depth != {1024: 24}.get(patch[0], 12):
        raise ValueError(
            f"weights: neither the name nor the tensors of '{file}' tell which ViT of timm it is of ({depth} blocks, "
            f"width {patch[0]}, patches of {patch[-1]} px); call the file as timm calls the model, such as "
            "vit_small_patch16_224.augreg_in21k.safetensors"
        )
    return guess


def seconds_per_image(fields: Mapping[str, Any], image_size: int, threads: int) -> float:
    """How long the frozen ViT takes for an image on this machine; it is built to be measured, and to be checked.

    Args:
        fields: of `backbone` in a configuration.
        image_size: side in pixels.
        threads: of torch.

    Raises:
        FileNotFoundError: its weights are not there.
        ValueError: they are not its weights, or it is none that can be used.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vit = FrozenViT(**{**fields, "image_size": image_size})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vit.to(device)
        images = torch.zeros((MEASURED, 3, image_size, image_size), dtype=torch.uint8, device=device)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            vit(images)[0, 0].item()  # waits for the device
            taken.append(time.perf_counter() - start)
        return min(taken[1:]) / MEASURED
    finally:
        torch.set_num_threads(before)


def tokens(image_size: int) -> float:
    """What a pass takes in proportion to, by the side of the image: the number of patches."""
    return float(image_size**2)


def sizes_of(backbone: Backbone, budgets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The budgets, with the image size of a backbone that has one only."""
    own = backbone.fields.get("image_size")
    fitted = [{**budget, "image_size": own or budget["image_size"]} for budget in budgets]
    return [budget for n, budget in enumerate(fitted) if budget not in fitted[:n]]
