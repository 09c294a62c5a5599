"""The command line: what a configuration becomes, how files overlay each other, and how mistakes are answered."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SETTING

from fedlscl.cli import main
from fedlscl.client import Client
from fedlscl.continual import NoReplay, Replay
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.methods.small_model import SmallModelClient
from fedlscl.run.configuration import Configuration
from fedlscl.run.experiment import Experiment
from fedlscl.server import FedAvg

ROOT = Path(__file__).parent.parent
METHOD: dict[str, Any] = {
    "method": "fed_lscl",
    "model": {
        "class_path": "FedLSCL",
        "init_args": {
            "epochs": 1,
            "batch_size": 7,
            "buffer_size": 3,
            "learning_rate": 0.002,
            "block": 2,
            "rank": 2,
            "continual": {
                "class_path": "Replay",
                "init_args": {"passes": 1, "lambda_e": 0.7, "lambda_w": 0.1},
            },
        },
    },
    "server": {"class_path": "ExactO2D", "init_args": {"strength": 0.3}},
}

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def setting(tmp_path: Path, cache: Path) -> str:
    """A configuration file with everything in it."""
    path = tmp_path / "setting.yaml"
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """The experiments that were to be run, and are not."""
    experiments: list[Experiment] = []
    monkeypatch.setattr(Experiment, "run", lambda self, console: experiments.append(self))
    return experiments


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The configuration that --print_config shows."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *words, "--print_config"])
    assert end.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


# ---- running


def test_fit_runs_and_a_second_time_shows_the_numbers(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--config", setting, "--run_dir", str(tmp_path / "run")]
    main(words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["setting"], summary["method"], summary["seed"]) == ("tiny", "fed_lscl", 7)
    assert len(summary["accuracy"]["seen"]["table1"]) == 2
    first = capsys.readouterr().out
    assert "task 2/2" in first
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    main(words)
    again = capsys.readouterr().out
    assert "This run is finished" in again
    table = first[first.index("fed_lscl on tiny") :].splitlines()[:8]
    assert "\n".join(table) in again


def test_the_configuration_reaches_the_parts(setting: str, built: list[Experiment]) -> None:
    main(["fit", "--config", setting, "--federation.clients_per_round", "2", "--threads", "1"])
    (experiment,) = built
    client, server = experiment.client, experiment.server
    assert isinstance(client, FedLSCL)
    assert (client.block, client.rank, client.epochs, client.batch_size, client.learning_rate) == (2, 2, 1, 7, 0.002)
    assert isinstance(client.continual, Replay)
    assert client.continual.weights == {"features": 0.7, "weights": 0.1}
    assert isinstance(server, ExactO2D)
    assert server.strength == 0.3
    assert (experiment.schedule.rounds, experiment.schedule.clients_per_round) == (1, 2)
    assert experiment.data.split.spec.clients == 3
    assert experiment.data.num_classes == 11
    assert experiment.vit.depth == 4
    assert experiment.cnn.model_args == {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
    assert experiment.tracking.wandb_mode == "disabled"
    assert torch.get_num_threads() == 1
    assert experiment.trainer(None) is not experiment.trainer(None)  # a fresh one each time
    assert experiment.trainer(None).accelerator.__class__.__name__ == "CPUAccelerator"
    assert experiment.config["model"]["init_args"]["block"] == 2
    assert not {"run_dir", "tracking", "config"} & set(experiment.config)


def test_one_seed_for_run_and_split(setting: str, built: list[Experiment]) -> None:
    for seed in ("7", "8"):
        main(["fit", "--config", setting, "--seed_everything", seed])
    assert [(e.seed, e.data.seed) for e in built] == [(7, 7), (8, 8)]
    assert built[0].data.split.sha256 != built[1].data.split.sha256


def test_a_run_without_a_name_finds_its_folder_again(setting: str, built: list[Experiment]) -> None:
    main(["fit", "--config", setting])
    main(["fit", "--config", setting, "--tracking.project", "another"])
    main(["fit", "--config", setting, "--model.init_args.rank", "3"])
    main(["fit", "--config", setting, "--run_dir", "here"])
    same, again, other, named = (str(experiment.run_dir) for experiment in built)
    assert same == again
    assert other != same
    assert all(name.startswith("runs/tiny-fed_lscl-seed7-") for name in (same, other))
    assert named == "here"
    assert str(Configuration(["--config", setting]).run_dir) == same


def test_the_first_look(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["-h"], ["--help"]):
        main(words)
        shown = capsys.readouterr().out
        assert "fedlscl fit --config" in shown
        assert "fedlscl predict" in shown
    with pytest.raises(SystemExit, match="unknown command 'train'"):
        main(["train"])


def test_help_names_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", str(ROOT / "experiments" / "digits.yaml"), "--method", "lorm", "--help", "all"])
    shown = capsys.readouterr().out
    for field in ("--run_dir", "--federation.rounds", "--federation.clients_per_round", "--data.split.clients",
                  "--backbone.name", "--cnn.features", "--server.alpha",
                  "--model.b_learning_rate", "--tracking.wandb_mode"):  # fmt: skip
        assert field in shown


def test_the_command_is_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedlscl", "fti"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(sys.executable).parent / "fedlscl"), run_name="__main__")
    assert end.value.code == "fedlscl: unknown command 'fti'; did you mean fit?"  # which Python shows, and ends with 1
    assert "usage: fedlscl fit" in capsys.readouterr().out


# ---- files over files


def test_the_printed_configuration_gives_itself(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], built: list[Experiment]
) -> None:
    words = ["--config", setting, "--model.init_args.learning_rate", "1e-5", "--data.split.dirichlet_alpha", "0.25"]
    config = printed(capsys, *words)
    assert config["model"]["init_args"]["learning_rate"] == 1e-5
    assert printed(capsys, "--config", write(tmp_path / "printed.yaml", config)) == config
    main(["fit", *words])
    main(["fit", "--config", str(tmp_path / "printed.yaml")])
    assert built[0].config == built[1].config


def test_the_saved_configuration_gives_the_same_run(setting: str, tmp_path: Path, built: list[Experiment]) -> None:
    main(["fit", "--config", setting])
    saved = write(tmp_path / "config.yaml", dict(built[0].config))
    main(["fit", "--config", saved, "--tracking.wandb_mode", "disabled"])
    assert built[1].config == built[0].config


def test_another_method_keeps_the_budget_of_the_setting(setting: str, tmp_path: Path, built: list[Experiment]) -> None:
    method = {
        "method": "small",
        "model": {"class_path": "SmallModelClient", "init_args": {"share": "cnn"}},
        "server": {"class_path": "FedAvg"},
    }
    main(["fit", "--config", setting, "--config", write(tmp_path / "method.yaml", method)])
    (experiment,) = built
    client = experiment.client
    assert isinstance(client, SmallModelClient)
    assert (client.share, client.logit_scale) == ("cnn", 16.0)
    assert (client.epochs, client.batch_size, client.buffer_size, client.learning_rate) == (1, 7, 3, 0.002)
    assert isinstance(client.continual, Replay)
    assert (client.continual.passes, client.continual.weights["features"]) == (1, 0.7)
    assert isinstance(experiment.server, FedAvg)
    assert (experiment.method, experiment.setting) == ("small", "tiny")


def test_another_strategy_keeps_the_rest(setting: str, tmp_path: Path, built: list[Experiment]) -> None:
    method = {
        "model": {
            "class_path": "FedLSCL",
            "init_args": {"continual": {"class_path": "NoReplay"}},
        }
    }
    main(["fit", "--config", setting, "--config", write(tmp_path / "method.yaml", method)])
    client = built[0].client
    assert isinstance(client, FedLSCL)
    assert isinstance(client.continual, NoReplay)
    assert (client.block, client.rank, client.epochs, client.batch_size) == (2, 2, 1, 7)


def test_a_word_beats_every_file(setting: str, tmp_path: Path, built: list[Experiment]) -> None:
    later = write(tmp_path / "later.yaml", {"model": {"init_args": {"epochs": 4, "batch_size": 9}}})
    main(["fit", "--config", setting, "--config", later, "--model.init_args.epochs=5"])
    assert (built[0].client.epochs, built[0].client.batch_size) == (5, 9)


SETTINGS = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
WHOLE = ("digits", "cifar100")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each method over the digits and the paper's setting, and over one of the others, which differ in data."""
    config = printed(capsys, "--config", str(ROOT / "experiments" / f"{name}.yaml"))
    assert config["setting"] == name
    methods, others = sorted((ROOT / "experiments" / "methods").glob("*.yaml")), sorted({*SETTINGS} - {*WHOLE})
    for method in methods if name in WHOLE else methods[others.index(name) :: len(others)]:
        over = printed(capsys, "--config", str(ROOT / "experiments" / f"{name}.yaml"), "--config", str(method))
        assert over["method"] == method.stem
        for field in ("epochs", "batch_size", "learning_rate", "buffer_size"):
            if (method.stem, field) == ("lorm_published", "learning_rate"):
                continue
            if field in over["model"]["init_args"]:  # not every client trains in steps
                assert over["model"]["init_args"][field] == config["model"]["init_args"][field]
        for group in ("data", "backbone", "cnn", "federation"):
            assert over[group] == config[group]


