"""Test images of data sets that have none of their own: cut once, recorded, and the same from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlscl.data.cache import Files, key
from fedlscl.data.source import cut_test
from fedlscl.files import write_atomically

TEST_FRACTION = 0.2


def test_part(field: str, fraction: float | None) -> float:
    """The part of each class that is for testing; `TEST_FRACTION` for None.

    Raises:
        ValueError: if it is not above 0 and below 1.
    """
    if fraction is None:
        return TEST_FRACTION
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise ValueError(f"data.source.{field} is {fraction}; it must be above 0 and below 1")
    return fraction


def cut_parts(
    kind: str, found: Mapping[str, Sequence[Path]], root: Path, fraction: float, cache_dir: Path
) -> tuple[Files, Files]:
    """Training and test images of a data set without official split.

    A random part of each class, the same in every run, is the test set. The names of the test images are kept in
    the cache folder, so that they outlive changes of the random generator; another set of names is another cut.

    Args:
        kind: what the name of the record begins with.
        found: the image files by class, in a fixed order.
        root: the folder that names are relative to.
        fraction: of each class, rounded; at least one image is for testing and one for training.
        cache_dir: where the record is.

    Raises:
        ValueError: a class has a single image, or the record is damaged.
    """
    names = {
        name: [os.path.relpath(path, root).replace(os.sep, "/") for path in paths] for name, paths in found.items()
    }
    tests = _recorded(kind, list(names.values()), [root / name for name in found], fraction, cache_dir)

    def part(what: str, test: bool) -> Files:
        return Files(
            what,
            {
                name: [path for path, its in zip(paths, names[name], strict=True) if (its in tests) == test]
                for name, paths in found.items()
            },
        )

    return part("train", False), part("test", True)


def _recorded(
    kind: str, names: Sequence[Sequence[str]], where: Sequence[Path], fraction: float, cache_dir: Path
) -> set[str]:
    """Names of the test images, from the cache or drawn now; other file names are another cut."""
    others = [fraction] if fraction != TEST_FRACTION else []
    record = cache_dir / f"{kind}-test-{key(names, *others)}.json"
    if not record.is_file():
        cuts = [cut_test(len(files), fraction, c, where[c]) for c, files in enumerate(names)]
        drawn = [files[k] for files, cut in zip(names, cuts, strict=True) for k in cut]
        write_atomically(record, json.dumps(drawn, indent=0).encode())
    try:
        kept = set(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        kept = set()
    if any(not 0 < len(kept.intersection(files)) < len(files) for files in names):
        raise ValueError(f"{record} is damaged; delete it to have the split drawn again")
    return kept
