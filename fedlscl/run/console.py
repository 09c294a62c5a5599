"""What a person sees in the terminal: one bar for the whole federation, and its closing table."""

from __future__ import annotations

from math import isinf
from pathlib import Path
from types import TracebackType

import numpy as np
from lightning.pytorch.loggers import Logger
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedlscl.evaluation import MASKS, final_average, forgetting, measured_mean
from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.run.contribution import read_contribution
from fedlscl.run.summary import Summary


class FederationProgress:
    """One progress bar for a federation, counted in client-rounds.

    Where the output is no terminal there is no bar, only the line of each round.

    Args:
        tasks: number of tasks.
        rounds: rounds per task.
        clients: clients taking part in each round.
        completed: client-rounds a resumed federation has behind it.
        console: where to draw; standard output for None.

    Raises:
        ValueError: if a count is below 1, or `completed` is not among the client-rounds there are.
    """

    def __init__(
        self, tasks: int, rounds: int, clients: int, *, completed: int = 0, console: Console | None = None
    ) -> None:
        if min(tasks, rounds, clients) < 1:
            raise ValueError(f"tasks, rounds and clients count from 1, got {tasks}, {rounds} and {clients}")
        self._tasks, self._rounds, self._clients, total = tasks, rounds, clients, tasks * rounds * clients
        if not 0 <= completed <= total:
            raise ValueError(f"completed must be 0..{total} client-rounds, got {completed}")
        console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", style="progress.percentage"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal or console.is_jupyter),
            expand=True,
            speed_estimate_period=float("inf"),  # a client's round may last longer than rich's 30 s
        )
        self._bar = self._progress.add_task("federation", total=total, completed=completed)

    def __enter__(self) -> FederationProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, task: int, round: int, client: int) -> None:
        """Say which client is at work.

        Args:
            task: task being learned, from 1.
            round: round within the task, from 1.
            client: its number.
        """
        where = f"task {task}/{self._tasks}  round {round}/{self._rounds}  client {client}"
        self._progress.update(self._bar, description=where)

    def serve(self, step: int, steps: float) -> None:
        """Say that the server is at work, after the clients of the round.

        Args:
            step: how many steps of a fit it has done.
            steps: of how many; infinity if nobody knows.
        """
        where = self._progress.tasks[self._bar].description.split("  client ")[0].split("  server ")[0]
        total = "" if isinf(steps) else f"/{steps:.0f}"
        self._progress.update(self._bar, description=f"{where}  server step {step}{total}")

    def advance(self) -> None:
        """Count one client-round as done."""
        self._progress.advance(self._bar)

    def reach(self, round: int) -> None:
        """Count all client-rounds as done up to the end of a round, also those of clients that were left out.

        Args:
            round: counted over all tasks, from 1.
        """
        self._progress.update(self._bar, completed=round * self._clients)

    def round_done(self, text: str) -> None:
        """Print the line of a finished round, above the bar if there is one.

        Args:
            text: what came out, such as "task 1/3  round 2/3  seen 71.2 %".
        """
        self._progress.console.print(Text(text), soft_wrap=True)


def human_bytes(count: float) -> str:
    """Write a number of bytes in the largest unit that leaves at least 1.

    Args:
        count: bytes.

    Returns:
        Such as "512 B" or "42.9 MiB".
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


class ProgressCallback(FederationCallback):
    """Shows on a bar where the federation is.

    Args:
        bar: shows progress.
        rounds: of each task.
    """

    def __init__(self, bar: FederationProgress, rounds: int) -> None:
        self.bar, self.rounds = bar, rounds

    def on_fit_start(self, task: int, round: int, client: int) -> Logger | None:
        """Who is at work."""
        self.bar.update(task, (round - 1) % self.rounds + 1, client)
        return None

    def on_fit_end(self) -> None:
        """A step of the bar."""
        self.bar.advance()

    def on_aggregate_step(self, step: int, steps: float) -> None:
        """Beside the bar."""
        self.bar.serve(step, steps)

    def on_round_end(self, result: RoundResult) -> None:
        """The bar is where it would be if everybody had taken part to the end."""
        self.bar.reach(result.round)


def summary_table(summary: Summary, console: Console, *, picture: Path, run_dir: Path) -> None:
    """Print how a federation ended: a row for each client, their mean, what it cost, where to find it.

    Args:
        summary: the run's summary.
        console: where to print.
        picture: the run's accuracy picture.
        run_dir: the run's folder.
    """
    acc = summary.accuracy["seen"].array
    after = int(np.flatnonzero(~np.isnan(acc).all(axis=(0, 2)))[-1])
    final = acc[:, after, : after + 1]

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("client", no_wrap=True)
    headings = [f"task {task + 1}" for task in range(after + 1)]
    for heading in (*headings, "final", "forgetting", "up", "down"):
        table.add_column(heading, justify="right", no_wrap=True)
    up, down = summary.bytes_up.by_client, summary.bytes_down.by_client
    for client in range(len(acc)):
        own = acc[client : client + 1]
        numbers = [*final[client], final_average(own), forgetting(own)]
        traffic = (human_bytes(up[client]), human_bytes(down[client]))
        table.add_row(str(client), *map(_number, numbers), *traffic, end_section=client == len(acc) - 1)
    means = [*measured_mean(final, 0), final_average(acc), forgetting(acc)]
    traffic = (human_bytes(float(np.mean(up))), human_bytes(float(np.mean(down))))
    table.add_row("mean", *map(_number, means), *traffic, style="bold")
    # Many tasks may be wider than the terminal: whole numbers that wrap beat numbers cut short.
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum

    run = f"{summary.method} on {summary.setting}, seed {summary.seed}, {summary.backbone}"
    told = summary.task_aware

    def star(mask: str) -> str:
        return "*" if mask in told else ""

    averages = "  ".join(f"{mask} {_number(summary.accuracy[mask].final_average)}{star(mask)}" for mask in MASKS)
    directions = {"up": summary.bytes_up, "down": summary.bytes_down}
    ways = (f"{way} {human_bytes(sent.per_client_round)}" for way, sent in directions.items())
    seconds = summary.seconds
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    contributed = read_contribution(run_dir)
    for part in (
        Text(run, style="bold"),
        Text(f"accuracy in % after task {after + 1}, predicted among the classes seen so far{star('seen')}"),
        table,
        Text(f"final average (%) by mask: {averages}"),
        *([Text("* with parameters that the task of each image, which had to be known, has chosen")] if told else []),
        *([Text(_untrained(summary))] if summary.untrained_pairs else []),
        *([Text(summary.privacy.text)] if summary.privacy else []),
        *([Text(f"what the small model contributed: {contributed.text}")] if contributed else []),
        Text(f"bytes per client and round: {'  '.join(ways)}"),
        Text(f"seconds: {seconds['total']:.1f} ({parts})  peak memory: {summary.peak_memory_mib:.0f} MiB"),
        Text(f"picture: {picture}"),
        Text(f"run: {run_dir}"),
    ):
        console.print(part, crop=False, soft_wrap=True)


def _untrained(summary: Summary) -> str:
    """What part of the tests nobody could have prepared for."""
    return (
        f"in {summary.untrained_pairs} of {summary.tested_pairs} pairs of a client and a class that it is tested on, "
        "the client has no training image of that class (data.split.min_public_images)"
    )


def _number(value: float | None) -> str:
    """One decimal, or a dash where there is no number."""
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"
