"""`fedlscl audit`: runs in, tables and pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedlscl.audit.attack import Found, attack
from fedlscl.audit.pages import write
from fedlscl.audit.run import AuditedRun


def audit(
    folders: Sequence[Path],
    out: Path,
    seeds: int,
    reconstruct: int,
    words: Sequence[str],
    say: Callable[[str], None],
) -> list[Path]:
    """Attack what the servers of finished runs received; runs of the same method are put together.

    Args:
        folders: of the runs, which must share setting, backbone and split but for their seeds.
        out: where tables and pictures go.
        seeds: how often each run is attacked, with other draws of images and decoders.
        reconstruct: of how many clients of each run images are made.
        words: fields that are other in the audit than in the runs.
        say: is told what is being done.

    Returns:
        The files written, the page first.

    Raises:
        FileNotFoundError: if a folder holds no finished run, or not what its server received.
        ValueError: if a number or the runs are impossible.
    """
    for name, number, least in (("seeds", seeds, 1), ("reconstruct", reconstruct, 0)):
        if number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
    found: dict[str, list[Found]] = {}
    shared: dict[str, tuple[str, Path]] = {}
    of_runs = []
    for folder in folders:
        run = AuditedRun(folder, words)
        summary, split = run.summary, run.data.split.spec
        for what, value in (("setting", summary.setting), ("backbone", summary.backbone), ("split", str(split))):
            before, where = shared.setdefault(what, (value, folder))
            if before != value:
                raise ValueError(f"runs have different {what}s: '{before}' in '{where}', '{value}' in '{folder}'")
        of_runs.append(summary.seed)
        for seed in range(seeds):
            say(f"attacking {folder}" + f", draw {seed + 1} of {seeds}" * (seeds > 1))
            epsilon = f", epsilon {summary.privacy.epsilon:.3g}" if summary.privacy else ""
            found.setdefault(f"{summary.method}{epsilon}", []).append(attack(run, seed, reconstruct))
    named = ", ".join(map(str, dict.fromkeys(of_runs)))
    about = f"{shared['setting'][0]}, {shared['backbone'][0]}, seeds {named}"
    return write(found, about, out)
