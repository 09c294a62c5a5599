"""Checks of numbers that a user gives; the error names the field, its value and what would be right."""

from __future__ import annotations


def at_least(least: float, group: str, **fields: float) -> None:
    """Check that no field is below `least`.

    Args:
        least: the smallest value that is allowed.
        group: what stands before the fields' names in a configuration, such as ``model``.
        **fields: the values by name.

    Raises:
        ValueError: for the first that is below, or not a number.
    """
    for name, value in fields.items():
        if not value >= least:
            raise ValueError(f"{group}.{name} is {value}, must be at least {least}")


def positive(group: str, **fields: float) -> None:
    """Check that every field is above 0; see `at_least`.

    Raises:
        ValueError: for the first that is not.
    """
    for name, value in fields.items():
        if not value > 0:
            raise ValueError(f"{group}.{name} is {value}, must be positive")
