"""Sweeps: every command line means what the file says, W&B's agent gives the same one, and runs survive each other."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers import SETTING
from rich.console import Console
from test_cli import METHOD

from fedlscl.cli import METHOD_VARIABLE, SETTING_VARIABLE, main
from fedlscl.run.fields import flat
from fedlscl.run.planned import SweepProgress
from fedlscl.run.sweep import (
    LOG,
    PlannedRun,
    command_lines,
    configured,
    narrowed,
    not_arrived,
    plan,
    read_sweep,
    run_all,
)

ROOT = Path(__file__).parent.parent
EVERY = sorted((ROOT / "sweeps").glob("*.yaml"))
SEARCHES = [path for path in EVERY if path.stem.startswith("tune")]
SWEEPS = [path for path in EVERY if path not in SEARCHES]
SETTINGS = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
SEEDS = [42, 1999, 2024]
SCHEDULE = {"federation": {"rounds": 1}, "data": {"split": {"tasks": 1}}}

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(SETTING_VARIABLE, "digits")
    monkeypatch.setenv(METHOD_VARIABLE, "lorm")


@pytest.fixture(scope="module")
def parsed() -> dict[tuple[str, ...], dict[str, Any]]:
    """Configurations that were parsed before."""
    return {}


def configuration(words: list[str], parsed: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, Any]:
    key = tuple(words)
    if key not in parsed:
        parsed[key] = configured(words).values
    return json.loads(json.dumps(parsed[key]))  # type: ignore[no-any-return]


def put(config: dict[str, Any], name: str, value: Any) -> None:
    """Set a field as a person would in the file."""
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    config = config.get("init_args", config)
    assert last in config, f"there is no {name}"
    config[last] = value


def sweep_file(folder: Path, **changes: Any) -> Path:
    sweep = {
        "program": "fedlscl",
        "method": "grid",
        "command": ["fedlscl", "fit", "--config=setting.yaml", "${args}"],
        "parameters": {"model.block": {"values": [1, 2]}, "seed_everything": {"value": 5}},
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in sweep.items() if value is not None}))
    return path


# ------------------------------------------------------------------------------ the files


def test_the_sweeps_are_those_of_the_paper(repository: None) -> None:
    assert {path.stem for path in SWEEPS} == {
        *("table1", "table2_ablation", "vit_block", "buffer_size", "heterogeneous_cnns")
    }
    blocks = read_sweep(ROOT / "sweeps" / "vit_block.yaml")
    drawn = [(parameters["model.block"], parameters["seed_everything"]) for parameters, _ in command_lines(blocks)]
    assert sorted(drawn) == sorted(itertools.product(range(12), SEEDS))
    compared = yaml.safe_load((ROOT / "sweeps" / "table1.yaml").read_text())["parameters"]["config"]["values"]
    assert set(compared) >= {f"experiments/methods/{name}.yaml" for name in cli_names()}


def cli_names() -> set[str]:
    from fedlscl.analysis.paper import TABLE1

    return set(TABLE1["CIFAR-100"]) | {"fedweit", "local", "joint"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_command_line_is_the_configuration_that_was_meant(
    path: Path, repository: None, parsed: dict[tuple[str, ...], dict[str, Any]]
) -> None:
    """What is expected is put together without any of the sweep's code: the files, then each field by hand."""
    sweep = read_sweep(path)
    lines = command_lines(sweep)
    number = 1
    for values in sweep["parameters"].values():
        number *= len(values.get("values", [None]))
    assert len(lines) == number
    assert sweep["parameters"]["seed_everything"]["values"] == SEEDS
    for parameters, words in lines:
        if parameters["seed_everything"] != 1999:  # not the default, so that it has to arrive
            continue
        files = [word for word in words if word.startswith("--config")]
        expected = configuration(["fedlscl", "fit", *files], parsed)
        for name, value in parameters.items():
            if name == "seed_everything":
                expected["seed_everything"] = value
            elif name != "config":
                put(expected, name, value)
        assert configuration(words, parsed) == expected
        # the server may send the fields of a run in another order
        fixed = words[: len(words) - len(parameters)]
        assert configuration([*fixed, *reversed(words[len(fixed) :])], parsed) == expected


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_works_on_every_setting(
    path: Path, setting: str, repository: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTING_VARIABLE, setting)
    parameters, words = command_lines(read_sweep(path))[-1]
    config = configured(words).values
    assert config["setting"] == setting
    assert not_arrived(parameters, config) == []


