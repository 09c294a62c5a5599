"""Weights of a model of timm from a safetensors file: found, told apart by their content, checked, made to fit."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlscl.checks import path as path_of
from fedlscl.models.create import reason

SHIPPED = Path(__file__).parent / "weights"


def weights_sha256(group: str, weights: str | Mapping[str, str] | None) -> str | None:
    """What tells the content of files of weights apart; None where none is given.

    Args:
        group: what stands before `weights` in a configuration.
        weights: a path or the name of a shipped file, or one for each of several models, by the model's name.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if weights is None or weights == {}:
        return None
    if isinstance(weights, str):
        with find_weights(group, weights).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    sums = {name: weights_sha256(group, file) for name, file in sorted(weights.items())}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def find_weights(group: str, weights: str) -> Path:
    """The file that is meant.

    Raises:
        FileNotFoundError: if there is none, with those that are shipped.
    """
    for path in (path_of(weights, f"{group}.weights"), SHIPPED / weights):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(file.name for file in SHIPPED.glob("*.safetensors")))
    raise FileNotFoundError(f"{group}.weights: no file '{weights}', neither as a path nor among the shipped: {shipped}")


def load_weights(group: str, model: Any, weights: str) -> None:
    """Give a model of timm, made without classifier, all of its weights.

    Args:
        group: what stands before the fields' names in a configuration.
        model: the model. Patch and position embeddings of a ViT are resampled to its size.
        weights: a path or the name of a shipped file; a classifier in it is passed over.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, does not fit the model, or holds what is not finite.
    """
    path = find_weights(group, weights)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{group}.weights: '{path}' is not a safetensors file, the only kind that is read, or is damaged ({error})"
        ) from error
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{group}.weights: '{path}': tensor '{name}' holds NaN or infinite values")
    misfit = f"{group}.weights: '{path}' does not fit {group}.name, image_size and model_args"
    found = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    # timm's filter of a family of models resamples what depends on the size, and knows the layouts of other releases
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        found = found if convert is None else convert(found, model)
    except Exception as error:  # it takes the tensors for those of its family, and fails anywhere if they are not
        raise ValueError(f"{misfit}, or is of no model that timm knows ({reason(error)})") from error
    dropped = _classifiers(model)
    state = {name: tensor for name, tensor in found.items() if not name.startswith(dropped)}
    if problems := _misfits(state, model.state_dict()):
        more = f", and {len(problems) - 1} more like that" if problems[1:] else ""
        remedy = f"give the file of this model, or {group}.name and model_args of the file's"
        raise ValueError(f"{misfit}: {problems[0]}{more}; {remedy}")
    model.load_state_dict(state, strict=True)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """How the names of a classifier's tensors begin."""
    named: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _misfits(there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """In what tensors differ from those that a model wants."""
    problems = [
        f"'{name}' is {tuple(there[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in there and there[name].shape != tensor.shape
    ]
    problems += [f"'{name}' is not there" for name in wanted if name not in there]
    return problems + [f"'{name}' is there and not known here" for name in there if name not in wanted]
