"""The tables against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import accuracy, make_run

from fedlscl.analysis import paper
from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.formats import MISSING, Cell, Table, csv_text, to_csv, to_latex, to_markdown
from fedlscl.analysis.paper_tables import COMPARED, table1, table2
from fedlscl.analysis.results import Run
from fedlscl.analysis.rows import COMPONENTS
from fedlscl.analysis.tables import costs, overview, tables
from fedlscl.analysis.tuning import tuning
from fedlscl.client import Client
from fedlscl.continual import NoReplay, Replay
from fedlscl.evaluation import MASKS
from fedlscl.methods import GLFCClient, SmallModelClient
from fedlscl.run.names import Parser, load
from fedlscl.run.summary import Compute, Promise

ROOT = Path(__file__).parent.parent / "experiments"
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.yaml"))


def comparison(*runs: Run) -> Comparison:
    (only,) = compare(runs)
    return only


def rows(table: Table) -> dict[str, list[Cell]]:
    return {row[0].text: list(row[1:]) for row in table.rows}


def costs_of(of: Comparison) -> Table:
    return costs(of, of.usual)


def texts(cells: list[Cell]) -> list[str]:
    return [cell.text for cell in cells]


def test_table_1_by_hand() -> None:
    """Task n right after it was learned: mean over clients 50 and 51, then 61 and 62; a second seed 4 points higher."""
    table = table1(
        comparison(make_run(seed=1, value=50.0), make_run(seed=2, value=54.0), make_run("fedavg", value=30.0))
    )
    assert table.header == ("method", "seeds", "images kept", "task 1", "task 2", "mean")
    found = rows(table)
    # the sample deviation of x and x + 4 is sqrt(8) = 2.83
    assert texts(found["fed_lscl"]) == ["2", MISSING, "52.5 ± 2.8", "63.5 ± 2.8", "58.0 ± 2.8"]
    assert texts(found["fedavg"]) == ["1", MISSING, "30.5", "41.5", "36.0"]
    seen = rows(table1(comparison(make_run(value=50.0)), "seen"))
    assert texts(seen["fed_lscl"]) == ["1", MISSING, "40.5", "51.5", "46.0"]


BOUNDS = ("joint", "joint_vit", "joint_ridge")


def test_rows_are_sorted_and_bounds_and_what_was_not_run_come_last() -> None:
    """By the mean over the tasks in Table 1, which ewc does not have: nobody measured one of its accuracies."""
    unmeasured = accuracy(10.0)
    unmeasured[:, 1, 1] = float("nan")
    runs = [make_run("ewc", acc=dict.fromkeys(MASKS, unmeasured))]
    runs += [make_run("joint", value=20.0), make_run("joint_vit", value=70.0)]
    runs += [make_run("zebra", value=30.0), make_run("lorm", value=60.0), make_run("ape", value=30.0)]
    runs += [make_run("local_vit", value=55.0), make_run("fed_lscl", value=50.0)]
    run = ["lorm", "local_vit", "fed_lscl", "ape", "zebra", "ewc", "joint_vit", "joint"]
    for table in (table1(comparison(*runs)), overview(comparison(*runs)), costs_of(comparison(*runs))):
        assert [row[0].text for row in table.rows] == run


def test_on_the_papers_data_what_of_its_table_was_not_run_stands_there_as_missing() -> None:
    table = table1(comparison(make_run("lorm", config={"data.source.class_path": "ImageNetR"})))
    missing = [name for name in COMPARED if name != "lorm"]
    assert [row[0].text for row in table.rows] == ["lorm", *missing]
    assert texts(rows(table)["mfcl"])[:5] == ["0", *[MISSING] * 4]
    assert [row[0].text for row in table1(comparison(make_run("lorm"))).rows] == ["lorm"]


def test_the_overview_is_sorted_by_the_final_average_under_seen() -> None:
    """Which another mask would turn around."""
    high, low = ({"task": accuracy(a), "seen": accuracy(b), "none": accuracy(a)} for a, b in ((40, 60), (80, 20)))
    found = comparison(make_run("fedavg", acc=low), make_run("lorm", acc=high), make_run("glfc", value=40.0))
    assert [row[0].text for row in overview(found).rows] == ["lorm", "glfc", "fedavg"]
    assert [row[0].text for row in table1(found).rows][:3] == ["fedavg", "glfc", "lorm"]


@pytest.mark.parametrize("method", sorted({*METHODS} - {"fed_lscl"}))
def test_only_what_sees_all_images_at_once_is_a_bound(method: str) -> None:
    """Whatever else is better than Fed-LSCL takes the mark from it, unless it is a relative that is named here."""
    better = comparison(make_run("another", value=30.0), make_run(), make_run(method, value=80.0))
    relatives = {name for name in METHODS if name.startswith("fed_lscl_") or name.endswith(("_own_rate", "_published"))}
    relatives.add("small_fedavg")
    if method in BOUNDS or method in relatives:
        assert marks(overview(better), method) == {""}
        assert "best" in marks(overview(better), "fed_lscl")
    else:
        assert "best" in marks(overview(better), method)
        assert "best" not in marks(table1(better), "fed_lscl")
    sent = texts(rows(costs_of(better))[method])[1:4]
    assert (sent == [MISSING] * 3) == (method in BOUNDS)


KEPT = {
    **dict.fromkeys(("fed_lscl", "fed_lscl_without_o2d", "fed_lscl_iterative", "fed_lscl_sums", "fed_lscl_auto"), "20"),
    **dict.fromkeys(("fed_lscl_static", "fed_lscl_fedavg"), "20"),
    # no replay, but the features of the buffer travel
    **dict.fromkeys(("fed_lscl_without_replay", "fed_lscl_ewc", "fed_lscl_lwf"), "20"),
    **dict.fromkeys(("local", "local_vit", "local_both", "fedvit_replay", "lorm_replay"), "20"),
    "glfc": "333",
    **dict.fromkeys(BOUNDS, MISSING),
}
"""Images of each class that a client keeps on the digits, a client having 6 classes; none with any other method."""


@pytest.mark.parametrize("method", METHODS)
def test_tables_say_how_many_images_a_client_keeps(method: str) -> None:
    """What a run notes, and for the summary of an older run what follows from its configuration."""
    setting, given = (load((ROOT / f"{name}.yaml").read_text()) for name in ("digits", f"methods/{method}"))
    parser = Parser()
    parser.add_subclass_arguments(Client, "model")
    parsed = parser.parse_object({"model": given["model"]})
    config = setting | given | yaml.safe_load(parser.dump(parsed, skip_none=False))
    exchanged = given["server"]["class_path"] != "Isolated"
    noted = parser.instantiate_classes(parsed).model.images_kept(6, exchanged)
    for images_kept in (None, noted):
        runs = comparison(make_run(method, base=config, images_kept=images_kept))
        for table in (overview(runs), costs_of(runs), *([table2(runs)] if method in COMPONENTS else [table1(runs)])):
            column = table.header.index("images kept") - 1
            assert rows(table)[method][column].text == KEPT.get(method, "0")


def test_epsilon_stands_beside_what_is_private_and_nowhere_else() -> None:
    promises = (
        Promise(4.0, 1e-5, "image", "system", "sum", 1.08, 1),
        Promise(5.2, 1e-5, "image", "system", "sum", 1.08, 2),
    )
    runs = [make_run("fed_ridge", seed=seed, privacy=promise) for seed, promise in enumerate(promises)]
    table = overview(comparison(*runs, make_run("fedncm")))
    assert "whom it is promised" in table.note
    column = table.header.index("epsilon") - 1
    assert [rows(table)[method][column].text for method in ("fed_ridge", "fedncm")] == ["5.2 (image, 1e-05)", MISSING]
    assert len(rows(table)["fedncm"]) == len(table.header) - 1
    assert "epsilon" not in overview(comparison(make_run("fedncm"))).header


def test_a_replay_that_never_passes_keeps_nothing_and_what_a_run_notes_counts() -> None:
    assert SmallModelClient(continual=Replay(passes=0)).images_kept(6, False) == 0
    assert SmallModelClient(continual=Replay(), buffer_size=7).images_kept(6, False) == 7
    assert GLFCClient(continual=NoReplay(), memory_size=100).images_kept(6, True) == 16
    found = rows(overview(comparison(make_run(images_kept=3), make_run("fedavg", images_kept=0))))
    assert [found[name][1].text for name in ("fed_lscl", "fedavg")] == ["3", "0"]


def test_best_and_second_are_marked_where_bounds_do_not_count() -> None:
    runs = [make_run("joint", value=80.0), make_run("fedavg", value=30.0), make_run("lorm", value=60.0)]
    runs += [make_run("glfc", value=50.0), make_run("fedvit", value=60.04)]
    found = rows(table1(comparison(*runs)))
    marks = {name: {cell.mark for cell in cells[2:]} for name, cells in found.items()}
    # 60.04 reads 60.0 like the other, so both are best
    assert marks["lorm"] == marks["fedvit"] == {"best"}
    assert marks["glfc"] == {"second"}
    assert marks["joint"] == marks["fedavg"] == {""}


def test_low_forgetting_is_the_best() -> None:
    def run(method: str, last: float) -> Run:
        acc = accuracy(50.0)
        acc[:, 1, 0] = last
        return make_run(method, acc=dict.fromkeys(MASKS, acc))

    found = rows(overview(comparison(run("fedavg", 40.0), run("glfc", 20.0), run("lorm", 45.0))))
    # clients had 50 and 51 on task 1: 50.5 - 40 = 10.5
    assert [(found[name][-1].text, found[name][-1].mark) for name in ("fedavg", "glfc", "lorm")] == [
        *(("10.5", "second"), ("30.5", ""), ("5.5", "best"))
    ]


def test_a_star_where_the_task_chose_the_parameters() -> None:
    runs = (make_run("fedmgp", task_aware=("task",)), make_run())
    assert texts(rows(table1(comparison(*runs)))["fedmgp"])[2:] == ["50.5*", "61.5*", "56.0*"]
    assert texts(rows(table1(comparison(*runs), "seen"))["fedmgp"])[2:] == ["40.5", "51.5", "46.0"]
    assert texts(rows(overview(comparison(*runs)))["fedmgp"])[2:7] == ["56.0*", "61.0*", "51.0", "46.0", "41.0"]


def marks(table: Table, method: str) -> set[str]:
    return {cell.mark for cell in rows(table)[method][2:]}


def test_what_is_told_the_task_competes_only_where_everyone_is() -> None:
    runs = [make_run("fedweit", value=80.0, task_aware=("task", "seen")), make_run(), make_run("fedavg", value=30.0)]
    assert marks(table1(comparison(*runs)), "fedweit") == {"best"}
    assert marks(table1(comparison(*runs)), "fed_lscl") == {"second"}
    assert marks(table1(comparison(*runs), "seen"), "fedweit") == {""}
    assert marks(table1(comparison(*runs), "seen"), "fed_lscl") == {"best"}


def test_ablations_and_what_is_not_usual_do_not_compete() -> None:
    """More rounds, or the method itself once more without a component, take no mark from another method."""
    runs = [make_run(), make_run("fed_lscl_without_o2d", value=80.0), make_run("fedavg", value=30.0), make_run("glfc")]
    runs += [make_run("lorm", value=85.0, config={"federation.rounds": 50})]
    table = overview(comparison(*runs))
    assert marks(table, "fed_lscl_without_o2d") == marks(table, "lorm (federation.rounds 50)") == {""}
    assert "best" in marks(table, "fed_lscl")
    assert marks(table1(comparison(*runs)), "lorm (federation.rounds 50)") == {""}
    assert "Where a row does not name it: federation.rounds 3." in table.note
    # in the table of the components they are what is compared
    assert marks(table2(comparison(*runs)), "fed_lscl_without_o2d") == {"", "best"}


def test_a_table_says_what_its_rows_leave_out() -> None:
    runs = [make_run(), make_run("fedavg"), make_run(config={"model.block": 0}), make_run(config={"model.epochs": 5})]
    for table in tables(comparison(*runs)):
        expected = "fed_lscl" if table.name in ("blocks", "variants") else "fed_lscl, fedavg"
        assert f"Where a row does not name it: epochs 1; {expected}: block 3." in table.note, table.name
    for table in tables(comparison(make_run(), make_run("fedavg"))):
        assert "does not name" not in table.note


PROTOCOL = {
    "data.source.class_path": "CIFAR100",
    "data.split.clients": 5,
    "data.split.tasks": 5,
    "federation.rounds": 5,
    "model.epochs": 5,
    "model.buffer_size": 20,
}
"""What differs in runs made by hand from the paper's protocol."""
IMAGENET = {"data.source.class_path": "ImageNetR"}


