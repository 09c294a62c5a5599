"""Which module of this package defines a class: read off the source text, so that nothing needs to be imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent


@cache
def defined() -> Mapping[str, tuple[str, ...]]:
    """The modules that define a class of a name, for each name of a class."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for name in re.findall(r"^class ([A-Za-z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = (*found.get(name, ()), module)
    return found
