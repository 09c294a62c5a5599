"""Write the page of every field of a configuration, from the classes themselves.

`write(path)` is called by `conf.py`; the page is not in the repository.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser

from fedlscl import Client, FederatedDataModule, FrozenViT, Server, SmallModelSpec, Source, methods
from fedlscl.classes import defined
from fedlscl.continual import Continual
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.run.configuration import Tracking
from fedlscl.schedule import Schedule

HEAD = """# Every field

Made from the classes. A field is given in a YAML file, or as `--data.split.clients 3`. A class is chosen by its name,
`--model FedAvgClient`, `--model.continual Replay`, and its fields are below it: `--model.block 11`.

"""


def write(path: Path) -> None:
    """Write the page."""
    every = [getattr(methods, name) for name in dir(methods)]
    every += [getattr(import_module(m), n) for n, modules in defined().items() for m in modules if ".methods." not in m]
    groups: list[tuple[str, str, list[Any]]] = [
        ("data", "Images and their split", [FederatedDataModule]),
        ("data.source", "Where the images come from", below(every, Source)),
        ("backbone", "The frozen ViT", [FrozenViT]),
        ("cnn", "The small model", [SmallModelSpec]),
        ("model", "Clients", [Client, *below(every, Client)]),
        ("model.continual", "What a client does against forgetting", below(every, Continual)),
        ("server", "Servers", below(every, Server)),
        ("federation", "Who takes part when", [Schedule]),
        ("trainer", "Trainer", [RoundTrainer]),
        ("tracking", "W&B", [Tracking]),
    ]
    lines = [HEAD]
    common = {name for name, *_ in rows(Client)}
    for prefix, title, classes in groups:
        lines.append(f"## {title}: `{prefix}`\n")
        for one in classes:
            found = rows(one)
            own = [
                row
                for row in found
                if one in (Client, FederatedDataModule) or prefix != "model" or row[0] not in common
            ]
            if len(classes) > 1:
                lines.append(f"### `{one.__name__}`\n\n{summary(one)}\n")
            lines.append(table(own) if own else "No field of its own.\n")
            if prefix == "model" and one is not Client:
                lines.append("Besides the fields of `Client`.\n")
    path.write_text("\n".join(lines), encoding="utf-8")


def below(every: list[Any], base: type) -> list[Any]:
    """The classes below another that one can choose, by name."""
    found = {
        c for c in every if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c) and c is not Client
    }
    return sorted(found, key=lambda c: c.__name__)


def summary(one: Any) -> str:
    """The first line of a docstring, with the signs of Markdown as they are."""
    return (inspect.getdoc(one) or "").partition("\n")[0].replace("_", r"\_").replace("*", r"\*")


def rows(one: Any) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each argument."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(one) else parser.add_function_arguments
    add(one, None)
    found = []
    for action in parser._actions:
        if action.dest == "help" or action.dest.endswith(".help") or action.help is SUPPRESS:
            continue
        kind = getattr(action, "_typehint", action.type)
        if kind is None:
            continue
        default = "required" if action.required or action.default is inspect.Parameter.empty else action.default
        found.append((action.dest, short(kind), short(default), " ".join((action.help or "").split())))
    return found


def short(value: object) -> str:
    """A type or value without the modules of its parts."""
    text = value.__name__ if inspect.isclass(value) else str(value)
    return re.sub(r"\b[a-z_]\w*\.(?=[\w.])", "", text.replace("typing.", "").replace("NoneType", "None"))


def table(found: list[tuple[str, str, str, str]]) -> str:
    """A table in Markdown."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, default, meaning in found:
        cells = (f"`{name}`", f"`{kind}`", f"`{default}`", meaning.replace("``", "`"))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
