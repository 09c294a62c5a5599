"""What is printed: the bar's text, one line per round, and the closing table's numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_summary
from rich.console import Console

from fedlscl.evaluation import MASKS
from fedlscl.run.console import FederationProgress, human_bytes, summary_table
from fedlscl.run.summary import Summary, Traffic

NAN = float("nan")


def screen(*, terminal: bool, width: int = 100) -> Console:
    """A console that writes into memory."""
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)


def printed(console: Console) -> str:
    """Everything written so far."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_summary(seen: np.ndarray, **changes: Any) -> Summary:
    """A run's summary with `seen` as accuracy under the mask "seen"."""
    clients = len(seen)
    others = {"task": 98.76, "federation": 23.46, "none": 12.34}
    acc = {"seen": seen, **{mask: np.full((1, 1, 1), value) for mask, value in others.items()}}
    down = (5 * 2**20, 7 * 2**20, *[0] * clients)[:clients]
    return make_summary(
        acc=acc,
        backbone="tiny [vit]",
        bytes_up=Traffic(1536.0, 3072 * clients, (3072,) * clients, ()),
        bytes_down=Traffic(2**20, 2**20, down, ()),
        seconds={"total": 83.21, "fit": 70.5, "aggregate": 3.25, "evaluate": 9.0},
        peak_memory_mib=812.4,
        **changes,
    )


SEEN = np.array(
    [
        [[80, NAN, NAN], [60, 90, NAN], [70, 50, 100]],
        [[40, NAN, NAN], [50, 60, NAN], [20, 30, 40]],
    ]
)


def show(summary: Summary, width: int = 100) -> list[str]:
    """Print the closing table and return its lines."""
    console = screen(terminal=False, width=width)
    summary_table(summary, console, picture=Path("runs/[1]/accuracy.png"), run_dir=Path("runs/[1]"))
    return printed(console).splitlines()


def row(lines: list[str], first: str) -> list[str]:
    """The words of the one line that begins with `first`."""
    (found,) = [line.split() for line in lines if line.split()[:1] == [first]]
    return found


def test_the_closing_table_holds_every_number() -> None:
    lines = show(run_summary(SEEN))
    assert max(map(len, lines)) <= 100
    assert lines[0] == "fed_lscl on digits, seed 42, tiny [vit]"
    assert "after task 3" in lines[1]
    assert " ".join(row(lines, "client")) == "client task 1 task 2 task 3 final forgetting up down"
    assert " ".join(row(lines, "0")[1:]) == "70.0 50.0 100.0 73.3 25.0 3.0 KiB 5.0 MiB"
    assert " ".join(row(lines, "1")[1:]) == "20.0 30.0 40.0 30.0 30.0 3.0 KiB 7.0 MiB"
    assert " ".join(row(lines, "mean")[1:]) == "45.0 40.0 70.0 51.7 27.5 3.0 KiB 6.0 MiB"
    tail = "\n".join(lines[-5:])
    assert "task 98.8  seen 51.7  federation 23.5  none 12.3" in tail
    assert "up 1.5 KiB  down 1.0 MiB" in tail
    assert "seconds: 83.2 (fit 70.5, aggregate 3.2, evaluate 9.0)" in tail
    assert "peak memory: 812 MiB" in tail
    assert lines[-2:] == [f"picture: {Path('runs/[1]/accuracy.png')}", f"run: {Path('runs/[1]')}"]


def test_a_method_that_was_told_the_task_says_so() -> None:
    lines = show(run_summary(SEEN, task_aware=MASKS))
    assert lines[1].endswith("among the classes seen so far*")
    assert "final average (%) by mask: task 98.8*  seen 51.7*  federation 23.5*  none 12.3*" in lines
    assert any(line.startswith("* ") for line in lines)
    lines = show(run_summary(SEEN, task_aware=("task",)))
    assert lines[1].endswith("among the classes seen so far")
    assert "final average (%) by mask: task 98.8*  seen 51.7  federation 23.5  none 12.3" in lines
    assert not any("*" in line for line in show(run_summary(SEEN)))


def test_what_was_tested_without_training_images_is_said() -> None:
    lines = show(run_summary(SEEN, tested_pairs=375, untrained_pairs=29))
    assert any(line.startswith("in 29 of 375 pairs of a client and a class that it is tested on, ") for line in lines)
    for pairs in (0, None):
        assert not any("pairs of" in line for line in show(run_summary(SEEN, tested_pairs=375, untrained_pairs=pairs)))