def in_its_setting(method: str = "fed_lscl", config: dict[str, Any] | None = None, **options: Any) -> Run:
    five = dict.fromkeys(MASKS, accuracy(20.0, tasks=5))
    return make_run(method, setting="any", acc=five, config=PROTOCOL | (config or {}), **options)


def test_the_papers_numbers_stand_in_columns_of_their_own() -> None:
    table = table1(comparison(in_its_setting(), in_its_setting("fedweit")))
    assert table.header[9:] == tuple(f"paper: task {n}" for n in range(1, 6))
    assert texts(rows(table)["lorm"])[8:] == ["93.8", "88.7", "85.2", "84.6", "80.5"]
    assert texts(rows(table)["fedweit"])[8:] == [MISSING] * 5
    assert {len(row) for row in table.rows} == {len(table.header)}
    ablation = table2(comparison(in_its_setting(config=IMAGENET)))
    assert ablation.header[-1] == "paper"
    assert texts(rows(ablation)["fed_lscl_without_o2d"])[-1] == "80.8"
    assert texts(rows(ablation)["fed_lscl"])[-1] == MISSING
    assert ablation.note.endswith("The paper's numbers are those of its own protocol.")
    assert set(paper.TABLE1["CIFAR-100"]) == set(paper.TABLE1["ImageNet-R"]) == set(COMPARED)
    assert set(paper.TABLE2["CIFAR-100"]) == set(paper.TABLE2["ImageNet-R"]) == set(COMPONENTS) - {"fed_lscl"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"federation.rounds": 1}, "rounds per task 1 (paper: 5)"),
        ({"data.split.tasks": 4}, "tasks 4 (paper: 5)"),
        ({"model.buffer_size": 5}, "images kept of each class 5 (paper: 20)"),
    ],
)
def test_the_papers_numbers_stand_beside_no_other_protocol(config: dict[str, Any], said: str) -> None:
    for table in (table1, table2):
        found = table(comparison(in_its_setting(config=config)))
        assert "paper" not in " ".join(found.header)
        assert found.note.endswith(f"left out, for these runs differ from its protocol: {said}.")


