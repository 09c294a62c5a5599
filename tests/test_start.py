"""What is imported before anything is done: nobody waits for what is not needed, nor does a message of Flower."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEVER = {"wandb", "sklearn", "jinja2", "timm", "sweeps"}
"""What no start needs. Lightning brings torch and, by torchmetrics, torchvision and matplotlib with it."""

LIGHTNING = {"torch", "lightning", "torchmetrics", "torchvision", "matplotlib", "scipy"}
OVERVIEW = "import sys; sys.argv = ['fedlscl', '--help']; from fedlscl.cli import main; main()"
FIT = "import sys; sys.argv = ['fedlscl', 'fit', '--help']; from fedlscl.cli import main; main()"
CONFIGURED = (
    "from fedlscl.run.configuration import Configuration\n"
    "Configuration(['--model=FedLSCL', '--model.continual=Replay', '--server=ExactO2D', '--data.source=Digits']).sha256"
)


def imported(script: str) -> set[str]:
    """The modules that a process has after `script`, however that ends."""
    script = f"import atexit, sys; atexit.register(lambda: print('imported', *sys.modules))\n{script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported ")[2].split())


@pytest.mark.parametrize("script", ["import fedlscl", "import fedlscl.cli", OVERVIEW])
def test_the_first_look_costs_no_torch(script: str) -> None:
    assert not (NEVER | LIGHTNING | {"numpy"}) & imported(script)


@pytest.mark.parametrize("script", [FIT, CONFIGURED])
def test_a_command_line_is_parsed_without_what_runs_it(script: str) -> None:
    there = imported(script)
    assert "lightning" in there
    assert not NEVER & there
    assert not {"fedlscl.run.plots", "fedlscl.run.sweep", "fedlscl.methods.mfcl"} & there
    assert not [name for name in there if name.startswith(("fedlscl.analysis", "fedlscl.deployment"))]


def test_a_message_of_flower_imports_only_what_answers_it() -> None:
    pytest.importorskip("flwr")
    there = imported("import fedlscl.deployment.flower.client")
    assert "fedlscl.deployment.flower.server" not in there
    assert not NEVER & there
    assert not {"fedlscl.cli", "fedlscl.run.plots", "fedlscl.run.sweep", "fedlscl.run.predict"} & there
    assert not [name for name in there if name.startswith(("fedlscl.analysis", "fedlscl.methods"))]
