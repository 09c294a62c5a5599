"""What a federation on Flower does about dead nodes, bad nodes and a dead server; prints what happened.

    python experiments/faults.py FOLDER

Three clients of the digits, one task of three rounds, as separate processes on this machine (see deploy.py):

nodes    in round 2 the node of client 2 is killed with SIGKILL while it trains, client 1 sends NaN and client 0
         trains on; in round 3 the node of client 2 is back, and client 1 sends bytes that are no message
server   SuperLink and server are killed with SIGKILL in the middle of round 2 and started again; the run must end
         with the numbers of a run in one process
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from deploy import BIN, HERE, Deployment
from torch import Tensor

from fedlscl.messages import Upload
from fedlscl.methods.fed_lscl import FedLSCL

TIMEOUT = 180.0  # seconds; long enough where other work shares the cores
WORDS = [
    f"--config={HERE / 'digits.yaml'}",
    *("--data.split.clients=3", "--data.split.tasks=1", "--data.split.classes_per_task=6"),
    *("--data.split.train_per_class=60", "--federation.rounds=3", "--model.epochs=1"),
    *("--threads=1", "--trainer.accelerator=cpu", "--tracking.wandb_mode=disabled"),
]


class Garbled(Upload):
    """Bytes that are no message."""

    def to_bytes(self) -> bytes:
        """No header, no tensors."""
        return b"\x80\x04\x95garbage"


class Bad(FedLSCL):
    """A client that sends NaN in round 2, and bytes that are no message in round 3."""

    def outgoing(self) -> dict[str, Tensor]:
        """In round 2 a weight is NaN."""
        sent = {name: tensor.detach().clone() for name, tensor in super().outgoing().items()}
        if self.round.number == 2:
            sent["weight"][0, 0] = torch.nan
        return sent

    def upload(self) -> Upload:
        """In round 3 garbage."""
        sent = super().upload()
        if self.round.number == 3:
            return Garbled(sent.client, sent.task, sent.round, sent.samples, sent.tensors)
        return sent


def nodes(folder: Path) -> None:
    """A node that dies and one that is bad."""
    with Deployment(folder, WORDS, TIMEOUT) as deployed:
        deployed.environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        for name in ("client-0", "client-1", "client-2"):
            deployed.register(name)
        deployed.start_node("client-0")
        deployed.start_node("client-1", more="words='--model faults.Bad'")
        deployed.start_node("client-2")
        run = deployed.run()
        wait_for(lambda: deployed.log("client-2").count("Receiving: train message") == 2)
        time.sleep(2)
        say("client 2 trains in round 2: SIGKILL to its node and all that it started")
        deployed.stop("client-2", signal.SIGKILL)
        wait_for(lambda: progress(folder)["round"] == 2)
        say("round 2 is over; the node of client 2 is started again")
        deployed.start_node("client-2")
        deployed.wait(run)
    summary = summary_of(folder)
    for entry in summary["skipped"]:
        say(f"left out of round {entry['round']}: client {entry['client']}, {entry['reason']}")
    left_out = {(entry["round"], entry["client"]) for entry in summary["skipped"]}
    if left_out != {(2, 1), (2, 2), (3, 1)}:
        raise SystemExit(f"left out were {left_out}")
    history = progress(folder)["history"]
    for entry in history:
        seen = [f"{values[0]:.1f}" for values in entry["accuracy"]["seen"]]
        senders = sorted(map(int, entry["bytes_up"]))
        say(f"round {entry['round']}: uploads sent by clients {senders}, accuracy in % {seen}")


def server(folder: Path) -> None:
    """A server that dies."""
    subprocess.run([BIN / "fedlscl", "fit", *WORDS, f"--run_dir={folder / 'one'}"], check=True, capture_output=True)
    expected = json.loads((folder / "one" / "summary.json").read_text())
    with Deployment(folder, WORDS, TIMEOUT) as deployed:
        for name in ("client-0", "client-1", "client-2"):
            deployed.register(name)
            deployed.start_node(name)
        deployed.run()
        wait_for(lambda: deployed.log("client-2").count("Receiving: train message") == 2)
        time.sleep(2)
        say(f"round 2 has begun, round {progress(folder)['round']} is on the disk: SIGKILL to SuperLink and server")
        deployed.stop("server", signal.SIGKILL)
        deployed.start_superlink()
        say("SuperLink started again, same run submitted again")
        deployed.wait(deployed.run())
    found = summary_of(folder)
    for name in ("accuracy", "bytes_up", "bytes_down", "skipped"):
        say(f"{name}: {'equal' if found[name] == expected[name] else 'DIFFERENT FROM'} to the run in one process")
    if any(found[name] != expected[name] for name in ("accuracy", "bytes_up", "bytes_down", "skipped")):
        raise SystemExit("the numbers differ")


def progress(folder: Path) -> dict[str, Any]:
    """How far the run on the server's disk has come."""
    for path in (folder / "server").glob("runs/*/checkpoint/state.json"):
        return dict(json.loads(path.read_text())["progress"])
    return {"round": 0}


def summary_of(folder: Path) -> dict[str, Any]:
    """The server's summary."""
    summary: dict[str, Any] = json.loads(next((folder / "server").glob("runs/*/summary.json")).read_text())
    return summary


def wait_for(happened: Any, limit: float = 900) -> None:
    """Wait until something has happened.

    Raises:
        TimeoutError: if it does not.
    """
    deadline = time.monotonic() + limit
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.5)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main() -> None:
    """Both."""
    folder = Path(sys.argv[1]).resolve()
    say("nodes")
    nodes(folder / "nodes")
    say("\nserver")
    server(folder / "server")


if __name__ == "__main__":
    main()