RATE = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}


def test_a_random_search_draws_as_many_trials_as_it_may_the_same_for_all(tmp_path: Path) -> None:
    """The nth draw of a parameter depends on nothing else in the file; a range in logarithms, choices all taken."""
    parameters = {"model.learning_rate": RATE, "seed_everything": {"value": 5}}
    few, many, other = (
        command_lines(read_sweep(sweep_file(tmp_path, method="random", run_cap=cap, parameters=parameters | more)))
        for cap, more in ((3, {}), (200, {}), (200, {"model.block": {"values": [1, 2, 4]}}))
    )
    assert (len(few), len(many), len(other)) == (3, 200, 200)
    assert few == many[:3]
    rates = [drawn["model.learning_rate"] for drawn, _ in many]
    assert rates == [drawn["model.learning_rate"] for drawn, _ in other]
    assert len(set(rates)) > 190
    assert all(1e-5 <= rate <= 1e-1 and rate == float(f"{rate:.4g}") for rate in rates)
    by_decade = [sum(10.0**-n <= rate < 10.0 ** (1 - n) for rate in rates) for n in (2, 3, 4, 5)]
    assert all(30 < count < 70 for count in by_decade)
    assert {drawn["model.block"] for drawn, _ in other} == {1, 2, 4}
    assert {type(value) for drawn, _ in other for value in drawn.values()} == {float, int}
    assert f"--model.learning_rate={rates[0]}" in few[0][1]


def test_a_grid_goes_no_further_than_its_cap(tmp_path: Path) -> None:
    parameters = {"model.block": {"values": [1, 2, 3]}}
    lines = command_lines(read_sweep(sweep_file(tmp_path, run_cap=2, parameters=parameters)))
    assert [drawn for drawn, _ in lines] == [{"model.block": 1}, {"model.block": 2}]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_a_search_tunes_on_images_held_out_and_its_draws_arrive(path: Path, repository: None) -> None:
    """Equally many trials for all; other fields than rates and strengths stay as they are."""
    sweep = read_sweep(path)
    lines = command_lines(sweep)
    assert len(lines) == 16
    parameters, words = lines[-1]
    config = configured(words).values
    assert not_arrived(parameters, config) == []
    assert config["data"]["split"]["local_test"] == "holdout30"
    assert config["method"] == (path.stem.removeprefix("tune_") if path.stem != "tune" else "lorm")
    drawn = tuple(f"--{name}=" for name in parameters)
    plain = configured([word for word in words if not word.startswith(drawn)]).values
    assert set(parameters) - {"seed_everything"} == {
        name for name, value in flat(config).items() if value != flat(plain)[name]
    }


def test_what_is_drawn_twice_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = sweep_file(tmp_path, method="random", run_cap=9, parameters={"model.block": {"values": [1, 2]}})
    monkeypatch.setattr(
        "fedlscl.run.sweep.configured",
        lambda words: SimpleNamespace(
            values={**SCHEDULE, "model": {"block": int(words[-1][-1])}}, run_dir=Path(words[-1])
        ),
    )
    assert len(plan(read_sweep(drawn), [])) == 2


def test_wandbs_agent_gives_the_same_command_lines(
    repository: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from wandb import wandb_agent

    started: list[list[str]] = []
    monkeypatch.setattr(
        wandb_agent, "AgentProcess", lambda command, **_: started.append(command) or SimpleNamespace(command=command)
    )
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "x")  # the agent sets them for good
    for path in EVERY:
        sweep = read_sweep(path)
        for parameters, words in command_lines(sweep):
            agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
            agent._sweep_command, agent._in_jupyter, agent._function = list(sweep["command"]), False, None
            agent._run_processes, agent._forward_signals = {}, False
            sent = {name: {"value": value} for name, value in parameters.items()}
            agent._command_run({"run_id": "r1", "program": sweep["program"], "args": sent})
            assert started.pop() == words


