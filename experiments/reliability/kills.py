"""A small run, killed at every change that it makes on the disk, and cut off from power at each.

What a kill before a change leaves behind is what the folder holds at that moment: one run is enough to see all of them,
and at some of them a process is really killed, to see the same. From each the run is started again, and must end with
the numbers of the run that nothing disturbed, and leave nothing else behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from reliability.changes import Change, audited, watch
from reliability.forked import Outcome, finished, fit, forked, numbers
from reliability.power import MODES, Disk

COUNT = 100_000
"""At most so many folders to go on from; there are fewer."""

REALLY = 5
"""Kills that are done for real."""

TWICE = 40
"""Kills that are followed by another one while the run goes on."""

Contents = dict[str, bytes | None]


def contents(folder: Path) -> Contents:
    """All below a folder: the contents of files by path, None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def write(folder: Path, found: Contents) -> None:
    """Make a folder with these contents."""
    folder.mkdir()
    for name, content in sorted(found.items()):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def snapshots(config: Path, place: Path, where: Path, seed: int) -> tuple[list[Path], dict[str, list[Path]], Outcome]:
    """Run a federation in `place`/run, and write what each kind of interruption would leave behind below `where`.

    Returns:
        For each change the folder that a kill before it leaves behind, the folders by kind of interruption without
        those that are alike, and how the run ended.
    """
    where.mkdir()

    def prepare() -> None:
        seen: dict[str, dict[str, Contents]] = {}
        disk, rng, killed = Disk(place), Random(seed), list[str]()
        heard, told = audited([place]), Counter[str]()

        def keep(kind: str, found: Contents) -> str:
            alike = seen.setdefault(kind, {})
            for name, other in alike.items():
                if other == found:
                    return name
            name = f"{len(killed) + 1:04d}-{kind}"
            alike[name] = found
            write(where / name, found)
            return name

        def tell(change: Change) -> None:
            if {kind: told[kind] for kind in heard} != heard:
                (where / "unseen").write_text(f"before change {len(killed) + 1} {heard} and not {told}")
            told[change.kind] += 1
            now = contents(place)
            killed.append(keep("kill", now))
            if change.kind == "write" and len(change.content) > 1:
                name = str(change.path.relative_to(place))
                before = now[name] or b""
                keep("half", {**now, name: before + change.content[: len(change.content) // 2]})
            for mode in range(len(MODES)):
                keep(f"power{mode}", disk.left(mode, rng))
            disk.apply(change)
            (where / "killed").write_text("\n".join(killed))

        watch([place], tell)

    outcome = forked(fit(config, place / "run"), prepare)
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(path for path in where.iterdir() if path.is_dir()):
        by_kind.setdefault(path.name.partition("-")[2], []).append(path)
    return [where / name for name in (where / "killed").read_text().split()], by_kind, outcome


def killing(place: Path, number: int) -> Callable[[], None]:
    """What kills a process before its change of this number below a folder."""

    def prepare() -> None:
        left = number

        def tell(change: Change) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        watch([place], tell)

    return prepare


def problem(outcome: Outcome, run_dir: Path, expected: Any, names: set[str]) -> str | None:
    """What is wrong with a run that was started again, if anything."""
    if outcome.code:
        return f"ends with {outcome.code}: {outcome.text.strip().splitlines()[-1]}"
    if numbers(run_dir) != expected:
        return "other numbers"
    return f"{sorted(left)} left behind" if (left := listed(run_dir) ^ names) else None


def listed(run_dir: Path) -> set[str]:
    """The files of a run, whatever round they are of, and whatever temporary name they bear."""
    return {re.sub(r"\.\d+\.safetensors|[0-9a-f]{32}", "", name) for name in contents(run_dir)}


def run(folder: Path, seed: int, count: int) -> tuple[str, int]:
    """Do it; what was found as Markdown, and how many faults."""
    rng = Random(seed)
    config, whole = finished(folder)
    expected, names = numbers(whole), listed(whole)
    place, where = folder / "place", folder / "snapshots"
    place.mkdir()
    killed_at, by_kind, outcome = snapshots(config, place, where, seed)
    changes = len(killed_at)
    lines, faults = [f"The run makes {changes} changes on the disk.", ""], []
    if (where / "unseen").exists():
        faults.append(f"not all changes were seen: the interpreter says {(where / 'unseen').read_text()}")
    if (wrong := problem(outcome, place / "run", expected, names)) is not None:
        faults.append(f"the run that is watched: {wrong}")
    killed = folder / "killed"
    for number in sorted(rng.sample(range(2, changes), min(REALLY, count))):
        killed.mkdir()
        outcome = forked(fit(config, killed / "run"), killing(killed, number))
        before = killed_at[number - 1]
        if outcome.code != -signal.SIGKILL or listed(killed) != listed(before):
            faults.append(f"killed for real at change {number}: not what the snapshot {before.name} has")
        shutil.rmtree(killed)
    again = {
        "kill": "killed before a change",
        "half": "killed in the middle of a write",
        **{f"power{mode}": f"power failure: {text}" for mode, text in enumerate(MODES)},
    }
    lines += ["| | folders to go on from | went on to the same numbers |", "| --- | --- | --- |"]
    share = count / sum(map(len, by_kind.values()))
    for kind, text in again.items():
        found = by_kind[kind] if share >= 1 else rng.sample(by_kind[kind], max(1, int(share * len(by_kind[kind]))))
        bad = [f"{path.name}: {wrong}" for path in found if (wrong := gone_on(config, path, expected, names))]
        lines.append(f"| {text} | {len(found)} | {len(found) - len(bad)} |")
        faults += bad
    tried = rng.sample(by_kind["kill"], min(TWICE, count, len(by_kind["kill"])))
    bad = []
    for path in tried:
        copy = shutil.copytree(path, folder / "twice")
        forked(fit(config, copy / "run"), killing(copy, rng.randint(1, changes // 2)))
        if wrong := gone_on(config, copy, expected, names):
            bad.append(f"{path.name}, and again: {wrong}")
        shutil.rmtree(copy)
    lines.append(f"| killed, and killed again while going on | {len(tried)} | {len(tried) - len(bad)} |")
    faults += bad
    really = f"{min(REALLY, count)} processes were really killed, and left the same files as the snapshots have."
    lines += ["", really, "", *(f"- fault: {fault}" for fault in faults)]
    return "\n".join(lines), len(faults)


def gone_on(config: Path, snapshot: Path, expected: Any, names: set[str]) -> str | None:
    """Go on from what an interruption left behind; what is wrong then, if anything."""
    outcome = forked(fit(config, snapshot / "run"))
    wrong = problem(outcome, snapshot / "run", expected, names)
    if wrong is None:
        shutil.rmtree(snapshot / "run")
    return wrong
