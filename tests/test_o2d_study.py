"""The study of when one-by-one distillation helps: what is compared with what."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("o2d")


@pytest.fixture
def found(study: Any) -> dict[Any, dict[str, float]]:
    """Two seeds; in every case the second method is 1 point above the first, and the third above that."""
    return {
        study.Key(case, method, seed): {"seen": 10.0 * n + 3 * seed + place, "federation": 5.0 * n + place}
        for n, (case, of) in enumerate(study.CASES.items())
        for place, method in enumerate(of.methods)
        for seed in (1, 2)
    }


def test_what_is_added_is_beside_the_same_case_and_seed_without(study: Any, found: dict[Any, dict[str, float]]) -> None:
    assert [*study.METHODS] == ["fed_lscl", "fed_lscl_without_o2d", "fed_lscl_fedavg"]
    assert study.added(found, "none", "fed_lscl_fedavg", "federation") == [1.0, 1.0]
    found[study.Key("none", "fed_lscl_without_o2d", 2)] = {"seen": 4.0, "federation": 0.0}
    assert study.added(found, "none", "fed_lscl", "seen") == [-1.0, 12.0]


def test_a_case_of_lambda_is_beside_the_first_case_without_it(study: Any, found: dict[Any, dict[str, float]]) -> None:
    place = [*study.CASES].index("strong")
    assert study.added(found, "strong", "fed_lscl", "federation") == [5.0 * place - 1.0] * 2
    assert study.added(found, "strong", "fed_lscl_fedavg", "federation") == []


def test_the_table_has_a_row_for_each_case_and_mask_and_the_figure_its_seeds(
    study: Any, found: dict[Any, dict[str, float]]
) -> None:
    table = [*study.rows(found)]
    assert len(table) == 2 + 2 * len(study.CASES)
    assert table[2] == "| 5 of 6 classes in common | seen | 4.5 | 5.5 | 6.5 | -1.0, -1.0 | +1.0, +1.0 |"
    assert "the seeds 1, 2," in study.drawn(found).caption
