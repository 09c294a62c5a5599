"""Checks of numbers, names and paths that a user gives; the error names field, value and what would be right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

LONGEST = 100  # characters of a name that becomes part of a file's


def at_least(least: float, group: str, **fields: float) -> None:
    """Check that no field is below `least`.

    Args:
        least: the smallest value that is allowed.
        group: what stands before the fields' names in a configuration, such as ``model``.
        **fields: the values by name.

    Raises:
        ValueError: for the first that is below, or not a number, or infinite.
    """
    for name, value in fields.items():
        if not value >= least:
            raise ValueError(f"{group}.{name} is {value}, must be at least {least}")
        _finite(group, name, value)


def positive(group: str, **fields: float) -> None:
    """Check that every field is above 0; see `at_least`.

    Raises:
        ValueError: for the first that is not, or infinite.
    """
    for name, value in fields.items():
        if not value > 0:
            raise ValueError(f"{group}.{name} is {value}, must be positive")
        _finite(group, name, value)


def fraction(group: str, **fields: float) -> None:
    """Check that every field is from 0 to 1; see `at_least`.

    Raises:
        ValueError: for the first that is not.
    """
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{group}.{name} is {value}, must be between 0 and 1")


def _finite(group: str, name: str, value: float) -> None:
    if math.isinf(value):
        raise ValueError(f"{group}.{name} is {value}, must be finite")


def file_name(field: str, value: str) -> str:
    """Check a name that becomes part of the names of folders and files.

    Args:
        field: what it is called in a configuration.
        value: the name.

    Returns:
        The name.

    Raises:
        ValueError: if it is empty, too long, begins with a dot, or holds what separates folders, a line break or the
            like.
    """
    if not re.fullmatch(r'[^./\\:*?"<>|\x00-\x20\x7f][^/\\:*?"<>|\x00-\x1f\x7f]*', value) or len(value) > LONGEST:
        raise ValueError(
            f"{field} is {value[:LONGEST]!r}, which becomes part of a file's name: it must have 1 to {LONGEST} "
            'characters, none of / \\ : * ? " < > | or a line break, and no dot at its beginning'
        )
    return value


def path(given: str | Path, field: str = "path") -> Path:
    """A path that a user gives, with `~` as the home folder.

    Args:
        given: the path.
        field: what it is called in a configuration.

    Raises:
        ValueError: if there is no such user, or no path can be like that.
    """
    if "\0" in str(given):
        raise ValueError(f"{field} is {str(given)!r}, but no path holds a NUL character")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{field} is '{given}', but there is no home folder of that user ({error})") from error


def output(file: Path, suffixes: Iterable[str]) -> Path:
    """A file that is to be written, checked before anything is computed for it.

    Args:
        file: the file.
        suffixes: of the formats that there are.

    Raises:
        ValueError: if its name says of no format that it is in.
        FileNotFoundError: if its folder does not exist.
    """
    if file.suffix not in (known := tuple(suffixes)):
        raise ValueError(f"out is '{file}', must end in {' or '.join(known)}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"out is '{file}', but there is no folder '{file.parent}'")
    return file
