"""The runs of a study: each a process, several at a time, as long as there is time; none is repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedlscl.analysis.results import Run, read_runs
from fedlscl.files import content_of, make_folder, write_atomically
from fedlscl.run.configuration import Configuration
from fedlscl.run.errors import in_a_line, kept_in
from fedlscl.run.leash import end_with
from fedlscl.run.planned import LOG, PlannedRun
from fedlscl.run.sweep import POLL_SECONDS

PROGRESS = "progress.json"
START = 5.0
"""Seconds until a run begins, before any run has said how long it takes here."""

TICK = 5.0
"""Seconds after which the time that is used is noted again."""

PRELOADED = ("fedlscl.run.configuration", "fedlscl.run.plots", "timm", "torchvision")
"""What takes seconds to import: it is imported once, in a process that others are copied from where there is such."""


@dataclass
class Clock:
    """How much of a study's time is used, over all starts.

    Args:
        folder: of the study, where it is noted.
        limit: seconds that there are.
        before: seconds of earlier starts.
        begun: when this start began, by `time.monotonic`.
    """

    folder: Path
    limit: float
    before: float
    begun: float
    _saved: float = 0.0

    @classmethod
    def of(cls, folder: Path, limit: float, begun: float) -> Clock:
        """The clock of a study that may have been started before; `begun` is when this start began."""
        content = content_of(folder / PROGRESS)
        try:
            return cls(folder, limit, float(json.loads(content)["seconds"]) if content else 0.0, begun)
        except (ValueError, KeyError, TypeError):  # somebody has changed it
            return cls(folder, limit, 0.0, begun)

    @property
    def used(self) -> float:
        """Seconds."""
        return self.before + time.monotonic() - self.begun

    @property
    def left(self) -> float:
        """Seconds, below 0 where it took longer."""
        return self.limit - self.used

    def tick(self) -> None:
        """Note what is used, if that was last done a while ago: whoever kills a study has still used its time."""
        if self.used - self._saved > TICK:
            self.save()

    def save(self) -> None:
        """Note what is used."""
        self._saved = self.used
        write_atomically(self.folder / PROGRESS, json.dumps({"seconds": round(self.used, 1)}).encode())


@dataclass(frozen=True)
class Task:
    """One run: a method with a seed."""

    method: str
    seed: int
    planned: PlannedRun

    @property
    def result(self) -> Run | None:
        """What came of it, None as long as it is not finished."""
        return read_runs(self.planned.run_dir)[0] if self.planned.finished else None


class Pace:
    """How long runs take: as long as those of the same method took, or else as predicted, by how wrong that was.

    Args:
        predicted: seconds by method.
    """

    def __init__(self, predicted: Mapping[str, float]) -> None:
        self._predicted = predicted
        self._taken: dict[str, list[float]] = {}

    def note(self, method: str, seconds: float) -> None:
        """A run has taken so long."""
        self._taken.setdefault(method, []).append(seconds)

    def of(self, method: str) -> float:
        """Seconds that a run of this method will probably take."""
        if method in self._taken:
            return statistics.mean(self._taken[method])
        known = [name for name in self._taken if name in self._predicted]
        taken = sum(statistics.mean(self._taken[name]) for name in known)
        said = sum(self._predicted[name] for name in known)
        return self._predicted.get(method, max(self._predicted.values())) * (taken / said if known else 1.0)

    def sum(self, methods: Sequence[str]) -> float:
        """Seconds of several runs, one after another."""
        return sum(map(self.of, methods))


class Process(Protocol):
    """A started run."""

    exitcode: int | None

    def terminate(self) -> None:
        """Ask it to end."""

    def join(self) -> None:
        """Wait until it has ended."""


class Launcher:
    """Starts runs as processes that end with this one, however it ends.

    Args:
        threads: of each.
    """

    def __init__(self, threads: int) -> None:
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self._context.set_forkserver_preload([*PRELOADED])
        self._held: list[Connection] = []
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported there

    def __call__(self, planned: PlannedRun) -> Process:
        """Start a run; what it writes is added to its log."""
        make_folder(planned.run_dir)
        (planned.run_dir / LOG).touch()
        theirs, mine = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(planned.words[2:], planned.run_dir / LOG, theirs))
        process.start()
        theirs.close()
        self._held.append(mine)
        made: Process = process
        return made


def _run(words: Sequence[str], log: Path, pipe: Connection) -> None:
    """What `fedlscl fit` does, in a process of its own."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    end_with(pipe.fileno())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with in_a_line():
        experiment = Configuration(words).build()
        experiment.load()
        with kept_in(experiment.run_dir):
            experiment.run(Console())


