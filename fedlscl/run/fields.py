"""The fields of a configuration, by the names that they have on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
