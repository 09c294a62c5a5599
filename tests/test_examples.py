"""What the documents show as an example runs as shown: the method in docs/examples, the lines of docs/python.md,
the notebook."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from helpers import SETTING, copy_of, make_client, restore_client, rows
from matplotlib.figure import Figure

import fedlscl
from fedlscl.cli import main
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, Upload
from fedlscl.schedule import Round
from fedlscl.server import Context

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def fedper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the example, found as with PYTHONPATH=docs/examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fedper")


def test_fedper_runs_and_its_head_stays(
    fedper: Any, cache: Path, tmp_path: Path, wire: list[tuple[Message, bytes]]
) -> None:
    setting = {**SETTING, "data": {**SETTING["data"], "cache_dir": str(cache)}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(setting))
    files = [word for path in (tmp_path / "setting.yaml", EXAMPLES / "fedper.yaml") for word in ("--config", str(path))]
    main(["fit", *files, "--model.epochs=1", "--run_dir", str(tmp_path / "run")])
    logged = {(row["metric"], int(row["round"])) for row in rows(tmp_path / "run")}
    assert {(f"client/{client}/collaborate/cross_entropy", n) for client in "012" for n in (1, 2, 3, 4)} <= logged
    assert {type(message) for message, _ in wire} == {Upload, Download}
    for message, _ in wire:
        assert message.tensors
        assert all(name.startswith("cnn.") for name in message.tensors)


def test_fedper_averages_the_body_alone(fedper: Any, make: Callable[..., Federation]) -> None:
    client = make_client(fedper.FedPerClient, continual=fedlscl.NoReplay(), train_mask="task")
    federation = make(client=client, server=fedlscl.FedAvg())
    body, name = restore_client(federation, 0), "cnn.backbone.conv1.weight"
    assert {name.split(".")[0] for name in body.state_dict()} == {"cnn", "head"}
    before = copy_of(body.state_dict())
    uploads = {
        index: Upload(index, 1, 1, samples, {**copy_of(body.shared()), name: torch.full_like(before[name], value)})
        for index, (samples, value) in enumerate([(10, 1.0), (30, 5.0)])
    }
    context = Context(3, Round(1, 1, False, 0), lambda: pytest.fail("nothing is trained"))
    answers, _ = federation.server.aggregate(uploads, context)
    body.download(Download(0, 1, 1, 0, answers[0].tensors))
    after = body.state_dict()
    assert float(after[name].unique()) == 4.0  # (10 * 1 + 30 * 5) / 40
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["head.bias"], before["head.bias"])


def test_the_python_lines_of_the_documents(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (lines,) = [block for block in blocks if "simulate(" in block]
    rounds: list[fedlscl.RoundResult] = []
    simulate, split = fedlscl.simulate, fedlscl.SplitSpec

    def listening(**arguments: Any) -> Any:
        for result in simulate(**arguments | {"rounds": 1}):
            rounds.append(result)
            yield result

    monkeypatch.setattr(fedlscl, "simulate", listening)
    fewer = {"train_per_class": 6, "test_per_class": 2}  # images, as nobody looks at how good the models become
    monkeypatch.setattr(fedlscl, "SplitSpec", lambda **fields: split(**fields | fewer))
    exec(compile(lines, "python.md", "exec"), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("task ")]
    assert len(printed) == len(rounds) > 1
    for line, result in zip(printed, rounds, strict=True):
        assert f"task {result.task}, round {result.round}: {result.mean('seen'):.1f} %" in line


def test_the_notebook_runs_from_top_to_bottom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "quickstart.ipynb").read_text("utf-8")
    assert len(text) < 200_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    monkeypatch.setattr(plt, "subplots", lambda **options: (figure := Figure(), figure.subplots()))  # in no window
    space: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
        if cell["metadata"].get("tags") == ["parameters"]:
            space |= {"clients": 2, "rounds": 1, "images": 4, "tested": 1, "least": 1}  # nobody looks how good they are
    assert [(r.task, r.round) for r in space["history"]] == [(r.task, r.round) for r in space["closed"]]
    assert [line.get_label() for line in space["axes"].get_lines()[:4]] == [
        *(f"Fed-LSCL, {mask}" for mask in ("task", "seen", "none")),
        "ridge, seen",
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("task ")] == [
        f"task {r.task}, round {r.round}: {r.mean('seen'):.1f} % of the classes seen so far" for r in space["history"]
    ]
