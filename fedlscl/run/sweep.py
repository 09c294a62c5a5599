"""A W&B sweep file without a server: the same grid and the same command lines as `wandb agent`, run on this machine.

The grid is drawn by W&B's own `sweeps` package and the command lines are put together by W&B's own functions. Of a
random search, the distributions are W&B's, and the draws are the same on every machine and for every method.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.text import Text

from fedlscl import seeds
from fedlscl.checks import path
from fedlscl.run.configuration import Configuration
from fedlscl.run.fields import flat, read_yaml, short
from fedlscl.run.leash import VARIABLE
from fedlscl.run.planned import LOG, PlannedRun, SweepProgress

ARGS = "${args}"
CAP = "run_cap"
POLL_SECONDS = 0.1


def read_sweep(file: Path) -> dict[str, Any]:
    """Read a sweep file.

    Args:
        file: a sweep file in W&B's format, method `grid`, or `random` with the number of trials as `run_cap`, whose
            command runs `fedlscl fit`.

    Returns:
        Its content.

    Raises:
        ValueError: if it is not in W&B's format, is neither, or does not hand its parameters to `fedlscl fit`.
        FileNotFoundError: if there is no such file.
    """
    sweeps = _sweeps()
    sweep = read_yaml(file)
    if not isinstance(sweep, dict):
        raise ValueError(f"{file} holds {type(sweep).__name__}, must be a sweep in W&B's format")
    known = {name: value for name, value in sweep.items() if name != CAP}  # to W&B's server, not yet to its package
    if violations := sweeps.config.schema_violations_from_proposed_config(known):
        raise ValueError(f"{file} is not a sweep in W&B's format: {'; '.join(violations)}")
    if sweep["method"] not in ("grid", "random"):
        raise ValueError(
            f"{file}: method is '{sweep['method']}'; without W&B's server only 'grid' and 'random' can be drawn"
        )
    cap = sweep.get(CAP)
    if cap is None and sweep["method"] == "random":
        raise ValueError(f"{file} lacks {CAP}, the number of trials, without which a random search has no end")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ValueError(f"{file}: {CAP} is {cap}, must be a whole number of at least 1")
    if "early_terminate" in sweep:
        raise ValueError(f"{file} has early_terminate, which needs W&B's server; here every run goes on to its end")
    command = sweep.get("command") or []
    if command[:2] != ["fedlscl", "fit"] or ARGS not in command:
        raise ValueError(f"{file}: command is {command}, must begin with fedlscl, fit and hold {ARGS}")
    return sweep


def narrowed(sweep: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """A part of a sweep.

    Args:
        sweep: what :func:`read_sweep` returns.
        only: `parameter=value`, the value as in the file; of a parameter named here only the values named are drawn.

    Returns:
        The sweep with these values alone.

    Raises:
        ValueError: if the sweep has no such parameter or no such value of it, or draws it from a range.
    """
    chosen: dict[str, list[Any]] = {}
    for text in only:
        name, _, value = text.partition("=")
        if name not in sweep["parameters"]:
            raise ValueError(f"only is '{text}', must be PARAMETER=VALUE of one of {', '.join(sweep['parameters'])}")
        entry = sweep["parameters"][name]
        if not {"value", "values"} & set(entry):
            raise ValueError(f"only is '{text}', but {name} is drawn from a range; change the range in the file")
        there = entry.get("values", [entry.get("value")])
        wanted = yaml.safe_load(value)
        if wanted not in there:
            raise ValueError(f"only is '{text}', must name one of {', '.join(map(str, there))}")
        chosen.setdefault(name, []).append(wanted)
    parameters = {
        name: {"values": chosen[name]} if name in chosen else entry for name, entry in sweep["parameters"].items()
    }
    return {**sweep, "parameters": parameters}


def command_lines(sweep: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """What the runs of a sweep are told, in the order of the grid or of the draws.

    Args:
        sweep: what :func:`read_sweep` or :func:`narrowed` returns.

    Returns:
        For each run its parameters and the command line that `wandb agent` would give it in this environment.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    lines = []
    for drawn in _trials(sweep) if sweep["method"] == "random" else _grid(sweep):
        words: list[str] = []
        args = {"args": {name: {"value": value} for name, value in drawn.items()}}
        for word in create_sweep_command(list(sweep["command"])):
            words += create_sweep_command_args(args)["args"] if word == ARGS else [str(word)]
        lines.append((drawn, words))
    return lines


