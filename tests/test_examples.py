"""What the documents show as an example runs as shown: the method in docs/examples, the Python lines of README."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import CNN, SETTING, rows
from torch import Tensor

import fedlscl
from fedlscl.cli import main
from fedlscl.messages import Download, Message, MessageError, Upload
from fedlscl.schedule import Round
from fedlscl.server import Context

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def fedproto(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the example, found as with PYTHONPATH=docs/examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fedproto")


def fit(cache: Path, folder: Path, **changes: Any) -> list[dict[str, str]]:
    """Run the example's file on the tiny setting; the rows of its metrics."""
    setting = {**SETTING, "data": {**SETTING["data"], "cache_dir": str(cache)}, **changes}
    (folder / "setting.yaml").write_text(yaml.safe_dump(setting))
    files = [word for path in (folder / "setting.yaml", EXAMPLES / "fedproto.yaml") for word in ("--config", str(path))]
    main(["fit", *files, "--model.epochs=1", "--run_dir", str(folder / "run")])
    return rows(folder / "run")


def test_fedproto_runs_and_its_term_counts_from_the_second_round_on(
    fedproto: Any, cache: Path, tmp_path: Path, wire: list[tuple[Message, bytes]]
) -> None:
    found = fit(cache, tmp_path)
    terms = {
        (row["metric"].split("/")[1], int(row["round"])): float(row["value"])
        for row in found
        if row["metric"].endswith("collaborate/prototype")
    }
    assert set(terms) == {(client, round) for client in "012" for round in (1, 2, 3, 4)}
    for client in "012":
        assert terms[client, 1] == 0
        assert terms[client, 2] > 0
        assert terms[client, 4] > 0
    # no weight travels, and what does is as small as prototypes are
    assert {type(message) for message, _ in wire} == {Upload, Download}
    for message, _ in wire:
        shapes = {name: tuple(tensor.shape) for name, tensor in message.tensors.items()}
        assert shapes == {"prototypes": (11, CNN["features"]), "images": (11,)}
    for upload in (message for message, _ in wire if isinstance(message, Upload)):
        sent = upload.tensors["images"] > 0
        assert sent.sum() == SETTING["data"]["split"]["classes_per_task"]
        assert torch.equal(upload.tensors["prototypes"].abs().sum(dim=1) > 0, sent)


def test_fedproto_takes_clients_with_different_cnns(fedproto: Any, cache: Path, tmp_path: Path) -> None:
    names = ["resnet18", "resnet34", "resnet18"]
    cnn = {**CNN, "name": names, "model_args": {name: CNN["model_args"] for name in names}}
    assert any(row["metric"].endswith("collaborate/prototype") for row in fit(cache, tmp_path, cnn=cnn))


def upload(client: int, prototypes: Tensor, images: list[int]) -> Upload:
    return Upload(client, 1, 1, sum(images), {"prototypes": prototypes, "images": torch.tensor(images)})


def test_fedproto_averages_class_by_class(fedproto: Any) -> None:
    uploads = {
        0: upload(0, torch.tensor([[1.0, 2.0], [4.0, 0.0], [0.0, 0.0]]), [1, 2, 0]),
        2: upload(2, torch.tensor([[5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]), [3, 0, 0]),
    }
    context = Context(3, Round(1, 1, False, 0), lambda: pytest.fail("nothing is trained"))
    answers, _ = fedproto.FedProtoServer().aggregate(uploads, context)
    assert list(answers) == [0, 1, 2]
    for answer in answers.values():
        # (1 * 1 + 3 * 5) / 4 and (1 * 2 + 3 * 6) / 4; one sender; nobody
        assert answer.tensors["prototypes"].tolist() == [[4.0, 5.0], [4.0, 0.0], [0.0, 0.0]]
        assert answer.tensors["prototypes"].dtype == torch.float32
        assert answer.tensors["images"].tolist() == [4, 2, 0]


def test_fedproto_refuses_what_it_cannot_average(fedproto: Any) -> None:
    server = fedproto.FedProtoServer()
    server.check(upload(0, torch.ones(2, 2), [3, 0]))
    with pytest.raises(MessageError, match=r"images is \[4, -1\], must"):
        server.check(upload(0, torch.ones(2, 2), [4, -1]))
    with pytest.raises(MessageError, match=r"images is \[4, 0\], must add up to 3 images"):
        server.check(Upload(0, 1, 1, 3, {"prototypes": torch.ones(2, 2), "images": torch.tensor([4, 0])}))
    with pytest.raises(ValueError, match=r"FedProtoServer, .* send 'prototypes', .* the model FedProtoClient"):
        server.begin({"cnn.weight": fedlscl.TensorSpec((2,))}, {}, lambda: pytest.fail("no model is wanted"))


def test_fedproto_s_term_is_the_mean_squared_distance(fedproto: Any) -> None:
    client = fedproto.FedProtoClient(strength=0.5, continual=fedlscl.NoReplay())
    client.register_buffer("prototypes", torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    client.register_buffer("images", torch.tensor([4, 0]))
    client.competing_mask = client.seen_mask = client.learned_mask = torch.tensor([True, True])
    client.kept = {}
    images = fedlscl.Images(torch.arange(2).numpy(), torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]))
    batch = fedlscl.Batch("collaborate", images, {}, torch.zeros(2))
    output = fedlscl.Output(torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [7.0, 7.0]]))
    terms = client.collaborative_losses(output, batch)
    assert float(terms["prototype"]) == 0.5 * (2**2 + 1**2) / 2  # class 1 has no prototype
    assert float(terms["cross_entropy"]) == pytest.approx(0.6931, abs=1e-4)


def test_the_python_lines_of_the_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (lines,) = [block for block in blocks if "simulate(" in block]
    rounds: list[fedlscl.RoundResult] = []
    simulate, split = fedlscl.simulate, fedlscl.SplitSpec

    def listening(**arguments: Any) -> Any:
        for result in simulate(**arguments):
            rounds.append(result)
            yield result

    monkeypatch.setattr(fedlscl, "simulate", listening)
    fewer = {"train_per_class": 12, "test_per_class": 6}  # images, as nobody looks at how good the models become
    monkeypatch.setattr(fedlscl, "SplitSpec", lambda **fields: split(**fields | fewer))
    exec(compile(lines, "README.md", "exec"), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("task ")]
    assert len(printed) == len(rounds) > 1
    for line, result in zip(printed, rounds, strict=True):
        assert f"task {result.task}, round {result.round}: {result.mean('seen'):.1f} %" in line
