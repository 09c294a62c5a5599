"""`fedlscl study`: from a folder of images to an answer."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedlscl.analysis.comparison import compare
from fedlscl.analysis.report import write_report
from fedlscl.analysis.results import Run, read_runs
from fedlscl.checks import at_least
from fedlscl.checks import path as path_of
from fedlscl.data.dealing import make_split
from fedlscl.data.folders import ImageFolder
from fedlscl.data.listed import ImageTable
from fedlscl.data.module import cache_folder
from fedlscl.data.source import Dataset, Source
from fedlscl.data.splits import SplitSpec
from fedlscl.files import locked, make_folder, write_atomically
from fedlscl.run.fields import read_yaml
from fedlscl.run.names import Parser, load
from fedlscl.study import answer, backbone, budget, look, plan, proposal
from fedlscl.study.running import START, Clock, Launcher, Pace, Runner, Task

LEAST_MINUTES = 0.5
REPORT, ANSWER, DOUBTFUL = "report.html", "answer.md", "doubtful.csv"


def study(asked: plan.Asked, minutes: float, out: str | None, console: Console) -> None:
    """Plan a study and run it, or go on with it.

    Args:
        asked: what it is about.
        minutes: that there are, over all starts; not counted is the report.
        out: its folder; None = studies/<name of the source>.
        console: where to print.

    Raises:
        ValueError: an impossible wish, or the folder is another study's.
        RuntimeError: no run of any method was finished.
    """
    at_least(1, "study", clients=asked.clients, tasks=asked.tasks)
    at_least(LEAST_MINUTES, "study", minutes=minutes)
    folder = path_of(out) if out is not None else Path("studies") / _name(asked.source)
    make_folder(folder)
    try:
        with locked(folder / ".lock"):
            _study(folder, asked, minutes, console)
    except BlockingIOError as error:
        raise ValueError(f"out '{folder}' is in use by another process; wait for it or give another --out") from error


def _study(folder: Path, asked: plan.Asked, minutes: float, console: Console) -> None:
    choices = read_yaml(plan.CHOICES)
    clock = Clock.of(folder, 60 * minutes)
    planned = plan.Study.read(folder)
    if planned is None:
        planned = _plan(folder, asked, clock, choices, console)
    elif planned.asked != asked:
        raise ValueError(
            f"out '{folder}' holds a study of other words ({planned.asked}); give the same, or another --out"
        )
    else:
        console.print(Text(f"Going on with {folder}: {clock.used / 60:.1f} of {minutes:g} minutes are used."))
    methods = plan.methods_of(asked.methods, choices)
    told = {name: methods.get(name, choices["other"]) for name in planned.methods}
    Ending(planned, clock, told, console).run()


def _name(source: str) -> str:
    """A name for the study and its setting, fit for a file."""
    path = path_of(source)
    name = path.resolve().stem if path.exists() else source.rpartition(":")[2].rpartition("/")[2]
    return re.sub(r"[^\w-]+", "_", name)[:60].strip("_") or "images"


# ------------------------------------------------------------------------- the plan


def _plan(folder: Path, asked: plan.Asked, clock: Clock, choices: Mapping[str, Any], console: Console) -> plan.Study:
    gpu = torch.cuda.is_available()
    methods = plan.methods_of(asked.methods, choices)
    source = look.source_of(asked.source)
    chosen = backbone.choose(asked.weights, choices, gpu)
    sizes = backbone.sizes_of(chosen, choices["budgets"])
    jobs, threads = plan.workers(gpu)

    _say(console, "Images", asked.source)
    seen, cache = _looked_at(folder, source, console)
    _say(console, "Backbone", chosen.why)
    seeds = tuple(choices["seeds"])
    counts, tests = list(seen.train), list(seen.test)

    smallest = sizes[-1]["image_size"]
    measured = backbone.seconds_per_image(chosen.fields, smallest, threads)
    predictions = []
    for size in sizes:
        train, test = _labels(counts, tests)
        caps = {name: size[name] for name in ("train_per_class", "test_per_class")}
        split = proposal.propose(train, test, seen.classes, asked.clients, asked.tasks, seeds, **caps)
        images = budget.Images.of(counts, tests, SplitSpec(**split.fields))
        scale = backbone.tokens(size["image_size"]) / backbone.tokens(smallest)
        runs = {
            name: budget.seconds_of(entry["cost"], images, size["rounds"], measured * scale, START)
            for name, entry in methods.items()
        }
        predictions.append(({**size, "split": split}, runs))
    extras = [name for name, entry in methods.items() if entry["run"] == "if_time"]
    fitted = budget.fit(predictions, extras, len(seeds), clock.left, jobs)
    split = fitted.size["split"]

    side = fitted.size["image_size"]
    dataset = _loaded(source, side, seen, cache)
    spec, name = SplitSpec(**split.fields), _name(asked.source)
    labels = dataset.train.labels, dataset.test.labels
    dealt = {
        tested: make_split(*labels, SplitSpec(**{**split.fields, "local_test": tested}), seeds[0], dataset.classes)
        for tested in ("holdout30", "official")
    }
    for line in split.notes:
        _say(console, "Split", line)
    console.print(proposal.drawn(dealt["official"], dataset.train.labels, dataset.classes))
    used = ", ".join(
        f"{'all' if value is None else f'up to {value}'} {what} images of a class"
        for what, value in (("training", spec.train_per_class), ("test", spec.test_per_class))
    )
    rounds = fitted.size["rounds"]
    notes = [
        f"{used}, at {side} px, {rounds} round{'s'[: rounds > 1]} a task, {fitted.seeds} of {len(seeds)} seeds: what "
        f"probably fits into {clock.limit / 60:g} minutes, {jobs} runs at a time, {threads} threads a run "
        f"({1000 * measured:.1f} ms for an image's pass through the ViT at {smallest} px)",
        *(
            f"{left}: left out, a run would take about {seconds / 60:.0f} min"
            for left, seconds in fitted.left_out.items()
        ),
    ]
    for note in notes:
        _say(console, "Budget", note)
    made = plan.Study(
        folder,
        asked,
        clock.limit / 60,
        seeds[: fitted.seeds],
        fitted.methods,
        {method: round(fitted.seconds[method], 1) for method in fitted.methods},
        {
            tested: sum(len(task.test) for client in one.clients for task in client.tasks)
            for tested, one in dealt.items()
        },
        (*seen.lines(), chosen.why, *split.notes, *notes),
    )
    setting = {
        "setting": name,
        "seed_everything": seeds[0],
        "threads": threads,
        "data": {"source": look.with_size(source, side, _takes_size(source)), "split": split.fields},
        "backbone": {**chosen.fields, "image_size": side, "cache_mib": 1024},
        "cnn": chosen.cnn,
        "federation": {"rounds": rounds},
        "tracking": {"wandb_mode": "disabled"},
    }
    made.write(setting, {method: methods[method]["config"] for method in made.methods})
    console.print(Text(f"All of this is in {folder}/*.yaml; change it there and give the same command again."))
    return made


def _few_rounds(methods: Mapping[str, Any], fitted: budget.Plan, enough: int) -> list[str]:
    """What is to be said where methods that train cannot show what they can."""
    trained = [name for name in fitted.methods if methods[name]["cost"]["round"] > 0]
    if not trained or (rounds := fitted.size["rounds"]) >= enough:
        return []
    return [
        f"{', '.join(trained)}: {rounds} round{'s'[: rounds > 1]} of training a task {'are' if rounds > 1 else 'is'} "
        f"few; with {enough} or more, as more --minutes give, they may do better"
    ]


def duration(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _built(source: Mapping[str, object], size: int) -> Source:
    parser = Parser()
    parser.add_subclass_arguments(Source, "source")
    fields = load(yaml.safe_dump({"source": look.with_size(source, size, _takes_size(source))}))  # it finds the class
    built: Source = parser.instantiate_classes(parser.parse_object(fields)).source
    return built


def _takes_size(source: Mapping[str, object]) -> bool:
    """Whether images are decoded to a size; sets of arrays have their own."""
    return source["class_path"] in ("ImageFolder", "ImageTable", "Torchvision", "HuggingFace")


def _looked_at(folder: Path, source: Mapping[str, object], console: Console) -> tuple[look.Look, Path]:
    cache = cache_folder()
    built = _built(source, look.SMALLEST)
    if isinstance(built, ImageFolder | ImageTable):
        with console.status("looking at the images"):
            seen = look.look_at_files(built, cache)
    else:
        seen = look.look_at_images(built.load(cache))
    if seen.doubts:
        write_atomically(folder / DOUBTFUL, seen.table().encode(errors="replace"))
    for line in seen.lines():
        _say(console, "", line)
    if seen.doubts:
        _say(console, "", f"all doubtful files: {folder / DOUBTFUL}, such as {seen.doubts[0].path}")
    if broken := [doubt for doubt in seen.doubts if doubt.why.startswith("no image")]:
        raise ValueError(
            f"{len(broken)} files cannot be read as images, such as {broken[0].path}; delete or replace what "
            f"{folder / DOUBTFUL} names, and give the same command again"
        )
    return seen, cache


def _loaded(source: Mapping[str, object], size: int, seen: look.Look, cache: Path) -> Dataset:
    with warnings.catch_warnings():
        if seen.notes:  # they have been shown
            warnings.simplefilter("ignore")
        return _built(source, size).load(cache)


def _labels(train: list[int], test: list[int]) -> tuple[Any, Any]:
    """Class ids of as many images as there are."""
    import numpy as np

    first, second = (np.repeat(np.arange(len(counts)), counts) for counts in (train, test))
    return first, second


def _say(console: Console, what: str, text: str) -> None:
    console.print(f"[bold]{what:9}[/]{escape(text)}", highlight=False, soft_wrap=True)


# ----------------------------------------------------------------------- the ending


class Ending:
    """Runs what is planned as far as there is time, chooses, tests what was chosen, and says so.

    Args:
        planned: the study.
        clock: its time.
        told: by method `what` it is and what `leaves` a client.
        console: where to print.
    """

    def __init__(self, planned: plan.Study, clock: Clock, told: Mapping[str, Any], console: Console) -> None:
        self.planned, self.clock, self.told, self.console = planned, clock, told, console
        self.pace = Pace(planned.seconds)
        self.jobs, threads = plan.workers(torch.cuda.is_available())
        self.runner = Runner(Launcher(threads), self.jobs, clock, self.pace, console)
        self.by_time = sorted(planned.methods, key=lambda method: planned.seconds.get(method, 0.0))

    def run(self) -> None:
        """All of it."""
        chosen_of = self._choose()
        standings = [
            answer.Standing.of(method, runs, self.planned.images["holdout30"]) for method, runs in chosen_of.items()
        ]
        choice = answer.choose(standings)
        tested = self._test(choice, max(len(runs) for runs in chosen_of.values()))
        self._end(standings, choice, tested)

    def _choose(self) -> dict[str, list[Run]]:
        """Runs of every method on held-out images, as many seeds as there is time for."""
        planned, done = self.planned, {method: list[Run]() for method in self.by_time}
        self.console.rule("Choosing, on training images held out", align="left", style="dim")
        with self.console.status("reading the configurations"):
            groups = [planned.tasks(self.by_time, True, seed) for seed in planned.seeds]
        for number, tasks in enumerate(groups):
            for task in tasks:
                if (found := task.result) is not None:
                    self.pace.note(task.method, found.seconds + START)
            known = [method for method in self.by_time if number == 0 or done[method]]
            tasks = [task for task in tasks if task.method in known]
            due = [task.method for task in tasks if not task.planned.finished]
            tests = budget.testing({method: self.pace.of(method) for method in known}) if known else 0.0
            if number and due and self.pace.sum(due) + (number + 1) * tests > self.jobs * self.clock.left:
                self.console.print(f"No time for seed {planned.seeds[number]} and those behind it.")
                break
            rest = (len(groups) - number - 1) * self.pace.sum(known) + len(groups) * tests
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

    def _time_for(self, first: Task, tests: float) -> Any:
        """Whether a run may start: the first in any case, others if a test of what is chosen still fits behind."""

        def may(task: Task) -> bool:
            return task is first or self.pace.of(task.method) + tests / self.jobs <= self.clock.left

        return may

    def _test(self, choice: answer.Choice, seeds: int) -> dict[str, answer.Standing]:
        """What was chosen, and what it is compared with, trained on all training images and tested on test images."""
        both = [method for method in (choice.chosen, choice.reference) if method is not None]
        self.console.rule(f"Testing {' and '.join(both)}, on test images", align="left", style="dim")
        done: dict[str, list[Run]] = {method: [] for method in both}
        for number, seed in enumerate(self.planned.seeds[:seeds]):
            tasks = self.planned.tasks(both, False, seed)
            due = [task.method for task in tasks if not task.planned.finished]
            if number and due and self.pace.sum(due) > self.jobs * self.clock.left:
                self.console.print(f"No time for a test with seed {seed} and those behind it.")
                break
            later = (seeds - number - 1) * self.pace.sum(both)
            self.runner.run(tasks, lambda task: True, later, _in_words)
            for task in tasks:
                if (found := task.result) is not None:
                    done[task.method].append(found)
        official = self.planned.images["official"]
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
        for row in rows:
            table.add_row(*row)
        seeds = min(len(standing.values) for standing in standings)
        lines = answer.lines(choice, tested, self.told, seeds)
        again = shlex.join(self.planned.words(choice.chosen, False, self.planned.seeds[0]))
        write_atomically(folder / ANSWER, _markdown(lines, rows, self.planned.notes, again).encode())
        report = folder / REPORT
        with self.console.status("writing the report"):
            write_report(compare(read_runs(folder / plan.RUNS)), report)
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
