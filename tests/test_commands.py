"""`fedlscl tables`, `plot` and `report`, from run folders to files."""

from __future__ import annotations

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
    names = {f"{setting}-{name}" for setting in ("digits", "cifar100") for name in ("table1_task", "table1_none")}
    names |= {f"{setting}-{name}" for setting in ("digits", "cifar100") for name in ("overview", "costs")}
    written = {path.name for path in Path("out").iterdir()}
    assert written == {f"{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    text = Path("out/digits-table1_task.md").read_text()
    assert text in printed
    row = next(line for line in text.splitlines() if line.startswith("| fed_lscl"))
    # 50.5 and 52.5 on the first task, 61.5 and 63.5 on the second
    assert [cell.strip(" *") for cell in row.split("|")[3:6]] == ["51.5 ± 1.4", "62.5 ± 1.4", "57.0 ± 1.4"]


def test_two_backbones_of_one_setting_get_files_of_their_own(runs: Path) -> None:
    write_run(runs / "e", backbone="another ViT")
    main(["tables", str(runs), "--out", "out"])
    assert {path.name for path in Path("out").glob("*-overview.md")} == {
        *("digits-overview.md", "digits_2-overview.md", "cifar100-overview.md")
    }


def test_a_numbered_name_takes_no_settings_own(runs: Path) -> None:
    write_run(runs / "e", setting="digits_2")
    write_run(runs / "f", backbone="another ViT")
    main(["tables", str(runs), "--out", "out"])
    assert {path.name for path in Path("out").glob("digits*-overview.md")} == {
        *("digits-overview.md", "digits_2-overview.md", "digits_3-overview.md")
    }


def test_figures_are_written_below_their_setting(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(runs), "--out", "out"])
    written = {str(path) for path in Path("out").rglob("*.*")}
    assert {"out/digits/forgetting.png", "out/digits/forgetting.svg", "out/cifar100/accuracy_by_bytes.svg"} <= written
    assert set(capsys.readouterr().out.split()) == written


def test_the_report_holds_all_settings(runs: Path) -> None:
    main(["report", str(runs), "--out", "new/folder/report.html"])
    page = Path("new/folder/report.html").read_text()
    assert page.count("<h2") >= 2
    assert "digits" in page
    assert "cifar100" in page


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tables", "nowhere"], "nowhere"),
        (["tables", "RUNS", "--masks", "[all]"], "mask is 'all', must be one of task, seen, none"),
        (["plot", "RUNS", "--mask", "all"], "all"),
        (["report", "EMPTY"], "no finished run in it"),
    ],
)
def test_mistakes_are_told_in_a_line(runs: Path, words: list[str], complaint: str) -> None:
    Path("empty").mkdir()
    places = {"RUNS": str(runs), "EMPTY": "empty"}
    with pytest.raises(SystemExit, match=complaint):
        main([places.get(word, word) for word in words])
