"""The pictures: what is drawn is what was measured, and a PNG appears whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from fedlscl.run import plots
from fedlscl.run.plots import accuracy_matrix, accuracy_over_rounds


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    figures: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def entry(task: int, round: int, *clients: list[float | None], none: float = 0.0) -> dict[str, Any]:
    """One round: `clients` under "seen", 100 % under "task", `none` under "none", twice that under "federation"."""
    fill = {
        mask: [[None if a is None else value for a in row] for row in clients]
        for mask, value in (("task", 100.0), ("federation", 2 * none), ("none", none))
    }
    return {"task": task, "round": round, "accuracy": {"seen": list(clients), **fill}}


HISTORY = [
    entry(1, 1, [40.0, None], [60.0, None], none=10.0),
    entry(1, 2, [50.0, None], [90.0, None], none=20.0),
    entry(2, 3, [50.0, 100.0], [0.0, 50.0], none=30.0),
]


def test_curves_are_means_over_clients_of_means_over_learned_tasks(tmp_path: Path, drawn: list[Figure]) -> None:
    accuracy_over_rounds(HISTORY, tmp_path / "rounds.png")
    (axes,) = drawn[0].axes
    curves = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert curves["the task's classes"] == [100, 100, 100]
    assert curves["classes seen so far"] == [50, 70, 50]
    assert curves["classes any client has seen"] == [20, 40, 60]
    assert curves["all classes"] == [10, 20, 30]
    thin = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
    assert [40, 50, 75] in thin
    assert [60, 90, 25] in thin
    assert "%" in axes.get_ylabel()
    assert "round" in axes.get_xlabel()


def test_a_new_task_is_marked_where_it_begins(tmp_path: Path, drawn: list[Figure]) -> None:
    accuracy_over_rounds(HISTORY, tmp_path / "rounds.png", clients=False)
    (axes,) = drawn[0].axes
    assert len(axes.lines) == 5  # four masks, one boundary
    (boundary,) = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert list(boundary.get_xdata()) == [2.5, 2.5]
    assert [text.get_text() for text in axes.texts] == ["task 1", "task 2"]


def test_the_heat_maps_show_the_client_mean_and_the_final_row(tmp_path: Path, drawn: list[Figure]) -> None:
    accuracy_matrix(
        [
            [[80.0, None, None], [60.0, 91.0, None], [None, None, None]],
            [[40.0, None, None], [30.0, None, None], [None, None, None]],
        ],
        tmp_path / "matrix.png",
        "a run",
    )
    mean, final, _ = drawn[0].axes
    nan = np.nan
    expected = [[60, nan, nan], [45, 91, nan], [nan, nan, nan]]
    np.testing.assert_array_equal(np.ma.filled(mean.images[0].get_array(), nan), expected)
    np.testing.assert_array_equal(np.ma.filled(final.images[0].get_array(), nan), [[60, 91, nan], [30, nan, nan]])
    assert [text.get_text() for text in mean.texts] == ["60", "45", "91"]
    assert [text.get_text() for text in final.texts] == ["60", "91", "30"]
    assert final.get_title() == "after task 2"
    assert drawn[0].get_suptitle() == "a run"


def test_many_clients_are_drawn_without_numbers(tmp_path: Path, drawn: list[Figure]) -> None:
    accuracy_matrix([[[50.0]]] * 40, tmp_path / "matrix.png", "forty")
    mean, final, _ = drawn[0].axes
    assert len(mean.texts) == 1
    assert not final.texts


def test_a_png_appears_under_its_name_only_once_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rounds.png"
    accuracy_over_rounds(HISTORY, path, title="a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    before = path.read_bytes()

    def broken(figure: Figure, target: io.BytesIO, **options: Any) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        accuracy_over_rounds(HISTORY, path)
    assert path.read_bytes() == before


def test_pyplot_keeps_no_figure(tmp_path: Path) -> None:
    accuracy_over_rounds(HISTORY, tmp_path / "rounds.png")
    accuracy_matrix([[[50.0]]], tmp_path / "matrix.png", "")
    assert not pyplot.get_fignums()


def test_bad_input_is_named(tmp_path: Path) -> None:
    for history in ([], HISTORY[::-1], [HISTORY[0], HISTORY[0]]):
        with pytest.raises(ValueError, match="history must hold rounds in rising order"):
            accuracy_over_rounds(history, tmp_path / "rounds.png")
    for matrix in ([], [[[None]]], [[[1.0, 2.0]]]):
        with pytest.raises(ValueError, match="matrix must be"):
            accuracy_matrix(matrix, tmp_path / "matrix.png", "")
    assert not list(tmp_path.iterdir())


def test_a_name_is_drawn_as_it_is(tmp_path: Path, drawn: list[Figure]) -> None:
    """And not as a formula, which it need not be."""
    for number, title in enumerate((r"a$\frac$b", "cost $5 to $6", r"\$", "$x$")):
        accuracy_matrix([[[50.0]]], tmp_path / f"{number}.png", title)
        accuracy_over_rounds(HISTORY, tmp_path / f"{number}-rounds.png", title=title)
    for figure in drawn:
        assert not figure._suptitle.get_parse_math()  # type: ignore[attr-defined]
    assert drawn[0]._suptitle.get_text() == r"a$\frac$b"  # type: ignore[attr-defined]
