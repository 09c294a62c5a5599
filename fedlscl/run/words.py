"""The words of a command line before any of them is looked at, and the parsers of the smaller commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedlscl.run.errors import OneLine

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LOADING = "fedlscl: loading PyTorch, which takes some seconds ..."


def parser_of(name: str, description: str) -> ArgumentParser:
    """A parser for the words of a command, which tells in a line what is wrong."""
    from jsonargparse import ArgumentParser

    class Parser(OneLine, ArgumentParser):
        """Tells what is wrong in a line."""

    return Parser(prog=f"fedlscl {name}", description=description)


def say(text: object) -> None:
    """Print a line as it is: rich would wrap it."""
    sys.stdout.write(f"{text}\n")


def flag(words: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Whether a word is among others, and the others: `--dry_run` alone, with `true` or `false` behind it, or `=true`.

    Raises:
        ValueError: if `=` is followed by anything else.
    """
    there, rest, values = False, [*words], {"true": True, "false": False}
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("-", "_").lstrip("_") != name or not option.startswith("--"):
            continue
        following = words[number + 1].lower() if number + 1 < len(words) else ""
        if equals and value.lower() not in values:
            raise ValueError(f"{name} is '{value}', must be true or false, or have nothing behind it")
        there = values.get(value.lower() if equals else following, True)
        alone = equals or following not in values
        rest = [*words[:number], *words[number + (1 if alone else 2) :]]
    return there, rest


def option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a word that may be among others, the last one's, and the others.

    Raises:
        ValueError: if it has no value.
    """
    found: str | None = None
    rest: list[str] = []
    waiting = [*words]
    while waiting:
        word, equals, value = waiting.pop(0).partition("=")
        if word != f"--{name}":
            rest.append(word + equals + value)
        elif equals or waiting:
            found = value if equals else waiting.pop(0)
        else:
            raise ValueError(f"{name} has no value behind it")
    return found, rest


def from_here() -> None:
    """Let classes be found in modules of the current folder, behind all others, so that these hide none."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


@contextmanager
def loading() -> Iterator[None]:
    """Say in a terminal that something is imported inside, until it is: nobody looks at an empty screen."""
    shown = sys.stderr.isatty()
    if shown:
        sys.stderr.write(LOADING)
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write(f"\r{' ' * len(LOADING)}\r")
            sys.stderr.flush()
