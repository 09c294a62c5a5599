"""The benchmark in its tiniest size: every part runs and says what it should."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_every_part_runs(
    command_line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bench.json"
    monkeypatch.syspath_prepend(EXPERIMENTS)
    importlib.import_module("bench").run(["--tiny", "--threads", "1", "--json", str(report)])
    found = json.loads(report.read_text())
    assert set(found) == {
        *("machine", "prefix", "replay", "throughput", "hardware"),
        *("framework", "distillation", "clients", "device"),
    }
    # what does not depend on time
    ratios = [row["FLOP ratio"] for row in found["prefix"]]
    assert ratios[1] > ratios[0] > 1.05  # blocks 11 and 3
    assert [row["same accuracies"] for row in found["framework"]] == [True]
    exact, iterative, *sizes = found["distillation"]
    assert exact["objective before"] == iterative["objective before"]
    assert exact["after"] <= iterative["after"]
    assert [row["clients"] for row in sizes] == [row["clients"] for row in found["clients"]] == [2, 3]
    for row in found["device"]:
        assert row["steps"] > row["fits and tests"] == 4
        untouched = ("moves of the ViT", "tensors of it elsewhere", "copies of its weights", "waits in steps")
        assert [row[name] for name in untouched] == [0, 0, 0, 0]
    assert "| ViT | block |" in capsys.readouterr().out


def test_what_a_gpu_is_measured_with_runs(
    command_line: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    gpu = importlib.import_module("gpu")
    gpu.run(["speed", "profile", "round", "--tiny", "--out", str(tmp_path)])
    (speed,) = json.loads((tmp_path / "speed.json").read_text())["speed"]
    assert speed["equal states after them"]
    (found,) = json.loads((tmp_path / "round.json").read_text())["round"]
    assert found["images"] > 0
    assert "| ViT | precision |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.run(["runs", "--tiny"])
    assert "runs needs --images" in capsys.readouterr().err
    one = gpu.one_method("fedavg")
    assert one["equal states"]
    assert one["why not"] == ""
