"""`fedlscl tables`, `plot` and `report`, from run folders to files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from made_runs import write_run

from fedlscl.cli import main

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods, two seeds of one, and another setting."""
    write_run(tmp_path / "runs" / "a", seed=1)
    write_run(tmp_path / "runs" / "b", seed=2, value=52.0)
    write_run(tmp_path / "runs" / "c", "fedavg", value=30.0)
    write_run(tmp_path / "runs" / "d", setting="cifar100")
    return tmp_path / "runs"


def test_tables_are_printed_and_written_in_every_format(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tables", str(runs), "--out", "out", "--masks", "[task,none]"])
    printed = capsys.readouterr().out
    assert "## digits (a ViT, 32 px; test images)" in printed
    assert "(Table 1), mask task**, digits (a ViT, 32 px; test images)" in printed
    names = {f"{setting}-{name}" for setting in ("digits", "cifar100") for name in ("table1_task", "table1_none")}
    names |= {f"{setting}-{name}" for setting in ("digits", "cifar100") for name in ("overview", "costs")}
    written = {path.name for path in Path("out").iterdir()}
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    text = Path("out/digits-table1_task.md").read_text()
    assert text in printed
    tex = Path("out/digits-table1_task.tex").read_text()
    assert tex.startswith("% Accuracy on each task right after it was learned (Table 1), mask task, digits (a ViT, 32")
    row = next(line for line in text.splitlines() if line.startswith("| fed_lscl"))
    # 50.5 and 52.5 on the first task, 61.5 and 63.5 on the second
    assert [cell.strip(" *") for cell in row.split("|")[4:7]] == ["51.5 ± 1.4", "62.5 ± 1.4", "57.0 ± 1.4"]


def test_what_was_tuned_is_in_a_table_of_its_own_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"evaluated_on": "images held out of training"}
    for n, rate in enumerate((0.001, 0.004)):
        config = {"model.learning_rate": rate, "data.split.local_test": "holdout30"}
        write_run(tmp_path / "runs" / f"trial{n}", value=50.0 + n, config=config, **held)
        write_run(tmp_path / "runs" / f"test{n}", value=60.0 + n, config=config | {"data.split.local_test": "official"})
    main(["tables", "runs", "--out", "out"])
    assert "--model.learning_rate 0.004" in capsys.readouterr().out
    written = (tmp_path / "out" / "digits-images_held_out_of_training-tuning.csv").read_text()
    (row,) = csv.DictReader(written.splitlines())
    assert [row[name] for name in ("method", "trials", "held out", "test, tuned")] == ["fed_lscl", "2", "52", "62"]
    main(["report", "runs"])
    assert "--model.learning_rate 0.004" in Path("report.html").read_text()


def names(folder: Path) -> set[str]:
    return {path.name.removesuffix("-overview.md") for path in folder.glob("*-overview.md")}


def test_what_tells_comparisons_apart_is_in_the_names_of_their_files(runs: Path) -> None:
    write_run(runs / "e", backbone="another ViT, 32 px")
    main(["tables", str(runs), "--out", "out"])
    both = {"digits-a_ViT_32_px", "digits-another_ViT_32_px"}
    assert names(Path("out")) == {*both, "cifar100"}
    # in whatever order they are given
    main(["tables", str(runs / "e"), str(runs / "a"), "--out", "turned"])
    assert names(Path("turned")) == both
    for name in both:
        table = Path(f"turned/{name}-overview.md").read_text()
        assert f"digits ({'another' if 'another' in name else 'a'} ViT, 32 px; test images)" in table
    write_run(runs / "f", evaluated_on="images held out of training")
    main(["tables", str(runs / "a"), str(runs / "f"), "--out", "held"])
    assert names(Path("held")) == {"digits-test_images", "digits-images_held_out_of_training"}


