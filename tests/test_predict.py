"""Prediction from a finished run: the same answers as the run's own evaluation, from files; and mistakes in a line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import CNN, SETTING, Patterns
from PIL import Image
from safetensors.torch import save_file
from test_cli import METHOD

from fedlscl.cli import main
from fedlscl.data.splits import Split
from fedlscl.files import Damaged
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.run import examples
from fedlscl.run.predict import files_in, predict

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
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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

    with monkeypatch.context() as patch:  # the report shows some of them
        patch.setattr(examples, "LOOKED_AT", 1000)
        parts = Split.from_json(json.dumps(stored["split"])).clients
        for asked, part, of in zip(examples.examples(run_dir, 3), parts, accuracy, strict=True):
            sizes = [len(task.test) for task in part.tasks]
            assert (asked.looked_at, len(asked.images)) == (sum(sizes), 3)
            assert 100 * asked.right == pytest.approx(np.dot(sizes, of[-1]))
            assert all(
                len(image.best) == 3 and image.right == (image.best[0][0] == image.truth) for image in asked.images
            )

    with monkeypatch.context() as patch:  # images are read as the run's source reads its own
        patch.setattr(Patterns, "decode", lambda self, path, size: np.zeros((3, size, size), np.uint8))
        assert len({prediction.probability for prediction in predict(run_dir, files)}) == 1

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


def test_what_the_small_model_began_with_is_not_needed(run_dir: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    wanted = predict(run_dir, [str(tmp_path / "image.png")])
    first = SmallModel(SmallModelSpec(**CNN), "resnet18").backbone.state_dict()
    save_file(first, tmp_path / "cnn.safetensors")
    words = ["--config", str(tmp_path / "setting.yaml"), f"--cnn.weights={tmp_path / 'cnn.safetensors'}"]
    main(["fit", *words, "--run_dir", str(tmp_path / "begun")])
    found = predict(tmp_path / "begun", [str(tmp_path / "image.png")])
    (tmp_path / "cnn.safetensors").unlink()
    assert predict(tmp_path / "begun", [str(tmp_path / "image.png")]) == found != wanted
    stored = json.loads((tmp_path / "begun" / "split.json").read_text())
    assert len(stored["cnn_weights_sha256"]) == 64


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


def picture(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_lines_files_and_failures(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names are printed as they are, in a folder too; what cannot be read takes no other answer away."""
    odd = ["scan[left].png", "x:smiley:.png", "[/b].png", "=1+1.png", f"{'long' * 50}.png", "sub/deeper/a b.png"]
    named = [picture(tmp_path / "odd" / name) for name in odd]
    (tmp_path / "odd" / "broken.png").write_text("no image")
    (tmp_path / "odd" / "notes.txt").write_text("no image")
    (tmp_path / "odd" / ".hidden.png").write_text("no image")
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["predict", str(run_dir), str(tmp_path / "odd"), "--client", "0", "2", "--top", "2"])
    message: Any = end.value.code
    assert message.count("\n") == 0
    assert message.startswith(f"fedlscl: {tmp_path / 'odd' / 'broken.png'} cannot be read as an image")
    said = capfd.readouterr()
    assert (
        said.err.splitlines(True)[-1]
        == f"fedlscl: 1 other files in these folders are no images, such as {tmp_path / 'odd' / 'notes.txt'}\n"
    )
    rows = [line.split("\t") for line in said.out.splitlines()]
    assert {row[0] for row in rows} == {*named}
    assert [len(row) for row in rows] == [4] * len(odd) * 2 * 2
    assert [row[1] for row in rows[:4]] == ["0", "0", "2", "2"]

    main(["predict", str(run_dir), *named, "--client", "0", "2", "--out", str(tmp_path / "out.csv")])
    main(["predict", str(run_dir), *named, "--client", "0", "2", "--out", str(tmp_path / "out.json")])
    entries = json.loads((tmp_path / "out.json").read_text())
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [entry["image"] for entry in entries] == [row["image"] for row in table] == [n for n in named for _ in "02"]
    of = {client: dict(zip(named, predict(run_dir, named, client), strict=True)) for client in (0, 2)}
    for entry, row in zip(entries, table, strict=True):
        found = of[entry["client"]][entry["image"]]
        expected_of = dict(zip(found.classes, found.probabilities, strict=True))
        assert entry["probabilities"] == pytest.approx(expected_of, abs=1e-5)
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert entry["class"] == found.label == row["class"]
        for name, probability in entry["probabilities"].items():
            assert float(row[f"probability of {name}"]) == pytest.approx(probability, abs=1e-8)
    best = of[2][rows[2][0]]
    assert rows[2][1:] == ["2", best.classes[0], f"{best.probabilities[0]:.3f}"]
    assert rows[3][1:] == ["2", best.classes[1], f"{best.probabilities[1]:.3f}"]
    assert {path.name for path in tmp_path.glob("*out*")} == {"out.csv", "out.json"}


def test_a_task_that_is_told_lets_its_classes_alone_compete(run_dir: Path, tmp_path: Path) -> None:
    image, stored = picture(tmp_path / "a.png"), json.loads((run_dir / "split.json").read_text())
    split = Split.from_json(json.dumps(stored["split"]))
    for task, own in enumerate(split.clients[1].tasks, 1):
        (found,) = predict(run_dir, [image], 1, task)
        assert {*found.classes} == {stored["classes"][label] for label in own.classes}
    with pytest.raises(ValueError, match="task is 3, but the run has tasks 1 to 2"):
        predict(run_dir, [image], 1, 3)


def test_a_damaged_run_is_told(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(tmp_path / "a.png")

    def answer(*more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["predict", str(run_dir), image, *more])
        said = f"{capsys.readouterr().err}{end.value.code if isinstance(end.value.code, str) else ''}"
        assert len(said.splitlines()) == 1
        return said

    assert "out is 'x.txt', must end in .csv or .json" in answer("--out", "x.txt")
    assert "there is no folder 'nowhere'" in answer("--out", "nowhere/x.csv")
    assert "top is 0" in answer("--top", "0")
    for path, content, text in (
        *((state, b"\xff" * 30, state.name) for state in (run_dir / "checkpoint").glob("client-0*")),
        (run_dir / "config.yaml", b"model:\n  unknown: 3\n", "config.yaml"),
        (run_dir / "config.yaml", b"", "config.yaml"),
        (run_dir / "split.json", b'{"split": 3}', "split.json"),
        (run_dir / "split.json", b'{"split": ', "split.json"),
        (run_dir / "summary.json", b"{}", "summary.json"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        assert text in answer()
        path.write_bytes(before)
    manifest = run_dir / "checkpoint" / "state.json"
    before = manifest.read_bytes()
    manifest.unlink()
    assert f"'{manifest}' is missing, which says what 'client-0" in answer()
    manifest.write_bytes(before)


def test_which_files_are_taken(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "sub/c.webp", "sub/d.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "e.csv").touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "f.png").touch()
    images, others = files_in([str(tmp_path), "gone.txt"])
    assert images == [*(str(tmp_path / name) for name in ("a.jpeg", "b.PNG", "sub/c.webp", "sub/d.jfif")), "gone.txt"]
    assert others == [str(tmp_path / "e.csv")]