def test_the_papers_numbers_are_of_test_images() -> None:
    found = table1(comparison(in_its_setting(evaluated_on="images held out of training")))
    assert "paper" not in " ".join(found.header)
    assert found.note.endswith("left out: these are accuracies on images held out of training.")


def test_other_data_than_the_papers_say_nothing_of_its_numbers() -> None:
    for table in tables(comparison(make_run(), make_run("small_fedavg"))):
        assert "paper" not in " ".join(table.header)
        assert "paper's numbers" not in table.note


def test_numbers_of_two_data_sets_of_the_paper_stand_beside_neither() -> None:
    runs = [in_its_setting(), in_its_setting("fedavg", config=IMAGENET)]
    table = table1(comparison(*runs))
    assert "paper" not in " ".join(table.header)
    assert table.note.endswith("left out: these are runs on CIFAR-100 and ImageNet-R.")


def test_a_row_of_another_protocol_stands_without_the_papers_numbers() -> None:
    """What the paper leaves open may differ and is said; a row with other rounds bears no number of the paper's."""
    epochs = {"data.split.train_per_class": 20}
    runs = [in_its_setting(name, config=epochs) for name in ("fed_lscl", "glfc")]
    runs.append(in_its_setting("fedavg", config=epochs | {"federation.rounds": 50}))
    table = table1(comparison(*runs))
    found = rows(table)
    assert texts(found["fed_lscl"])[-1] == "96.9"
    assert texts(found["fedavg (federation.rounds 50)"])[8:] == [MISSING] * 5
    assert "training images per class 20 (paper: all), rounds per task 5 (2 runs); 50 (1 run) (paper: 5)." in table.note


