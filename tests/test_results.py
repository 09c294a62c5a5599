"""Reading finished runs and telling apart what is repeated from what was varied."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run, make_summary, write_run

from fedlscl.results import Run, compare, flat, read_runs

SEEDS = (42, 1999, 2024)


def test_runs_are_found_at_any_depth_and_each_only_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_run(tmp_path / "a" / "one", seed=1)
    write_run(tmp_path / "a" / "b" / "two", seed=2)
    (tmp_path / "a" / "three-seed3.json").write_text(json.dumps(make_summary(seed=3)))
    (tmp_path / "a" / "list.json").write_text("[1]")
    (tmp_path / "a" / "other.json").write_text('{"method": "of payment"}')
    (tmp_path / "a" / "folder.json").mkdir()
    runs = read_runs([tmp_path / "a", first, first / "summary.json"])
    assert sorted(run.seed for run in runs) == [1, 2, 3]
    assert not caplog.records


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run in it"):
        read_runs([tmp_path])
    with pytest.raises(FileNotFoundError):
        read_runs([tmp_path / "nowhere"])
    folder = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"split\.json is not the summary"):
        read_runs([folder / "split.json"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON: Expecting property name"),
        ({"config": None}, "lacks config; it was cut short, or made by another version"),
        ({"seconds": None, "machine": None}, "lacks machine, seconds; it was"),
        ({"accuracy": {"seen": {}, "task": {}}}, "lacks accuracy under mask none; it was made by another version"),
    ],
)
def test_what_may_have_been_meant_as_a_run_is_named_in_folders_and_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | dict[str, object], complaint: str
) -> None:
    write_run(tmp_path / "runs" / "new")
    if not isinstance(text, str):
        changed = {**make_summary(seed=1), **text}
        text = json.dumps({key: value for key, value in changed.items() if value is not None})
    bad = tmp_path / "runs" / "bad.json"
    bad.write_text(text)
    assert [run.seed for run in read_runs([tmp_path / "runs"])] == [42]
    (record,) = caplog.records
    assert f"{bad} {complaint}" in record.message
    assert record.message.endswith("; it is left out")
    with pytest.raises(ValueError, match=re.escape(f"{bad} {complaint}")):
        read_runs([bad])


def test_runs_of_other_conditions_are_not_compared() -> None:
    runs = [make_run(seed=1), make_run(seed=2, backbone="another"), make_run(seed=3, setting="cifar100")]
    runs.append(make_run(seed=4, evaluated_on="images held out of training"))
    comparisons = compare(runs)
    assert [len(comparison.variants) for comparison in comparisons] == [1] * 4
    assert [comparison.setting for comparison in comparisons] == ["digits", "digits", "cifar100", "digits"]


def test_seeds_threads_and_places_make_no_other_variant() -> None:
    runs = [make_run(seed=seed, config={"threads": seed, "data.device_mib": seed}) for seed in reversed(SEEDS)]
    (comparison,) = compare(runs)
    (variant,) = comparison.variants
    assert [run.seed for run in variant.runs] == list(SEEDS)
    assert variant.label == "fed_lscl"


def test_a_field_that_is_off_and_one_that_an_older_version_did_not_have_are_the_same() -> None:
    runs = [make_run(seed=1), make_run(seed=2, config={"model.gradient_clip": None})]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.variants] == ["fed_lscl"]
    (comparison,) = compare([*runs, make_run(seed=3, config={"model.gradient_clip": 1.0})])
    labels = [variant.label for variant in comparison.variants]
    assert labels == ["fed_lscl (gradient_clip None)", "fed_lscl (gradient_clip 1.0)"]


def test_the_usual_configuration_has_the_most_frequent_values() -> None:
    """A sweep over blocks and one over buffers share their middle; it is what each of them varies."""
    blocks = [make_run(config={"model.block": block}) for block in (0, 3, 11)]
    buffers = [make_run(config={"model.buffer_size": size}) for size in (5, 20)]
    (comparison,) = compare([*blocks, *buffers, make_run("fedavg")])
    labels = {variant.label for variant in comparison.variants}
    assert labels == {
        *("fed_lscl", "fed_lscl (block 0)", "fed_lscl (block 11)"),
        *("fed_lscl (buffer_size 5)", "fed_lscl (buffer_size 20)", "fedavg"),
    }
    assert [variant.label for variant in comparison.usual] == ["fed_lscl", "fedavg"]
    assert list(comparison.varying("model.block")) == [0, 3, 11]
    assert list(comparison.varying("model.buffer_size")) == [5, 10, 20]
    assert comparison.usual_values == {"": {}, "fed_lscl": {"model.block": 3, "model.buffer_size": 10}}
    assert comparison.varying("model.epochs") == {}


def test_a_method_and_its_ablations_are_usual_at_the_same_value() -> None:
    """Three blocks are equally frequent for the method itself; its ablation and the other class ran at one of them."""
    other = {"model.class_path": "another.Class", "model.block": 11}
    runs = [make_run(config={"model.block": block}) for block in (0, 3, 11)]
    runs += [make_run("fed_lscl_without_o2d"), make_run("lorm", config={"model": other})]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.usual] == ["fed_lscl", "fed_lscl_without_o2d", "lorm"]
    assert [variant.label for variant in comparison.variants][1:3] == ["fed_lscl (block 0)", "fed_lscl (block 11)"]
    # two more at block 11, and it is the ablation that ran at another than the usual one
    runs += [make_run(config={"model.block": 11, "model.epochs": epochs}) for epochs in (5, 9)]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.usual] == ["fed_lscl", "fed_lscl_without_o2d (block 3)", "lorm"]
    assert comparison.usual[0].runs[0].fields["model.block"] == 11


def test_without_a_usual_configuration_all_variants_are_shown() -> None:
    (comparison,) = compare([make_run(config={"model.block": block}) for block in (11, 0, 2)])
    assert [variant.label for variant in comparison.usual] == [f"fed_lscl (block {block})" for block in (0, 2, 11)]
    assert list(comparison.varying("model.block")) == [0, 2, 11]


def test_what_is_no_methods_own_is_usual_for_all_together() -> None:
    """A method that ran under another protocol says so, whatever it has most runs of."""
    runs = [make_run(name) for name in ("fed_lscl", "lorm", "glfc")]
    runs += [make_run("fedavg", seed=seed, config={"federation.rounds": 50}) for seed in SEEDS]
    # a study with fewer rounds has more configurations than the real thing, and still is not the usual one
    runs += [make_run(config={"federation.rounds": 1, "model.block": block}) for block in (3, 0, 11)]
    runs += [make_run(name) for name in ("fedprox", "ewc")]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.usual] == [
        *("fed_lscl", "lorm", "glfc", "fedavg (federation.rounds 50)", "fedprox", "ewc")
    ]
    # fedavg has no usual configuration of its own here, and what is usual for all is the same for it
    assert comparison.usual_values == {"": {"federation.rounds": 3}, "fed_lscl": {"model.block": 3}}


def test_data_of_another_folder_are_other_data_wherever_it_lies() -> None:
    def run(root: str, seed: int) -> Run:
        return make_run(seed=seed, config={"data.source": {"class_path": "X", "init_args": {"root": root}}})

    (comparison,) = compare([run("/a/birds", 1), run("data/birds", 2), run("/a/cats", 1)])
    assert [len(variant.runs) for variant in comparison.variants] == [2, 1]
    assert [variant.differs for variant in comparison.variants] == [
        *({"data.source.root": "birds"}, {"data.source.root": "cats"})
    ]


def test_a_field_that_some_lack_can_still_be_sorted() -> None:
    (comparison,) = compare([make_run(config={"model.block": block}) for block in (5, None, 3)])
    assert list(comparison.varying("model.block")) == [None, 3, 5]


def test_a_seed_more_does_not_make_a_configuration_usual() -> None:
    runs = [make_run(seed=seed, config={"model.block": 0}) for seed in SEEDS]
    (comparison,) = compare([*runs, make_run(config={"model.block": 1})])
    assert all(variant.differs for variant in comparison.variants)


def test_the_same_run_twice_is_one_and_with_other_numbers_an_error() -> None:
    (comparison,) = compare([make_run(), make_run()])
    assert len(comparison.variants[0].runs) == 1
    with pytest.raises(ValueError, match="same configuration and seed 42 but other numbers"):
        compare([make_run(), make_run(value=51.0)])


def test_accuracy_over_the_tasks_is_the_mean_of_what_was_learned() -> None:
    run = make_run(value=50.0)
    # after task 1: clients 50 and 51; after task 2: 60, 61 and 61, 62
    np.testing.assert_allclose(run.over_tasks("task"), [50.5, 61.0])
    np.testing.assert_allclose(run.over_tasks("seen"), [40.5, 51.0])


def test_fields_are_named_as_on_the_command_line() -> None:
    nested = {"model": {"class_path": "X", "init_args": {"continual": {"class_path": "R", "init_args": {"a": 1}}}}}
    assert flat({**nested, "cnn": {"model_args": {}}}) == {
        "model.class_path": "X",
        "model.continual.class_path": "R",
        "model.continual.a": 1,
        "cnn.model_args": {},
    }
