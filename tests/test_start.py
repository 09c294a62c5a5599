"""What is imported before anything is done: nobody waits for what is not needed, nor does a message of Flower."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NEVER = {"wandb", "sklearn", "jinja2", "timm", "sweeps"}
"""What no start needs. Lightning brings torch and, by torchmetrics, torchvision and matplotlib with it."""

LIGHTNING = {"torch", "lightning", "torchmetrics", "torchvision", "matplotlib", "scipy"}
OVERVIEW = "import sys; sys.argv = ['fedlscl', '--help']; from fedlscl.cli import main; main()"
SHORT = "import sys; from fedlscl.cli import main; main(['fit', '--help']); main(['settings']); main(['methods'])"
FIT = "import sys; sys.argv = ['fedlscl', 'fit', '--help', 'all']; from fedlscl.cli import main; main()"
CONFIGURED = (
    "from fedlscl.run.configuration import Configuration\n"
    "Configuration(['--model=FedLSCL', '--model.continual=Replay', '--server=ExactO2D', '--data.source=Digits']).sha256"
)
NAMED = (
    "from fedlscl.run.names import Parser; from fedlscl.client import Client\n"
    "parser = Parser(); parser.add_subclass_arguments(Client, 'model')\n"
    "parser.parse_args(['--model', 'GLFCClient', '--model.continual', 'NoReplay'])\n"
)
MESSAGE = "import fedlscl.deployment.flower.client"

# Lightning takes seconds: one interpreter imports it, and forks a process for each script
FORKS = """
import json, os, sys, traceback
import lightning.pytorch.cli

folder, *scripts = sys.argv[1:]
sys.argv[1:] = []
for number, script in enumerate(scripts):
    child = os.fork()
    if not child:
        code = 1
        try:
            exec(script, {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with open(f"{folder}/{number}.json", "w") as file:
                json.dump([code, list(sys.modules)], file)
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """The modules that a process which has Lightning has after one of the scripts."""
    folder, scripts = tmp_path_factory.mktemp("imported"), (FIT, CONFIGURED, NAMED, MESSAGE)
    done = subprocess.run([sys.executable, "-c", FORKS, folder, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def modules(script: str) -> set[str]:
        code, names = json.loads(Path(folder, f"{scripts.index(script)}.json").read_text())
        assert code == 0, done.stderr
        return set(names)

    return modules


@pytest.mark.parametrize("script", ["import fedlscl", "import fedlscl.cli", OVERVIEW, SHORT])
def test_the_first_look_costs_no_torch(script: str) -> None:
    script = f"import atexit, sys; atexit.register(lambda: print('imported', *sys.modules))\n{script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = set(done.stdout.rpartition("imported ")[2].split())
    assert "fedlscl" in there
    assert not (NEVER | LIGHTNING | {"numpy"}) & there


@pytest.mark.parametrize("script", [FIT, CONFIGURED])
def test_a_command_line_is_parsed_without_what_runs_it(script: str, imported: Callable[[str], set[str]]) -> None:
    there = imported(script)
    assert "fedlscl.run.configuration" in there
    assert not NEVER & there
    assert not {"fedlscl.run.plots", "fedlscl.run.sweep", "fedlscl.methods.mfcl"} & there
    light = {"fedlscl.analysis", "fedlscl.analysis.commands"}  # which import the rest when they are called
    assert not [name for name in there - light if name.startswith(("fedlscl.analysis", "fedlscl.deployment"))]


def test_of_the_methods_only_what_is_named_is_imported(imported: Callable[[str], set[str]]) -> None:
    there = imported(NAMED)
    assert "fedlscl.methods.glfc" in there
    assert not {f"fedlscl.methods.{name}" for name in ("mfcl", "target", "pilora", "fed_lscl")} & there


def test_a_message_of_flower_imports_only_what_answers_it(imported: Callable[[str], set[str]]) -> None:
    pytest.importorskip("flwr")
    there = imported(MESSAGE)
    assert "fedlscl.deployment.flower.client" in there
    assert "fedlscl.deployment.flower.server" not in there
    assert not NEVER & there
    assert not {"fedlscl.cli", "fedlscl.run.plots", "fedlscl.run.sweep", "fedlscl.run.predict"} & there
    assert not [name for name in there if name.startswith(("fedlscl.analysis", "fedlscl.methods"))]