def test_table_2_by_hand() -> None:
    """Final averages: after task 2 the clients have 60, 61 and 61, 62, on average 61, 51, 46 and 41 under the masks."""
    found = rows(table2(comparison(make_run(), make_run("small_fedavg", value=20.0))))
    assert texts(found["fed_lscl"]) == ["✓", "✓", "✓", "1", MISSING, "61.0", "51.0", "46.0", "41.0"]
    assert texts(found["small_fedavg"]) == ["×", "×", "×", "1", MISSING, "31.0", "21.0", "16.0", "11.0"]
    assert texts(found["fed_lscl_without_replay"]) == ["✓", "×", "✓", "0", *[MISSING] * 5]
    older = replace(
        made := make_run(),
        summary=replace(
            made.summary, accuracy={mask: each for mask, each in made.summary.accuracy.items() if mask != "federation"}
        ),
    )
    assert texts(rows(table2(comparison(older, make_run("small_fedavg"))))["fed_lscl"])[5:] == [
        "61.0",
        "51.0",
        MISSING,
        "41.0",
    ]
    assert "federation" not in table2(comparison(older)).header


def test_without_a_usual_configuration_each_variant_has_its_row_and_the_papers_numbers() -> None:
    """Two configurations are equally frequent, as in a sweep of two values."""
    runs = [in_its_setting(config={"model.epochs": epochs}) for epochs in (1, 5)]
    runs += [in_its_setting("small_fedavg", config={"model.epochs": epochs}) for epochs in (2, 9)]
    labels = ["fed_lscl (epochs 1)", "fed_lscl (epochs 5)"]
    found = rows(table1(comparison(*runs)))
    assert [texts(found[label])[-1] for label in labels] == ["96.9", "96.9"]
    ablation = rows(table2(comparison(*runs)))
    assert [texts(ablation[label])[:6] for label in labels] == [["✓", "✓", "✓", "1", MISSING, "62.5"]] * 2
    assert texts(ablation["small_fedavg (epochs 9)"])[-1] == "29.9"
    assert "fed_lscl" not in ablation


