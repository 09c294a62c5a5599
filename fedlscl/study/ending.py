"""From a planned study to its answer: runs as far as there is time, a choice, and a test of what was chosen."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlscl.analysis.comparison import compare
from fedlscl.analysis.report import write_report
from fedlscl.analysis.results import Run, read_runs
from fedlscl.data.source import TEST_IMAGES
from fedlscl.files import write_atomically
from fedlscl.study import answer, plan
from fedlscl.study.budget import duration, testing
from fedlscl.study.running import START, Clock, Launcher, Pace, Runner, Task

REPORT, ANSWER = "report.html", "answer.md"


class Ending:
    """Runs what is planned as far as there is time, chooses, tests what was chosen, and says so.

    Args:
        planned: the study.
        clock: its time.
        told: by method `what` it is and what `leaves` a client.
        console: where to print.
    """

    def __init__(
        self, planned: plan.Study, clock: Clock, told: Mapping[str, Mapping[str, str]], console: Console
    ) -> None:
        self.planned, self.clock, self.told, self.console = planned, clock, told, console
        self.pace = Pace(planned.seconds)
        self.jobs, threads = plan.workers(torch.cuda.is_available())
        self.runner = Runner(Launcher(threads), self.jobs, clock, self.pace, console)
        self.by_time = sorted(planned.methods, key=lambda method: planned.seconds.get(method, 0.0))

    def run(self) -> None:
        """All of it."""
        chosen_of = self._choose()
        standings = [
            answer.Standing.of(method, runs, self.planned.images[plan.HELD]) for method, runs in chosen_of.items()
        ]
        choice = answer.choose(standings)
        tested = self._test(choice)
        self._end(standings, choice, tested)

    def _choose(self) -> dict[str, list[Run]]:
        """Runs of every method on held-out images, as many seeds as there is time for."""
        planned, done = self.planned, {method: list[Run]() for method in self.by_time}
        self.console.rule("Choosing, on training images held out", align="left", style="dim")
        groups = [planned.tasks(self.by_time, True, seed) for seed in planned.seeds]
        for number, tasks in enumerate(groups):
            for task in tasks:
                if (found := task.result) is not None:
                    self.pace.note(task.method, found.seconds + START)
            known = [method for method in self.by_time if number == 0 or done[method]]
            tasks = [task for task in tasks if task.method in known]
            due = [task.method for task in tasks if not task.planned.finished]
            tests = testing({method: self.pace.of(method) for method in known}) if known else 0.0
            if number and due and self.pace.sum(due) + (number + 1) * tests > self.jobs * self.clock.left:
                self.console.print(f"No time for seed {planned.seeds[number]} and those behind it.")
                break
            rest = (len(groups) - number - 1) * self.pace.sum(known) + len(groups) * tests
            rest = min(rest, self.jobs * max(0.0, self.clock.left) - self.pace.sum(due))  # what there is no time for
            skipped = self.runner.run(tasks, self._time_for(tasks[0], tests), rest, _in_words)
            for task in skipped:
                about = duration(self.pace.of(task.method))
                self.console.print(f"{task.method}, seed {task.seed}: no time for it (about {about})")
            for task in tasks:
                if (found := task.result) is not None:
                    done[task.method].append(found)
        finished = {method: done[method] for method in planned.methods if done[method]}
        if not finished:
            failed = "; ".join(f"{method}: {why}" for (method, _), why in self.runner.failed.items())
            raise RuntimeError(f"no run was finished ({failed or 'there was no time'})")
        return finished

    def _time_for(self, first: Task, tests: float) -> Callable[[Task], bool]:
        """Whether a run may start: the first in any case, others if a test of what is chosen still fits behind."""

        def may(task: Task) -> bool:
            return task is first or self.pace.of(task.method) + tests / self.jobs <= self.clock.left

        return may

    def _test(self, choice: answer.Choice) -> dict[str, answer.Standing]:
        """What was chosen, and what it is compared with, trained on all training images and tested on test images."""
        both = [method for method in (choice.chosen, choice.reference) if method is not None]
        self.console.rule(f"Testing {' and '.join(both)}, on test images", align="left", style="dim")
        done: dict[str, list[Run]] = {method: [] for method in both}
        seeds = self.planned.seeds
        for number, seed in enumerate(seeds):
            tasks = self.planned.tasks(both, False, seed)
            due = [task.method for task in tasks if not task.planned.finished]
            if number and due and self.pace.sum(due) > self.jobs * self.clock.left:
                self.console.print(f"No time for a test with seed {seed} and those behind it.")
                break
            later = (len(seeds) - number - 1) * self.pace.sum(both)
            self.runner.run(tasks, lambda task: True, later, _in_words)
            for task in tasks:
                if (found := task.result) is not None:
                    done[task.method].append(found)
        official = self.planned.images[plan.OFFICIAL]
        tested = {method: answer.Standing.of(method, runs, official) for method, runs in done.items() if runs}
        if choice.chosen not in tested:
            failed = "; ".join(why for (method, _), why in self.runner.failed.items() if method == choice.chosen)
            raise RuntimeError(f"{choice.chosen}, which was chosen, could not be tested ({failed})")
        return tested

    def _end(
        self, standings: list[answer.Standing], choice: answer.Choice, tested: Mapping[str, answer.Standing]
    ) -> None:
        folder = self.planned.folder
        rows = answer.ranking(standings, choice)
        table = Table(*answer.HEADER, box=None, header_style="bold", pad_edge=False)
        table.columns[0].no_wrap = True  # a name that is cut may be that of another
        for row in rows:
            table.add_row(*row)
        seeds = min(len(standing.values) for standing in standings)
        lines: tuple[str, ...] = answer.lines(choice, tested, self.told, seeds)
        there = {standing.method for standing in standings}
        if absent := [method for method in self.planned.methods if method not in there]:
            why = dict.fromkeys(absent, "no time") | {method: "failed" for method, _ in self.runner.failed}
            lines += (f"Not compared: {', '.join(f'{method} ({why[method]})' for method in absent)}.",)
        again = shlex.join(self.planned.words(choice.chosen, False, self.planned.seeds[0]))
        write_atomically(folder / ANSWER, _markdown(lines, rows, self.planned.notes, again).encode())
        report = folder / REPORT
        comparisons = compare(read_runs(folder / plan.RUNS))
        # the answer first: what was chosen, on test images
        write_report(sorted(comparisons, key=lambda found: found.evaluated_on != TEST_IMAGES), report)
        self.clock.save()
        self.console.rule("Answer", align="left", style="dim")
        self.console.print(table)
        self.console.print()
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)
        self.console.print()
        for text in (
            f"again, with any field changed: {again}",
            f"report: {report}",
            f"minutes: {self.clock.used / 60:.1f} of {self.clock.limit / 60:g}; answer and choices: {folder}/",
        ):
            self.console.print(Text(text), soft_wrap=True)


def _in_words(run: Run) -> str:
    return f"{run.final_average[answer.MASK]:.1f} %"


def _markdown(lines: tuple[str, ...], rows: list[tuple[str, ...]], notes: tuple[str, ...], again: str) -> str:
    def row(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cells)} |"

    table = [row(answer.HEADER), row(("---",) * len(answer.HEADER)), *map(row, rows)]
    return "\n".join(
        [*(f"{line}\n" for line in lines), *table, "", *(f"- {note}" for note in notes), "", f"`{again}`\n"]
    )
