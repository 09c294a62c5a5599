"""A federation from Python: the same numbers as any other way to run it, a result a round, and not a word."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, SPLIT, Patterns, make_client, make_federation, outcome, run

import fedlscl
from fedlscl import FederatedDataModule, FrozenViT, RoundResult, SmallModelSpec, SplitSpec, methods, simulate
from fedlscl.methods import ExactO2D, FedAvgClient


def arguments(data: FederatedDataModule, vit: FrozenViT, **changes: Any) -> dict[str, Any]:
    """A tiny federation of one round a task."""
    cnn = SmallModelSpec(**CNN)
    wanted = {"client": make_client(), "server": ExactO2D(), "data": data, "vit": vit, "cnn": cnn, "rounds": 1}
    return {**wanted, "seed": 0, "accelerator": "cpu", **changes}


def test_a_simulation_is_the_federation_and_says_nothing(
    data: FederatedDataModule, vit: FrozenViT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found = list(simulate(**arguments(data, vit)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert [(result.task, result.round) for result in found] == [(1, 1), (2, 2)]
    assert outcome(found) == outcome(run(make_federation(tmp_path, data, vit)))


def test_data_without_a_seed_are_split_by_that_of_the_run(
    cache: Path, data: FederatedDataModule, vit: FrozenViT
) -> None:
    own = FederatedDataModule(Patterns(), SplitSpec(**SPLIT), cache_dir=str(cache))
    simulate(**arguments(own, vit))
    assert own.split.sha256 == data.split.sha256


def test_the_bar_is_drawn_where_it_is_asked_for(
    data: FederatedDataModule, vit: FrozenViT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for result in simulate(**arguments(data, vit, progress=True)):
        assert 0 <= result.mean("seen") <= 100
    assert "task 2/2  round 1/1  client 2" in capsys.readouterr().out


def test_states_are_kept_in_a_folder_of_their_own_or_nowhere(
    data: FederatedDataModule, vit: FrozenViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rounds = simulate(**arguments(data, vit))
    next(rounds)
    assert len(list(tmp_path.glob("*/client-*.safetensors"))) >= 3
    rounds.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
    next(simulate(**arguments(data, vit, folder=tmp_path / "kept")))
    assert json.loads((tmp_path / "kept" / "state.json").read_text())["progress"]["round"] == 1
    with pytest.raises(ValueError, match="holds something"):
        simulate(**arguments(data, vit, folder=tmp_path / "kept"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, r"federation\.rounds is 0"),
        ({"clients_per_round": 4}, r"federation\.clients_per_round is 4"),
        ({"secure": True}, r"federation\.secure is true, but server ExactO2D looks at what each client sent"),
        ({"client": make_client(FedAvgClient)}, r"ExactO2D, .* send 'weight', .* the model FedLSCL"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_round(
    data: FederatedDataModule, vit: FrozenViT, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**arguments(data, vit, **changes))


def test_the_mean_of_a_round_by_hand() -> None:
    nan = float("nan")
    result = RoundResult(2, 3, accuracy={"seen": [[10.0, 20.0], [60.0, nan], [nan, nan]]})
    assert result.mean("seen") == pytest.approx((15 + 60) / 2)


def test_a_round_survives_json() -> None:
    result = RoundResult(1, 2, {0: 5}, {1: 7}, {2: "gone"}, {3: "huge"}, {"seen": [[1.0]]}, {"x": 0.5}, {"fit": 2.0})
    assert RoundResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_every_public_name_is_there() -> None:
    assert len(dir(fedlscl)) > 30
    for name in dir(fedlscl):
        assert getattr(fedlscl, name).__name__ == name or name in ("Answers", "Metrics", "Schema")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        fedlscl.Nothing  # noqa: B018


def test_methods_are_found_by_name_and_nothing_else_is() -> None:
    assert {"FedLSCL", "ExactO2D", "TARGETServer", "PILoRAClient", "EWC"} <= set(dir(methods))
    assert methods.ExactO2D.__module__ == "fedlscl.methods.fed_lscl"
    assert "Client" not in dir(methods)
    with pytest.raises(AttributeError, match="has no class 'Client'"):
        methods.Client  # noqa: B018
