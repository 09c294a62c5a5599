"""What an audit found as tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedlscl.analysis.audit_section import CONTENTS
from fedlscl.analysis.formats import FORMATS, Cell, Table, to_markdown
from fedlscl.audit import membership
from fedlscl.audit.attack import SHOWN, Exact, Found, Made
from fedlscl.audit.membership import DRAWS, FALSE_POSITIVES, Interval
from fedlscl.files import make_folder, write_atomically
from fedlscl.privacy import best_auc, most_found, most_found_under

Runs = Mapping[str, Sequence[Found]]
"""By method what was found in its runs."""

PAGE = "audit.md"
INTRODUCTION = """\
# What the server could learn

Attacks on what the server received, by `fedlscl audit`. An attack that finds nothing shows that this attack finds
nothing with this much knowledge, and no more; a better one may. What is exact, or close to it, is lost for certain.
"""


def write(runs: Runs, about: str, folder: Path) -> list[Path]:
    """Write tables and pictures.

    Args:
        runs: what was found.
        about: what the runs share, for the tables' titles.
        folder: where to.

    Returns:
        The files, the page with all tables first.
    """
    make_folder(folder)
    texts, files, pictures = [INTRODUCTION], [folder / PAGE], []
    shown = tables(runs, about)
    for table in shown:
        texts.append(to_markdown(table))
        for suffix in ("csv", "tex"):
            files.append(folder / f"{table.name}.{suffix}")
            write_atomically(files[-1], FORMATS[suffix](table).encode())
    for method, found in runs.items():
        for number, (what, made) in enumerate(together([one.made for one in found]).items(), 1):
            files.append(folder / f"{_fit(method)}-{number}.png")
            title = f"{method}: {what[1]}, {what[0]}; {what[2]}"
            draw(made, title, files[-1])
            pictures.append({"file": files[-1].name, "title": title})
            texts.append(f"![{method}, {', '.join(what)}]({files[-1].name})\n")
    write_atomically(folder / PAGE, "\n".join(texts).encode())
    contents = {"tables": [_plain(table) for table in shown], "pictures": pictures}
    write_atomically(folder / CONTENTS, json.dumps(contents, indent=1).encode())
    return [*files, folder / CONTENTS]


def _plain(table: Table) -> dict[str, object]:
    """A table's texts, for the report."""
    rows = [[cell.text for cell in row] for row in table.rows]
    return {"title": table.title, "runs": table.runs, "note": table.note, "header": table.header, "rows": rows}


def _fit(method: str) -> str:
    """A method's name, and its epsilon, as a part of a file's name."""
    return method.replace(", ", "-").replace(" ", "")


def tables(runs: Runs, about: str) -> list[Table]:
    """Exact leaks, membership, reconstruction."""
    found = [_exact(runs, about), _membership(runs, about), _reconstruction(runs, about)]
    return [table for table in found if table.rows]


def together(parts: Sequence[Mapping[tuple[str, str, str], Made]]) -> dict[tuple[str, str, str], Made]:
    """What several runs of a method gave, one after another."""
    found: dict[tuple[str, str, str], Made] = {}
    for part in parts:
        for what, made in part.items():
            one = found.setdefault(what, Made())
            one.similarity += made.similarity
            one.baseline += made.baseline
            one.found += made.found
            one.chance += made.chance
            one.pictures += made.pictures
    return found


def _exact(runs: Runs, about: str) -> Table:
    rows = []
    for method, found in runs.items():
        for view in dict.fromkeys(view for one in found for view in one.exact):
            parts = [one.exact.get(view, Exact()) for one in found]
            claimed, right, images, asked, classes, counts = (
                sum(getattr(part, name) for part in parts) for name in Exact.__dataclass_fields__
            )
            cells = [f"{right} of {images}" if images else "none", f"{claimed - right}" if claimed else "0"]
            cells += [f"{classes} of {asked}" if asked else "not sent", f"{counts} of {asked}" if asked else "not sent"]
            rows.append(tuple(Cell(text) for text in (method, view, *cells)))
    header = ("method", "the server has", "images whose feature is exact", "false ones", "list of classes", "counts")
    note = (
        "Images behind a message whose features follow from it by arithmetic, and features that were wrongly taken for "
        "one image's; messages from which the client's classes, and how many images it has of each, can be read. Every "
        "message states the number of training images besides."
    )
    return Table("exact", "Exact leaks", about, note, header, tuple(rows))


