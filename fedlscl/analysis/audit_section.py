"""The part of the report on what servers could learn, from folders that `fedlscl audit` has written."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

CONTENTS = "audit.json"
"""Tables and pictures of an audit, in its folder."""

PNG = b"\x89PNG"


def audit_section(folders: Sequence[Path]) -> Markup:
    """A section of HTML with tables and pictures of audits; nothing if there are none.

    Args:
        folders: those that `fedlscl audit --out` has written.

    Raises:
        ValueError: if one is none, or a file in it is damaged.
    """
    if not folders:
        return Markup("")
    parts = [
        Markup(
            '<section aria-labelledby="audit">\n<h2 id="audit">What the server could learn</h2>\n'
            '<p class="note">Attacks on what servers received, by <code>fedlscl audit</code>. One that finds nothing '
            "shows that this attack finds nothing with this much knowledge, and no more.</p>\n"
        )
    ]
    for number, folder in enumerate(folders, 1):
        path = folder / CONTENTS
        try:
            found = json.loads(path.read_bytes())
            parts += [_table(table, f"audit-{number}-table{n}") for n, table in enumerate(found["tables"], 1)]
            parts += [_picture(folder, picture) for picture in found["pictures"]]
        except FileNotFoundError as error:
            raise ValueError(
                f"audit '{folder}' lacks {Path(error.filename).name}, must be a folder that `fedlscl audit --out` wrote"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is damaged, or of another version; run `fedlscl audit` again") from error
    return Markup("").join([*parts, Markup("</section>\n")])


def _table(table: dict[str, Any], key: str) -> Markup:
    """A table, whose title, runs, note, header and rows are texts."""
    header = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in table["header"])
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>\n').format(
            first, Markup("").join(Markup("<td>{}</td>").format(text) for text in others)
        )
        for first, *others in table["rows"]
    )
    return Markup(
        '\n<h3 id="{key}">{title}</h3>\n<p class="note">{runs}</p>\n'
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="{key}">\n'
        '<table class="numbers" aria-describedby="{key}-note">\n<thead><tr>{header}</tr></thead>\n'
        '<tbody>\n{rows}</tbody>\n</table>\n</div>\n<p class="note" id="{key}-note">{note}</p>\n'
    ).format(key=key, title=table["title"], runs=table["runs"], header=header, rows=rows, note=table["note"])


def _picture(folder: Path, picture: dict[str, str]) -> Markup:
    """A picture of the folder, inside the page."""
    content = (folder / Path(picture["file"]).name).read_bytes()
    if not content.startswith(PNG):
        raise ValueError(picture["file"])
    return Markup(
        '<figure><img src="data:image/png;base64,{}" alt="{}" style="max-width: 100%">'
        "<figcaption>{}</figcaption></figure>\n"
    ).format(base64.b64encode(content).decode(), picture["title"], picture["title"])
