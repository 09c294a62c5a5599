"""Flower for real: SuperLink, SuperNodes and simulated nodes as processes, with TLS and node authentication."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import lasting

pytest.importorskip("flwr")
pytest.importorskip("ray")

from fedlscl.cli import main

pytestmark = pytest.mark.processes

LONG = 1800
"""Seconds after which something hangs, however busy the machine is."""

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

DIGITS = """
setting: digits
method: fed_lscl
seed_everything: 3
threads: 1
data:
  source: {class_path: Digits}
  split: {clients: 2, tasks: 1, classes_per_task: 3, private_classes: 1, public_classes: 2, min_public_images: 4,
          train_per_class: 30, test_per_class: 10}
backbone: {name: vit_tiny_patch16_224, image_size: 16,
           model_args: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
cnn: {name: resnet18, features: 16, image_size: 16, model_args: {channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}}
federation: {rounds: 1}
trainer: {accelerator: cpu}
tracking: {wandb_mode: disabled}
model:
  class_path: FedLSCL
  init_args: {epochs: 1, block: 1, rank: 2, buffer_size: 3,
              continual: {class_path: Replay, init_args: {passes: 1}}}
server: {class_path: ExactO2D}
"""


@pytest.fixture(scope="module")
def deploy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy", EXPERIMENTS / "deploy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deploy"] = module
    spec.loader.exec_module(module)
    module.START_SECONDS = LONG
    return module


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the setting and of its run in one process."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "setting.yaml").write_text(DIGITS)
    return folder


@pytest.fixture
def setting(one: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return one / "setting.yaml"


@pytest.fixture
def expected(one: Path, setting: Path, command_line: None) -> dict[str, Any]:
    """The numbers of one process, which has finished when the second test asks."""
    main(["fit", "--config", str(setting), "--run_dir", str(one / "run")])
    return lasting(json.loads((one / "run" / "summary.json").read_text()))


@pytest.fixture(autouse=True)
def alert(deploy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask about a run, which takes a process, once its summary is there and seldom before."""

    def sleep(seconds: float) -> None:
        if seconds < 1:
            return time.sleep(seconds)
        for _ in range(300):
            if list(tmp_path.glob("apart/server/runs/*/summary.json")):
                break
            time.sleep(0.2)
        return time.sleep(1)  # the process of the server's app has yet to end

    monkeypatch.setattr(deploy, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))


def ended(deploy: ModuleType, deployed: Any) -> dict[str, Any]:
    """What Flower says about a run that has gone from its beginning to its end."""
    run_id = deployed.run()
    deploy.time.sleep(15)
    status: dict[str, Any] = deployed.wait(run_id)
    return status


def of_the_server(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "server" / "runs").glob("*/summary.json")
    return lasting({**json.loads(path.read_text()), "nodes": {}})  # in one process there are none


def test_separate_processes_end_with_the_numbers_of_one_and_strangers_stay_outside(
    deploy: ModuleType, setting: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    with deploy.Deployment(tmp_path / "apart", ["--config", str(setting)], timeout=LONG) as deployed:
        stranger = tmp_path / "apart" / "client-9"
        deploy.node_key(stranger / "node")  # which nobody has registered
        deployed.start_node("client-9", client=1, data=str(tmp_path / "apart" / "client-1"))
        for index in range(2):
            deployed.register(f"client-{index}")
            deployed.start_node(f"client-{index}")
        status = ended(deploy, deployed)
        refused = deployed.log("client-9")
    assert of_the_server(tmp_path / "apart") == expected
    (path,) = (tmp_path / "apart" / "server" / "runs").glob("*/summary.json")
    assert set(json.loads(path.read_text())["nodes"]) == {"0", "1"}
    assert not (stranger / "runs").exists()
    assert "SuperNode ID" not in refused
    assert "Failed to activate SuperNode" in refused  # which differs from the others in its key alone
    # each node's state is in its own folder, and the payload is part of what Flower has counted
    assert [len(list((tmp_path / "apart").glob(f"client-{n}/runs/*/client-{n}"))) for n in range(2)] == [1, 1]
    assert status["network-traffic"]["inbound-bytes"] > expected["bytes_up"]["total"]
    assert status["network-traffic"]["outbound-bytes"] > expected["bytes_down"]["total"]


def test_simulated_nodes_end_with_the_numbers_of_one_process(
    deploy: ModuleType, setting: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    with deploy.Deployment(tmp_path / "apart", ["--config", str(setting)], timeout=LONG, simulate=2) as deployed:
        ended(deploy, deployed)
    assert of_the_server(tmp_path / "apart") == expected
