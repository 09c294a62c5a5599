"""The summary of a run: what is written is read again, as are older and later ones, and nothing wrong is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import accuracy, make_summary

from fedlscl.evaluation import MASKS, summarise
from fedlscl.run.summary import Accuracy, NotASummary, Promise, Skipped, Summary, Traffic, contradictory

RECORDED = sorted((Path(__file__).parent.parent / "experiments" / "results").rglob("*.json"))
LAYOUT = [
    *("method", "setting", "seed", "backbone", "cnn", "task_aware", "evaluated_on"),
    *("split_sha256", "data_sha256", "weights_sha256", "cnn_weights_sha256", "accuracy", "bytes_up", "bytes_down"),
    *("bytes_setup_per_client", "compute", "tested_pairs", "untrained_pairs", "images_kept", "privacy"),
    *("skipped", "unanswered", "nodes", "seconds", "peak_memory_mib", "threads", "machine", "versions"),
    *("config", "overrides"),
]
LACKING = {
    **{"task_aware": [], "data_sha256": None, "weights_sha256": None, "compute": {}, "config": {}, "overrides": {}},
    **{"tested_pairs": None, "untrained_pairs": None, "images_kept": None, "unanswered": [], "nodes": {}},
    **{"cnn_weights_sha256": None, "privacy": None},
}
"""What older summaries lack, and what they are read as."""


def content(**changes: Any) -> dict[str, Any]:
    """What is in the file of a summary."""
    made: dict[str, Any] = json.loads(make_summary().to_json())
    return made | changes


def test_there_are_recorded_summaries() -> None:
    assert len(RECORDED) > 200


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECORDED}), ids=lambda path: path.name)
def test_what_was_recorded_is_read_whole_and_written_as_it_was(folder: Path) -> None:
    for path in (path for path in RECORDED if path.parent == folder):
        recorded = json.loads(path.read_text())
        if recorded.get("task_aware") is False:
            recorded["task_aware"] = []
        complete = {name: recorded[name] if name in recorded else LACKING[name] for name in LAYOUT}
        assert set(recorded) <= set(complete)
        summary = Summary.read(path)
        assert summary.to_json() == json.dumps(complete, indent=1), path
        assert Summary.from_json(summary.to_json()) == summary


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    summary = make_summary(
        cnn=("resnet18", "vgg16"),
        task_aware=("task",),
        privacy=Promise(5.2, 1e-5, "image", "system", "upload", 1.08, 2),
        data_sha256="a" * 64,
        skipped=(Skipped(2, 1, "gone"),),
        bytes_up=Traffic.of([[3, None], [5, 4]]),
        config={"model": {"init_args": {"block": 3, "kept": None, "list": [1, 2.5]}}},
        overrides={"model.block": 3},
    )
    summary.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == summary
    assert (tmp_path / "summary.json").read_text() == summary.to_json()
    assert list(content()) == LAYOUT


def test_only_fingerprints_of_one_kind_contradict() -> None:
    assert not contradictory("a", "a", None)
    assert not contradictory("a", "all:b", None)
    assert contradictory("a", "all:b", "b")
    assert contradictory("all:a", "all:b")


def test_what_was_never_measured_is_read_again() -> None:
    unmeasured = accuracy(10.0)
    unmeasured[:, 1, 1] = np.nan
    text = make_summary(acc=dict.fromkeys(MASKS, unmeasured)).to_json()
    summary = Summary.from_json(text)
    assert np.isnan(summary.accuracy["seen"].table1[1])
    assert summary.to_json() == text


def test_what_a_later_version_adds_is_passed_over() -> None:
    later = content(a_new_field={"a": 1})
    later["accuracy"]["seen"]["a_new_metric"] = 1.0
    assert Summary.from_json(json.dumps(later)) == make_summary()


@pytest.mark.parametrize("name", LACKING)
def test_what_older_summaries_lack_is_empty(name: str) -> None:
    older = content()
    del older[name]
    expected = tuple(LACKING[name]) if isinstance(LACKING[name], list) else LACKING[name]
    assert getattr(Summary.from_json(json.dumps(older)), name) == expected


@pytest.mark.parametrize("name", sorted(set(LAYOUT) - set(LACKING) - {"method", "accuracy"}))
def test_any_other_field_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    short = content()
    del short[name]
    (tmp_path / "it.json").write_text(json.dumps(short))
    expected = f"{tmp_path / 'it.json'} lacks {name}; it was cut short, or made by another version"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        Summary.read(tmp_path / "it.json")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seed", "42", "seed is '42', must be a whole number"),
        ("seed", True, "seed is True, must be a whole number"),
        ("seed", 1.5, "seed is 1.5, must be a whole number"),
        ("method", None, "method is None, must be a text"),
        ("cnn", 3, "cnn is 3, must be a text or a list"),
        ("cnn", ["a", 3], "cnn[1] is 3, must be a text"),
        ("task_aware", True, "task_aware is True, must be a list"),
        ("data_sha256", 5, "data_sha256 is 5, must be a text or null"),
        ("accuracy", [], "accuracy is [], must be an object"),
        ("accuracy.seen", None, "accuracy.seen is None, must be an object"),
        ("accuracy.seen.final_average", "high", "accuracy.seen.final_average is 'high', must be a number"),
        ("accuracy.seen.forgetting", "low", "accuracy.seen.forgetting is 'low', must be a number or null"),
        ("accuracy.task.matrix", [[1.0]], "accuracy.task.matrix[0][0] is 1.0, must be a list"),
        ("bytes_up.by_client", [1, 2.5], "bytes_up.by_client[1] is 2.5, must be a whole number"),
        ("bytes_up.by_round", [[1, "x"]], "bytes_up.by_round[0][1] is 'x', must be a whole number or null"),
        (
            "compute.resnet18",
            {"flops": 1},
            " lacks compute.resnet18.flops_frozen, compute.resnet18.trained_parameters;",
        ),
        ("skipped", [{"round": 1}], " lacks skipped[0].client, skipped[0].reason;"),
        ("seconds", {"fit": 1.0}, " lacks seconds.total;"),
        ("seconds.total", "long", "seconds.total is 'long', must be a number"),
        ("versions.torch", 2.15, "versions.torch is 2.15, must be a text"),
        ("config", "none", "config is 'none', must be an object"),
    ],
)
def test_a_value_of_another_type_is_named(path: str, value: object, said: str) -> None:
    wrong = content()
    *groups, last = path.split(".")
    inner = wrong
    for group in groups:
        inner = inner[group]
    inner[last] = value
    expected = f"the file{said}" if said.startswith(" ") else f"the file: {said}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        Summary.from_json(json.dumps(wrong), "the file")


def test_a_whole_number_may_stand_for_any_number() -> None:
    assert Summary.from_json(json.dumps(content(peak_memory_mib=100))) == make_summary(peak_memory_mib=100.0)


def test_a_mask_that_is_missing_is_named() -> None:
    wrong = content()
    del wrong["accuracy"]["none"]
    with pytest.raises(ValueError, match="lacks accuracy under mask none; it was made by another version"):
        Summary.from_json(json.dumps(wrong))


def test_accuracy_under_a_mask_that_a_later_version_has_added_is_unknown_in_an_older_summary() -> None:
    older = content()
    del older["accuracy"]["federation"]
    summary = Summary.from_json(json.dumps(older))
    unknown, known = summary.under("federation"), summary.under("none")
    assert unknown.array.shape == known.array.shape
    assert np.isnan([*unknown.array.flat, *unknown.table1, unknown.final_average, unknown.average_incremental]).all()
    assert known is summary.accuracy["none"]
    assert unknown.forgetting is unknown.backward_transfer is None


@pytest.mark.parametrize("text", ["[1]", '{"split": {}}', '{"method": "of payment"}', "3"])
def test_what_is_no_summary_is_told_from_what_is_a_bad_one(text: str) -> None:
    with pytest.raises(NotASummary, match=r"is not the summary\.json of a finished run"):
        Summary.from_json(text)


@pytest.mark.parametrize("text", [b"{", b'{"method": "\xff"}'])
def test_what_is_no_json_says_so(text: bytes) -> None:
    with pytest.raises(ValueError, match="it is not JSON: ") as raised:
        Summary.from_json(text, "it")
    assert not isinstance(raised.value, NotASummary)


def test_a_summary_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    make_summary().write(path)

    def broken(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        make_summary(seed=1).write(path)
    assert Summary.read(path).seed == 42


def test_the_metrics_are_those_of_the_array() -> None:
    found = Accuracy.of(accuracy(50.0))
    assert json.loads(json.dumps(found.__dict__)) == summarise(accuracy(50.0))
    np.testing.assert_array_equal(found.array, accuracy(50.0))


def test_the_single_numbers_are_those_that_there_are_and_the_newest_of_table_1() -> None:
    # after task 2 the clients have 60, 61 and 61, 62; task 1 was learned with 50 and 51
    assert Accuracy.of(accuracy(50.0)).scalars == {
        "final_average": 61.0,
        "average_incremental": (50.5 + 61.0) / 2,
        "forgetting": -10.0,
        "backward_transfer": 10.0,
        "table1": 61.5,
    }
    assert set(Accuracy.of(accuracy(50.0, tasks=1)).scalars) == {"final_average", "average_incremental", "table1"}


def test_traffic_by_hand() -> None:
    found = Traffic.of([[3, None, 4], [5, None, None]])
    assert found == Traffic(4.0, 12, (8, 0, 4), ((3, None, 4), (5, None, None)))
    assert Traffic.of([[None, None]]) == Traffic(0.0, 0, (0, 0), ((None, None),))