def test_what_the_small_model_contributed_is_said_where_it_was_measured(tmp_path: Path) -> None:
    values = {"feature_distance": 0.5, "product_variance": 0.25, "shuffled_cost": 12.5, "mean_cost": -6.25}
    rows = "".join(f"1,1,client/0/generated/{name},{value}\n" for name, value in values.items())
    (tmp_path / "metrics.csv").write_text(f"task,round,metric,value\n{rows}")
    console = screen(terminal=False, width=100)
    summary_table(run_summary(SEEN), console, picture=Path("x.png"), run_dir=tmp_path)
    assert (
        "\nwhat the small model contributed: 12.5 points lost when W are shuffled over images, 6.2 points won with the "
        "mean W; 25.0 % of the LoRA differs between images: it tells images apart in every client\n"
    ) in printed(console)
    assert not any("contributed" in line for line in show(run_summary(SEEN)))


def test_one_task_has_no_forgetting_to_show() -> None:
    lines = show(run_summary(SEEN[:, :1, :1]))
    assert row(lines, "0")[1:4] == ["80.0", "80.0", "-"]
    assert row(lines, "mean")[1:4] == ["60.0", "60.0", "-"]


def test_an_unfinished_run_shows_the_tasks_it_has_learned() -> None:
    unfinished = SEEN.copy()
    unfinished[:, 2] = NAN
    lines = show(run_summary(unfinished))
    assert row(lines, "client")[:5] == ["client", "task", "1", "task", "2"]
    assert row(lines, "0")[1:5] == ["60.0", "90.0", "75.0", "20.0"]


def test_a_missing_test_set_is_a_dash() -> None:
    acc = SEEN.copy()
    acc[1, :, 1] = NAN
    lines = show(run_summary(acc))
    assert row(lines, "1")[1:6] == ["20.0", "-", "40.0", "30.0", "30.0"]
    assert row(lines, "mean")[2] == "50.0"


def test_no_number_is_cut_short_on_a_narrow_console() -> None:
    tasks = 20
    acc = np.where(np.tril(np.ones((tasks, tasks), dtype=bool)), 87.5, NAN)[None]
    lines = show(run_summary(acc), width=40)
    assert row(lines, "0").count("87.5") == tasks + 1
    assert "…" not in "".join(lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (44_950_000, "42.9 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**40, "5.0 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_off_a_terminal_there_is_one_line_per_round_and_no_bar() -> None:
    console = screen(terminal=False, width=20)
    with FederationProgress(2, 1, 2, console=console) as progress:
        for task in (1, 2):
            for client in (0, 1):
                progress.update(task, 1, client)
                progress.advance()
            progress.round_done(f"task {task}/2  round 1/1  seen [71.2] %")
    assert printed(console).splitlines() == [
        "task 1/2  round 1/1  seen [71.2] %",
        "task 2/2  round 1/1  seen [71.2] %",
    ]


def test_on_a_terminal_the_bar_says_where_the_federation_stands() -> None:
    console = screen(terminal=True)
    with FederationProgress(3, 3, 5, completed=7, console=console) as progress:
        progress.update(2, 1, 4)
        progress.advance()
        progress._progress.refresh()
        assert "task 2/3  round 1/3  client 4" in printed(console)
        assert "8/45" in printed(console)
        progress.reach(2)  # two clients were left out of it
        progress._progress.refresh()
        assert "10/45" in printed(console)
        progress.round_done("round 4: seen 71.2 %")
        progress.update(2, 2, 0)
        progress._progress.refresh()
    text = printed(console)
    assert "task 2/3  round 2/3  client 0" in text
    assert text.index("round 4: seen 71.2 %") < text.index("round 2/3  client 0")


def test_a_resumed_bar_judges_its_speed_by_what_it_did_itself() -> None:
    now = 0.0
    progress = FederationProgress(1, 10, 10, completed=90, console=screen(terminal=True))
    progress._progress.get_time = lambda: now
    progress._progress.reset(progress._bar, completed=90)
    for now in (100.0, 200.0, 300.0):  # noqa: B007  # read by get_time
        progress.advance()
    assert progress._progress.tasks[0].time_remaining == pytest.approx(700)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_bad_counts_are_named(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        FederationProgress(*counts)
    with pytest.raises(ValueError, match=r"completed must be 0\.\.6"):
        FederationProgress(1, 2, 3, completed=7)
