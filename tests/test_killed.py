"""A run that is killed again and again, for real, and in the end has the numbers of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import lasting, lasting_rows

DIGITS = """
setting: digits
method: fed_lscl
seed_everything: 3
threads: 1
data:
  source: {class_path: Digits}
  split: {clients: 3, tasks: 2, classes_per_task: 2, private_classes: 1, public_classes: 3, min_public_images: 4,
          train_per_class: 30, test_per_class: 10}
backbone: {name: vit_tiny_patch16_224, image_size: 16,
           model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
cnn: {name: resnet18, features: 16, image_size: 16, model_args: {channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}}
federation: {rounds: 3}
trainer: {accelerator: cpu}
tracking: {wandb_mode: disabled}
model:
  class_path: FedLSCL
  init_args: {epochs: 1, block: 1, rank: 2, buffer_size: 3,
              continual: {class_path: Replay, init_args: {passes: 1}}}
server: {class_path: ExactO2D}
"""

# One interpreter imports everything once and forks a process per attempt. A write is a file put in its place, forced
# onto the disk or removed: between two of them a SIGKILL leaves behind what one at any other moment would
FORKS = """
import json, os, signal, sys
from pathlib import Path
from fedlscl import cli
import fedlscl.methods.fed_lscl, lightning.pytorch.loops, matplotlib.pyplot, timm, sklearn.datasets

config, whole, killed, record = sys.argv[1:]
sys.argv[1:] = []
writes, deadly = [0], None  # writes after each manifest


def counted(write):
    def call(*args, **options):
        writes[-1] += 1
        if (len(writes) - 1, writes[-1]) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        result = write(*args, **options)
        if write is replace and Path(args[1]).name == "state.json":
            writes.append(0)
        return result

    return call


def attempt(run_dir, when):
    global deadly
    deadly = when
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        cli.main(["fit", "--config", config, "--run_dir", run_dir])
        Path(run_dir, "writes").write_text(json.dumps(writes))
        code = 0
    finally:
        os._exit(code)


replace = os.replace
for name in ("replace", "fsync", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
assert attempt(whole, None) == 0
first, *rounds, last = json.loads(Path(whole, "writes").read_text())
assert len(rounds) == 7  # a manifest before the first state, one for each round, and one when all is finished
# at the beginning, in the first round, and then each time elsewhere in the round after the next
for when in ((0, 2), (1, 3), *((1, 4 + 7 * n % (rounds[1] - 4)) for n in range(4))):
    code, state = attempt(killed, when), Path(killed, "checkpoint", "state.json")
    progress = json.loads(state.read_text())["progress"] if state.exists() else {}
    with open(record, "a") as file:
        file.write(json.dumps([code, progress.get("round", 0)]) + "\\n")
assert attempt(killed, None) == 0
"""


@pytest.mark.processes
def test_a_run_killed_again_and_again_gives_the_same_numbers(tmp_path: Path) -> None:
    config, record = tmp_path / "digits.yaml", tmp_path / "kills"
    config.write_text(DIGITS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(config), str(whole), str(killed), str(record)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes, rounds = zip(*map(json.loads, record.read_text().splitlines()), strict=True)
    assert set(codes) == {-signal.SIGKILL}
    assert rounds == (0, 0, 1, 2, 3, 4)  # complete at each kill, of 6
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert one["accuracy"] == other["accuracy"]
    assert lasting(one) == lasting(other)
    assert lasting_rows(whole) == lasting_rows(killed)
    assert not list(killed.rglob("*.tmp"))
    files = sorted((whole / "checkpoint").glob("*.safetensors"))
    # and what uploads are compared with
    assert {path.name[: len("client-0")] for path in files} == {"client-0", "client-1", "client-2", "usual.6."}
    for path in files:
        assert (killed / "checkpoint" / path.name).read_bytes() == path.read_bytes()
