"""Classes by their short names: a configuration says `FedLSCL`, wherever in this package that class is defined.

Which module defines it is read off the source text, so that only what a configuration names is imported. A class from
elsewhere has its full path as its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from fedlscl.checks import path
from fedlscl.classes import defined
from fedlscl.run.errors import OneLine
from fedlscl.run.fields import read_yaml, short

MODE = "fedlscl"


def load(text: str) -> Any:
    """Read YAML, and import the modules that define the classes named in it."""
    try:
        values = short(get_loader("yaml")(text))
        _import(values)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply to be read") from None
    return values


def dump(values: Any) -> str:
    """Write YAML, with short names."""
    return yaml.safe_dump(short(values), sort_keys=False, allow_unicode=True)


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, dump)


class Parser(OneLine, LightningArgumentParser):
    """Knows the classes of this package by their short names, in files and in words."""

    def __init__(self, *args: Any, parser_mode: str = MODE, **kwargs: Any) -> None:
        super().__init__(*args, parser_mode=parser_mode, **kwargs)

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse words; `--model.help FedLSCL` too finds its class."""
        self._check_files(args or ())
        _import([word.rpartition("=")[2] for word in args or ()])
        try:
            return super().parse_args(args, *others, **kwargs)
        except (AttributeError, TypeError, KeyError, RecursionError, UnicodeError) as error:  # of values it never met
            self.error(f"a value is of another kind than its field ({type(error).__name__}: {error})")

    def _check_files(self, words: Sequence[str]) -> None:
        """End with file and line where a configuration is none; what follows would know neither."""
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if name in ("--config", "-c") and (file := path(value if equals else following)).is_file():
                try:
                    values = read_yaml(file)
                except (ValueError, OSError) as error:
                    self._end(str(error))
                if not isinstance(values, Mapping):
                    what = "nothing" if values is None else f"a {type(values).__name__}"
                    self._end(f"{file} holds {what}, must hold fields of a configuration and their values")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what is wrong, in a line."""
        if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
            name, groups = unknown[1], re.findall(r'Parser key "([\w.]+)"|--([\w.]+)\.help:', message)
            field = ".".join(key or asked for key, asked in groups)
            if name in defined():
                self._end(f"{field} is '{name}', a class of another kind")
            near = get_close_matches(name, defined())
            meant = f"; close to it are {', '.join(near)}" if near else ""
            self._end(f"{field} is '{name}', must be a class of fedlscl or a full path{meant}")
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
