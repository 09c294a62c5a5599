"""How predictions are shown on the screen, and written to a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fedlscl.analysis.formats import csv_text
from fedlscl.files import write_atomically
from fedlscl.run.predict import Failure, Known, Prediction

NAMED = 12
"""Classes that are named, of those that a client knows."""

UNSURE = 0.6
"""Probability below which an image may be of a class that the client has never seen: with Fed-LSCL and federated ridge
on the digits most such images are below it, and few of the others."""

BAR_FROM = 200
"""Images that take long enough for a progress bar."""


def told(client: int, known: Known) -> str:
    """Which classes a client can name, in a line, with a warning of those that it cannot."""
    text = f"client {client} chooses among {len(known.learned)} classes: {_listed(known.learned)}"
    if not known.never:
        return text
    return (
        f"{text}; it has never seen {_listed(known.never)}: an image of these, or of none, is given one of the others"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(str(_visible(name)) for name in names[:NAMED]) + more


def show(
    found: Iterable[Prediction | Failure], images: int, top: int, keep: bool = False
) -> tuple[list[Prediction], list[str]]:
    """Print predictions: as a table in a terminal, elsewhere a line each as soon as it is known, with tabs between.

    Args:
        found: what `fedlscl.run.predict.predictions` returns.
        images: how many there are.
        top: how many classes to print of each.
        keep: whether to return the predictions.

    Returns:
        The predictions, and why images could not be read.
    """
    console, kept, failures = Console(), [], []
    unsure: list[Prediction] = []
    table = Table("image", "client", "class", "probability", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"  # nothing is cut
    with Progress(console=Console(stderr=True), transient=True, disable=images < BAR_FROM) as progress:
        bar = progress.add_task("classifying", total=images)
        last: str | None = None
        for each in found:
            progress.advance(bar, each.image != last)
            last = each.image
            if isinstance(each, Failure):
                failures.append(each.reason)
                continue
            if keep:
                kept.append(each)
            if each.probability < UNSURE:
                unsure.append(each)
            for name, probability in list(zip(each.classes, each.probabilities, strict=True))[:top]:
                cells = (each.image, str(each.client), name, f"{probability:.3f}")
                if console.is_terminal:
                    table.add_row(*map(_visible, cells))
                else:
                    sys.stdout.write("\t".join(cells) + "\n")
    if table.row_count:
        console.print(table)
    if unsure:
        of = f"{len(unsure)} answers have" if len(unsure) > 1 else "1 answer has"
        sys.stderr.write(
            f"{of} a probability below {UNSURE}, as of {_visible(unsure[0].image)}: such an image may be of no class "
            "that the client knows\n"
        )
    return kept, failures


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions with the probabilities of all classes that compete.

    Args:
        predictions: of one run.
        path: a file that `checks.output` has returned; it is there whole or not at all.
    """
    write_atomically(path, WRITERS[path.suffix](predictions).encode(errors="surrogateescape"))


def _visible(text: str) -> Text:
    """A cell as it is, but for signs that would steer the terminal."""
    return Text("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text))


def _to_csv(predictions: Sequence[Prediction]) -> str:
    """A column for each class; nothing in it where a client does not know the class."""
    names = sorted({name for each in predictions for name in each.classes})
    rows = [["image", "client", "class", "probability", *(f"probability of {name}" for name in names)]]
    for each in predictions:
        of = dict(zip(each.classes, each.probabilities, strict=True))
        numbers = [f"{of[name]:.9g}" if name in of else "" for name in names]
        rows.append([each.image, str(each.client), each.label, f"{each.probability:.9g}", *numbers])
    return csv_text(rows)


def _to_json(predictions: Sequence[Prediction]) -> str:
    entries = [
        {
            "image": each.image,
            "client": each.client,
            "class": each.label,
            "probability": each.probability,
            "probabilities": dict(zip(each.classes, each.probabilities, strict=True)),
        }
        for each in predictions
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


WRITERS = {".csv": _to_csv, ".json": _to_json}
"""How predictions are written, by the file's suffix."""
