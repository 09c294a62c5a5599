"""A study of one's own images: what is looked at, proposed, fitted to the minutes, chosen, and gone on with."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import constant, make_summary, traffic
from pictures import pixels, write_folder
from PIL import Image
from rich.console import Console

from fedlscl.cli import main
from fedlscl.data.dealing import make_split
from fedlscl.data.folders import ImageFolder
from fedlscl.data.held_out import held_out
from fedlscl.data.source import HELD_OUT_IMAGES
from fedlscl.data.splits import SplitSpec
from fedlscl.models import hub
from fedlscl.run.sweep import PlannedRun
from fedlscl.study import answer, backbone, budget, command, ending, look, plan
from fedlscl.study.answer import Standing
from fedlscl.study.proposal import drawn, propose
from fedlscl.study.running import Clock, Pace, Runner, Task

CHOICES = yaml.safe_load(plan.CHOICES.read_text(encoding="utf-8"))
METHODS = Path(__file__).parent.parent / "experiments" / "methods"

# ------------------------------------------------------------------------ the images


def test_files_that_somebody_should_look_at_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", names=("ant", "bee", "cow"))
    for path in root.rglob("*.png"):
        Image.open(path).resize((20, 24)).save(path)
    Image.fromarray(pixels(3, 8, 30)).save(root / "train" / "ant" / "small.png")
    (root / "train" / "ant" / "text.png").write_text("no image")
    (root / "test" / "bee" / "other.png").write_bytes((root / "train" / "ant" / "0.png").read_bytes())
    (root / "test" / "cow" / "again.png").write_bytes((root / "train" / "cow" / "0.png").read_bytes())
    (root / "train" / "cow" / "twice.png").write_bytes((root / "train" / "cow" / "1.png").read_bytes())
    (root / "train" / "notes.md").write_text("passed over, being no image")
    (root / "train" / "stray.png").write_bytes((root / "train" / "cow" / "2.png").read_bytes())
    seen = look.look_at_files(ImageFolder(str(root), 8), tmp_path)
    assert (seen.classes, seen.train, seen.test) == (("ant", "bee", "cow"), (5, 3, 4), (2, 3, 3))
    assert {(Path(doubt.path).name, doubt.why.partition(":")[0]) for doubt in seen.doubts} == {
        ("small.png", "smaller than 16 px"),
        ("text.png", "no image"),
        ("other.png", "the same file in two classes"),
        ("again.png", "the same file for training and for testing"),
        ("twice.png", "the same file twice in a class"),
    }
    assert seen.sizes.count((20, 24)) == len(seen.sizes) - 1
    assert "stray.png" in seen.notes[0]
    assert "text.png,no image" in seen.table()


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("pets", {"class_path": "ImageFolder"}),
        ("list.csv", {"class_path": "ImageTable"}),
        ("torchvision:DTD", {"class_path": "Torchvision", "init_args": {"name": "DTD"}}),
        ("huggingface:flwrlabs/pacs", {"class_path": "HuggingFace", "init_args": {"name": "flwrlabs/pacs"}}),
        ("medmnist:bloodmnist", {"class_path": "MedMNIST", "init_args": {"name": "bloodmnist"}}),
        ("EuroSAT", {"class_path": "Torchvision", "init_args": {"name": "EuroSAT"}}),
        ("digits", {"class_path": "Digits"}),
    ],
)
def test_a_source_is_what_a_person_would_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, fields: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    (tmp_path / "list.csv").write_text("path,label\n")
    found = look.source_of(given)
    assert found == {**fields, **({"init_args": found["init_args"]} if "init_args" in found else {})}
    if "init_args" in fields:
        assert found == fields
    with pytest.raises(ValueError, match="no folder or CSV file that is there"):
        look.source_of("nowhere/at/all")


# ------------------------------------------------------------------------- the split


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=12), clients=st.integers(1, 6), tasks=st.integers(1, 5))
def test_a_proposed_split_works_with_every_seed(counts: list[int], clients: int, tasks: int) -> None:
    train, test = np.repeat(np.arange(len(counts)), counts), np.repeat(np.arange(len(counts)), 2)
    names = [f"class {n}" for n in range(len(counts))]
    try:
        found = propose(train, test, names, clients, tasks, (1, 2))
    except ValueError:  # then there is none that is not of one class for each client
        assert len(counts) < 2 * clients
        return
    spec = SplitSpec(**found.fields)
    assert (spec.clients, spec.tasks <= tasks) == (clients, True)
    assert min(spec.task_sizes) >= 2 or spec.tasks == 1
    held = held_out(train)
    for labels in ((train, test), (train[~held], train[held])):
        split = make_split(*labels, spec, 2)
        used = {label for client in split.clients for task in client.tasks for label in task.classes}
        assert len(used) == len(counts) or any("left out" in note for note in found.notes)


def test_a_split_is_drawn_with_what_everybody_has() -> None:
    train = np.repeat(np.arange(4), 10)
    spec = SplitSpec(clients=2, tasks=1, classes_per_task=2, private_classes=1, public_classes=1)
    split = make_split(train, train, spec, 0)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(drawn(split, train, ["a[1]", "b", "c", "d"]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    (public,) = split.clients[0].public
    numbers = [int((train[client.tasks[0].train] == public).sum()) for client in split.clients]
    row = next(line for line in shown.splitlines() if line.startswith(["a[1]", "b", "c", "d"][public]))
    assert row.split()[1:] == [f"1:{number}" for number in numbers]
    assert sum(line.rstrip().endswith("left out") for line in shown.splitlines()) == 1
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a[1]", "b", "c", "d"]


# ------------------------------------------------------------------------ the budget


def test_the_time_of_a_run_is_that_of_the_images_in_it() -> None:
    spec = SplitSpec(
        clients=2,
        tasks=2,
        classes_per_task=2,
        private_classes=3,
        public_classes=1,
        train_per_class=10,
        test_per_class=4,
    )
    images = budget.Images.of([20] * 7, [5] * 7, spec)
    assert images == budget.Images(train=70, test=32, tasks=2)
    cost = {"once": 1, "round": 2, "test": 0.5}
    # 102 once, 2 x 3 x 70, and 0.5 x 3 rounds x (16 + 32) test images
    assert budget.seconds_of(cost, images, 3, 0.1, 5) == pytest.approx(5 + 0.1 * (102 + 420 + 72))


def test_the_largest_size_is_taken_that_fits() -> None:
    large, small = {"fast": 10.0, "slow": 100.0}, {"fast": 10.0, "slow": 30.0}
    both = [({"size": "large"}, large), ({"size": "small"}, small)]

    def fitted(seconds: float) -> tuple[Any, int, tuple[str, ...], dict[str, float]]:
        found = budget.fit(both, (), 3, seconds, 2)
        return found.size["size"], found.seeds, found.methods, dict(found.left_out)

    # seeds x (all methods to choose, the slowest and the fastest to test) x margin / jobs
    assert fitted(3 * 220 * 1.3 / 2) == ("large", 3, ("fast", "slow"), {})
    assert fitted(3 * 220 * 1.3 / 2 - 1) == ("small", 3, ("fast", "slow"), {})
    assert fitted(3 * 80 * 1.3 / 2 - 1) == ("large", 1, ("fast", "slow"), {})
    assert fitted(220 * 1.3 / 2 - 1) == ("small", 1, ("fast", "slow"), {})
    assert fitted(1) == ("small", 1, ("fast",), {"slow": 30.0})
    assert budget.fit([({}, {"one": 5.0, "two": 5.0})], (), 1, 1, 1).methods == ("one",)
    assert budget.fit(both, ("slow",), 3, 3 * 30 * 1.3 / 2, 2).methods == ("fast",)
    assert budget.fit(both, ("slow",), 3, 3 * 220 * 1.3 / 2, 2).methods == ("fast", "slow")


def test_predictions_learn_from_what_runs_took() -> None:
    pace = Pace({"fast": 10.0, "slow": 100.0})
    assert pace.sum(["fast", "slow"]) == 110
    pace.note("fast", 30)
    assert (pace.of("fast"), pace.of("slow")) == (30, 300)
    pace.note("slow", 100)
    pace.note("slow", 200)
    assert pace.of("slow") == 150


# ------------------------------------------------------------------------ the answer


def standing(method: str, *values: float, up: float = 0, images: int = 400) -> Standing:
    return Standing(method, dict(enumerate(values)), up, up / 2, 1.0, images)


def test_of_methods_that_are_level_that_which_sends_least_is_taken() -> None:
    best, level = standing("best", 80, 82, 84, up=1000), standing("level", 78, 80, 82, up=100)
    local, far = standing("local", 70, 71, 72), standing("far", 60, 62, 64, up=10)
    assert answer.choose([best, level, local, far]) == ("level", "local", ("best",))
    assert answer.choose([standing("local", 78, 80, 82), best, far]) == ("local", "best", ("best",))
    assert answer.choose([best, far]) == ("best", "far", ())
    assert answer.choose([best]) == ("best", None, ())
    # one seed: the standard error of a share of 96 images with two right and two wrong ones added
    assert standing("one", 100, images=96).deviation == pytest.approx(100 * (0.98 * 0.02 / 100) ** 0.5)
    assert answer.overlap(standing("one", 100, images=96), standing("other", 97.5, images=96))


def test_the_answer_says_by_how_much_and_at_what_cost() -> None:
    methods = {name: {"what": f"what {name} is", "leaves": f"sums of {name}"} for name in ("mine", "local")}
    mine, local = standing("mine", 80, 84, 82, up=2048), standing("local", 70, 71, 72)
    choice = answer.Choice("mine", "local", ())
    take, much, cost = answer.lines(choice, {"mine": mine, "local": local}, methods, 3)
    assert take == "Take mine: what mine is. On held-out training images (3 seeds) it is ahead of all others."
    assert much == (
        "It has 82.0 ± 2.0 % of the test images right (3 seeds); local, the best without any exchange, has "
        "71.0 ± 1.0 %: 11.0 ± 1.7 points more."
    )
    assert cost.startswith("A client sends 2.0 KiB and receives 1.0 KiB in all. What leaves it: sums of mine. Nothing ")
    near = standing("local", 79, 83, 82)
    take, much, _ = answer.lines(answer.Choice("local", "mine", ("mine",)), {"mine": mine, "local": near}, methods, 3)
    assert "Level with it on held-out training images: mine; and it sends nothing." in take
    assert much.endswith("has 82.0 ± 2.0 %: level, since the deviations overlap (0.7 ± 0.6 points less).")


# ------------------------------------------------------------- the choices and the files


def test_the_methods_of_a_study_are_those_of_the_experiments() -> None:
    for name, entry in CHOICES["methods"].items():
        there = yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8"))
        for part in ("model", "server"):
            mine, theirs = entry["config"][part], there[part]
            assert mine["class_path"] == theirs["class_path"], name
            given, own = theirs.get("init_args", {}), mine.get("init_args", {})
            assert {field: own.get(field) for field in given if field != "continual"} == {
                field: value for field, value in given.items() if field != "continual"
            }, name
            assert given.get("continual", {}).get("class_path") == own.get("continual", {}).get("class_path")
        assert entry.keys() == {"what", "leaves", "cost", "run", "config"}


def test_methods_may_be_files(tmp_path: Path) -> None:
    found = plan.methods_of(["fedncm", str(METHODS / "lorm.yaml"), "ccvr"], CHOICES)
    assert list(found) == ["fedncm", "lorm", "ccvr"]
    assert found["lorm"]["config"]["server"] == {"class_path": "LoRMServer"}
    with pytest.raises(ValueError, match=r"methods: 'fedncn' must be one of local_ncm, .*or another method, or a file"):
        plan.methods_of(["fedncn"], CHOICES)
    (tmp_path / "odd.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match="holds no model and server"):
        plan.methods_of([str(tmp_path / "odd.yaml")], CHOICES)


def test_weights_are_known_by_their_file(tmp_path: Path) -> None:
    name = "vit_small_patch16_224.augreg_in21k"
    assert backbone.name_of(tmp_path / f"{name}.fp16.safetensors") == name
    with pytest.raises(ValueError, match=r"tell which ViT of timm it is of \(12 blocks, width 96, patches of 8 px\)"):
        backbone.name_of(SHIPPED)
    with pytest.raises(FileNotFoundError, match="weights: there is no file"):
        backbone.choose(str(tmp_path / "none.safetensors"), CHOICES, False)


SHIPPED = Path(backbone.__file__).parents[1] / "models" / "weights" / "vit_glyph_patch8_32.fp16.safetensors"


class Done:
    """A process that has ended."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode: int | None = exitcode

    def terminate(self) -> None:
        """It has ended."""

    def join(self) -> None:
        """It has ended."""