def test_a_task_that_a_method_does_not_have_or_that_nobody_measured_is_missing() -> None:
    three = dict.fromkeys(MASKS, accuracy(20.0, tasks=3))
    unmeasured = accuracy(10.0)
    unmeasured[:, 1, 1] = float("nan")
    nothing = dict.fromkeys(MASKS, unmeasured)
    runs = [make_run("ewc", acc=nothing), make_run(), make_run("fedavg", acc=three)]
    found = rows(table1(comparison(*runs)))
    assert texts(found["fed_lscl"]) == ["1", MISSING, "50.5", "61.5", MISSING, "56.0"]
    assert texts(found["ewc"]) == ["1", MISSING, "10.5", MISSING, MISSING, MISSING]
    assert [found[name][3].mark for name in ("fed_lscl", "fedavg", "ewc")] == ["best", "second", ""]


def test_costs_by_hand() -> None:
    two = {name: Compute(millions * 10**6, 2 * 10**9, 10**9) for name, millions in (("a", 1), ("b", 12))}
    runs = [make_run(seed=1), make_run(seed=2, seconds={"total": 14.0}, peak_memory_mib=300.0)]
    runs += [make_run("fedavg", compute=two), make_run("old", compute={}), make_run("joint")]
    found = rows(costs_of(comparison(*runs)))
    numbers = ["1.5 M", "2.0 G", "1.0 G"]
    assert texts(found["fed_lscl"]) == [MISSING, "1.0 KiB", "1.0 KiB", "12.0 KiB", *numbers, "13 ± 1", "200"]
    assert texts(found["fedavg"])[4:7] == ["1.0 M to 12.0 M", "2.0 G", "1.0 G"]
    assert texts(found["old"])[4:7] == [MISSING] * 3
    assert texts(found["joint"])[:4] == [MISSING] * 4


