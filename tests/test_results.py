"""Reading finished runs and telling apart what is repeated from what was varied."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run, make_summary, write_run

from fedlscl.analysis.comparison import compare
from fedlscl.analysis.results import Run, Runs, read_runs
from fedlscl.evaluation import MASKS
from fedlscl.run.fields import flat
from fedlscl.run.summary import Skipped

SEEDS = (42, 1999, 2024)


def test_runs_are_found_at_any_depth_and_each_only_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write_run(tmp_path / "a" / "one", seed=1)
    write_run(tmp_path / "a" / "b" / "two", seed=2)
    (tmp_path / "a" / "three-seed3.json").write_text(make_summary(seed=3).to_json())
    (tmp_path / "a" / "list.json").write_text("[1]")
    (tmp_path / "a" / "other.json").write_text('{"method": "of payment"}')
    (tmp_path / "a" / "folder.json").mkdir()
    runs = read_runs([tmp_path / "a", first, first / "summary.json"])
    assert sorted(run.seed for run in runs) == [1, 2, 3]
    assert not caplog.records


def test_one_path_will_do_as_text_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "one", seed=1)
    other = write_run(tmp_path / "runs" / "two", seed=2)
    for one in (folder, str(folder), [folder], (str(folder / "summary.json"),)):
        assert [run.seed for run in read_runs(one)] == [1]
    assert [run.seed for run in read_runs([str(other), folder])] == [2, 1]
    assert [run.seed for run in read_runs(str(tmp_path))] == [1, 2]


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
        ("{", "is not JSON; it was cut short or changed"),
        ({"seed": "42"}, ": seed is '42', must be a whole number"),
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
        changed = {**asdict(make_summary(seed=1)), **text}
        text = json.dumps({key: value for key, value in changed.items() if value is not None})
    bad = tmp_path / "runs" / "bad.json"
    bad.write_text(text)
    assert [run.seed for run in read_runs([tmp_path / "runs"])] == [42]
    (record,) = caplog.records
    complaint = f"{bad}{complaint if complaint.startswith(':') else f' {complaint}'}"
    assert complaint in record.message
    assert record.message.endswith("; it is left out")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read_runs([bad])


def test_a_bad_file_among_others_that_were_named_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [write_run(tmp_path / str(seed), seed=seed) / "summary.json" for seed in (1, 2)]
    (tmp_path / "cut.json").write_bytes(good[0].read_bytes()[:100])
    assert [run.seed for run in read_runs([good[0], tmp_path / "cut.json", good[1]])] == [1, 2]
    assert [record.message.partition(" is not JSON")[0] for record in caplog.records] == [str(tmp_path / "cut.json")]
    caplog.clear()
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == good[1]:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for paths in ([tmp_path], good):
        assert [run.seed for run in read_runs(paths)] == [1]
        assert "Permission denied" in caplog.text
    with pytest.raises(PermissionError):
        read_runs(good[1])


def test_a_run_says_what_is_asked_for_most(tmp_path: Path) -> None:
    """After task 1 the clients have 50 and 51, after task 2 60, 61 and 61, 62; under the other masks 10 to 20 less."""
    (run,) = read_runs(write_run(tmp_path / "run", "fedavg", 7, config={"model.block": 5}))
    assert (run.method, run.setting, run.seed, run.path) == ("fedavg", "digits", 7, tmp_path / "run" / "summary.json")
    np.testing.assert_array_equal(run.accuracy["seen"], [[[40, np.nan], [50, 51]], [[41, np.nan], [51, 52]]])
    assert run.final_average == {"task": 61, "seen": 51, "federation": 46, "none": 41}
    assert run.forgetting == dict.fromkeys(MASKS, -10)
    assert run.bytes == 2 * 3 * 2 * 1024  # directions, rounds and clients
    assert run.bytes_per_client_round == 2048
    assert run.seconds == 12
    assert run.config["model"]["init_args"]["block"] == 5


def test_runs_print_in_a_line_each(tmp_path: Path) -> None:
    for seed in range(22):
        write_run(tmp_path / f"{seed:02}", seed=seed)
    runs = read_runs(tmp_path)
    averages = "task 61.0, seen 51.0, federation 46.0, none 41.0"
    first = f"<fed_lscl on digits, seed 0: final average in %: {averages}; {runs[0].path}>"
    assert repr(runs[0]) == first
    lines = repr(runs).splitlines()
    assert lines[:2] == ["22 finished runs", first]
    assert len(lines) == 22
    assert lines[-1] == "and 2 more"
    assert repr(read_runs(tmp_path / "00")).splitlines() == ["1 finished run", first]


def test_runs_make_one_table_with_a_row_each(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    cnns = ["resnet18", "vgg16"]
    write_run(tmp_path / "a", seed=1, config={"model.block": 5, "cnn.name": cnns}, skipped=(Skipped(1, 0, "gone"),))
    write_run(tmp_path / "b", "fedavg", 2, value=30.0, config={"model": {"class_path": "FedAvgClient"}})
    table = read_runs(tmp_path).to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table.columns.is_unique
    assert table[["method", "setting", "seed"]].to_numpy().tolist() == [
        ["fed_lscl", "digits", 1],
        ["fedavg", "digits", 2],
    ]
    assert table["final_average_task"].tolist() == [61, 41]
    assert table["final_average_none"].tolist() == [41, 21]
    assert table["forgetting_seen"].tolist() == [-10, -10]
    assert table[["bytes_up", "bytes_down", "skipped"]].to_numpy().tolist() == [[6144, 6144, 1], [6144, 6144, 0]]
    assert table["seconds"].tolist() == [12, 12]
    assert table["path"].tolist() == [str(tmp_path / name / "summary.json") for name in "ab"]
    assert table["model.class_path"].tolist() == ["fedlscl.methods.x.X", "FedAvgClient"]
    assert table["model.block"][0] == 5
    assert table["model.block"].isna().tolist() == [False, True]
    assert table["cnn.name"][0] == cnns


def test_without_pandas_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        Runs([make_run()]).to_pandas()


def test_runs_of_other_conditions_are_not_compared() -> None:
    runs = [make_run(seed=1), make_run(seed=2, backbone="another"), make_run(seed=3, setting="cifar100")]
    runs.append(make_run(seed=4, evaluated_on="images held out of training"))
    comparisons = compare(runs)
    assert [len(comparison.variants) for comparison in comparisons] == [1] * 4
    assert [comparison.setting for comparison in comparisons] == ["digits", "digits", "cifar100", "digits"]


def test_seeds_threads_and_places_make_no_other_variant() -> None:
    runs = [
        make_run(seed=seed, config={"threads": seed, "data.device_mib": seed, "data.source.expected_classes": seed})
        for seed in reversed(SEEDS)
    ]
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
    assert labels == ["fed_lscl", "fed_lscl (gradient_clip 1.0)"]


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
    usual = {"model.block": 3, "model.buffer_size": 10}
    assert comparison.usual_values == {"": {}, "fed_lscl": usual, "fedavg": usual}
    assert comparison.varying("model.epochs") == {}


def test_what_all_relatives_have_decides_where_a_method_itself_does_not() -> None:
    """Three blocks are equally frequent for the method; both of its ablations ran at one of them."""
    other = {"model.class_path": "another.Class", "model.block": 11}
    runs = [make_run(config={"model.block": block}) for block in (0, 3, 11)]
    runs += [make_run(f"fed_lscl_without_{part}") for part in ("o2d", "replay")]
    (comparison,) = compare([*runs, make_run("lorm", config={"model": other})])
    assert [variant.label for variant in comparison.usual] == [
        *("fed_lscl", "fed_lscl_without_o2d", "fed_lscl_without_replay", "lorm")
    ]
    assert [variant.label for variant in comparison.variants][1:3] == ["fed_lscl (block 0)", "fed_lscl (block 11)"]
    # the method's own runs go before its relatives
    runs += [make_run(config={"model.block": 11, "model.snapshot": way}) for way in ("a", "b")]
    (comparison,) = compare(runs)
    assert comparison.usual_values["fed_lscl"]["model.block"] == 11
    assert comparison.usual_values["fed_lscl_without_o2d"]["model.block"] == 3


def test_what_relatives_have_by_design_names_no_other_method() -> None:
    """A run of the full method without its replay is a variant of it, whatever most of the ablations do without."""
    off = {"model.continual": "none"}
    runs = [make_run(seed=seed, config={"model.continual": "replay"}) for seed in SEEDS]
    runs += [make_run("fed_lscl_without_o2d", config={"model.continual": "replay"})]
    runs += [make_run(f"fed_lscl_{name}", config=off) for name in ("without_replay", "collaboration_only")]
    runs += [make_run(config=off)]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.variants] == [
        *("fed_lscl", "fed_lscl (continual none)"),
        *("fed_lscl_without_o2d", "fed_lscl_without_replay", "fed_lscl_collaboration_only"),
    ]


def test_a_lone_relative_decides_nothing_against_more_seeds() -> None:
    """A head that is federated trains under another mask than one that is not; a single run tries the other's."""
    runs = [make_run("fedvit", seed=seed, config={"model.train_mask": "task"}) for seed in SEEDS]
    runs += [make_run(name, config={"model.train_mask": "seen"}) for name in ("fedvit", "local_vit")]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.variants] == ["fedvit", "fedvit (train_mask seen)", "local_vit"]


