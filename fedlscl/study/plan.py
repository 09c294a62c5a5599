"""The files of a study: what was asked for, what was chosen, and configurations that `fedlscl fit` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlscl.files import content_of, make_folder, write_atomically
from fedlscl.run.configuration import Configuration
from fedlscl.run.fields import read_yaml
from fedlscl.run.planned import PlannedRun
from fedlscl.study.running import Task

HELD, OFFICIAL = "held out", "official"
"""The two parts that a study tests on: of the training images, to choose a method, and the test images."""

STUDY, SETTING, HELD_OUT, METHODS, RUNS = "study.yaml", "setting.yaml", "held_out.yaml", "methods", "runs"
MEMORY = 3e9
"""Bytes that a run may take."""

CHECKOUT = Path(__file__).parents[2]
"""What has `experiments/` beside the package, unless that is installed elsewhere."""

CHOICES = Path(__file__).with_name("choices.yaml")

HEADS = {
    STUDY: "What `fedlscl study` was asked for and what it chose; seeds and methods may be changed here.",
    SETTING: "The setting: `fedlscl fit --config {folder}/setting.yaml --config {folder}/methods/NAME.yaml`",
    HELD_OUT: "Over the setting, to choose a method: 30 % of each class's training images are tested on, none trained. "
    "What is changed of the source in the setting is to be changed here, too.",
}


@dataclass(frozen=True)
class Asked:
    """The words of a study, by which it is known again."""

    source: str
    clients: int
    tasks: int
    weights: str | None
    methods: tuple[str, ...] | None


@dataclass(frozen=True)
class Study:
    """A planned study in its folder.

    Args:
        folder: its folder.
        asked: what it was asked for.
        minutes: that there are.
        seeds: of each method.
        methods: names, in order.
        seconds: predicted of a run, by method.
        images: test images of all clients, held out and official.
        notes: what was chosen and why.
    """

    folder: Path
    asked: Asked
    minutes: float
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    seconds: Mapping[str, float]
    images: Mapping[str, int]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Study | None:
        """What a folder holds; None if it is no study's.

        Raises:
            ValueError: something in it was changed to what cannot be.
        """
        if content_of(folder / STUDY) is None:
            return None
        stored = read_yaml(folder / STUDY)
        try:
            asked = stored["asked"]
            given = asked["methods"]
            return cls(
                folder,
                Asked(**{**asked, "methods": None if given is None else tuple(given)}),
                float(stored["minutes"]),
                tuple(map(int, stored["seeds"])),
                tuple(map(str, stored["methods"])),
                {str(name): float(value) for name, value in stored["seconds"].items()},
                {str(name): int(value) for name, value in stored["images"].items()},
                tuple(map(str, stored["notes"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{folder / STUDY} is not what a study writes ({type(error).__name__}: {error}); put back what was "
                "there, or give another --out"
            ) from error

    def write(self, setting: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
        """Write all files; `study.yaml` last, without which the others are nothing.

        Args:
            setting: the configuration without a method.
            methods: what each method has over it.
        """
        make_folder(self.folder / METHODS)
        for name, config in methods.items():
            self._put(f"{METHODS}/{name}.yaml", {"method": name, **config})
        self._put(SETTING, setting)
        inner = {"class_path": "HeldOut", "init_args": {"source": setting["data"]["source"]}}
        self._put(HELD_OUT, {"setting": f"{setting['setting']}-{HELD.replace(' ', '-')}", "data": {"source": inner}})
        stored = {name: value for name, value in asdict(self).items() if name != "folder"}
        self._put(STUDY, {name: list(value) if isinstance(value, tuple) else value for name, value in stored.items()})

    def _put(self, name: str, values: Mapping[str, Any]) -> None:
        head = HEADS.get(name)
        comment = f"# {head.format(folder=self.folder)}\n" if head else ""
        text = yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=120)
        write_atomically(self.folder / name, f"{comment}{text}".encode())

    def words(self, method: str, held_out: bool, seed: int) -> list[str]:
        """The command line of a run, but for its folder."""
        files = [SETTING, f"{METHODS}/{method}.yaml", *([HELD_OUT] if held_out else [])]
        configs = [word for file in files for word in ("--config", str(self.folder / file))]
        return ["fedlscl", "fit", *configs, "--seed_everything", str(seed)]

    def tasks(self, methods: Sequence[str], held_out: bool, seed: int) -> list[Task]:
        """The runs of some methods with a seed. A configuration that was changed has folders of its own."""
        made = []
        for method in methods:
            words = self.words(method, held_out, seed)
            run_dir = (
                self.folder / RUNS / ("choose" if held_out else "test") / Configuration(words[2:]).default_run_dir.name
            )
            made.append(Task(method, seed, PlannedRun((*words, "--run_dir", str(run_dir)), run_dir)))
        return made


def _plain(value: Any) -> Any:
    """As YAML writes it: no tuples."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def methods_of(names: Sequence[str] | None, choices: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods that are meant, with what choices.yaml says of each.

    Args:
        names: of choices.yaml or of experiments/methods, or files like those there; None = the usual ones.
        choices: the content of choices.yaml.

    Raises:
        ValueError: there is no such method, or the file is of none.
    """
    known = choices["methods"]
    if names is None:
        return dict(known)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in known:
            found[name] = {**known[name], "run": "usual"}
            continue
        beside = (base / "experiments" / "methods" / f"{name}.yaml" for base in (Path(), CHECKOUT))
        if (file := next((path for path in (Path(name), *beside) if path.is_file()), None)) is not None:
            config = read_yaml(file)
            if not isinstance(config, dict) or not {"model", "server"} <= config.keys():
                raise ValueError(f"methods: {file} holds no model and server, which a method has")
            own = {key: value for key, value in config.items() if key != "method"}
            found[str(config.get("method", file.stem))] = {**choices["other"], "run": "usual", "config": own}
        else:
            raise ValueError(
                f"methods: '{name}' must be one of {', '.join(known)}, or another method, or a file, such as "
                "experiments/methods/lorm.yaml"
            )
    return found


def workers(gpu: bool) -> tuple[int, int]:
    """Runs at the same time, and the threads of each: what the cores and the memory that is free allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if gpu:
        return 1, max(1, cores // 2)
    free = _free_memory()
    jobs = 1 if free is None else min(4, cores, max(1, int(free / MEMORY)))
    return jobs, max(1, cores // jobs)


def _free_memory() -> float | None:
    """Bytes that processes may take without others being swapped out; None on a system that does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        return None
