"""What words stand for: a folder, a fingerprint, plain values, and an experiment, which is built when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SETTING

from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.run.configuration import Configuration
from fedlscl.run.names import Parser

pytestmark = pytest.mark.usefixtures("command_line")

MODEL = {"class_path": "FedLSCL", "init_args": {"continual": {"class_path": "Replay"}, "block": 1}}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "setting.yaml"
    path.write_text(yaml.safe_dump({**SETTING, "model": MODEL, "server": {"class_path": "ExactO2D"}}))
    return ["--config", str(path)]


def test_asking_builds_nothing_and_draws_nothing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parser, "instantiate_classes", lambda *_, **__: pytest.fail("built"))
    before = torch.random.get_rng_state()
    configuration = Configuration([*words, "--threads", "7"])
    assert configuration.values["model"]["class_path"] == "FedLSCL"
    assert str(configuration.run_dir).startswith("runs/tiny-custom-seed7-")
    assert configuration.sha256
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() != 7


def test_folder_and_fingerprint_change_with_the_values_alone(words: list[str]) -> None:
    one, same, other = (
        Configuration([*words, *more])
        for more in ([], ["--tracking.project", "p", "--run_dir", "here"], ["--model.block", "2"])
    )
    assert (same.run_dir, same.default_run_dir) == (Path("here"), one.run_dir)
    assert (same.sha256, same.values) == (one.sha256, one.values)
    assert other.sha256 != one.sha256
    assert other.run_dir != one.run_dir


def test_what_it_builds(words: list[str]) -> None:
    configuration = Configuration(words)
    experiment = configuration.build()
    assert (experiment.config, experiment.run_dir) == (configuration.values, configuration.run_dir)
    assert isinstance(experiment.client, FedLSCL)
    assert experiment.seed == experiment.data.seed == 7


def test_networks_need_neither_data_nor_trainer(words: list[str]) -> None:
    configuration = Configuration([*words, "--trainer.accelerator", "nonsense"])
    with pytest.raises(ValueError, match="nonsense"):
        configuration.build()
    client, vit, cnn = configuration.networks()
    assert (type(client), vit.depth, cnn.features) == (FedLSCL, 4, 16)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--threads", "0"], "threads is 0, must be at least 1"),
        (["--backbone.weights", "nowhere.safetensors"], "no file 'nowhere"),
        (["--model.epochs", "0"], "model.epochs is 0"),
    ],
)
def test_what_cannot_be_built_is_an_error(words: list[str], more: list[str], complaint: str) -> None:
    configuration: Any = Configuration([*words, *more])
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        configuration.build()


def test_what_words_give_beyond_their_files_is_known_by_its_fields(words: list[str]) -> None:
    assert Configuration(words).build().overrides == {}
    more = ["--model.init_args.epochs=2", "--data.split.train_per_class", "9", "--threads", "1", "--run_dir", "there"]
    assert Configuration([*words, *more]).overrides == {
        "model.epochs": 2,
        "data.split.train_per_class": 9,
        "threads": 1,
    }
    strategy = Configuration([*words, "--model.continual", "NoReplay"]).overrides
    assert strategy["model.continual.class_path"] == "NoReplay"
