"""A run that is killed again and again, for real, and in the end has the numbers of one that was not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

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

# One interpreter imports everything once and forks a process per attempt: SIGKILL finds it in the middle of its work
FORKS = """
import os, random, signal, sys, time, warnings
from pathlib import Path
from fedlscl import cli
import fedlscl.methods.fed_lscl, lightning.pytorch.loops, matplotlib.pyplot, timm, sklearn.datasets

config, whole, killed, seed, record = sys.argv[1:]
sys.argv[1:] = []
folder = Path(killed)


def start(run_dir):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            cli.main(["fit", "--config", config, "--run_dir", run_dir])
            code = 0
        finally:
            os._exit(code)
    return child


began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
took = time.monotonic() - began
rng = random.Random(int(seed))
for attempt in range(40):
    child = start(killed)
    # 8 attempts are cut short, wherever they are; each may live a little longer than a round takes
    limit = time.monotonic() + (rng.uniform(0.1, 0.45) * took if attempt < 8 else 1e9)
    while time.monotonic() < limit and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    else:
        if time.monotonic() < limit:
            break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = folder / "checkpoint" / "state.json"
    with open(record, "a") as file:
        file.write(f"{state.read_text() if state.exists() else '{}'}\\n")
else:
    raise SystemExit("never finished")
"""


def test_a_run_killed_again_and_again_gives_the_same_numbers(tmp_path: Path) -> None:
    config, record = tmp_path / "digits.yaml", tmp_path / "kills"
    config.write_text(DIGITS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seed = random.Random(0).randrange(1000)
    subprocess.run(
        [sys.executable, "-c", FORKS, str(config), str(whole), str(killed), str(seed), str(record)],
        check=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    kills = [json.loads(line).get("progress", {}).get("round", 0) for line in record.read_text().splitlines()]
    assert len(kills) >= 3
    assert max(kills) >= 1
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert one["accuracy"] == other["accuracy"]
    assert lasting(one) == lasting(other)
    assert lasting_rows(whole) == lasting_rows(killed)
    assert not list(killed.rglob("*.tmp"))
    files = sorted((whole / "checkpoint").glob("*.safetensors"))
    assert {path.name[: len("client-0")] for path in files} == {"client-0", "client-1", "client-2"}
    for path in files:
        assert (killed / "checkpoint" / path.name).read_bytes() == path.read_bytes()