def test_without_privacy_is_usual_however_many_runs_have_it() -> None:
    private = [{"epsilon": epsilon, "delta": 1e-5, "unit": "image"} for epsilon in (1.0, 4.0, 8.0)]
    plain = make_run("fed_ridge")
    runs = [plain, *(make_run("fed_ridge", config={"model.privacy": privacy}) for privacy in private)]
    (comparison,) = compare(runs)
    names = [f"fed_ridge (privacy.epsilon {epsilon})" for epsilon in (1.0, 4.0, 8.0)]
    assert [variant.label for variant in comparison.variants] == ["fed_ridge", *names]
    of_clients = {"model.privacy": {"epsilon": 8.0, "delta": 1e-5, "unit": "client"}}
    (comparison,) = compare([*runs, make_run("fed_ridge", config=of_clients)])
    labels = [variant.label for variant in comparison.variants]
    assert labels[0] == "fed_ridge"
    assert labels[-2:] == [f"fed_ridge (privacy.epsilon 8.0, privacy.unit {unit})" for unit in ("client", "image")]
    (comparison,) = compare([make_run("fedncm"), runs[1]])
    assert [variant.label for variant in comparison.variants] == ["fedncm", "fed_ridge (privacy.epsilon 1.0)"]


def test_a_field_that_a_run_does_not_have_is_named_so() -> None:
    runs = [make_run(config={"model.drawn": drawn}) for drawn in (None, 3, 3)]
    (comparison,) = compare([*runs, make_run(config={"model.drawn": 3, "model.block": 0})])
    assert "fed_lscl (without drawn)" in [variant.label for variant in comparison.variants]


