"""The commands that say what there is: `fedlscl settings`, `methods`, `doctor` and `completion`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from fedlscl.data.presets import PRESETS
from fedlscl.run.shipped import Kind, about, shipped
from fedlscl.run.words import loading, parser_of, say

DESCRIPTIONS = {
    "settings": "The settings that --config and --setting find by name, and what each is.",
    "methods": "The methods that --config and --method find by name, and what each is.",
    "doctor": "Versions, devices, disk, and what can be reached from here.",
    "completion": "Print a script by which the shell completes commands, names and fields.",
}

NO_FILES = (
    "there are no {kind}s here: they are files in experiments/ of the repository; go to its folder, or give --config "
    "the path of a file"
)

COMPLETION = """\
# Put this into ~/.bashrc:  source <(fedlscl completion)  or, faster, what it prints into
# ~/.local/share/bash-completion/completions/fedlscl. In zsh: autoload -U +X bashcompinit && bashcompinit before.
_fedlscl() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words
  if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
  else
    case $prev in
      --config|-c) words="{settings} {methods} $(compgen -f -- "$cur")" ;;
      --setting) words="{settings}" ;;
      --method) words="{methods}" ;;
      --split) words="{presets}" ;;
      *) case $cur in -*) words="{fields}" ;; *) words=$(compgen -f -- "$cur") ;; esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o filenames -F _fedlscl fedlscl
"""


def settings_command(words: list[str]) -> None:
    """`fedlscl settings`: the settings by name, what each is, and whether its data are there."""
    _refuse(words, "settings")
    import yaml

    lines = []
    for name, file in _named("setting").items():
        source = (yaml.safe_load(file.read_text(encoding="utf-8")).get("data") or {}).get("source") or {}
        root = (source.get("init_args") or {}).get("root")
        missing = root and not Path(root).expanduser().exists()
        lines.append((name, f"{about(file)}{f' ({root} is not there: give --data.source.root)' if missing else ''}"))
    _list(lines)


def methods_command(words: list[str]) -> None:
    """`fedlscl methods`: the methods by name, and what each is."""
    _refuse(words, "methods")
    _list([(name, about(file)) for name, file in _named("method").items()])


def doctor_command(words: list[str]) -> None:
    """`fedlscl doctor`: versions, devices, disk, and what can be reached."""
    _refuse(words, "doctor")
    with loading():
        from fedlscl.run.doctor import findings
    _list(findings())


def completion(commands: Iterable[str]) -> str:
    """The script by which bash, or zsh, completes words: the commands, settings, methods, and fields."""
    any_of_them = ["--model=FedLSCL", "--model.continual=NoReplay", "--server=FedAvg", "--data.source=Digits"]
    with loading():
        from fedlscl.client import Client
        from fedlscl.run.configuration import Configuration
        from fedlscl.run.names import parameters

        names = [*Configuration(any_of_them).fields, *(f"model.{name}" for name in parameters(Client))]
    fields = [f"--{name}" for name in dict.fromkeys((*names, "dry_run")) if not name.endswith((".help", "+"))]
    words: dict[str, Iterable[str]] = {
        "settings": shipped("setting"),
        "methods": shipped("method"),
        "presets": PRESETS,
        "commands": commands,
    }
    return COMPLETION.format(fields=" ".join(fields), **{name: " ".join(each) for name, each in words.items()})


def _refuse(words: list[str], command: str) -> None:
    """Say that a command takes no words, or show what it does."""
    parser_of(command, DESCRIPTIONS[command]).parse_args(words)


def _named(kind: Kind) -> dict[str, Path]:
    found = shipped(kind)
    if not found:
        raise FileNotFoundError(NO_FILES.format(kind=kind))
    return found


def _list(lines: Iterable[tuple[str, str]]) -> None:
    """Print names and what they are; long lines are wrapped in a terminal."""
    lines = [*lines]
    column = max(len(name) for name, _ in lines) + 2
    width = max(shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000, column + 30)
    for name, text in lines:
        indent = " " * column
        say(textwrap.fill(text, width, initial_indent=name.ljust(column), subsequent_indent=indent) if text else name)
