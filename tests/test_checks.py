"""The checks of numbers that a user gives."""

from __future__ import annotations

import math

import pytest

from fedlscl.checks import at_least, file_name, fraction, path, positive


def test_what_is_right_passes() -> None:
    at_least(1, "model", epochs=1, batch_size=16)
    positive("model", temperature=1e-9)
    fraction("server", alpha=0, beta=1.0)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_the_error_names_field_value_and_what_would_be_right(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^model\.epochs is {value}, must be at least 1$"):
        at_least(1, "model", batch_size=2, epochs=value)
    with pytest.raises(ValueError, match=rf"^server\.temperature is {value}, must be positive$"):
        positive("server", temperature=value)


@pytest.mark.parametrize("value", [-1e-9, 1.5, math.nan, math.inf])
def test_what_is_no_fraction(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^server\.alpha is {value}, must be between 0 and 1$"):
        fraction("server", beta=0.5, alpha=value)


def test_infinity_is_no_setting() -> None:
    with pytest.raises(ValueError, match=r"^model\.mu is inf, must be finite$"):
        at_least(0, "model", mu=math.inf)
    with pytest.raises(ValueError, match=r"^model\.mu is inf, must be finite$"):
        positive("model", mu=math.inf)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\\b", "a\nb", "a\0", "C:", "a*", " a", "x" * 101])
def test_what_is_no_part_of_a_files_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^setting is .*, which becomes part of a file's name"):
        file_name("setting", name)


@pytest.mark.parametrize("name", ["digits", "a.b", "a b", "é", "fed-lscl_2", "a$x$", "x" * 100])
def test_what_is_part_of_a_files_name(name: str) -> None:
    assert file_name("setting", name) == name


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert str(path("~/a")) == "/home/me/a"
    assert str(path("a/~/b")) == "a/~/b"
    with pytest.raises(ValueError, match="run_dir is '~nobody-here/a', but there is no home folder"):
        path("~nobody-here/a", "run_dir")
    with pytest.raises(ValueError, match="NUL"):
        path("a\0b")