def test_another_budget_is_named_though_it_is_all_that_a_method_ran_with() -> None:
    runs = [make_run(name) for name in ("fed_lscl", "lorm", "glfc")]
    runs += [make_run("fedvit", config={"model.epochs": 40}), make_run("fedavg", config={"model.learning_rate": 0.1})]
    (comparison,) = compare(runs)
    labels = [variant.label for variant in comparison.variants]
    assert labels == ["fed_lscl", "lorm", "glfc", "fedvit (epochs 40)", "fedavg"]
    assert comparison.usual_values[""] == {"model.epochs": 1}


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
    # nor have its many configurations more to say than one of another method
    runs += [make_run("lwf", config={"federation.rounds": 50, "model.block": block}) for block in range(9)]
    runs += [make_run(name) for name in ("fedprox", "ewc")]
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.usual if variant.method != "lwf"] == [
        *("fed_lscl", "lorm", "glfc", "fedavg (federation.rounds 50)", "fedprox", "ewc")
    ]
    assert all("federation.rounds 50" in v.label for v in comparison.variants if v.method in ("lwf", "fedavg"))
    # what is usual for all is the same for those that have no usual configuration
    usual = comparison.usual_values
    assert usual.pop("") == {"federation.rounds": 3}
    assert usual == {name: {"model.block": 3} for name in ("fed_lscl", "lorm", "glfc", "fedprox", "ewc")}


