"""Classes by their short names: a configuration says `FedLSCL`, wherever in this package that class is defined.

Which module defines it is read off the source text, so that only what a configuration names is imported. A class from
elsewhere has its full path as its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from fedlscl.checks import path
from fedlscl.classes import defined
from fedlscl.run.errors import OneLine, meant
from fedlscl.run.fields import flat, read_yaml, short

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
        self._words: list[str] = []

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse words; `--model.help FedLSCL` too finds its class."""
        self._words = [*(args or ())]
        self._check_files()
        _import([word.rpartition("=")[2] for word in args or ()])
        try:
            return super().parse_args(args, *others, **kwargs)
        except (AttributeError, TypeError, KeyError, RecursionError, UnicodeError) as error:  # of values it never met
            self.error(f"a value is of another kind than its field ({type(error).__name__}: {error})")

    def _check_files(self) -> None:
        """End with file and line where a configuration is none; what follows would know neither."""
        try:
            for file, values in configurations(self._words):
                if not isinstance(values, Mapping):
                    what = "nothing" if values is None else f"a {type(values).__name__}"
                    self._end(f"{file} holds {what}, must hold fields of a configuration and their values")
        except (ValueError, OSError) as error:
            self._end(str(error))

    def known_fields(self) -> list[str]:
        """Also the fields of the classes that the words and their files name."""
        known = super().known_fields()
        for field, kind in self.chosen_classes().items():
            known += [f"{field}.{name}" for name in parameters(kind)]
        return known

    def chosen_classes(self) -> dict[str, type]:
        """The classes of this package that the words and their files name, by field."""
        return classes_named(self._words)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what is wrong, in a line."""
        if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
            name, groups = unknown[1], re.findall(r'Parser key "([\w.]+)"|--([\w.]+)\.help:', message)
            field = ".".join(key or asked for key, asked in groups)
            if name in defined():
                self._end(f"{field} is '{name}', a class of another kind")
            near = get_close_matches(name, defined())
            there = meant(near, "the pages in docs/methods name them")
            self._end(f"{field} is '{name}', must be a class of fedlscl or a full path{there}")
        if missing := re.search(r"No module named '([\w.]+)'", message):
            field = ".".join(re.findall(r'Parser key "([\w.]+)"', message)).replace(".init_args", "")
            self._end(
                f"{field or 'a class'} is of '{missing[1]}', but there is no such module, neither installed nor in the "
                f"current folder ({Path.cwd()}); go to the folder of {missing[1].partition('.')[0]}.py, or give it as "
                "PYTHONPATH"
            )
        super().error(message, ex)


def configurations(words: Sequence[str]) -> Iterator[tuple[Path, Any]]:
    """The files that words name as `--config`, and what they hold.

    Raises:
        OSError: if one cannot be read.
        ValueError: if one is no YAML.
    """
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c") and (file := path(value if equals else following)).is_file():
            yield file, read_yaml(file)


def check_order(words: Sequence[str]) -> None:
    """Refuse a field that a file behind it would override, without a word.

    Raises:
        ValueError: names the field and the file.
        OSError: if a file cannot be read.
    """
    for place, word in enumerate(words):
        field = word.partition("=")[0].removeprefix("--").replace(".init_args", "")
        if not word.startswith("--") or field == "config":
            continue
        for file, values in configurations(words[place + 1 :]):
            keys: list[str] = []
            with suppress(RecursionError):  # of a value that holds itself, which is refused where it is read
                keys += flat(values) if isinstance(values, Mapping) else ()
            for key in keys:
                whole = key.removesuffix(".class_path")
                if f"{key}.".startswith(f"{field}.") or (whole != key and field.startswith(f"{whole}.")):
                    raise ValueError(f"--{field} stands before --config {file}, which overrides it; put it behind")


def classes_named(words: Sequence[str]) -> dict[str, type]:
    """The classes of this package that words and their files name, by field: `model`, `model.continual`, `server`."""
    names: dict[str, str] = {}
    for _, values in configurations(words):
        with suppress(RecursionError):  # of a value that holds itself, which is refused where it is read
            given = flat(short(values)).items() if isinstance(values, Mapping) else ()
            names |= {key.removesuffix(".class_path"): str(each) for key, each in given if key.endswith(".class_path")}
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        value = (value if equals else following).rpartition(".")[2]
        if name.startswith("--") and value in defined():
            names[name[2:].replace(".init_args", "").removesuffix(".class_path")] = value
    there = {field: name for field, name in names.items() if name in defined()}
    found = {field: getattr(import_module(defined()[name][0]), name) for field, name in there.items()}
    # an earlier file may have named the class of a field that the class of a later one does not have
    valid = {}
    for field, kind in found.items():
        outer, _, name = field.rpartition(".")
        if outer not in found or name in parameters(found[outer]):
            valid[field] = kind
    return valid


def parameters(kind: type) -> list[str]:
    """What may be given to a class, and to those that it derives from as far as it hands words on to them."""
    found: dict[str, None] = {}
    for each in kind.__mro__:
        if "__init__" in vars(each) and each.__module__.partition(".")[0] == kind.__module__.partition(".")[0]:
            names = signature(each).parameters.values()
            found |= {each.name: None for each in names if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
            if all(each.kind != each.VAR_KEYWORD for each in names):
                break
    return list(found)


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
