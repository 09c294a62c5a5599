"""Flower for real: SuperLink, SuperNodes and simulated nodes as processes, with TLS and node authentication."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import warm
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
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("setting") / "setting.yaml"
    path.write_text(DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield path


def until_there(folder: Path) -> SimpleNamespace:
    """A clock for `deploy`: it asks about a run, which takes a process, once its summary is there and seldom before."""

    def sleep(seconds: float) -> None:
        if seconds < 1:
            return time.sleep(seconds)
        for _ in range(300):
            if list(folder.glob("server/runs/*/summary.json")):
                break
            time.sleep(0.2)
        return time.sleep(1)  # the process of the server's app has yet to end

    return SimpleNamespace(monotonic=time.monotonic, sleep=sleep)


class Ended(NamedTuple):
    """Two deployments that have gone from their beginning to their end."""

    apart: Path  # the folder of separate processes
    simulated: Path  # the folder of simulated nodes
    status: dict[str, Any]  # what Flower says about the separate ones
    refused: str  # what a stranger's node has written


@pytest.fixture(scope="module")
def ended(deploy: ModuleType, setting: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Both at the same time: each waits often, for processes that start and ask each other whether there is work."""
    folder, words = tmp_path_factory.mktemp("deployed"), ["--config", str(setting)]
    apart, simulated = folder / "apart", folder / "simulated"
    with pytest.MonkeyPatch.context() as patch:

        def wait(deployed: Any, run_id: int) -> dict[str, Any]:
            patch.setattr(deploy, "time", until_there(deployed.folder))
            deploy.time.sleep(15)
            status: dict[str, Any] = deployed.wait(run_id)
            return status

        separate = deploy.Deployment(apart, words, timeout=LONG)
        nodes = deploy.Deployment(simulated, words, timeout=LONG, simulate=2)
        first = tmp_path_factory.mktemp("commands")
        for deployed in (separate, nodes):
            deployed.environment["PATH"] = f"{first}{os.pathsep}{deployed.environment['PATH']}"
        with warm.commands(first, separate.environment), separate, nodes:
            of_nodes = nodes.run()
            deploy.node_key(apart / "client-9" / "node")  # which nobody has registered
            separate.start_node("client-9", client=1, data=str(apart / "client-1"))
            for index in range(2):
                separate.register(f"client-{index}")
                separate.start_node(f"client-{index}")
            status = wait(separate, separate.run())
            wait(nodes, of_nodes)
            refused = separate.log("client-9")
    return Ended(apart, simulated, status, refused)


@pytest.fixture
def expected(setting: Path, command_line: None, tmp_path: Path) -> dict[str, Any]:
    """The numbers of one process."""
    main(["fit", "--config", str(setting), "--run_dir", str(tmp_path / "run")])
    return lasting(json.loads((tmp_path / "run" / "summary.json").read_text()))


def of_the_server(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "server" / "runs").glob("*/summary.json")
    return lasting({**json.loads(path.read_text()), "nodes": {}})  # in one process there are none


def test_separate_processes_and_simulated_nodes_end_with_the_numbers_of_one_process(
    ended: Ended, expected: dict[str, Any]
) -> None:
    assert of_the_server(ended.apart) == expected
    assert of_the_server(ended.simulated) == expected
    # each node's state is in its own folder, and the payload is part of what Flower has counted
    assert [len(list(ended.apart.glob(f"client-{n}/runs/*/client-{n}"))) for n in range(2)] == [1, 1]
    assert ended.status["network-traffic"]["inbound-bytes"] > expected["bytes_up"]["total"]
    assert ended.status["network-traffic"]["outbound-bytes"] > expected["bytes_down"]["total"]


def test_strangers_stay_outside(ended: Ended) -> None:
    (path,) = (ended.apart / "server" / "runs").glob("*/summary.json")
    assert set(json.loads(path.read_text())["nodes"]) == {"0", "1"}
    assert not (ended.apart / "client-9" / "runs").exists()
    assert "SuperNode ID" not in ended.refused
    assert "Failed to activate SuperNode" in ended.refused  # which differs from the others in its key alone