# ---- mistakes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"federation": {"roundz": 3}}, "roundz"),
        ({"model": {"init_args": {"blocks": 3}}}, "blocks"),
        ({"datum": {"seed": 3}}, "datum"),
        ({"server": {"class_path": "FedAvg", "init_args": {"weight": "uniform"}}}, "weight"),
        ({"model": {"class_path": "FedLSLC"}}, "FedLSLC"),
        ({"data": {"split": {"client": 3}}}, "client"),
        ({"model": {"init_args": {"train_mask": "sen"}}}, "train_mask"),
        ({"federation": {"rounds": "many"}}, "rounds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_is_named(
    setting: str,
    tmp_path: Path,
    change: dict[str, Any],
    named: str,
    capsys: pytest.CaptureFixture[str],
    built: list[Any],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", setting, "--config", write(tmp_path / "change.yaml", change)])
    assert end.value.code == 2
    assert named in capsys.readouterr().err
    assert built == []


@pytest.mark.parametrize("words", [["--federation.roundz", "3"], ["--federation.round", "3"], ["--rounds", "3"]])
def test_an_unknown_word_is_named(
    setting: str, words: list[str], capsys: pytest.CaptureFixture[str], built: list[Any]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", setting, *words])
    assert end.value.code == 2
    assert words[0].split(".")[-1].strip("-") in capsys.readouterr().err
    assert built == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--federation.rounds", "0"], r"federation\.rounds is 0"),
        (["--federation.clients_per_round", "9"], r"federation\.clients_per_round is 9"),
        (["--model.init_args.block", "12"], r"model\.block is 12"),
        (["--model.init_args.epochs", "0"], r"model\.epochs is 0"),
        (["--model.init_args.continual.init_args.lambda_w", "-1"], r"continual\.lambda_w is -1"),
        (["--server.init_args.strength", "-1"], r"server\.strength is -1"),
        (["--data.split.public_classes", "3"], r"private_classes \+ public_classes"),
        (["--data.split.dirichlet_alpha", "0"], r"split\.dirichlet_alpha is 0"),
        (["--cnn.name", "resnet19"], r"cnn\.name: timm has no model 'resnet19'"),
        (["--backbone.name", "resnet18"], "backbone"),
        (["--backbone.weights", "nowhere.safetensors"], r"backbone\.weights: no file 'nowhere"),
        (["--threads", "0"], "threads is 0"),
        (["--seed_everything", "-1"], "seed_everything is -1, must be a whole number from 0"),
        (["--seed_everything", "true"], "seed"),
        (["--seed_everything", "false"], "seed"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_an_impossible_value_is_named_before_anything_is_trained(
    setting: str,
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        main(["fit", "--config", setting, "--run_dir", str(tmp_path / "run"), *words])
    said = str(error.value) + capsys.readouterr().err
    assert re.search(complaint, said), said
    # the corrected command must be able to use the folder
    assert not {"config.yaml", "split.json"} & {path.name for path in (tmp_path / "run").glob("*")}


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "no-such.yaml"])
    assert "no-such.yaml" in capsys.readouterr().err


def test_another_configuration_for_the_same_folder(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedlscl.run.experiment.Federation.run", lambda self, callback: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    words = ["fit", "--config", setting, "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="130"):
        main(words)
    with pytest.raises((ValueError, SystemExit), match=r"model\.init_args\.rank: 2 there, 3 now"):
        main([*words, "--model.init_args.rank", "3"])
    with pytest.raises(SystemExit, match="130"):  # tracking is not part of what is computed
        main([*words, "--tracking.project", "elsewhere"])


def test_a_polite_kill_ends_the_run_at_once(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler only sets a flag, which nobody looks at after the last batch or during a test."""
    on_test_start = Client.on_test_start

    def terminate(self: Client) -> None:
        on_test_start(self)
        assert not killed  # it went on
        killed.append(self.index)
        os.kill(os.getpid(), signal.SIGTERM)

    killed: list[int] = []
    monkeypatch.setattr(Client, "on_test_start", terminate)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", setting, "--run_dir", str(tmp_path / "run")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143  # not 0: the run is not finished
    assert not (tmp_path / "run" / "summary.json").exists()
