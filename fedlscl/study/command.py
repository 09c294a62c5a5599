"""`fedlscl study`: from a folder of images to an answer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fedlscl.checks import at_least
from fedlscl.checks import path as path_of
from fedlscl.data.dealing import make_split
from fedlscl.data.folders import ImageFolder
from fedlscl.data.held_out import held_out
from fedlscl.data.listed import ImageTable
from fedlscl.data.module import cache_folder
from fedlscl.data.source import Dataset, Source
from fedlscl.data.splits import SplitSpec
from fedlscl.files import locked, make_folder, write_atomically
from fedlscl.run.fields import read_yaml
from fedlscl.run.names import Parser, load
from fedlscl.study import backbone, budget, look, plan, proposal
from fedlscl.study.ending import Ending
from fedlscl.study.plan import HELD, OFFICIAL
from fedlscl.study.running import START, Clock

LEAST_MINUTES = 0.5
DOUBTFUL = "doubtful.csv"


def study(asked: plan.Asked, minutes: float, out: str | None, begun: float, console: Console) -> None:
    """Plan a study and run it, or go on with it.

    Args:
        asked: what it is about.
        minutes: that there are, over all starts; not counted is the report.
        out: its folder; None = studies/<name of the source>.
        begun: when this start began, by `time.monotonic`.
        console: where to print.

    Raises:
        ValueError: an impossible wish, or the folder is another study's.
        RuntimeError: no run of any method was finished.
    """
    at_least(1, "study", clients=asked.clients, tasks=asked.tasks)
    at_least(LEAST_MINUTES, "study", minutes=minutes)
    choices = read_yaml(plan.CHOICES)
    look.source_of(asked.source)
    plan.methods_of(asked.methods, choices)
    if asked.weights is not None:
        backbone.file_of(asked.weights)
    folder = path_of(out) if out is not None else Path("studies") / _name(asked.source)
    make_folder(folder)
    try:
        with locked(folder / ".lock"):
            _study(folder, asked, Clock.of(folder, 60 * minutes, begun), choices, console)
    except BlockingIOError as error:
        raise ValueError(f"out '{folder}' is in use by another process; wait for it or give another --out") from error


def _study(folder: Path, asked: plan.Asked, clock: Clock, choices: Mapping[str, Any], console: Console) -> None:
    planned = plan.Study.read(folder)
    if planned is None:
        planned = _plan(folder, asked, clock, choices, console)
    elif planned.asked != asked:
        raise ValueError(
            f"out '{folder}' holds a study of other words ({planned.asked}); give the same, or another --out"
        )
    else:
        console.print(Text(f"Going on with {folder}: {clock.used / 60:.1f} of {clock.limit / 60:g} minutes are used."))
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
    smallest = sizes[-1]["image_size"]
    seen, cache = _looked_at(folder, source, smallest, console)
    _say(console, "Backbone", chosen.why)
    seeds = tuple(choices["seeds"])
    counts, tests = list(seen.train), list(seen.test)

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
    held = held_out(dataset.train.labels)
    labels = {
        HELD: (dataset.train.labels[~held], dataset.train.labels[held]),
        OFFICIAL: (dataset.train.labels, dataset.test.labels),
    }
    dealt = {part: make_split(*both, spec, seeds[0], dataset.classes) for part, both in labels.items()}
    for line in split.notes:
        _say(console, "Split", line)
    console.print(proposal.drawn(dealt[OFFICIAL], dataset.train.labels, dataset.classes))
    used = ", ".join(
        f"{'all' if value is None else f'up to {value}'} {what} images of a class"
        for what, value in (("training", spec.train_per_class), ("test", spec.test_per_class))
    )
    rounds = fitted.size["rounds"]
    notes = [
        f"{used}, at {side} px, {rounds} round{'s'[: rounds > 1]} a task, {fitted.seeds} of {len(seeds)} seeds: "
        f"what probably fits into {clock.limit / 60:g} minutes, {jobs} runs at a time, {threads} threads a run "
        f"({1000 * measured:.1f} ms for an image's pass through the ViT at {smallest} px)",
        *(
            f"{left}: left out, a run would take about {seconds / 60:.0f} min"
            for left, seconds in fitted.left_out.items()
        ),
        *_few_rounds(methods, fitted, choices["enough_rounds"]),
    ]
    for note in notes:
        _say(console, "Budget", note)
    made = plan.Study(
        folder,
        asked,
        clock.limit / 60,
        seeds,
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


def _built(source: Mapping[str, object], size: int) -> Source:
    parser = Parser()
    parser.add_subclass_arguments(Source, "source")
    fields = load(yaml.safe_dump({"source": look.with_size(source, size, _takes_size(source))}))  # it finds the class
    built: Source = parser.instantiate_classes(parser.parse_object(fields)).source
    return built


def _takes_size(source: Mapping[str, object]) -> bool:
    """Whether images are decoded to a size; sets of arrays have their own."""
    return source["class_path"] in ("ImageFolder", "ImageTable", "Torchvision", "HuggingFace")


def _looked_at(folder: Path, source: Mapping[str, object], size: int, console: Console) -> tuple[look.Look, Path]:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    built = _built(source, size)
    if isinstance(built, ImageFolder | ImageTable):
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