def _grid(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = {name: value for name, value in sweep.items() if name != CAP}
    runs = _sweeps().next_runs(given, [], n=sys.maxsize)[:-1]  # the last is None: there are no more
    drawn = [{name: entry["value"] for name, entry in run.config.items()} for run in runs]
    return drawn[: sweep.get(CAP)]


def _trials(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As many draws as the cap says; the nth of a parameter depends on nothing but its name, so that more add to them.

    W&B's package itself would draw from Python's global state.
    """
    parameters = _sweeps().params.HyperParameterSet.from_config(dict(sweep["parameters"]))
    return [{one.name: _drawn(one, trial) for one in parameters} for trial in range(sweep[CAP])]


def _drawn(parameter: Any, trial: int) -> Any:
    rng = seeds.generator(0, "sweep", parameter.name, trial)
    value = parameter.ppf(max(torch.rand((), generator=rng, dtype=torch.float64).item(), 1e-9))
    # nobody needs more digits of what is drawn from a range
    return float(f"{value:.4g}") if isinstance(value, np.floating) else value


def plan(sweep: Mapping[str, Any], further: Sequence[str]) -> list[PlannedRun]:
    """Parse every command line, and make sure that each says what the sweep means.

    Args:
        sweep: what :func:`read_sweep` or :func:`narrowed` returns.
        further: words put behind every command line.

    Returns:
        The runs, in the order of the grid or of the draws; what is drawn twice is run once.

    Raises:
        ValueError: if a value of the sweep does not arrive in the configuration, or two runs are the same.
        SystemExit: if a command line describes no run; why is on the standard error.
    """
    planned: dict[Path, PlannedRun] = {}
    known: dict[Path, dict[str, Any]] = {}
    for parameters, line in command_lines(sweep):
        words = [*line, *further]
        configuration = configured(words)
        if lost := not_arrived(parameters, configuration.values):
            raise ValueError(f"`{shlex.join(words)}` does not do what the sweep says: {'; '.join(lost)}")
        folder = configuration.run_dir
        if sweep["method"] == "random" and known.get(folder) == parameters:
            continue
        if folder in planned:
            raise ValueError(
                f"`{shlex.join(words)}` and `{shlex.join(planned[folder].words)}` are the same run: "
                "a parameter has no effect"
            )
        known[folder] = parameters
        rounds = configuration.values["federation"]["rounds"] * configuration.values["data"]["split"]["tasks"]
        planned[folder] = PlannedRun(tuple(words), folder, rounds)
    return list(planned.values())


def configured(words: Sequence[str]) -> Configuration:
    """The configuration of a command line, `fedlscl fit` and what is behind it.

    Raises:
        ValueError: if it names its run folder.
        SystemExit: if it describes no run; why, and of which command line, is on the standard error.
    """
    try:
        configuration = Configuration(words[2:])
    except SystemExit:
        print(f"fedlscl: that was said of `{shlex.join(words)}`", file=sys.stderr)  # noqa: T201
        raise
    if configuration.run_dir != configuration.default_run_dir:
        raise ValueError("run_dir must not be given to a sweep: each run has a folder of its own below runs/")
    return configuration


def not_arrived(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Which values of a sweep are not in a configuration.

    Args:
        parameters: value by name, as the sweep draws them; `config` names a file whose fields count as well.
        config: the configuration that the command line was parsed to.

    Returns:
        A text for each value that is missing or different.
    """
    wanted = {}
    if "config" in parameters:
        wanted = flat(short(read_yaml(path(parameters["config"]))))
    wanted |= flat(short({name: value for name, value in parameters.items() if name != "config"}))
    there = flat(config)
    return [
        f"{name} is {there.get(name)!r}, not {value!r}"
        for name, value in wanted.items()
        if name not in there or not _same(value, there[name])
    ]


def run_all(runs: Sequence[PlannedRun], jobs: int, console: Console) -> list[PlannedRun]:
    """Run what is not finished, several at a time, and go on when one fails.

    Args:
        runs: the runs.
        jobs: how many at once; with more than one, each gets its share of the CPU's cores.
        console: where to show how far it is.

    Returns:
        The runs that failed. What they wrote is in ``output.log`` of their folders.
    """
    environment = {
        **os.environ,
        VARIABLE: "1",
        "PYTHONUNBUFFERED": "1",  # or the reason that a run fails for would come before what it said on the way
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    waiting = [run for run in runs if not run.finished]
    failed: list[PlannedRun] = []
    running: dict[subprocess.Popen[bytes], PlannedRun] = {}
    with SweepProgress(runs, console) as bars:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[_start(run, environment)] = run
                time.sleep(POLL_SECONDS)
                bars.look(list(running.values()))
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    _let_go(process)
                    if process.returncode < 0:  # its own last line would not tell why, as when memory ran out
                        with (run.run_dir / LOG).open("a") as log:
                            log.write(f"\nended by signal {-process.returncode}\n")
                    if process.returncode == 0:
                        end = "finished"
                    else:
                        end = f"failed: {run.last_words}"
                        failed.append(run)
                    console.print(Text(f"{run.run_dir.name}  {end}"), soft_wrap=True)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
                _let_go(process)
    return failed


def _start(run: PlannedRun, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with (run.run_dir / LOG).open("ab") as log:
        return subprocess.Popen(run.words, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe that has kept it alive, see `leash`."""
    assert process.stdin is not None  # `_start` makes one
    process.stdin.close()


def _same(wanted: Any, there: Any) -> bool:
    if isinstance(wanted, str) and isinstance(there, int | float):  # YAML takes 1e-3 for a word
        try:
            return float(wanted) == there
        except ValueError:
            return False
    return bool(wanted == there)


def _sweeps() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is written for an older pydantic
        import sweeps
    return sweeps
