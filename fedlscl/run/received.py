"""What the server of a run received, kept in the run folder for `fedlscl audit`, and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedlscl.files import Damaged, make_folder, write_atomically
from fedlscl.messages import Received, Upload
from fedlscl.server import Total

RECEIVED = "received"
"""The folder of a run in which that is kept."""

_NAME = re.compile(r"round-(\d+)-(client|sum)((?:-\d+)+)\.safetensors")


@dataclass(frozen=True)
class Sight:
    """What the server saw of some clients in one round.

    `clients` is one whose upload it is, or all of those whose terms it is the sum of, if `summed`; `samples` is the
    number of their training images.
    """

    task: int
    round: int
    clients: tuple[int, ...]
    summed: bool
    samples: int
    tensors: Mapping[str, Tensor]


def keep(folder: Path, task: int, round: int, sent: Received | Total) -> None:
    """Write what the server received in a round.

    Args:
        folder: of the run.
        task: of the round.
        round: its number.
        sent: the uploads, or the sums where these are secure.
    """
    make_folder(folder / RECEIVED)
    if isinstance(sent, Total):
        who = "-".join(map(str, sent.clients))
        found = {f"sum-{who}": Upload(0, task, round, sent.samples, sent.tensors)}
    else:
        found = {f"client-{client}": upload for client, upload in sent.items()}
    for name, message in found.items():
        write_atomically(folder / RECEIVED / f"round-{round}-{name}.safetensors", message.to_bytes())


def kept(folder: Path) -> list[Sight]:
    """All that was kept of a run, by round and client.

    Raises:
        FileNotFoundError: if nothing was.
        Damaged: if a file is no message.
    """
    found = []
    for path in sorted((folder / RECEIVED).glob("*.safetensors")):
        if (name := _NAME.fullmatch(path.name)) is None:
            continue
        content = path.read_bytes()
        try:
            tensors = load(content)
            said = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            task, samples = int(said["task"]), int(said["samples"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise Damaged(f"'{path}' is damaged ({error}): put back a copy, or run the run again") from error
        clients = tuple(int(one) for one in name[3].split("-")[1:])
        found.append(Sight(task, int(name[1]), clients, name[2] == "sum", samples, tensors))
    if not found:
        raise FileNotFoundError(
            f"run_dir '{folder}' does not hold what its server received; run it into another folder with "
            f"--tracking.received true: fedlscl fit --config {folder / 'config.yaml'} --tracking.received true "
            "--run_dir NEW"
        )
    return sorted(found, key=lambda sight: (sight.round, sight.clients))
