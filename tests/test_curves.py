"""Accuracy over training steps: what is drawn and written is what the runs' folders tell, by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import write_run

from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.curves import growth_tables
from fedlscl.analysis.figures import pictures
from fedlscl.analysis.formats import to_csv
from fedlscl.analysis.results import read_runs
from fedlscl.data.splits import ClientSplit, Split, SplitSpec, TaskSplit
from fedlscl.run.growth import Growth

Accuracies = Mapping[tuple[int, int, int], list[float]]
"""Accuracy in % on each task learned so far, by task, round of the task and client."""


def task(classes: tuple[int, ...], first: int, images: int) -> TaskSplit:
    """A task with so many training images, from the first on, and two for testing."""
    return TaskSplit(classes, np.arange(first, first + images), np.arange(2))


def split() -> Split:
    """Two clients with two classes, then one: 10 and 4, and 6 and 12 training images."""
    one = ClientSplit((), (0, 1, 2), (task((0, 1), 0, 10), TaskSplit((2,), np.arange(10, 14), np.array([2, 3]))))
    other = ClientSplit((), (0, 1, 2), (task((1, 2), 20, 6), TaskSplit((0,), np.arange(30, 42), np.array([2, 3]))))
    spec = SplitSpec(clients=2, tasks=2, classes_per_task=(2, 1), private_classes=0, public_classes=3)
    return Split(spec, 42, (one, other))


def grown(
    folder: Path, accuracy: Accuracies, rounds: int = 2, method: str = "fedavg", seed: int = 42, **fields: Any
) -> Path:
    """A finished run whose metrics have this accuracy under `task`, half of it under `seen`, batches of 4."""
    config = {"federation.rounds": rounds, "model.epochs": 2, "model.batch_size": 4, **fields}
    write_run(folder, method, seed, config=config)
    lines = ["task,round,metric,value", "1,1,client/0/collaborate/cross_entropy,0.5"]
    for (n, number, client), values in accuracy.items():
        for on, value in enumerate(values, 1):
            for mask, part in (("task", 1.0), ("seen", 0.5)):
                name = f"eval/{mask}/client/{client}/task/{on}"
                lines.append(f"{n},{(n - 1) * rounds + number},{name},{value * part}")
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    stored = {"classes": list("abcde"), "split": json.loads(split().to_json())}
    (folder / "split.json").write_text(json.dumps(stored))
    return folder


BY_HAND = {
    (1, 1, 0): [40.0],
    (1, 1, 1): [60.0],  # 50 on task 1
    (1, 2, 0): [80.0],
    (1, 2, 1): [80.0],  # 80
    (2, 1, 0): [80.0, 20.0],
    (2, 1, 1): [60.0, 40.0],  # 30 on task 2, and (50 + 50) / 2 on both
    (2, 2, 0): [70.0, 90.0],
    # client 1 could not be asked: 90 on task 2, and 80 on both
}


def growth(folder: Path) -> Growth | None:
    (run,) = read_runs(folder)
    return run.growth


def compared(folder: Path) -> Comparison:
    (comparison,) = compare(read_runs(folder))
    return comparison


def test_growth_is_the_mean_over_clients_and_then_over_tasks(tmp_path: Path) -> None:
    found = growth(grown(tmp_path / "run", BY_HAND))
    assert found is not None
    assert set(found.new) == {"task", "seen"}
    np.testing.assert_allclose(found.new["task"], [(50 + 30) / 2, (80 + 90) / 2])
    np.testing.assert_allclose(found.learned["task"], [(50 + 50) / 2, (80 + 80) / 2])
    np.testing.assert_allclose(found.learned["seen"], [25, 40])


def test_a_guess_depends_on_how_many_classes_compete(tmp_path: Path) -> None:
    found = growth(grown(tmp_path / "run", BY_HAND))
    assert found is not None
    assert found.chance["task"] == pytest.approx(((50 + 100) / 2, (50 + 75) / 2))
    assert found.chance["seen"] == pytest.approx(((50 + 100 / 3) / 2,) * 2)
    assert found.chance["federation"] == pytest.approx((100 / 3,) * 2)  # both have all three at once
    assert found.chance["none"] == pytest.approx((20, 20))


def test_steps_are_those_of_a_clients_batches_in_a_round(tmp_path: Path) -> None:
    every = growth(grown(tmp_path / "every", BY_HAND))
    some = growth(grown(tmp_path / "some", BY_HAND, **{"federation.clients_per_round": 1}))
    assert every is not None
    assert some is not None
    assert every.steps == pytest.approx(2 * (3 + 1 + 2 + 3) / 4)  # two epochs over 10, 4, 6 and 12 images by 4
    assert some.steps == pytest.approx(every.steps / 2)
    folder = grown(tmp_path / "none", BY_HAND)
    model = {"class_path": "StatisticsClient", "init_args": {"projection": 0}}  # it has no epochs
    summary = json.loads((folder / "summary.json").read_text())
    summary["config"]["model"] = model
    (folder / "summary.json").write_text(json.dumps(summary))
    none = growth(folder)
    assert none is not None
    assert none.steps == 0


def test_what_does_not_tell_is_left_out_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert growth(write_run(tmp_path / "plain")) is None  # no evaluation in its metrics
    folder = grown(tmp_path / "run", BY_HAND)
    (folder / "summary.json").rename(folder / "of-many.json")
    assert growth(folder) is None
    assert not caplog.records
    assert not growth_tables(compared(tmp_path))
    assert "accuracy_by_steps" not in {picture.name for picture in pictures(compared(tmp_path))}


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("metrics.csv", "2,4,", "2,5,", "in round 5 of task 2"),
        ("metrics.csv", "1,2,", "1,1,", "lacks round 2 of task 1"),
        ("metrics.csv", "task/1,40.0", "task/1,140.0", "140.0 in round 1 of task 1"),
        ("metrics.csv", "task/1,40.0", "task/1,nan", "nan in round 1 of task 1"),
        ("metrics.csv", "client/1/task", "client/7/task", "index 7"),
        ("split.json", '"spec"', '"spect"', "not a split"),
        ("split.json", '"classes": ["a"', '"classses": ["a"', "classes"),
    ],
)
def test_damaged_files_are_named_and_the_run_is_there_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, old: str, new: str, said: str
) -> None:
    folder = grown(tmp_path / "run", BY_HAND)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with caplog.at_level(logging.WARNING):
        assert growth(folder) is None
    (record,) = caplog.records
    assert str(folder) in record.getMessage()
    assert said in record.getMessage()


def level(*values: float) -> Accuracies:
    """These accuracies after the rounds of task 1, and the same ones in task 2."""
    return {(n, r, c): [v] * n for n in (1, 2) for r, v in enumerate(values, 1) for c in (0, 1)}


@pytest.fixture
def several(tmp_path: Path) -> Comparison:
    """A method with two seeds and six rounds, one with two rounds, and a bound."""
    grown(tmp_path / "a1", level(20, 30, 40, 50, 60, 70), 6, "fedavg", 1)
    grown(tmp_path / "a2", level(24, 30, 40, 50, 64, 70), 6, "fedavg", 2)
    grown(tmp_path / "b1", level(10, 90), 2, "lwf", 1)
    grown(tmp_path / "c1", level(50, 98), 2, "joint", 1)
    return compared(tmp_path)


def test_a_table_has_the_accuracy_after_some_rounds(several: Comparison) -> None:
    new, learned = growth_tables(several)
    assert (new.name, learned.name) == ("growth_task", "growth_seen")
    header = ("method", "seeds", "steps a round", "round 1", "round 2", "round 5", "last round")
    assert new.header == learned.header == header
    cells = {row[0].text.split()[0]: [cell.text for cell in row[1:]] for row in new.rows}
    assert cells["fedavg"] == ["2", "4.5", "22.0 ± 2.8", "30.0 ± 0.0", "62.0 ± 2.8", "70.0 ± 0.0"]
    assert cells["lwf"] == ["1", "4.5", "10.0", "90.0", "–", "90.0"]
    assert cells["joint"] == ["1", "–", "–", "–", "–", "98.0"]  # it has seen both tasks from the first round on
    assert {row[0].text.split()[0]: row[3].text for row in learned.rows}["lwf"] == "5.0"
    assert "round 1 sd" in to_csv(new).splitlines()[0]
    assert "A guess would have 75.0." in new.note


def test_a_figure_has_a_line_for_each_method_over_its_steps(several: Comparison) -> None:
    (picture,) = (found for found in pictures(several, "task") if found.name == "accuracy_by_steps")
    left, right = picture.figure.axes
    lines = {str(line.get_label()).split()[0].split("\n")[0]: line for line in left.lines}
    np.testing.assert_allclose(lines["fedavg"].get_xdata(), 4.5 * np.arange(1, 7))
    np.testing.assert_allclose(lines["fedavg"].get_ydata(), [22, 30, 40, 50, 62, 70])
    np.testing.assert_allclose(lines["lwf"].get_ydata(), [10, 90])
    assert list(lines["joint"].get_ydata()) == [98, 98]  # level
    assert list(lines["a"].get_ydata()) == [75, 75]
    assert left.get_xscale() == right.get_xscale() == "log"
    assert "(%)" in left.get_ylabel()
    assert "steps" in left.get_xlabel()
    assert "Mean over 1 to 2 seeds; bands are ± one sample standard deviation" in picture.caption


def test_one_round_of_a_task_is_no_curve(tmp_path: Path) -> None:
    grown(tmp_path / "run", level(50), 1)
    assert not growth_tables(compared(tmp_path))
    assert "accuracy_by_steps" not in {picture.name for picture in pictures(compared(tmp_path))}