def test_costs_are_counted_by_any_seed_that_counted() -> None:
    runs = [make_run(seed=1, compute={}), make_run(seed=2)]
    assert texts(rows(costs_of(comparison(*runs)))["fed_lscl"])[4] == "1.5 M"


def test_sensitivity_by_hand() -> None:
    runs = [make_run(config={"model.block": block}, value=50.0 + block) for block in (0, 3)]
    by_name = {table.name: table for table in tables(comparison(*runs))}
    assert set(by_name) == {"table1_task", "overview", "costs", "blocks"}
    assert "All with" not in by_name["blocks"].note
    found = rows(by_name["blocks"])
    # under mask seen: 40.5 after task 1, 51 after task 2, and 61 under mask task at the end; three more for block 3
    assert texts(found["0"]) == ["1", "40.5", "51.0", "61.0"]
    assert texts(found["3"]) == ["1", "43.5", "54.0", "64.0"]


def test_a_study_in_another_precision_than_the_rest_is_still_one_and_says_so() -> None:
    half, full = ({"trainer": {"precision": precision}} for precision in ("bf16-mixed", "32-true"))
    runs = [make_run(name, config=full) for name in ("lorm", "glfc", "fedavg")]
    runs += [make_run(config={**half, "model.block": block}, value=50.0 + block) for block in (0, 3)]
    blocks = {table.name: table for table in tables(comparison(*runs))}["blocks"]
    assert list(rows(blocks)) == ["0", "3"]
    assert "All with trainer.precision bf16-mixed." in blocks.note


def test_rounding_bars_nobody_and_relatives_take_no_mark() -> None:
    half, full = ({"trainer": {"precision": precision}} for precision in ("bf16-mixed", "32-true"))
    runs = [make_run(name, config=full) for name in ("fed_lscl", "glfc")] + [make_run("lorm", config=half, value=80.0)]
    runs += [make_run(name, config=full, value=85.0) for name in ("fed_lscl_sums", "pilora_own_rate")]
    table = table1(comparison(*runs))
    assert marks(table, "lorm (trainer.precision bf16-mixed)") == {"best"}
    assert marks(table, "fed_lscl") == {"second"}
    assert marks(table, "fed_lscl_sums") == marks(table, "pilora_own_rate") == {""}


def test_what_was_varied_besides_has_a_table_of_its_own() -> None:
    cnns = {"cnn.name": ["resnet18", "vgg16"], "cnn.model_args": {"vgg16": {}}}
    runs = [make_run(), make_run("fedavg"), make_run(config=cnns, value=20.0), make_run(config={"model.epochs": 5})]
    runs += [make_run(config={"model.block": block}) for block in (0, 1)]
    by_name = {table.name: table for table in tables(comparison(*runs))}
    found = rows(by_name["variants"])
    assert list(found) == ["fed_lscl (epochs 5)", "fed_lscl (cnn.name ['resnet18', 'vgg16'])"]
    assert texts(found["fed_lscl (cnn.name ['resnet18', 'vgg16'])"])[2] == "26.0"
    assert {cell.mark for cells in found.values() for cell in cells} == {""}
    assert list(rows(by_name["overview"])) == ["fed_lscl", "fedavg"]
    more, cnns_differ = found
    assert list(rows(by_name["costs"])) == ["fed_lscl", more, "fedavg", cnns_differ]


HELD_OUT = {"evaluated_on": "images held out of training"}


def trial(method: str, rate: float, value: float, **config: Any) -> Run:
    fields = {"model.learning_rate": rate, "data.split.local_test": "holdout30", **config}
    return make_run(method, value=value, config=fields, **HELD_OUT)


def on_test_images(method: str, rate: float, value: float, **options: Any) -> Run:
    fields = {"model.learning_rate": rate, "data.split.local_test": "official"}
    return make_run(method, value=value, config=fields, **options)


