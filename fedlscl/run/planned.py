"""The runs of a sweep: how far each has come, by what it has written, and the bars that show it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG = "output.log"
LOOK_SECONDS = 1.0
"""How often it is looked up in which round a run is."""

TAIL = 8192
"""Bytes at the end of what a run has written, among which its last round is looked for."""

_ROUND = re.compile(rb"^task (\d+)/\d+  round (\d+)/(\d+)  ", re.MULTILINE)  # as RunCallback says it


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Args:
        words: the command line.
        run_dir: the folder that it makes or continues.
        rounds: how many it has in all.
    """

    words: tuple[str, ...]
    run_dir: Path
    rounds: int = 1

    @property
    def finished(self) -> bool:
        """Whether its numbers are there."""
        return (self.run_dir / "summary.json").exists()

    @property
    def rounds_done(self) -> int:
        """How many rounds are behind it, as far as it has said so."""
        if self.finished:
            return self.rounds
        try:
            with (self.run_dir / LOG).open("rb") as log:
                log.seek(max(os.fstat(log.fileno()).st_size - TAIL, 0))
                said = _ROUND.findall(log.read())
        except FileNotFoundError:
            return 0
        if not said:
            return 0
        task, round_, rounds = map(int, said[-1])
        return min((task - 1) * rounds + round_, self.rounds)

    @property
    def last_words(self) -> str:
        """The last line that it wrote."""
        lines = (self.run_dir / LOG).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


class SweepProgress:
    """A bar for a sweep, in rounds, so that the time left is known before a run has ended, and one for each that runs.

    Args:
        runs: all runs.
        console: where to draw, if that is a terminal.
    """

    def __init__(self, runs: Sequence[PlannedRun], console: Console) -> None:
        self._runs, self._looked = runs, 0.0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
            speed_estimate_period=float("inf"),  # a round may last longer than rich's 30 s
        )
        done = sum(run.rounds_done for run in runs)
        self._all = self._begin("all runs", sum(run.rounds for run in runs), done)
        self._each: dict[Path, TaskID] = {}

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _begin(self, description: str, total: int, done: int) -> TaskID:
        """Add a bar; its time runs from here on, so that after one round more it knows how long the others take."""
        task = self._progress.add_task(description, total=total, completed=done, count="")
        self._progress.advance(task, 0)
        return task

    def look(self, running: Sequence[PlannedRun]) -> None:
        """Show how far all are.

        Args:
            running: those that run now.
        """
        if self._progress.disable or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        done = {run.run_dir: run.rounds_done for run in self._runs}
        finished = sum(run.finished for run in self._runs)
        self._progress.update(self._all, completed=sum(done.values()), count=f"{finished}/{len(self._runs)} runs")
        for gone in [folder for folder in self._each if folder not in {run.run_dir for run in running}]:
            self._progress.remove_task(self._each.pop(gone))
        for run in running:
            if run.run_dir not in self._each:
                self._each[run.run_dir] = self._begin(run.run_dir.name, run.rounds, done[run.run_dir])
            now = done[run.run_dir]
            self._progress.update(self._each[run.run_dir], completed=now, count=f"round {now}/{run.rounds}")