def test_data_of_another_folder_are_other_data_wherever_it_lies() -> None:
    def run(root: str, seed: int) -> Run:
        return make_run(seed=seed, config={"data.source": {"class_path": "X", "init_args": {"root": root}}})

    (comparison,) = compare([run("/a/birds", 1), run("data/birds", 2), run("/a/cats", 1)])
    assert [len(variant.runs) for variant in comparison.variants] == [2, 1]
    assert [variant.differs for variant in comparison.variants] == [
        *({"data.source.root": "birds"}, {"data.source.root": "cats"})
    ]


def test_a_run_without_the_field_is_in_no_study_of_it() -> None:
    (comparison,) = compare([make_run(config={"model.block": block}) for block in (5, None, 3)])
    assert list(comparison.varying("model.block")) == [3, 5]


def test_a_study_is_the_longest_series_that_agrees_in_all_else() -> None:
    """Twelve blocks in another precision than everything else, beside two in the usual one."""
    half, full = ({"trainer": {"precision": precision}} for precision in ("bf16-mixed", "32-true"))
    runs = [make_run(name, config=full) for name in ("fed_lscl", "lorm", "glfc")]
    runs += [make_run(config={**full, "model.block": 1})]
    runs += [make_run(config={**half, "model.block": block}) for block in range(12)]
    (comparison,) = compare(runs)
    series = comparison.varying("model.block")
    assert list(series) == list(range(12))
    assert {variant.differs["trainer.precision"] for variant in series.values()} == {"bf16-mixed"}
    # of two of one length the one with less that is unusual
    (comparison,) = compare([run for run in runs if run.fields["model.block"] in (1, 3)])
    assert [variant.label for variant in comparison.varying("model.block").values()] == [
        "fed_lscl (block 1)",
        "fed_lscl",
    ]


def test_where_two_values_are_equally_frequent_the_one_with_more_seeds_is_usual() -> None:
    runs = [make_run(seed=seed, config={"model.block": 0}) for seed in SEEDS]
    runs.append(make_run(config={"model.block": 1}))
    (comparison,) = compare(runs)
    assert [variant.label for variant in comparison.variants] == ["fed_lscl", "fed_lscl (block 1)"]
    # but it is configurations that count first
    runs += [make_run(config={"model.block": 1, "model.snapshot": way}) for way in ("a", "b")]
    (comparison,) = compare(runs)
    assert comparison.usual_values["fed_lscl"]["model.block"] == 1


def test_the_same_run_twice_is_one_and_with_other_numbers_an_error() -> None:
    (comparison,) = compare([make_run(), make_run()])
    assert len(comparison.variants[0].runs) == 1
    with pytest.raises(ValueError, match="same configuration and seed 42 but other numbers"):
        compare([make_run(), make_run(value=51.0)])


@pytest.mark.parametrize(
    ("fingerprint", "what"),
    [("data_sha256", "images"), ("weights_sha256", "weights"), ("cnn_weights_sha256", "weights of the CNN")],
)
def test_what_was_run_on_other_data_or_weights_of_the_same_name_is_no_other_seed(fingerprint: str, what: str) -> None:
    runs = [make_run(seed=1, **{fingerprint: "a" * 64}), make_run(seed=2, **{fingerprint: "a" * 64}), make_run(seed=3)]
    assert len(compare([*runs, make_run(seed=4, **{fingerprint: None})])[0].variants) == 1
    with pytest.raises(ValueError, match=f"same configuration but are of other {what}"):
        compare([*runs, make_run(seed=4, **{fingerprint: "b" * 64})])


def test_a_field_that_was_added_later_makes_no_other_run_where_it_changes_nothing() -> None:
    def variants(background: str) -> int:
        before = {**make_run().config, "data": {"source": {"root": "a"}}}
        now = {**before, "data": {"source": {"root": "a", "background": background}}}
        return len(compare([make_run(seed=1, base=before), make_run(seed=2, base=now)])[0].variants)

    assert (variants("white"), variants("black")) == (1, 2)


