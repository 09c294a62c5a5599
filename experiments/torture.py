"""Try to break it: kills, full disks, damaged files, hostile messages and values, odd images, wrong fields.

    python experiments/torture.py PART [PART ...] [--seed N] [--count N] [--out FILE]

Each part prints what it did and found as a section of Markdown; with --out the section takes the place of the one
of the same name in that file. The same seed does the same. It ends with exit code 1 if a part found a fault.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("kills", "disks", "damage", "messages", "values", "images", "fields")


def section(name: str, text: str, options: argparse.Namespace, seconds: float) -> str:
    """A part's findings under its heading, with what is needed to do it again."""
    command = f"python experiments/torture.py {name} --seed {options.seed}"
    command += f" --count {options.count}" if options.count else ""
    command += f" --methods {' '.join(options.methods)}" if options.methods and name == "values" else ""
    return f"## {name}\n\n{text.strip()}\n\n`{command}`, {seconds:.0f} s, Python {platform.python_version()}.\n"


def replaced(document: str, name: str, new: str) -> str:
    """A document with the section `name` replaced by a new one, or with the new one at its end."""
    sections = re.split(r"(?m)^(?=## )", document)
    at = next((n for n, old in enumerate(sections) if old.startswith(f"## {name}\n")), len(sections))
    return "\n".join(part.strip() + "\n" for part in [*sections[:at], new, *sections[at + 1 :]] if part.strip())


def main() -> None:
    """Do the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="how many cases, where a part draws them; by default its own")
    parser.add_argument("--methods", nargs="+", help="the methods that `values` attacks; by default all that send")
    parser.add_argument("--out", type=Path, help="the document that the sections are part of")
    options = parser.parse_args()
    faults = 0
    for name in options.parts:
        since = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            part: Any = importlib.import_module(f"reliability.{name}")
            if name == "values":
                part.METHODS = options.methods
            text, found = part.run(Path(folder), options.seed, options.count or part.COUNT)
        faults += found
        new = section(name, text, options, time.monotonic() - since)
        print(new, flush=True)
        if options.out is not None:
            before = options.out.read_text() if options.out.exists() else ""
            options.out.write_text(replaced(before, name, new))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
