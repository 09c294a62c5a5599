"""What the report shows of a run's folder besides its summary: split, small model, learning curves, two runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import accuracy, make_run, traffic, write_run

from fedlscl.analysis.comparison import Comparison, compare
from fedlscl.analysis.learning import curve, learning
from fedlscl.analysis.results import read_runs
from fedlscl.analysis.sections import ranking_section, small_model_section, split_section
from fedlscl.analysis.side_by_side import across_section, two_section
from fedlscl.data.split_map import SplitMap
from fedlscl.run.contribution import Contribution, read_contribution

HEADER = "task,round,metric,value\n"


def measured(client: int, task: int, shuffled: float, mean: float, distance: float, share: float) -> str:
    values = {"feature_distance": distance, "product_variance": share, "shuffled_cost": shuffled, "mean_cost": mean}
    return "".join(f"{task},{task},client/{client}/generated/{name},{value}\n" for name, value in values.items())


def words(html: str) -> str:
    """The text of HTML in one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def only(*runs: object) -> Comparison:
    (comparison,) = compare(runs)  # type: ignore[arg-type]
    return comparison


def test_what_the_small_model_contributed_is_that_of_the_last_task(tmp_path: Path) -> None:
    rows = [measured(0, 1, 50.0, 50.0, 1.0, 1.0), measured(0, 2, 12.5, 0.0, 0.5, 0.25), measured(1, 2, -6.25, 0, 0, 0)]
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(rows) + "2,2,client/7/generated/mean_cost,1\n")
    found = read_contribution(tmp_path)
    assert found == Contribution(3.125, 0.0, 12.5, (1,), 2)  # client 7 lacks the others
    assert found.text == (
        "3.1 points lost when W are shuffled over images, 0.0 points lost with the mean W; 12.5 % of the LoRA differs "
        "between images: in 1 of 2 clients (1) it says the same of every image"
    )
    assert Contribution(-3.0, 0.0, 0.01, (), 2).text.startswith("3.0 points won when W")
    assert "below 0.1 % of the LoRA" in Contribution(0.0, 0.0, 0.01, (), 2).text


def test_without_such_a_small_model_or_with_damaged_metrics_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_contribution(tmp_path) is None
    (tmp_path / "metrics.csv").write_text(HEADER + "1,1,eval/seen/mean,50\n")
    assert read_contribution(tmp_path) is None
    assert not caplog.records
    (tmp_path / "metrics.csv").write_text(HEADER + measured(0, 1, 1, 1, 1, 1).replace("cost,1", "cost,nan"))
    assert read_contribution(tmp_path) is None
    assert "shuffled_cost is nan" in caplog.text


def test_sections_of_a_run_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    of = SplitMap(
        ("cat", "<dog>", "cow"),
        np.array([[1, 0], [2, 1], [0, 0]]),
        np.array([[7, 0], [5, 6], [0, 0]]),
        np.array([[3, 0], [2, 2], [0, 0]]),
        np.array([0, 0, 9]),
    )
    (folder / "split.json").write_text(json.dumps({"map": of.to_json()}))
    rounds = [(1, 1, 40.0), (1, 2, 60.0), (2, 3, 50.0), (2, 4, 80.0)]
    lines = "".join(f"{task},{n},eval/seen/mean,{value}\n" for task, n, value in rounds)
    (folder / "metrics.csv").write_text(HEADER + lines + measured(0, 2, 10.0, 5.0, 0.5, 0.25))
    (run,) = read_runs(folder)
    comparison = only(run)
    split, small = split_section(comparison, "a"), small_model_section(comparison, "b")
    assert split is not None
    assert small is not None
    rows = [words(row) for row in re.findall(r"<tr>(.*?)</tr>", split.html, re.DOTALL)]
    assert rows == [
        "class client 0 client 1 left out",
        *("cat 1 7", "&lt;dog&gt; 2 5 1 6", "cow 9", "all 12 6 9"),
    ]
    assert 'title="task 2: 5 training images, 2 tested"' in split.html
    assert "Left out: 1 class that no client has (cow; 9 training images)." in words(split.html)
    assert "10.0 points lost when the generated weights W are shuffled" in small.html
    assert "25.0 % of the energy" in small.html
    assert "in 0 of 1 client the" in small.html
    assert "it matters here for which image" in small.html

    found = learning(run)
    assert (found.unit, dict(found.lines), [*found.starts]) == ("round", {"seen": [40, 60, 50, 80]}, [1, 3])
    drawing = curve(found, "a curve")
    (points,) = re.findall(r'points="(.*?) ?"', drawing)
    x, y = np.array([point.split(",") for point in points.split()], float).T
    np.testing.assert_allclose(np.diff(x, 2), 0, atol=0.2)  # as far apart
    np.testing.assert_allclose((y - y[0]) / (y[3] - y[0]), [0, 0.5, 0.25, 1], atol=0.01)
    assert y[3] < y[0]  # 80 % above 40 %
    assert "task 2" in drawing

    (folder / "split.json").write_text('{"map": {"names": 3}}')
    (folder / "metrics.csv").write_text(HEADER + "1,x,eval/seen/mean,1\n")
    assert split_section(comparison, "a") is None
    assert small_model_section(comparison, "b") is None
    assert learning(run).unit == "task"
    np.testing.assert_allclose(learning(run).lines["seen"], run.over_tasks("seen"))


