"""The checks of numbers that a user gives."""

from __future__ import annotations

import math

import pytest

from fedlscl.checks import at_least, positive


def test_what_is_right_passes() -> None:
    at_least(1, "model", epochs=1, batch_size=16)
    positive("model", temperature=1e-9)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_the_error_names_field_value_and_what_would_be_right(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^model\.epochs is {value}, must be at least 1$"):
        at_least(1, "model", batch_size=2, epochs=value)
    with pytest.raises(ValueError, match=rf"^server\.temperature is {value}, must be positive$"):
        positive("server", temperature=value)