# ------------------------------------------------------------------------- mistakes in a file


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"metod": "grid"}, "not a sweep in W&B's format.*metod"),
        ({"method": "bayes", "metric": {"name": "x", "goal": "maximize"}}, "method is 'bayes'.*only 'grid' and"),
        ({"method": "random"}, "lacks run_cap, the number of trials"),
        ({"method": "random", "run_cap": 0}, "run_cap is 0, must be a whole number of at least 1"),
        ({"run_cap": True}, "run_cap is True, must be a whole number"),
        ({"parameters": {"a": {"distribution": "log_uniform_values", "min": -1, "max": 2}}}, "not a sweep in W&B's"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3}}, "early_terminate, which needs W&B's server"),
        ({"command": ["fedlscl", "fit"]}, r"command is .*must begin with fedlscl, fit and hold \${args}"),
        ({"command": ["python", "x.py", "${args}"]}, "command is .*must begin with fedlscl, fit"),
        ({"command": None}, r"command is \[\]"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_sweep(sweep_file(tmp_path, **changes))


def test_a_file_that_is_no_mapping_or_no_yaml(tmp_path: Path) -> None:
    for text, complaint in (("- 1", "holds list"), ("a: [", "is not YAML")):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read_sweep(tmp_path / "sweep.yaml")


def let_all_be(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], run_dir: str | None = None) -> None:
    """Every command line is of this configuration, with a run folder of its own if there is no `run_dir`."""
    folders = itertools.count()
    monkeypatch.setattr(
        "fedlscl.run.sweep.configured",
        lambda words: SimpleNamespace(values={**SCHEDULE, **values}, run_dir=Path(run_dir or str(next(folders)))),
    )


def test_a_value_that_does_not_arrive_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep(sweep_file(tmp_path))
    let_all_be(monkeypatch, {"model": {"class_path": "X", "init_args": {"block": 1}}, "seed_everything": 5})
    with pytest.raises(ValueError, match=r"model\.block=2.* does not do what the sweep says: model\.block is 1, not 2"):
        plan(sweep, [])
    let_all_be(monkeypatch, {"model": {"class_path": "X"}, "seed_everything": 5})
    with pytest.raises(ValueError, match=r"model\.block is None, not 1"):
        plan(sweep, [])


def test_two_runs_that_are_the_same_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep(sweep_file(tmp_path, parameters={"model.block": {"values": [1, 1.0]}}))
    let_all_be(monkeypatch, {"model": {"init_args": {"block": 1}}}, run_dir="always")
    with pytest.raises(ValueError, match="are the same run"):
        plan(sweep, [])


def test_the_fields_of_a_configuration_file_must_arrive_unless_a_parameter_replaces_them(tmp_path: Path) -> None:
    method = tmp_path / "method.yaml"
    method.write_text("model: {class_path: A, init_args: {block: 3, learning_rate: 1e-3}}\nserver: {class_path: B}\n")
    config = {
        "model": {"class_path": "A", "init_args": {"block": 7, "learning_rate": 0.001}},
        "server": {"class_path": "B"},
    }
    assert not_arrived({"config": str(method), "model.block": 7}, config) == []
    assert not_arrived({"config": str(method)}, config) == ["model.block is 7, not 3"]
    config["server"]["class_path"] = "C"
    assert not_arrived({"config": str(method), "model.block": 7}, config) == ["server.class_path is 'C', not 'B'"]


# ---------------------------------------------------------------------------- running


def run_of(folder: Path, script: str) -> PlannedRun:
    return PlannedRun((sys.executable, "-c", script, str(folder)), folder)


FINISH = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'summary.json').write_text('{}')"


def test_a_run_that_fails_stops_no_other_and_its_last_words_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    good, bad, last = (tmp_path / name for name in ("good", "bad", "last"))
    runs = [run_of(bad, "print('first'); print(); raise SystemExit('no disk')"), run_of(good, FINISH)]
    runs.append(run_of(last, FINISH))
    console = Console(record=True, width=120, file=(tmp_path / "shown").open("w"))
    with console.file:
        assert run_all(runs, 1, console) == [runs[0]]
    assert runs[0].last_words == "no disk"
    assert (bad / LOG).read_text().startswith("first\n")
    assert [run.finished for run in runs] == [False, True, True]
    shown = console.export_text()
    assert "bad  failed: no disk" in shown
    assert "good  finished" in shown