def test_first_weights_of_the_cnn_make_another_run_and_their_folder_does_not() -> None:
    def variants(*weights: Any) -> int:
        runs = [make_run(seed=n, config={"cnn.weights": one}) for n, one in enumerate(weights)]
        return len(compare(runs)[0].variants)

    assert variants("a/vit.safetensors", "/b/vit.safetensors") == 1
    assert variants(None, "a/vit.safetensors") == 2
    assert variants({"resnet18": "a/x"}, {"resnet18": "b/x"}) == 1


def test_fingerprints_of_another_kind_tell_nothing() -> None:
    """Earlier versions looked at some images, this one at all of them."""
    runs = [make_run(seed=1, data_sha256="a" * 64), make_run(seed=2, data_sha256="all:" + "b" * 64)]
    assert len(compare(runs)[0].variants) == 1
    for other in ("b" * 64, "all:" + "a" * 64):
        with pytest.raises(ValueError, match="same configuration but are of other images"):
            compare([*runs, make_run(seed=3, data_sha256=other)])


def test_accuracy_over_the_tasks_is_the_mean_of_what_was_learned() -> None:
    run = make_run(value=50.0)
    # after task 1: clients 50 and 51; after task 2: 60, 61 and 61, 62
    np.testing.assert_allclose(run.over_tasks("task"), [50.5, 61.0])
    np.testing.assert_allclose(run.over_tasks("seen"), [40.5, 51.0])


def test_a_class_of_this_package_is_the_same_with_and_without_its_module() -> None:
    """Older versions named classes by their modules, which have moved; one of a user's own is told by its module."""
    paths = ("FedLSCL", "fedlscl.fed_lscl.FedLSCL", "fedlscl.methods.fed_lscl.FedLSCL", "mine.FedLSCL", "yours.FedLSCL")
    sources = ("Digits", "fedlscl.packed.Digits", "fedlscl.data.packed.Digits", "Digits", "Digits")
    runs = [
        make_run(seed=seed, config={"model.class_path": path, "data.source.class_path": source})
        for seed, (path, source) in enumerate(zip(paths, sources, strict=True))
    ]
    (comparison,) = compare(runs)
    assert [[run.seed for run in variant.runs] for variant in comparison.variants] == [[0, 1, 2], [3], [4]]
    assert [variant.differs for variant in comparison.variants] == [
        *({}, {"model.class_path": "mine.FedLSCL"}, {"model.class_path": "yours.FedLSCL"})
    ]
    assert runs[1].config["model"]["class_path"] == "fedlscl.fed_lscl.FedLSCL"


def test_fields_are_named_as_on_the_command_line() -> None:
    nested = {"model": {"class_path": "X", "init_args": {"continual": {"class_path": "R", "init_args": {"a": 1}}}}}
    assert flat({**nested, "cnn": {"model_args": {}}}) == {
        "model.class_path": "X",
        "model.continual.class_path": "R",
        "model.continual.a": 1,
        "cnn.model_args": {},
    }


DAMAGES: list[tuple[str, Any]] = [
    ("accuracy.seen.matrix", [[[50.0]]]),
    ("accuracy.seen.matrix", [[[50.0], [1.0, 2.0]]]),
    ("accuracy.none.table1", []),
    ("accuracy.task.final_average", 1e300),
    ("seconds.total", -1.0),
    ("seed", 10**400),
    ("peak_memory_mib", 10**400),
    ("bytes_up.total", -5),
    ("images_kept", -1),
    ("config", {}),
    ("method", 3),
]


@pytest.mark.parametrize(("field", "value"), DAMAGES, ids=[field for field, _ in DAMAGES])
def test_a_damaged_summary_is_named_and_the_others_are_read(
    field: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "good")
    path = write_run(tmp_path / "bad", seed=1) / "summary.json"
    content = json.loads(path.read_text())
    *groups, last = field.split(".")
    inner = content
    for group in groups:
        inner = inner[group]
    inner[last] = value
    path.write_text(json.dumps(content))
    assert [run.seed for run in read_runs(tmp_path)] == [42]
    assert str(path) in caplog.text
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_runs(path)


def test_texts_of_a_summary_are_of_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a\nb\x1b\ud800", setting="<i>")
    (run,) = read_runs(tmp_path)
    assert (run.method, run.setting) == ("a b  ", "<i>")
