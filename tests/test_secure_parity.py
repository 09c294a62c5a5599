"""Runs with and without secure sums beside each other: what differs is found and named."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("flwr")

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def secure_parity(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("secure_parity")


def run(folder: Path, value: float, weight: float, bytes_up: int = 8) -> Path:
    """What a finished run leaves, of two clients and two tasks; `value` is client 1's on task 1 after task 2."""
    (folder / "checkpoint").mkdir(parents=True)
    matrices = [[[50.0, None], [60.0, 70.0]], [[None, None], [value, 80.0]]]
    traffic = {"total": bytes_up}
    summary = {
        **{
            "method": "m",
            "seed": 7,
            "config": {"federation": {"rounds": 3, "fraction_bits": None}},
            "skipped": [],
            "compute": {},
        },
        "accuracy": {mask: {"final_average": value, "matrix": matrices} for mask in ("task", "seen")},
        **{"bytes_up": traffic, "bytes_down": traffic, "split_sha256": "1"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    save_file({"w": torch.tensor([4.0, weight])}, folder / "checkpoint" / "a.safetensors")
    save_file({"w": torch.tensor([weight])}, folder / "checkpoint" / "b.safetensors")
    files = {"client-0": ["a.safetensors"], "server": ["b.safetensors"]}
    (folder / "checkpoint" / "state.json").write_text(json.dumps({"files": files}))
    return folder


def test_a_difference_is_named_and_engines_are_compared(secure_parity: Any, tmp_path: Path) -> None:
    plain, secure = run(tmp_path / "plain", 90.0, 1.0), run(tmp_path / "secure", 90.5, 1.5)
    runs = {
        "same": run(tmp_path / "same", 90.5, 0.0),
        "last bit": run(tmp_path / "bit", math.nextafter(90.5, 91), 0.0),
        "bytes": run(tmp_path / "bytes", 90.5, 0.0, bytes_up=9),
        "none": tmp_path / "nothing",
    }
    found = secure_parity.compared(plain, secure, runs)
    assert found["difference"] == 0.5
    assert found["of"] == {"mask": "task", "client": 1, "after": 2, "task": 1}
    assert found["states"] == 0.5 / 4  # of client 0; the server's does not count
    assert found["engines"] == {"same": True, "last bit": False, "bytes": False}
    row, of = secure_parity.row([found]), "seed 7, task, client 1, after task 2, task 1"
    engines = "same equal, last bit DIFFERENT, bytes DIFFERENT"
    assert row == f"| m | 3 | default | 7 | 90.00 | 90.50 | 0.5000 | {of} | 0.1 | 8 | 1.00 | {engines} |"
    equal = secure_parity.compared(plain, run(tmp_path / "again", 90.0, 1.0), {})
    assert (equal["difference"], equal["of"], equal["states"]) == (0.0, None, 0.0)
    both = secure_parity.row([{**equal, "seed": 8}, found])
    assert both.startswith(f"| m | 3 | default | 8, 7 | 90.00, 90.00 | 90.00, 90.50 | 0.5000 | {of} | 0.1 |")


def test_what_has_no_counterpart_is_no_parity(secure_parity: Any, tmp_path: Path) -> None:
    plain, other = run(tmp_path / "plain", 90.0, 1.0), run(tmp_path / "other", math.nan, 1.0)
    with pytest.raises(ValueError, match="has accuracies where"):
        secure_parity.compared(plain, other, {})
    assert secure_parity.distance(iter([{"w": torch.ones(2)}]), iter([{"w": torch.ones(3)}])) == math.inf