class Pretended:
    """Runs whose numbers are made up: accuracies by method; a method without one fails."""

    def __init__(self, accuracies: dict[str, float]) -> None:
        self.accuracies, self.started = accuracies, list[tuple[str, str, int]]()

    def __call__(self, planned: PlannedRun) -> Done:
        method, seed = Path(planned.words[5]).stem, int(planned.words[planned.words.index("--seed_everything") + 1])
        self.started.append((planned.run_dir.parent.name, method, seed))
        planned.run_dir.mkdir(parents=True, exist_ok=True)
        (planned.run_dir / "output.log").write_text("it could not be\n")
        if method not in self.accuracies:
            return Done(1)
        value = self.accuracies[method] + seed % 3
        acc = {mask: constant(value, 3, 5) for mask in ("task", "seen", "federation", "none")}
        sent = traffic(0 if method.startswith("local") else 1000, clients=5)
        choosing = planned.run_dir.parent.name == "choose"
        setting, tested_on = ("digits-held-out", HELD_OUT_IMAGES) if choosing else ("digits", "test images")
        sizes = {"bytes_up": sent, "bytes_down": sent}
        made = make_summary(method, seed, setting=setting, acc=acc, evaluated_on=tested_on, **sizes)
        made.write(planned.run_dir / "summary.json")
        return Done(0)


