"""The settings and methods that come as files in `experiments/`, by short names: `digits`, `lorm`.

It imports nothing that takes time: what is asked for is found, or refused, before anything else is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Literal

from fedlscl.checks import file_name, path
from fedlscl.run.errors import meant

Kind = Literal["setting", "method"]
FOLDERS: dict[Kind, Path] = {"setting": Path("experiments"), "method": Path("experiments/methods")}
CHECKOUT = Path(__file__).resolve().parents[2]
"""What has `experiments/` beside the package, unless that is installed elsewhere."""

CONFIG = ("--config", "-c")
SETTINGS, METHODS = "`fedlscl settings`", "`fedlscl methods`"
ASKS = ("--help", "-h", "--print_config")


def shipped(kind: Kind) -> dict[str, Path]:
    """The files by name: below the current folder and, in a checkout, beside the package; the former win."""
    found: dict[str, Path] = {}
    for base in (Path(), CHECKOUT):
        for file in sorted((base / FOLDERS[kind]).glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def about(file: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        comment = [line.lstrip("# ").rstrip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    return re.split(r"\.(?= |$)", " ".join(comment))[0]


def resolved(words: Sequence[str]) -> list[str]:
    """The words behind `fedlscl fit` with the files that short names stand for.

    `--config digits` is the file of a setting or a method. `--method lorm` is `--config` with the file of the method,
    behind the `--config` before it, or behind the first where none is before it.

    Raises:
        ValueError: if there is no such setting or method, or nothing says what is to run.
    """
    found: list[str] = []  # --split, which Configuration makes fields of, is left as it is
    behind: int | None = None  # where a method goes
    waiting: list[str] = []
    rest = [*words]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in (*CONFIG, "--method") and not equals and rest:
            value = rest.pop(0)
        elif name not in (*CONFIG, "--method") or not equals:
            found.append(word)
            continue
        if name == "--method":
            file = _method(value, words)
            if file is None:
                found += ["--method", value]
            elif behind is None:
                waiting += ["--config", file]
            else:
                found[behind:behind] = ["--config", file]
                behind += 2
        else:
            found += ["--config", _config(value), *waiting]
            behind, waiting = len(found), []
    found += waiting
    if not any(_begins(word) for word in found):
        raise ValueError(
            "config is not given: `fedlscl fit --config SETTING [--method METHOD]`, such as --config digits; "
            f"{SETTINGS} and {METHODS} list them"
        )
    return found


def _begins(word: str) -> bool:
    """Whether a word says what is to run, or asks for something else than a run."""
    name = word.partition("=")[0]
    return name in (*CONFIG, "--model", "--model.class_path", *ASKS) or name.endswith(".help")


def _config(name: str) -> str:
    if path(name).is_file():
        return name
    known = {**shipped("method"), **shipped("setting")}
    if name in known:
        return str(known[name])
    if Path(name).suffix or "/" in name:
        return name  # which is said not to be there
    there = meant(get_close_matches(name, known), f"{SETTINGS} and {METHODS} list them")
    raise ValueError(f"config is '{name}', must be a file, or the name of a setting or a method{there}")


def _method(name: str, words: Sequence[str]) -> str | None:
    """The file of a method; None where it is but a name for tables, of what other words say."""
    known = shipped("method")
    if name in known:
        return str(known[name])
    file_name("method", name)
    names = [word.partition("=")[0] for word in words]
    if "--model" in names or "--model.class_path" in names or sum(name in CONFIG for name in names) > 1:
        return None
    raise ValueError(
        f"method is '{name}', must be the name of a method, or, as a name for tables, come with --model or a --config "
        f"for the method{meant(get_close_matches(name, known), f'{METHODS} lists them')}"
    )