def test_what_was_tuned_stands_beside_the_common_rate() -> None:
    """Three trials of 12 s for lorm, two for glfc; one is no search. After task 2 seen is value + 1 on average."""
    trials = [trial("lorm", rate, value) for rate, value in ((1e-3, 40.0), (0.0123, 70.0), (1e-4, 30.0))]
    trials += [trial("glfc", rate, value) for rate, value in ((1e-3, 80.0), (0.5, 20.0))] + [trial("ewc", 1e-3, 85.0)]
    runs = [on_test_images("lorm", 1e-3, 50.0), on_test_images("lorm", 0.0123, 60.0, seed=1)]
    runs += [on_test_images("lorm", 0.0123, 62.0, seed=2)]
    runs += [on_test_images(name, 1e-3, 55.0) for name in ("glfc", "ewc")]
    held, test = compare([*trials, *runs])
    (table,) = tuning(held, [held, test])
    assert [row[0].text for row in table.rows] == ["glfc", "lorm"]
    found = rows(table)
    # the same value on the test images is both where the common rate was the best
    assert texts(found["glfc"])[1:] == ["2", "24", "81.0", "--model.learning_rate 0.001", "56.0", "56.0"]
    assert texts(found["lorm"])[1:] == ["3", "36", "71.0", "--model.learning_rate 0.0123", "51.0", "62.0 ± 1.4"]
    assert {row[0].text for row in table.rows for cell in row if cell.mark} == set()
    # other epochs are no common rate, and one rate beside the tuned one is, if only lorm was run
    more = on_test_images("lorm", 1e-3, 80.0)
    more.fields["model.epochs"] = 9
    alone = compare([*trials[:3], *runs[:3], more])
    assert texts(rows(*tuning(alone[0], alone))["lorm"])[-2:] == ["51.0", "62.0 ± 1.4"]
    # nothing is tuned on test images, and without the runs on them their numbers are missing
    assert tuning(test, [held, test]) == []
    assert texts(rows(*tuning(held))["lorm"])[-2:] == [MISSING] * 2
    assert tuning(comparison(trial("ewc", 1e-3, 50.0))) == []


def test_a_search_over_two_fields_names_both() -> None:
    runs = [trial("fed_lscl", 10.0**-n, 40.0 + n, **{"model.block": n}) for n in (2, 3)]
    assert texts(rows(*tuning(comparison(*runs)))["fed_lscl"])[4] == "--model.block 3 --model.learning_rate 0.001"


def test_the_rate_that_all_have_is_usual_where_every_method_was_tuned() -> None:
    """Each was run at the common rate and at its own, equally often: who competes is the common rate."""
    runs = [on_test_images(name, 1e-3, 50.0 + n) for n, name in enumerate(("lorm", "glfc", "fedavg"))]
    runs += [on_test_images(name, rate, 70.0) for name, rate in (("lorm", 0.01), ("glfc", 0.002), ("fedavg", 0.03))]
    table = overview(comparison(*runs))
    assert [row[0].text for row in table.rows] == ["fedavg", "glfc", "lorm"]
    assert "best" in marks(table, "fedavg")


def test_one_alone_is_not_the_best() -> None:
    assert {cell.mark for row in table1(comparison(make_run())).rows for cell in row} == {""}


def test_the_papers_numbers_stand_under_its_own_mask_alone() -> None:
    assert "paper" not in " ".join(table1(comparison(in_its_setting()), "seen").header)


def test_an_unknown_mask_is_named() -> None:
    with pytest.raises(ValueError, match="mask is 'all', must be one of task, seen, federation, none"):
        tables(comparison(make_run()), ["all"])


SAMPLE = Table(
    "sample",
    "A title",
    "a setting",
    "A note.",
    ("method_name", "x"),
    (
        (Cell("a_b"), Cell("9.0 ± 1.0*", "best", {"": 9.04, "sd": 0.96, "task known": 1})),
        (Cell("5 % of {c}, d & e"), Cell("8.0", "second", {"": 8})),
        (Cell(MISSING), Cell(MISSING)),
    ),
)


def test_markdown() -> None:
    lines = to_markdown(SAMPLE).splitlines()
    assert lines[0] == "**A title**, a setting"
    assert [cell.strip() for cell in lines[4].split("|")[1:3]] == ["a_b", r"**9.0 ± 1.0\***"]
    assert [cell.strip() for cell in lines[5].split("|")[1:3]] == ["5 % of {c}, d & e", "_8.0_"]
    assert lines[-1] == "A note."


