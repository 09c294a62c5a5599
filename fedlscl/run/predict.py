"""Classify image files with one client's global model of a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fedlscl.client import Client
from fedlscl.data.splits import Split
from fedlscl.federation import store as checkpoint
from fedlscl.files import content_of
from fedlscl.run.configuration import Configuration
from fedlscl.run.folder import CHECKPOINT, CONFIG, SPLIT, SUMMARY, RunFolder


class Prediction(NamedTuple):
    """The most likely class of one image among all that the client has learned."""

    image: str
    label: str
    probability: float


def predict(run_dir: Path, images: Sequence[str], client: int = 0) -> list[Prediction]:
    """Classify images.

    Args:
        run_dir: folder of a finished run.
        images: image files of any size; they are prepared as the run's data were.
        client: whose model, and whose classes.

    Raises:
        FileNotFoundError: if there is no finished run in `run_dir`, or no such image.
        Damaged: if a file of the run is missing, or is not what the run wrote.
        ValueError: if there is no such client, a file is not an image, or the weights are not the run's.
    """
    folder = RunFolder(run_dir)
    if content_of(run_dir / SUMMARY) is None:
        raise FileNotFoundError(f"run_dir '{run_dir}' holds no finished run; give the folder that `fedlscl fit` named")
    sums = folder.sums()
    folder.needed(CONFIG, sums)
    stored = json.loads(folder.needed(SPLIT, sums))
    split = Split.from_json(json.dumps(stored["split"]))
    if not 0 <= client < len(split.clients):
        raise ValueError(f"client is {client}, but the run has clients 0 to {len(split.clients) - 1}")
    if not split.clients[client].tasks:
        raise ValueError(f"client {client} of the run in '{run_dir}' is elsewhere, and its model with it")
    configuration = Configuration(["--config", str(run_dir / CONFIG)])
    body, source = _load(configuration, run_dir, client, len(stored["classes"])), configuration.source()
    now, then = body.vit.weights_sha256, stored.get("weights_sha256")
    if now and then and now != then:
        raise ValueError(
            f"the foundation model's weights are not those of the run in '{run_dir}' ({now[:12]} now, {then[:12]} "
            "then); put that file back in place"
        )
    learned = sorted(label for task in split.clients[client].tasks for label in task.classes)
    logits = []
    size = body.evaluation_batch_size
    for first in range(0, len(images), size):
        part = images[first : first + size]
        pixels = torch.stack([torch.from_numpy(source.decode(Path(path), stored["image_size"])) for path in part])
        with torch.no_grad():
            logits.append(body(pixels, body.precompute(pixels)).logits[:, learned])
    best = torch.cat(logits).softmax(dim=1).max(dim=1)
    return [
        Prediction(path, stored["classes"][learned[index]], probability)
        for path, index, probability in zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _load(configuration: Configuration, run_dir: Path, client: int, num_classes: int) -> Client:
    """The client's networks as the run left them, in evaluation mode."""
    model, vit, cnn = configuration.networks()
    body = model.assemble(vit, cnn, cnn.name_of(client), num_classes)
    body.load(checkpoint.read(run_dir / CHECKPOINT, checkpoint.client_name(client)))
    body.eval()
    return body