def test_two_methods_stand_beside_each_other_with_the_differences_of_equal_seeds() -> None:
    """Seeds 1 and 2 of both: `b` has 4 and 6 points more than `a`; that `a` has a third seed adds no difference."""
    values = {"a": {1: 50.0, 2: 60.0, 3: 85.0}, "b": {1: 54.0, 2: 66.0}}
    config = {"a": {"model.block": 3}, "b": {"model": {"class_path": "fedlscl.methods.x.X", "epochs": 1, "own": 2}}}
    runs = [
        make_run(method, seed, value, config=config[method], bytes_up=traffic(1024 if method == "a" else 2048))
        for method, of in values.items()
        for seed, value in of.items()
    ]
    section = two_section(only(*runs), "two")
    assert section is not None
    assert section.title == "a and b"
    rows = {
        row[0]: row[1:]
        for tr in re.findall(r"<tr>(.*?)</tr>", section.html, re.DOTALL)
        if (row := [words(cell).replace("\xa0", " ") for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", tr, re.DOTALL)])
    }
    # after the last task 10 + 0.5 + 0.5 more than after the first
    assert rows["final average, task"] == ["76.0 ± 18.0", "71.0 ± 8.5", "+5.0 ± 1.4"]
    assert rows["final average, seen"] == ["66.0 ± 18.0", "61.0 ± 8.5", "+5.0 ± 1.4"]
    assert rows["forgetting, task"] == ["-10.0", "-10.0", "0.0"]
    assert rows["bytes up"] == ["6.0 KiB", "12.0 KiB", "+6.0 KiB"]
    assert "of runs with the same seed, ± its deviation over 2 seeds" in words(section.html)
    plain = section.html.replace("<wbr>", "").replace("&nbsp;", " ")
    assert "Fields that only a has: model.block 3, model.buffer_size 10." in words(plain)
    assert "Fields that only b has: model.own 2" in words(plain)
    assert len(re.findall("<svg", section.html)) == 2


def test_two_seeds_of_one_method_differ_in_no_field_and_three_methods_are_no_pair() -> None:
    one, other = make_run(seed=1), make_run(seed=2, value=51.0)
    section = two_section(only(one, other), "two")
    assert section is not None
    assert section.title == "fed_lscl, seed 1 and fed_lscl, seed 2"
    assert "differ in nothing but the seed" in section.html
    assert "of the means, since no seed is common to both" in words(section.html)
    assert "+1.0" in section.html
    assert two_section(only(one), "two") is None
    assert two_section(only(one, make_run("a"), make_run("b")), "two") is None


def test_runs_of_two_settings_stand_beside_each_other_with_a_warning() -> None:
    runs = make_run("a", setting="small", value=50.0), make_run("b", setting="large", value=60.0, split_sha256="1" * 64)
    section = across_section(compare(runs), "across")
    assert section is not None
    assert section.title == "a on small and b on large"
    told = words(section.html)
    assert (
        "These two differ in setting (small and large). Their images, or who has which of them, are not known" in told
    )
    assert "final average, task" in told
    assert across_section(compare([*runs, make_run("c", setting="large")]), "across") is None

    other = "vit_other"
    alike = [make_run("a", data_sha256="all:1"), make_run("a", backbone=other, data_sha256="all:1")]
    section = across_section(compare(alike), "across")
    assert section is not None
    assert section.title.endswith(f"and a on {other}")
    assert "Images and split are the same, so that accuracies may be compared" in words(section.html)
    assert across_section(compare(alike[:1] * 2), "across") is None


def test_two_splits_are_named_where_one_seed_has_both_and_where_seeds_draw_them() -> None:
    other = {"split_sha256": "1" * 64}
    by_field = two_section(only(make_run("a"), make_run("a", config={"data.split.clients": 3}, **other)), "two")
    by_seed = two_section(only(make_run("a", seed=1), make_run("a", seed=2, **other)), "two")
    assert by_field is not None
    assert by_seed is not None
    assert "Who has which images is not the same in both: a difference" in words(by_field.html)
    assert "is not the same in both, since seeds draw splits: a difference" in words(by_seed.html)
    section = two_section(only(make_run("a"), make_run("b")), "two")
    assert section is not None
    assert "Who has which" not in section.html


def test_the_ranking_has_the_bounds_below_and_one_method_is_shown_by_mask() -> None:
    runs = [make_run("low", value=40.0), make_run("joint", value=85.0), make_run("<high>", value=60.0)]
    runs += [make_run("<high>", seed=1, value=62.0)]
    section = ranking_section(only(*runs), "ranking")
    assert section is not None
    assert re.findall(r"<dt>(.*?)</dt>", section.html) == ["&lt;high&gt;", "low", "joint"]
    # accuracy(value) less 10 under seen, and 11 more after the last task, by `accuracy`
    mean = float(np.nanmean(accuracy(51.0)[:, -1]))
    assert f"{mean:.1f} ± 1.4" in section.html
    assert section.html.count('class="pooled"') == 1
    alone = ranking_section(only(runs[0]), "ranking")
    assert alone is not None
    assert alone.title == "Final average of low by mask"
    assert re.findall(r"<dt>(.*?)</dt>.*?<b>(.*?)</b>", alone.html, re.DOTALL) == [
        ("task", "51.0"), ("seen", "41.0"), ("federation", "36.0"), ("none", "31.0")
    ]  # fmt: skip