def test_a_bar_in_a_name_ends_no_cell() -> None:
    table = Table("t", "t", "s", "n", ("x",), ((Cell("a|b"),),))
    assert "| a\\|b" in to_markdown(table)


def test_latex_is_escaped() -> None:
    text = to_latex(SAMPLE)
    assert r"method\_name" in text
    assert r"\textbf{9.0 $\pm$ 1.0*}" in text
    assert r"5 \% of \{c\}, d \& e" in text
    assert r"\emph{8.0}" in text
    body = text[text.index(r"\begin{tabular}") :]
    assert not re.search(r"(?<!\\)[%#_]", body)


def test_csv_is_for_programs() -> None:
    read = list(csv.reader(io.StringIO(to_csv(SAMPLE))))
    assert read == [
        *(["method_name", "x", "x sd", "x task known"], ["a_b", "9.04", "0.96", "1"]),
        *(["5 % of {c}, d & e", "8", "", ""], ["", "", "", ""]),
    ]


def test_every_number_of_a_csv_can_be_read() -> None:
    """Bytes in bytes, deviations apart, a range as its ends; nothing but names and ticks is text."""
    two = {name: Compute(millions * 10**6, 0, 10**9) for name, millions in (("a", 1), ("b", 3))}
    runs = [in_its_setting(seed=1), in_its_setting(seed=2), in_its_setting("small_fedavg", task_aware=("task",))]
    runs += [in_its_setting("joint"), in_its_setting(config={"model.block": 0}, compute=two)]
    for table in tables(comparison(*runs)):
        read = list(csv.DictReader(io.StringIO(to_csv(table))))
        assert len(read) == len(table.rows)
        for row in read:
            assert all(not text or float(text) is not None for text in list(row.values())[-4:])
    found = {row["method"]: row for row in csv.DictReader(io.StringIO(to_csv(costs_of(comparison(*runs)))))}
    assert [found["fed_lscl"][name] for name in ("up", "whole run", "parameters", "seconds sd")] == [
        *("1024", "12288", "1500000", "0")
    ]
    assert [found["joint"][name] for name in ("up", "down", "whole run")] == [""] * 3
    ranged = costs_of(comparison(in_its_setting(compute=two)))
    (row,) = csv.DictReader(io.StringIO(to_csv(ranged)))
    assert [row[f"parameters {end}"] for end in ("least", "most")] == ["1000000", "3000000"]


def test_rows_are_as_wide_as_the_header() -> None:
    runs = [in_its_setting(name) for name in (*COMPARED, "small_fedavg", "joint")]
    runs += [in_its_setting(config={"model.buffer_size": size}) for size in (5, 10)]
    for table in tables(comparison(*runs), ("task", "seen", "none")):
        assert {len(row) for row in table.rows} == {len(table.header)}, table.name


HOSTILE = "a\n% b\\input{x}<script>|*[x](y) `c`\x1b"


def test_no_text_leaves_its_cell() -> None:
    table = Table(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), ((Cell(HOSTILE),),))
    markdown, latex, comma = to_markdown(table), to_latex(table), to_csv(table)
    assert "<script>" not in markdown
    assert "[x](" not in markdown
    assert "\n%" not in markdown
    assert r"\`c\`" in markdown
    assert sum(not line.startswith("%") and "input" in line for line in latex.splitlines()) == 2
    assert "\\input" not in latex.split("tabular")[1]
    assert latex.count("\n% ") == 1  # the note, and no line of anybody else's
    assert list(csv.reader(io.StringIO(comma))) == [[HOSTILE], [HOSTILE]]


@pytest.mark.parametrize("text", ["=1+1", "+a", "-a", "@x", "\tx", "\rx", "=", "-1+cmd"])
def test_a_cell_is_no_formula(text: str) -> None:
    assert csv_text([[text, "a=1", "-1.5e-3", "+2", "-inf", ""]]).startswith(("\"'", "'"))
    (row,) = csv.reader(io.StringIO(csv_text([[text, "a=1", "-1.5e-3", "+2", "-inf", ""]]), newline=""))
    assert row == [f"'{text}".replace("\r", " "), "a=1", "-1.5e-3", "+2", "-inf", ""]
