"""Classes by their short names: found wherever they are, and one of each name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import SETTING

import fedlscl
from fedlscl.cli import main
from fedlscl.client import Client
from fedlscl.continual import Continual
from fedlscl.data.source import Source
from fedlscl.run.fields import short
from fedlscl.run.names import defined
from fedlscl.server import Server

pytestmark = pytest.mark.usefixtures("command_line")

MODEL = {"class_path": "FedLSCL", "init_args": {"continual": {"class_path": "Replay"}}}


@pytest.fixture
def setting(tmp_path: Path) -> str:
    return write(tmp_path / "setting.yaml", {**SETTING, "model": MODEL, "server": {"class_path": "ExactO2D"}})


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line that is wrong is answered."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main(["fit", *words, "--print_config"])
    assert end.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def subclasses(base: type) -> Iterator[type]:
    for found in base.__subclasses__():
        yield found
        yield from subclasses(found)


def test_a_name_that_a_configuration_may_give_is_that_of_one_class() -> None:
    for module in pkgutil.walk_packages(fedlscl.__path__, "fedlscl."):
        if not module.name.startswith("fedlscl.deployment.flower"):
            importlib.import_module(module.name)
    there = {
        found
        for base in (Client, Server, Continual, Source)
        for found in subclasses(base)
        if found.__module__.startswith("fedlscl.") and not found.__name__.startswith("_")
    }
    assert len(there) > 30
    for found in there:
        assert defined()[found.__name__] == (found.__module__,), "another class of this package has the same name"


def test_what_is_dumped_says_short_names_and_a_full_path_of_ours_means_the_same(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed(capsys, "--config", setting)
    assert config["model"]["class_path"] == "FedLSCL"
    assert config["model"]["init_args"]["continual"]["class_path"] == "Replay"
    assert config["server"]["class_path"] == "ExactO2D"
    assert config["data"]["source"]["class_path"] == "helpers.Patterns"  # not ours
    full = {
        "model": {
            "class_path": "fedlscl.methods.fed_lscl.FedLSCL",
            "init_args": {"continual": {"class_path": "fedlscl.where.it.was.Replay"}},
        }
    }
    assert printed(capsys, "--config", setting, "--config", write(tmp_path / "full.yaml", full)) == config
    assert printed(capsys, "--config", setting, "--server", "fedlscl.methods.fed_lscl.ExactO2D") == config


def test_words_give_short_names(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "GLFCClient", "--server=GLFCServer", "--model.continual", "NoReplay", "--data.source=Digits"]
    config = printed(capsys, "--config", setting, *words)
    assert [config[name]["class_path"] for name in ("model", "server")] == ["GLFCClient", "GLFCServer"]
    assert config["model"]["init_args"]["continual"]["class_path"] == "NoReplay"
    assert config["data"]["source"]["class_path"] == "Digits"


@pytest.mark.parametrize("asked", [["--model.help", "FedMGPClient"], ["--model.help=FedMGPClient"]])
def test_help_for_a_class(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", *asked])
    assert end.value.code == 0
    assert "--model.local_length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "FedLSLC"], "model is 'FedLSLC', .*did you mean FedLSCL"),
        (["--model.class_path", "FedLSLC"], "model is 'FedLSLC', .*did you mean FedLSCL"),
        (["--data.source", "Digit"], "data.source is 'Digit', .*did you mean Digits"),
        (["--model.continual", "Repla"], "continual is 'Repla', .*did you mean Replay"),
        (["--model", "Isolated"], "model is 'Isolated', a class of another kind"),
        (
            ["--server", "Xyzzy"],
            "server is 'Xyzzy', must be a class of fedlscl or a full path; the pages in docs/methods name them$",
        ),
        (["--model.help", "FedLSLC"], "model is 'FedLSLC', .*did you mean FedLSCL"),
    ],
)
def test_an_unknown_name_is_told_in_a_line(
    setting: str, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = told(capsys, "--config", setting, *words).splitlines()
    assert re.match(f"fedlscl: {complaint}", line), line


@pytest.mark.parametrize("path", ["FedLSLC", "fedlscl.methods.fed_lscl.FedLSLC"])
def test_an_unknown_name_in_a_file(path: str, setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = write(tmp_path / "change.yaml", {"model": {"class_path": path}})
    (line,) = told(capsys, "--config", setting, "--config", change).splitlines()
    assert line.startswith("fedlscl: model is 'FedLSLC', must be")


def test_a_run_begun_with_full_paths_goes_on(
    setting: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlscl.run.experiment.Federation.run", lambda self, listener: (_ for _ in ()).throw(EOFError))
    words = ["fit", "--config", setting, f"--data.cache_dir={cache}", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="3"):
        main(words)
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text()
    assert "class_path: FedLSCL" in text
    path.write_text(
        text.replace(": FedLSCL", ": fedlscl.methods.fed_lscl.FedLSCL").replace(": Replay", ": fedlscl.a.Replay")
    )
    with pytest.raises(SystemExit, match="3"):  # and not refused
        main(words)
    path.write_text(text.replace(": FedLSCL", ": fedlscl.methods.fed_lscl.FedLSCLSums"))
    with pytest.raises(SystemExit, match="class_path: FedLSCLSums there, FedLSCL now"):
        main(words)


def test_only_class_paths_are_shortened() -> None:
    values = {
        "name": "fedlscl.a.B",
        "class_path": "fedlscl.a.B",
        "list": [{"class_path": "other.a.B"}, 3],
        "none": None,
    }
    assert short(values) == {**values, "class_path": "B"}
    assert short({"model.class_path": "fedlscl.a.B"}) == {"model.class_path": "B"}
