"""A small run on a disk that is full or broken: at every change that needs it, once or from then on.

Whatever it does then, it must not end as if all were well with other numbers, nor be ended by a signal or a traceback;
and on a disk that works again it must end with the numbers of the run that nothing disturbed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml

from reliability.changes import WRITES, Change, watch
from reliability.forked import finished, fit, forked, numbers

COUNT = 300
"""Cases that are drawn from all."""

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}


def failing(place: Path, at: int, kind: str, lasting: bool, record: Path | None = None) -> Callable[[], None]:
    """What lets a process fail at its change of this number below a folder; `record` gets the kinds of all changes."""

    def prepare() -> None:
        number = 0

        def tell(change: Change) -> None:
            nonlocal number
            number += 1
            if record is not None:
                record.write_text(f"{record.read_text() if record.exists() else ''}{change.kind}\n")
            if (number == at or (lasting and number > at)) and (kind == "broken" or change.kind in WRITES):
                # the system names no file where one that is open cannot be written to
                named = () if change.kind in ("write", "fsync") else (str(change.path),)
                raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]), *named)

        watch([place], tell)

    return prepare


def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Do it; what was found as Markdown, and how many faults."""
    config, whole = finished(folder)
    expected = numbers(whole)
    place, record = folder / "place", folder / "kinds"
    content = yaml.safe_load(config.read_text())
    content["data"]["cache_dir"] = str(place / "cache")  # one that is empty again in each case
    config.write_text(yaml.safe_dump(content, sort_keys=False))

    def new_place() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place / "run"

    forked(fit(config, new_place()), failing(place, 0, "full", False, record))
    kinds = record.read_text().split()
    cases = [
        (at, kind, lasting)
        for at, change in enumerate(kinds, 1)
        for kind in ERRORS
        for lasting in (False, True)
        if kind == "broken" or change in WRITES
    ]
    tried = Random(seed).sample(cases, min(count, len(cases)))
    ends: Counter[str] = Counter()
    faults = []
    for at, kind, lasting in sorted(tried):
        case = f"{kind} {'from' if lasting else 'at'} change {at} ({kinds[at - 1]}) on"
        run_dir = new_place()
        outcome = forked(fit(config, run_dir), failing(place, at, kind, lasting))
        said = outcome.text.strip().splitlines()[-1] if outcome.text.strip() else "nothing"
        if outcome.code < 0:
            faults.append(f"{case}: signal {-outcome.code}")
        elif outcome.traceback:
            faults.append(f"{case}: a traceback, {said}")
        elif outcome.code and os.strerror(ERRORS[kind]) not in outcome.text:
            faults.append(f"{case}: does not say why: {said}")
        elif not outcome.code and numbers(run_dir)[0] != {**expected[0], "config": numbers(run_dir)[0]["config"]}:
            faults.append(f"{case}: ends well with other numbers")
        again = forked(fit(config, run_dir))
        if again.code:
            faults.append(f"{case}: cannot go on: {again.text.strip().splitlines()[-1]}")
        elif numbers(run_dir)[1] != expected[1]:
            faults.append(f"{case}: goes on to other numbers")
        ends["ended with a line that says why" if outcome.code else "ended well, with the same numbers"] += 1
    lines = [
        f"{len(kinds)} changes on the disk, in the run folder and in the cache, make {len(cases)} cases of a disk that",
        "is full (no write, no new name) or broken (no change at all), once or from then on;",
        f"{len(tried)} of them were tried. Every run was started again afterwards.",
        "",
        *(f"- {end}: {number}" for end, number in ends.items()),
        *(f"- fault: {fault}" for fault in faults),
    ]
    return "\n".join(lines), len(faults)