def test_a_run_that_was_killed_says_so(tmp_path: Path) -> None:
    """As when memory runs out: what it wrote last is no reason."""
    run = run_of(tmp_path / "run", "import os; print('all is well', flush=True); os.kill(os.getpid(), 9)")
    assert run_all([run], 1, Console(quiet=True)) == [run]
    assert run.last_words == "ended by signal 9"


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", FINISH)
    assert run_all([run], 1, Console(quiet=True)) == []
    again = run_of(tmp_path / "run", "raise SystemExit(1)")
    assert run_all([again], 1, Console(quiet=True)) == []


def test_as_many_run_at_once_as_there_are_jobs(tmp_path: Path) -> None:
    """Each of two waits for the other to begin, which one after the other they could not."""
    wait = (
        "import sys, pathlib, time; here = pathlib.Path(sys.argv[1]); (here / 'here').touch()\n"
        "end = time.monotonic() + 300\n"
        "while len(list(here.parent.glob('*/here'))) < 2: time.sleep(0.01 if time.monotonic() < end else exit(1))\n"
    )
    runs = [run_of(tmp_path / name, wait + FINISH) for name in "ab"]
    assert run_all(runs, 2, Console(quiet=True)) == []
    assert all(run.finished for run in runs)


def test_cores_are_shared_among_jobs_unless_the_user_has_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = FINISH.replace("'{}'", "__import__('os').environ.get('OMP_NUM_THREADS', 'unset')")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for jobs, decided, expected in ((1, None, "unset"), (2, None, "3"), (9, None, "1"), (2, "5", "5")):
        if decided:
            monkeypatch.setenv("OMP_NUM_THREADS", decided)
        folder = tmp_path / f"{jobs}{decided}"
        run_all([run_of(folder, show)], jobs, Console(quiet=True))
        assert (folder / "summary.json").read_text() == expected


def test_ending_the_sweep_ends_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = (
        "import sys, os, time, pathlib; pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(999)"
    )
    run = PlannedRun((sys.executable, "-c", endless, str(tmp_path)), tmp_path)
    pid, wait = tmp_path / "pid", time.sleep

    def end_once_it_runs(seconds: float) -> None:
        if pid.exists() and pid.read_text():
            os.kill(os.getpid(), signal.SIGTERM)
        wait(seconds)

    monkeypatch.setattr("fedlscl.run.sweep.time.sleep", end_once_it_runs)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit) as end:
            run_all([run], 1, Console(quiet=True))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# --------------------------------------------------------------------------- the command


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a setting `tiny` and a sweep over its seeds."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv(SETTING_VARIABLE, "")
    (tmp_path / "experiments").mkdir()
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    (tmp_path / "experiments" / "tiny.yaml").write_text(yaml.safe_dump(content))
    command = ["fedlscl", "fit", "--config=experiments/${envvar:FEDLSCL_SETTING}.yaml", "${args}"]
    return sweep_file(tmp_path, command=command, parameters={"model.block": {"values": [1, 9]}})


