"""Classes by their short names: a configuration says `FedLSCL`, wherever in this package that class is defined.

Which module defines it is read off the source text, so that only what a configuration names is imported. A class from
elsewhere has its full path as its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from fedlscl.classes import defined
from fedlscl.run.fields import short

MODE = "fedlscl"


def load(text: str) -> Any:
    """Read YAML, and import the modules that define the classes named in it."""
    values = short(get_loader("yaml")(text))
    _import(values)
    return values


def dump(values: Any) -> str:
    """Write YAML, with short names."""
    return yaml.safe_dump(short(values), sort_keys=False, allow_unicode=True)


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, dump)


class Parser(LightningArgumentParser):
    """Knows the classes of this package by their short names, in files and in words."""

    def __init__(self, *args: Any, parser_mode: str = MODE, **kwargs: Any) -> None:
        super().__init__(*args, parser_mode=parser_mode, **kwargs)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse words; `--model.help FedLSCL` too finds its class."""
        _import([word.rpartition("=")[2] for word in args or ()])
        return super().parse_args(args, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what is wrong, which of an unknown class is a line."""
        if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
            name, groups = unknown[1], re.findall(r'Parser key "([\w.]+)"|--([\w.]+)\.help:', message)
            field = ".".join(key or asked for key, asked in groups)
            if name in defined():
                self.exit(2, f"fedlscl: {field} is '{name}', a class of another kind\n")
            near = get_close_matches(name, defined())
            meant = f"; close to it are {', '.join(near)}" if near else ""
            self.exit(2, f"fedlscl: {field} is '{name}', must be a class of fedlscl or a full path{meant}\n")
        super().error(message, ex)


def _import(values: Any) -> None:
    """Import the modules that define what is named; jsonargparse knows classes by short names once they are there."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            _import(value)
    elif isinstance(values, str):
        for module in defined().get(values, ()):
            import_module(module)