@pytest.mark.usefixtures("command_line")
def test_a_study_ends_with_an_answer_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Pretended({"local_ncm": 60.0, "fed_ridge": 70.0})
    monkeypatch.setattr(ending, "Launcher", lambda threads: runs)
    monkeypatch.setattr(hub, "cached", lambda repository: False)
    monkeypatch.setattr(hub, "unreachable", lambda repository: "it is far away")
    monkeypatch.setattr(command.backbone, "seconds_per_image", lambda *a: 0.001)
    monkeypatch.setattr("fedlscl.study.running.POLL_SECONDS", 0)
    monkeypatch.setattr(
        ending, "write_report", lambda shown, path: path.write_text(" and ".join(c.title for c in shown))
    )
    choices = tmp_path / "choices.yaml"
    choices.write_text(yaml.safe_dump({**CHOICES, "seeds": [0, 1]}))
    monkeypatch.setattr(plan, "CHOICES", choices)
    words = ["study", "digits", "--out", "mine", "--methods", "local_ncm", "fed_ridge", "fedncm", "--minutes"]
    main([*words, "10"])
    said = capsys.readouterr().out
    assert "since --weights names no file, no ViT is in the local hub cache, and the hub gives none (it is far" in said
    assert "fedncm, seed 0: failed: it could not be" in said
    assert "Take fed_ridge: ridge regression" in said
    assert "Not compared: fedncm (failed)." in said
    assert "It has 70.5 ± 0.7 % of the test images right (2 seeds); local_ncm, the best without any exchange" in said
    assert "10.0 ± 0.0 points more" in said
    expected = {("choose", method, seed) for method in ("local_ncm", "fed_ridge") for seed in (0, 1)}
    expected |= {("test", method, seed) for method in ("local_ncm", "fed_ridge") for seed in (0, 1)}
    assert {*runs.started} == expected | {("choose", "fedncm", 0)}
    assert "Take fed_ridge" in (tmp_path / "mine" / "answer.md").read_text(encoding="utf-8")
    report = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert [title.partition(" (")[0] for title in report.split(" and ")] == ["digits", "digits-held-out"]

    choices.write_text(yaml.safe_dump({**CHOICES, "enough_rounds": 99, "seeds": [0]}))
    runs.accuracies["fedvit"] = 10.0
    main(["study", "digits", "--out", "few", "--methods", "local_ncm", "fedvit", "--minutes", "10"])
    assert "a task are few; with 99 or more, as more --minutes give, they may do better" in capsys.readouterr().out
    assert "are few; with 99" in (tmp_path / "few" / "answer.md").read_text(encoding="utf-8")
    choices.write_text(yaml.safe_dump({**CHOICES, "seeds": [0, 1]}))

    runs.started.clear()
    runs.accuracies["fedncm"] = 71.0
    main([*words, "20"])
    again = capsys.readouterr().out
    assert runs.started[0] == ("choose", "fedncm", 0)  # what failed is tried again, and nothing else
    assert {method for _, method, _ in runs.started} == {"fedncm"}
    assert "Level with it on held-out training images: fed_ridge" in again
    with pytest.raises(SystemExit, match="methods: 'fedncn' must be one of"):
        main(["study", "digits", "--out", "other", "--methods", "fedncn"])
    with pytest.raises(SystemExit, match="weights: there is no file 'none'"):
        main(["study", "digits", "--out", "other", "--weights", "none"])
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit, match="out 'mine' holds a study of other words"):
        main([*words, "20", "--clients", "3"])


def test_a_run_for_which_there_is_no_time_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlscl.study.running.POLL_SECONDS", 0)
    runs = Pretended({"slow": 1.0, "fast": 2.0})
    clock = Clock.of(tmp_path, 100.0, time.monotonic())
    runner = Runner(runs, 2, clock, Pace({"slow": 50.0, "fast": 5.0}), Console(file=io.StringIO()))
    folder = tmp_path / "runs" / "choose"
    words = ("fedlscl", "fit", "--config", "x", "--config")
    tasks = [
        Task(name, 0, PlannedRun((*words, f"{name}.yaml", "--seed_everything", "0"), folder / name))
        for name in ("slow", "fast")
    ]
    skipped = runner.run(tasks, lambda task: runner.pace.of(task.method) < 10, 0.0, lambda run: "fine")
    assert [task.method for task in skipped] == ["slow"]
    assert tasks[1].result is not None
    clock.begun -= 60
    clock.save()
    later = Clock.of(tmp_path, 100.0, time.monotonic())
    assert later.before >= 60
    (tmp_path / "progress.json").write_text("{")
    assert Clock.of(tmp_path, 100.0, time.monotonic()).before == 0