@pytest.mark.processes
def test_a_sweep_from_the_command_line_to_its_numbers(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ViT has 4 blocks: the second run cannot begin, the first is finished and not run again."""
    words = ["sweep", str(tiny), "--setting", "tiny"]
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        main(words)
    shown = capsys.readouterr().out
    assert "2 runs, 0 of them finished before" in shown
    assert "model.block is 9" in shown
    (summary,) = Path("runs").glob("*/summary.json")
    config = json.loads(summary.read_text())["config"]
    assert config["model"]["init_args"]["block"] == 1
    left: list[list[bool]] = []
    monkeypatch.setattr("fedlscl.run.sweep.run_all", lambda runs, *_: left.append([run.finished for run in runs]))
    main(words)
    assert left == [[True, False]]
    assert "2 runs, 1 of them finished before" in capsys.readouterr().out


def test_a_dry_run_shows_the_command_lines_and_runs_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(tiny), "--setting", "tiny", "--dry_run", "true"]
    main([*words, "--only", "model.block=9"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "--model.block=9" in line
    main([*words, "--", "--model.rank", "1"])
    lines = capsys.readouterr().out.splitlines()
    expected = "fedlscl fit --config=experiments/tiny.yaml --model.block={} --model.rank 1  # runs/tiny-fed_lscl-seed7-"
    assert [line[: len(expected) - 1] for line in lines] == [expected.format(block) for block in (1, 9)]
    assert not Path("runs").exists()


def test_a_part_of_a_sweep(tmp_path: Path) -> None:
    rates = {"values": [1e-3, "1e-4"]}
    parameters = {"model.block": {"values": [1, 2, 3]}, "model.rate": rates, "seed_everything": {"value": 5}}
    sweep = read_sweep(sweep_file(tmp_path, parameters=parameters))
    part = narrowed(sweep, ["model.block=3", "model.rate=1e-4", "model.block=1", "seed_everything=5"])
    drawn = [tuple(values[name] for name in parameters) for values, _ in command_lines(part)]
    assert sorted(drawn) == [(1, "1e-4", 5), (3, "1e-4", 5)]
    assert narrowed(sweep, []) == sweep
    ranged = read_sweep(sweep_file(tmp_path, method="random", run_cap=2, parameters={"model.rate": RATE}))
    with pytest.raises(ValueError, match=r"only is 'model.rate=1', but model.rate is drawn from a range"):
        narrowed(ranged, ["model.rate=1"])
    assert len(command_lines(sweep)) == 6


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "setting is '', must be the name of a file in experiments/, of which there are here: tiny"),
        (["--setting", "tine"], "setting is 'tine', must be"),
        (["--setting", "tiny", "--method", "lorm"], "method has no effect: the command in"),
        (["--setting", "tiny", "--jobs", "0"], "jobs is 0, must be at least 1"),
        (
            ["--setting", "tiny", "--only", "block=1"],
            "only is 'block=1', must be PARAMETER=VALUE of one of model.block",
        ),
        (["--setting", "tiny", "--only", "model.block=3"], "only is 'model.block=3', must name one of 1, 9"),
        (["--setting", "tiny", "--", "--run_dir", "x"], "run_dir must not be given to a sweep"),
        (["--setting", "tiny", "--", "--model.block", "3"], r"model\.block is 3, not 1"),
        (["--setting", "tiny", "--", "--model.blok", "3"], "fedlscl fit --config=experiments/tiny.yaml"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    tiny: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(tiny), *words])
    assert complaint.replace("\\", "") in str(end.value) + capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_search_needs_a_method(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(METHOD_VARIABLE, "")
    methods = tiny.parent / "experiments" / "methods"
    methods.mkdir()
    (methods / "mine.yaml").write_text("method: mine\n")
    command = [
        *("fedlscl", "fit", "--config=experiments/${envvar:FEDLSCL_SETTING}.yaml"),
        *("--config=experiments/methods/${envvar:FEDLSCL_METHOD}.yaml", "${args}"),
    ]
    search = sweep_file(tiny.parent, command=command)
    with pytest.raises(SystemExit, match=r"method is '', must be the name of a file in experiments/methods/.*: mine"):
        main(["sweep", str(search), "--setting", "tiny"])
    main(["sweep", str(search), "--setting", "tiny", "--method", "mine", "--dry_run", "true"])
    assert all("runs/tiny-mine-seed5-" in line for line in capsys.readouterr().out.splitlines())


def test_a_setting_that_the_file_does_not_ask_for_is_an_error(tiny: Path) -> None:
    fixed = sweep_file(tiny.parent, command=["fedlscl", "fit", "--config=experiments/tiny.yaml", "${args}"])
    with pytest.raises(SystemExit, match=r"setting has no effect: the command in .* does not use FEDLSCL_SETTING"):
        main(["sweep", str(fixed), "--setting", "tiny", "--dry_run", "true"])


def test_after_a_runs_first_round_the_time_left_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("fedlscl.run.planned.LOOK_SECONDS", 0.0)
    runs = [PlannedRun((), tmp_path / name, rounds=6) for name in ("here", "later")]
    for run in runs:
        run.run_dir.mkdir()
    log = runs[0].run_dir / LOG
    log.write_text("task 1/3  round 2/2  accuracy\n")  # from an earlier start, at no cost now
    console = Console(force_terminal=True, file=io.StringIO(), get_time=lambda: clock)
    with SweepProgress(runs, console) as bars:
        bars.look(runs[:1])
        assert [task.time_remaining for task in bars._progress.tasks] == [None, None]
        clock = 10.0
        log.write_text("task 2/3  round 1/2  accuracy\n")
        bars.look(runs[:1])
        assert [task.time_remaining for task in bars._progress.tasks] == [90.0, 30.0]