class Runner:
    """Starts runs and waits for them.

    Args:
        launch: starts one.
        jobs: how many at a time.
        clock: the time that there is.
        pace: how long runs take; it learns from those that end.
        console: where to show how far it is.
    """

    def __init__(
        self, launch: Callable[[PlannedRun], Process], jobs: int, clock: Clock, pace: Pace, console: Console
    ) -> None:
        self.launch, self.jobs, self.clock, self.pace, self.console = launch, jobs, clock, pace, console
        self.failed: dict[tuple[str, int], str] = {}

    def run(
        self, tasks: Sequence[Task], may_start: Callable[[Task], bool], later: float, say: Callable[[Run], str]
    ) -> list[Task]:
        """Run what is not finished, and go on when one fails.

        Args:
            tasks: the runs, in order.
            may_start: whether there is time for one; asked just before it would start.
            later: seconds, one after another, of what comes after these, for the time left that is shown.
            say: what to print of a finished run, behind its method and seed.

        Returns:
            Those for which there was no time.
        """
        waiting, skipped = [task for task in tasks if not task.planned.finished], []
        running: dict[Process, tuple[Task, float]] = {}
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        bar = Progress(*columns, TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal)
        shown = bar.add_task("runs", total=len(tasks), completed=len(tasks) - len(waiting))
        try:
            with bar:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        task = waiting.pop(0)
                        if may_start(task):
                            running[self.launch(task.planned)] = (task, time.monotonic())
                        else:
                            skipped.append(task)
                    bar.update(shown, description=self._now(running, waiting, later))
                    time.sleep(POLL_SECONDS)
                    self.clock.tick()
                    for process in [process for process in running if process.exitcode is not None]:
                        task, begun = running.pop(process)
                        self._ended(task, process.exitcode, time.monotonic() - begun, say)
                        bar.advance(shown)
                        self.clock.save()
                        left = self._left(running, waiting, later)
                        if not self.console.is_terminal and (waiting or running or later):
                            self.console.print(f"  {_in_words(left)}")
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
            self.clock.save()
        return skipped

    def _ended(self, task: Task, code: int | None, seconds: float, say: Callable[[Run], str]) -> None:
        who = f"{task.method}, seed {task.seed}"
        found = task.result if code == 0 else None
        if found is None:
            self.failed[task.method, task.seed] = task.planned.last_words
            self.console.print(Text(f"{who}: failed: {task.planned.last_words}"), soft_wrap=True)
            return
        self.pace.note(task.method, seconds)
        self.console.print(Text(f"{who}: {say(found)}, {seconds:.0f} s"), soft_wrap=True)

    def _left(self, running: Mapping[Process, tuple[Task, float]], waiting: Sequence[Task], later: float) -> float:
        """Seconds until all is done."""
        now = time.monotonic()
        going = sum(max(0.0, self.pace.of(task.method) - now + begun) for task, begun in running.values())
        return (going + self.pace.sum([task.method for task in waiting]) + later) / self.jobs

    def _now(self, running: Mapping[Process, tuple[Task, float]], waiting: Sequence[Task], later: float) -> str:
        parts = [f"{task.method} {task.seed}{_round_of(task.planned)}" for task, _ in running.values()]
        return f"{' | '.join(parts)} | {_in_words(self._left(running, waiting, later))}"


def _in_words(seconds: float) -> str:
    """How long it still takes."""
    return f"about {seconds / 60:.0f} min left" if seconds >= 60 else "less than a minute left"


def _round_of(planned: PlannedRun) -> str:
    """Where a run is, by the last line that it wrote."""
    last = planned.last_words
    return f" ({last.partition('  seen')[0]})" if last.startswith("task ") else ""
