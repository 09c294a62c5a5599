"""The fields of a configuration, by the names that they have on the command line, and plain values from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level with dotted names, as fields are named on the command line."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix.rstrip(".") if key == "init_args" else f"{prefix}{key}"
        fields |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return fields


def short(values: Any) -> Any:
    """The same plain values, with the classes of this package by their short names alone."""
    if isinstance(values, Mapping):
        return {
            key: _short(value) if isinstance(value, str) and str(key).endswith("class_path") else short(value)
            for key, value in values.items()
        }
    return [short(value) for value in values] if isinstance(values, list) else values


def _short(path: str) -> str:
    return path.rpartition(".")[2] if path.startswith("fedlscl.") else path


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no YAML in UTF-8; naming file and line.
    """
    try:
        return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: this is not YAML ({getattr(error, 'problem', None) or error})") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be read") from None


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8 ({error.reason}); save it as UTF-8") from error