def _membership(runs: Runs, about: str) -> Table:
    rows = []
    for method, found in runs.items():
        for key in dict.fromkeys(key for one in found for key in one.members):
            groups = [pair for one in found for pair in one.members.get(key, [])]
            result, count = membership.measured(groups), sum(len(members) for members, _ in groups)
            view, members, attack, attacker = key
            cells = [Cell(text) for text in (method, view, attack, attacker, members, str(count))]
            rows.append((*cells, _interval(result.auc, 1, 3), _interval(result.tpr, 100, 1)))
        for promise in [one.privacy for one in found if one.privacy][:1]:
            z = promise.multiplier / promise.releases**0.5
            exact, general = (
                most_found(FALSE_POSITIVES, z),
                most_found_under(FALSE_POSITIVES, promise.epsilon, promise.delta),
            )
            cells = [Cell(text) for text in (method, "", "any: no attack can have more", *3 * ("",))]
            rates = Cell(
                f"{100 * exact:.1f} (from epsilon and delta alone {100 * general:.1f})", numbers={"": 100 * exact}
            )
            rows.append((*cells, Cell(f"{best_auc(z):.3f}", numbers={"": best_auc(z)}), rates))
    if rows:
        guess = [Cell(text) for text in ("guessing", *5 * ("",))]
        rows.append((*guess, Cell("0.5"), Cell("1.0")))
    header = ("method", "the server has", "attack", "it knows", "members", "of them", "AUC", "true positives at 1 %")
    note = (
        "Members are training images, the others as many test images of the same classes of the same clients; one "
        f"threshold for all clients. In brackets the 95 % interval of {DRAWS} bootstrap draws over images. What no "
        "attack can exceed holds for one release with so much noise, of whose unit (image or client) this is said."
    )
    return Table("membership", "Membership", about, note, header, tuple(rows))


def _reconstruction(runs: Runs, about: str) -> Table:
    rows = []
    for method, found in runs.items():
        for (view, what, attacker), made in together([one.made for one in found]).items():
            cells = [Cell(text) for text in (method, view, what, attacker, str(len(made.similarity)))]
            alike, usual = (_interval(_mean(values), 1, 3) for values in (made.similarity, made.baseline))
            again = f"{100 * np.mean(made.found):.1f} (guess {100 * np.mean(made.chance):.1f})" if made.found else "–"
            rows.append((*cells, alike, usual, Cell(again)))
    header = (*("method", "the server has", "of", "it knows", "images"), "similarity", "class mean", "found again (%)")
    note = (
        "Similarity is the correlation of the pixels of the image made by a decoder, trained on public images, with "
        "the true image's; beside it that of the mean of public images of the true class, which takes no message. "
        "Found again: the true image is the most similar one among the client's of its class. Of images that the "
        "server itself makes, the client's most similar image stands for the true one, also for the class mean. In "
        "brackets the 95 % interval of bootstrap draws over images."
    )
    return Table("reconstruction", "Reconstruction", about, note, header, tuple(rows))


def _mean(values: Sequence[float]) -> Interval:
    known, rng = np.array(values), np.random.default_rng(0)
    drawn = [rng.choice(known, len(known)).mean() for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high))


def _interval(found: Interval, scale: float, digits: int) -> Cell:
    value, low, high = (scale * part for part in found)
    numbers = {"": value, "low": low, "high": high}
    return Cell(f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]", numbers=numbers)


def draw(made: Made, title: str, path: Path) -> None:
    """Draw true images above made ones and the means of their classes."""
    places = np.linspace(0, len(made.pictures) - 1, min(SHOWN, len(made.pictures))).astype(int)
    columns = [made.pictures[k] for k in places.tolist()]
    figure = Figure(figsize=(0.75 * len(columns) + 1.1, 2.9))
    axes = figure.subplots(3, len(columns), squeeze=False)
    for row, name in enumerate(("true", "made", "class mean")):
        for place, column in zip(axes[row], columns, strict=True):
            place.imshow(column[row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
        axes[row][0].set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=8, wrap=True)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110, bbox_inches="tight")
    temporary.replace(path)