def test_names_that_no_sign_tells_apart_are_numbered(runs: Path) -> None:
    for name, backbone in (("e", "ViT-9"), ("f", "ViT: 9")):
        write_run(runs / name, backbone=backbone)
    main(["tables", str(runs / "e"), str(runs / "f"), "--out", "out"])
    assert names(Path("out")) == {"digits-ViT_9", "digits-ViT_9_2"}


def test_figures_are_written_below_their_setting(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(runs), "--out", "out"])
    written = {str(path) for path in Path("out").rglob("*.*")}
    assert {f"out/digits/forgetting_seen.{suffix}" for suffix in ("png", "svg")} <= written
    assert "out/cifar100/accuracy_by_bytes_seen.svg" in written
    assert set(capsys.readouterr().out.split()) == written
    captions = Path("out/digits/captions_seen.md").read_text()
    assert (
        "**forgetting_seen**: Accuracy on earlier tasks, digits (a ViT, 32 px; test images). Accuracy in %" in captions
    )
    # another mask takes nothing away
    main(["plot", str(runs), "--out", "out", "--mask", "none"])
    assert written < {str(path) for path in Path("out").rglob("*.*")}


def test_the_report_holds_all_settings(runs: Path) -> None:
    main(["report", str(runs), "--out", "new/folder/report.html"])
    page = Path("new/folder/report.html").read_text()
    assert page.count("<h2") >= 2
    assert "digits" in page
    assert "cifar100" in page


def test_the_published_tables_are_made_from_the_published_summaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    results, out = Path("experiments") / "results", Path("out").resolve()
    settings = ("digits", "inked_digits", "cifar100_small", "cifar100", "tiny_imagenet", "pacs")
    monkeypatch.chdir(root)
    words = [str(results / setting) for setting in settings]
    main(["tables", *words, "--out", str(out), "--leaderboard", str(tmp_path / "leaderboard.md")])
    page = (tmp_path / "leaderboard.md").read_text()
    assert page == (results / "leaderboard.md").read_text()
    assert f"fedlscl tables {' '.join(words)} --leaderboard experiments/results/leaderboard.md" in page
    made, published = (
        {path.name: path.read_text() for path in folder.iterdir()} for folder in (out, results / "tables")
    )
    assert set(made) == set(published)
    assert [name for name in made if made[name] != published[name]] == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tables", "nowhere"], "nowhere"),
        (["tables", "RUNS", "--masks", "[all]"], "mask is 'all', must be one of task, seen, federation, none"),
        (["plot", "RUNS", "--mask", "all"], "all"),
        (["report", "EMPTY"], "no finished run in it"),
    ],
)
def test_mistakes_are_told_in_a_line(runs: Path, words: list[str], complaint: str) -> None:
    Path("empty").mkdir()
    places = {"RUNS": str(runs), "EMPTY": "empty"}
    with pytest.raises(SystemExit, match=complaint):
        main([places.get(word, word) for word in words])


def test_no_name_leads_out_of_a_folder_or_breaks_a_page(tmp_path: Path) -> None:
    """Summaries may come from elsewhere, and hold any text."""
    for number, setting in enumerate(["..", "a/b", "$\\frac$", "x" * 300, "<script>\n", "\ud800"]):
        write_run(tmp_path / "runs" / str(number), setting=setting)
    Path("below").mkdir()
    main(["tables", "runs", "--out", "below/tables"])
    main(["plot", "runs/0", "runs/2", "--out", "below/figures"])
    main(["report", "runs/2", "runs/4", "--out", "below/report.html"])
    assert {path.name for path in Path().iterdir()} == {"runs", "below"}
    assert {path.name for path in Path("below").iterdir()} == {"tables", "figures", "report.html"}
    assert {path.parent.name for path in Path("below/figures").rglob("*.png")} == {"_", "_frac_"}
    page = Path("below/report.html").read_text()
    assert page.count("<script>") == 1  # its own
    assert "&lt;script&gt;" in page
    assert r"$\frac$" in Path("below/figures/_frac_/forgetting_seen.svg").read_text()
