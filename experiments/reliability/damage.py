"""Files of runs and of the cache are damaged, each in turn at random, and whatever reads them is tried.

A damage may have no effect (a picture, what is mended), or end the command with a line that names the file. It must not
change a number without a word, nor end in a traceback or a signal.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from reliability.changes import Change, watch
from reliability.forked import Outcome, finished, fit, forked, numbers, summary_of

COUNT = 2000
"""Damages."""

SHOWN = 5
"""Faults in one place that are listed, of which there may be many of a kind."""


def flipped(content: bytes, rng: Random) -> bytes:
    """One bit is another."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def scribbled(content: bytes, rng: Random) -> bytes:
    """Up to 64 bytes in a row are others."""
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.randint(1, min(64, len(content) - at))) + content[at + 64 :]


def zeroed(content: bytes, rng: Random) -> bytes:
    """From somewhere on all is zero, as after a power failure."""
    at = rng.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


def cut(content: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content))]


def windows(content: bytes, rng: Random) -> bytes:
    """Lines end as on Windows."""
    return content.replace(b"\n", b"\r\n")


def gone(content: bytes, rng: Random) -> None:
    """The file is deleted."""


DAMAGES: tuple[Callable[[bytes, Random], bytes | None], ...] = (flipped, scribbled, zeroed, cut, windows, gone)


def unfinished(config: Path, run_dir: Path) -> None:
    """A run that is killed at the end of its first round."""

    def prepare() -> None:
        manifests = 0

        def tell(change: Change) -> None:
            nonlocal manifests
            manifests += change.kind == "replace" and Path(change.target).name == "state.json"
            if manifests == 2 and change.kind == "unlink":  # the first is written before any state is
                os.kill(os.getpid(), signal.SIGKILL)

        watch([run_dir.parent], tell)

    outcome = forked(fit(config, run_dir), prepare)
    if outcome.code != -signal.SIGKILL:
        raise RuntimeError(f"the run was to be killed after its first round, and ends with {outcome}")


def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Do it; what was found as Markdown, and how many faults."""
    rng = Random(seed)
    config, whole = finished(folder)
    half, cache = folder / "half", folder / "cache"
    unfinished(config, half)
    places = {"an unfinished run": half, "a finished run": whole, "the cache": cache}
    kept = folder / "kept"
    for path in places.values():
        shutil.copytree(path, kept / path.name)
    image = next((folder / "images" / "test").rglob("*.png"))
    commands: dict[str, list[str]] = {
        "go on": fit(config, half),
        "fit again": fit(config, whole),
        "predict": ["predict", str(whole), str(image)],
        "tables": ["tables", str(whole), "--out", str(folder / "tables")],
    }
    told = {name: forked(words).text for name, words in commands.items() if name in ("predict", "tables")}
    expected = numbers(whole)
    tallies: dict[str, Counter[str]] = {}
    faults: dict[str, list[str]] = {}
    for _ in range(count):
        place = rng.choice([*places])
        root = places[place]
        for path in places.values():
            shutil.rmtree(path)
            shutil.copytree(kept / path.name, path)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
        file, damage = rng.choice(files), rng.choice(DAMAGES)
        name = rng.choice(("fit again", "predict", "tables")) if root == whole else "go on"
        old = file.read_bytes()
        new = damage(old, rng)
        if new is None:
            file.unlink()
        else:
            file.write_bytes(new)
        outcome = forked(commands[name])
        end = ended(outcome, file)
        if not outcome.code and name in ("go on", "fit again"):
            # of a record of metrics that was lost not all can be written anew; of a finished run nobody reads it
            if name == "fit again" or (file.name == "metrics.csv" and str(file) in outcome.text):
                found = summary_of(half if name == "go on" else whole), expected[1]
            else:
                found = numbers(half)
            end = end if found == expected else "OTHER NUMBERS"
        elif not outcome.code:
            end = end if told[name] in outcome.text else "OTHER NUMBERS"
        tallies.setdefault(place, Counter())[end] += 1
        if end.isupper():
            line = (outcome.text.strip().splitlines() or ["nothing"])[-1].replace(f"{folder}/", "")
            where = file.relative_to(root)
            faults.setdefault(place, []).append(f"{end}: {name}, {where} {damage.__name__}: {line}")
    ends = sorted({end for tally in tallies.values() for end in tally})
    lines = [f"{count} damages, by where they were and what came of them:", ""]
    lines += [f"| | {' | '.join(end.lower() for end in ends)} |", f"| --- |{' --- |' * len(ends)}"]
    lines += [f"| {place} | {' | '.join(str(tally[end]) for end in ends)} |" for place, tally in tallies.items()]
    lines += ["", *(f"- fault in {place}: {fault}" for place, those in faults.items() for fault in those[:SHOWN])]
    lines += [f"- and {len(those) - SHOWN} more in {p}" for p, those in faults.items() if len(those) > SHOWN]
    return "\n".join(lines), sum(map(len, faults.values()))


def ended(outcome: Outcome, file: Path) -> str:
    """How a command ended, in capitals if it must not end so."""
    if outcome.code < 0:
        return "SIGNAL"
    if outcome.traceback:
        return "TRACEBACK"
    if file.name in "".join(outcome.text.split("\n")):
        return "named" if outcome.code else "named, and went on to the same numbers"
    return "FILE NOT NAMED" if outcome.code else "no effect"
