"""A folder with a finished run that can be given away: model card, configuration, numbers, split and clients' weights.

It is a run folder as well: `fedlscl predict` classifies with it. What is left out are the images that a client kept for
replay and all that was computed from them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fedlscl.federation import store as checkpoint
from fedlscl.federation.store import Store
from fedlscl.files import content_of, sha256, write_atomically
from fedlscl.run.card import CARD, card
from fedlscl.run.configuration import PATHS
from fedlscl.run.folder import CHECKPOINT, CONFIG, SPLIT, SUMMARY, RunFolder
from fedlscl.run.splitting import read_map
from fedlscl.run.summary import Summary

LEFT_OUT = ("buffer", "candidates", "snapshot.", "upcoming.", "kept.")
"""What begins the names, in a client's memory, of what stays: which images it keeps, and outputs for them."""

SYNTHETIC = ("images", "logits", "classes", "generator.", "teacher.")
"""What begins the names of received tensors that are images which a server made, what makes them, or what belongs to
them: no client classifies with these."""


def publish(run_dir: Path, folder: Path) -> list[Path]:
    """Write what may be given away of a finished run into a new folder.

    Args:
        run_dir: the run's folder.
        folder: where to write; new or empty, or one that this has written, which is then written anew.

    Returns:
        The files, the card first.

    Raises:
        FileNotFoundError: if there is no finished run in `run_dir`.
        ValueError: if something in `run_dir` is damaged, or `folder` holds other files.
    """
    if content_of(run_dir / SUMMARY) is None:
        raise FileNotFoundError(
            f"run_dir '{run_dir}' holds no finished run, without {SUMMARY}; give the folder that `fedlscl fit` named"
        )
    files = RunFolder(run_dir)
    sums = files.sums()
    config = yaml.safe_load(files.needed(CONFIG, sums))
    split = files.needed(SPLIT, sums)
    summary = Summary.read(run_dir / SUMMARY)
    clients = {
        index: weights
        for index in range(len(json.loads(split)["split"]["clients"]))
        if (weights := _weights(run_dir / CHECKPOINT, index)) is not None
    }
    if not clients:
        raise ValueError(f"run_dir '{run_dir}' holds no client's weights: they are elsewhere")
    _empty(folder)
    summary = replace(summary, config=_without_places(summary.config), overrides=_names_alone(summary.overrides))
    contents = {
        SPLIT: split,
        CONFIG: yaml.safe_dump(_without_places(config), sort_keys=False).encode(),
        SUMMARY: summary.to_json().encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    kept = Store(folder / CHECKPOINT)
    for index, tensors in clients.items():
        kept.write(checkpoint.client_name(index), tensors)
    kept.commit({"files": {name: sha256(content) for name, content in contents.items()}})
    text = card(summary, read_map(folder), {index: _parameters(tensors) for index, tensors in clients.items()})
    write_atomically(folder / CARD, text.encode())
    states = sorted((folder / CHECKPOINT).iterdir())
    return [folder / CARD, *(folder / name for name in contents), *states]


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Send a folder that `publish` has written to the Hugging Face Hub, or to the hub that HF_ENDPOINT names.

    Args:
        folder: the folder.
        repo: the model's name there, such as `me/digits-fed_ridge`; it is made if it is not there.
        private: whether nobody else may see it, where it is made.

    Returns:
        Where it can be seen.

    Raises:
        ValueError: if nobody is logged in, or the name cannot be one.
        ConnectionError: if the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if (token := get_token()) is None:
        raise ValueError(
            f"push to '{repo}': nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN; "
            f"'{folder}' is ready"
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        # the name by which it was made may have got its owner there
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="fedlscl publish")
    except HFValidationError as error:
        raise ValueError(f"push is '{repo}', must be a name on the Hub, as owner/name: {error}") from error
    except Exception as error:  # whatever the hub, its library and the network between them come up with
        why = " ".join(str(error).split())
        raise ConnectionError(f"push to '{repo}' failed: {why}; '{folder}' is ready") from error
    return str(made)


def _weights(folder: Path, index: int) -> dict[str, Tensor] | None:
    """What a client classifies with, None where its state is not here; its memory is that of one without images."""
    try:
        state = checkpoint.read(folder, checkpoint.client_name(index))
    except KeyError:
        return None
    memory = {name: tensor for name, tensor in state.items() if name.startswith("memory.")}
    begin = (*LEFT_OUT, *(f"received.{name}" for name in SYNTHETIC))
    left = {name for name in memory if name.removeprefix("memory.").startswith(begin)}
    nothing = torch.empty(0, dtype=torch.int64)
    given = {name: tensor for name, tensor in state.items() if name not in left}
    return {**given, "memory.buffer": nothing, "memory.candidates": nothing}


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def _without_places(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration in which of every path its last part alone is left."""
    found = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        found[key] = _without_places(value, name) if isinstance(value, Mapping) else _name_alone(name, value)
    return found


def _names_alone(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _name_alone(name, value) for name, value in fields.items()}


def _name_alone(field: str, value: Any) -> Any:
    if value is None or not field.startswith(PATHS):
        return value
    if field == "data.cache_dir":
        return None
    return [*map(_last, value)] if isinstance(value, list) else _last(value)


def _last(path: Any) -> Any:
    return Path(path).name if isinstance(path, str) else path


def _empty(folder: Path) -> None:
    """Refuse a folder with anything else in it, and empty one that `publish` has written."""
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()}
    if foreign := sorted(there - {CARD, CONFIG, SPLIT, SUMMARY, CHECKPOINT}):
        raise ValueError(f"out is '{folder}', which holds other files ({foreign[0]}); give a new or an empty folder")
    if there and CARD not in there:
        raise ValueError(f"out is '{folder}', which holds a run; give a new or an empty folder")
    for path in [*(folder / CHECKPOINT).glob("*"), *folder.iterdir()]:
        if path.is_dir() and path.name == CHECKPOINT:
            path.rmdir()
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        else:
            path.unlink()
