"""W&B's own commands and an online run, against a server that answers as W&B's does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import SETTING
from test_cli import METHOD
from wandb_server import ENTITY, PROJECT, SWEEP, WandbServer


@pytest.mark.processes
def test_a_sweep_goes_through_wandb_sweep_and_wandb_agent_to_its_numbers(tmp_path: Path, cache: Path) -> None:
    """Every metric of every run arrives, with the parameters that the server drew."""
    (tmp_path / "experiments").mkdir()
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    content["tracking"] = {"wandb_mode": "auto"}
    (tmp_path / "experiments" / "tiny.yaml").write_text(yaml.safe_dump(content))
    sweep = yaml.safe_load((Path(__file__).parent.parent / "sweeps" / "vit_block.yaml").read_text())
    sweep["command"] = [word for word in sweep["command"] if "methods" not in word]
    sweep["parameters"] = {"model.block": {"values": [1]}, "seed_everything": {"value": 1999}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    scripts = Path(sys.executable).parent
    with WandbServer() as server:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parent),
            "HOME": str(tmp_path),
            "FEDLSCL_SETTING": "tiny",
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_AGENT_REPORT_INTERVAL": "1",
        }

        def wandb(*words: str) -> str:
            done = subprocess.run(
                [scripts / "wandb", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return done.stdout + done.stderr

        shown = wandb("sweep", "sweep.yaml")
        assert SWEEP in shown
        assert server.sweep == sweep
        shown = wandb("agent", f"{ENTITY}/{PROJECT}/{SWEEP}")
    assert server.unknown == []
    assert "W&B failed, the run goes on" in shown  # that server keeps no tables
    assert server.ended == {"run0": 0}
    (folder,) = (tmp_path / "runs").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model"]["init_args"]["block"], config["seed_everything"]) == (1, 1999)
    assert server.configs["run0"]["model"]["init_args"]["block"] == 1
    with (folder / "metrics.csv").open() as file:
        kept = {
            (int(row["task"]), int(row["round"]), row["metric"]): float(row["value"]) for row in csv.DictReader(file)
        }
    logged = {
        (line["task"], line["round"], name): value
        for line in server.history["run0"]
        if "task" in line
        for name, value in line.items()
        if "/" in name
    }
    assert logged == pytest.approx(kept, abs=0, rel=0, nan_ok=True)
    assert {name.partition("/")[0] for _, _, name in kept} == {"client", "server", "eval", "task"}
