"""What `fedlscl fit --help` shows: what matters first, or every field with those of the classes that are named.

The short one imports nothing that takes time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from fedlscl.data.presets import PRESETS

SHORT = f"""\
usage: fedlscl fit --config SETTING [--method METHOD] [--split NAME] [--run_dir DIR] [--any.field VALUE] [--dry_run]

Run a federation, or continue the one in its run folder: the same words find it again.

  --config NAME|FILE           a setting (`fedlscl settings`), a method, or a YAML file; a later one overrides
  --method NAME                a method (`fedlscl methods`) in the place of the setting's
  --split NAME                 a usual split, as values of the fields of data.split: {", ".join(PRESETS)}
  --dry_run                    check everything, show the split and the run folder, and train nothing
  --print_config               show every field with its value, and run nothing

The fields that matter first:

  --run_dir DIR                folder of the run; by default runs/SETTING-METHOD-seedSEED-...
  --seed_everything N          of all that is drawn, the split too
  --data.source.root FOLDER    where the images are, for settings that read a folder of them
  --data.split.clients N       how many clients
  --data.split.tasks N         how many tasks each of them learns, one after another
  --data.split.train_per_class N   no more training images of a class than that
  --federation.rounds N        rounds of communication for each task
  --model.epochs N             passes over a client's images in each round
  --model.learning_rate X      of the clients' training
  --backbone.weights FILE      weights of the frozen ViT, where timm's hub is out of reach

All the others: `fedlscl fit --help all`, and with --config and --method also those of their classes.
`fedlscl split` with the same words shows who gets which images.
"""

SPLIT = f"""\
usage: fedlscl split --config SETTING [--split NAME] [--out FILE.png|FILE.csv] [--any.field VALUE]

Show which client gets which classes and how many images of each, and what is left out; nothing is trained.

  --split NAME                 a usual split, as values of the fields of data.split: {", ".join(PRESETS)}
  --data.split.by FILE.csv     who has which classes, as a file says with the columns client, task and classes
  --data.split.by folders      every image is the client's in whose folder it is (--data.source ClientFolders)
  --out FILE.png               also as a picture
  --out FILE.csv               also as a file for data.split.by, to edit

All other words as behind `fedlscl fit`.
"""


def asked(words: Sequence[str]) -> str | None:
    """What of the help is asked for: `short`, `all`, or None."""
    for word, following in zip(words, [*words[1:], ""], strict=True) if words else ():
        if word == "--help=all" or (word in ("--help", "-h") and following == "all"):
            return "all"
        if word in ("--help", "-h"):
            return "short"
    return None


def everything(words: Sequence[str]) -> None:
    """Print all fields in groups, with those of the classes that the words and their files name."""
    from fedlscl.run.configuration import Configuration
    from fedlscl.run.names import Parser, classes_named
    from fedlscl.run.shipped import resolved

    named = classes_named(resolved([*words, "--help"]))
    with suppress(SystemExit):
        Configuration(["--help"])
    for field, kind in named.items():
        parser = Parser(prog="", description=None, add_help=False)
        parser.add_class_arguments(kind, field)
        groups = parser.format_help().partition("\n\n")[2].removeprefix(f"{parser.description}\n\n")
        sys.stdout.write(f"\n{field} is {kind.__name__}: {groups or 'no fields'}\n")
    if not named:
        sys.stdout.write(
            "\nThe fields of model, server and source are those of their classes: name these by --config.\n"
        )
