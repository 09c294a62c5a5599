"""Prediction from a finished run: the same answers as the run's own evaluation, from files; and mistakes in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import SETTING, Patterns
from PIL import Image
from safetensors.torch import save_file
from test_cli import METHOD

from fedlscl.cli import main
from fedlscl.data.splits import Split
from fedlscl.files import Damaged
from fedlscl.models.vit import FrozenViT
from fedlscl.run.predict import predict

pytestmark = pytest.mark.usefixtures("command_line")


def write_weights(folder: Path, shift: float) -> None:
    state = {name: tensor.contiguous() for name, tensor in FrozenViT(**SETTING["backbone"]).vit.state_dict().items()}
    save_file({**state, "pos_embed": state["pos_embed"] + shift}, folder / "vit.safetensors")


@pytest.fixture
def run_dir(tmp_path: Path, cache: Path) -> Path:
    """A finished run of two tasks."""
    write_weights(tmp_path, 0.0)
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    content["backbone"] = {**SETTING["backbone"], "weights": str(tmp_path / "vit.safetensors")}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(tmp_path / "setting.yaml"), "--run_dir", str(tmp_path / "run")])
    return tmp_path / "run"


def test_files_are_classified_as_in_the_evaluation(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((run_dir / "split.json").read_text())
    accuracy = json.loads((run_dir / "summary.json").read_text())["accuracy"]["seen"]["matrix"]
    before = sorted(path.name for path in (run_dir / "checkpoint").iterdir())
    test = Patterns(11).load(tmp_path).test
    for client, part in enumerate(Split.from_json(json.dumps(stored["split"])).clients):
        for task, own in enumerate(part.tasks):
            files = []
            for index in own.test:
                files.append(str(tmp_path / f"{index}.png"))
                Image.fromarray(np.ascontiguousarray(test.images[index].transpose(1, 2, 0))).save(files[-1])
            found = predict(run_dir, files, client)
            assert [prediction.image for prediction in found] == files
            hits = [p.label == stored["classes"][test.labels[i]] for p, i in zip(found, own.test, strict=True)]
            assert 100 * np.mean(hits) == pytest.approx(accuracy[client][-1][task])
            learned = sum(len(t.classes) for t in part.tasks)
            assert all(1 / learned <= prediction.probability <= 1 for prediction in found)
    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == before

    capsys.readouterr()
    main(["predict", str(run_dir), files[0], files[1], "--client", "2"])
    printed = capsys.readouterr().out
    assert found[0].label in printed
    assert f"{found[1].probability:.3f}" in printed


def test_other_weights_in_the_place_of_the_runs_are_refused(run_dir: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert len(predict(run_dir, [str(tmp_path / "image.png")])) == 1
    write_weights(tmp_path, 0.1)
    with pytest.raises(ValueError, match="weights are not those of the run"):
        predict(run_dir, [str(tmp_path / "image.png")])


@pytest.mark.parametrize("name", ["config.yaml", "split.json", "checkpoint/state.json", "client-0"])
def test_a_damaged_file_of_the_run_is_named(run_dir: Path, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    path = run_dir / name if name != "client-0" else next((run_dir / "checkpoint").glob("client-0*"))
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(Damaged, match=f"{path.name}' is damaged"):
        predict(run_dir, [str(tmp_path / "image.png")])
    path.unlink()
    if name != "checkpoint/state.json":
        with pytest.raises(Damaged, match=f"{path.name}' is missing"):
            predict(run_dir, [str(tmp_path / "image.png")])


def mistakes(run_dir: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "unfinished").mkdir()
    image = str(tmp_path / "text.png")
    return {
        "no run": ([str(tmp_path / "nowhere"), image], "holds no finished run"),
        "unfinished": ([str(tmp_path / "unfinished"), image], "holds no finished run"),
        "no client": ([str(run_dir), image, "--client", "3"], "client is 3, but the run has clients 0 to 2"),
        "no image": ([str(run_dir), image], "text.png"),
        "no file": ([str(run_dir), str(tmp_path / "gone.png")], "gone.png"),
    }


def test_mistakes_end_in_a_line(run_dir: Path, tmp_path: Path) -> None:
    for words, expected in mistakes(run_dir, tmp_path).values():
        with pytest.raises(SystemExit) as end:
            main(["predict", *words])
        message: Any = end.value.code
        assert expected in message
        assert "\n" not in message
