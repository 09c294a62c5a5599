"""Short names, flags and the help: what words stand for, before anything that takes time is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import write_run

from fedlscl import __version__
from fedlscl.cli import COMMANDS, main
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.run import help
from fedlscl.run.about import completion
from fedlscl.run.configuration import Configuration
from fedlscl.run.names import check_order, parameters
from fedlscl.run.planned import LOG, PlannedRun
from fedlscl.run.shipped import resolved, shipped
from fedlscl.run.tracking import wandb_is
from fedlscl.run.words import flag, option

ROOT = Path(__file__).parent.parent
DIGITS, LORM = (str(ROOT / "experiments" / name) for name in ("digits.yaml", "methods/lorm.yaml"))

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("--config digits --method lorm", f"--config {DIGITS} --config {LORM}"),
        ("--method=lorm --config=digits", f"--config {DIGITS} --config {LORM}"),
        ("-c digits --model.rank 8 --method lorm", f"--config {DIGITS} --config {LORM} --model.rank 8"),
        ("--config digits --method lorm --config my.yaml", f"--config {DIGITS} --config {LORM} --config my.yaml"),
        ("--method lorm --config digits --config my.yaml", f"--config {DIGITS} --config {LORM} --config my.yaml"),
        ("--config digits --config my.yaml --method mine", f"--config {DIGITS} --config my.yaml --method mine"),
        ("--config digits --model A --method mine", f"--config {DIGITS} --model A --method mine"),
        ("--config digits --split iid", f"--config {DIGITS} --split iid"),
        ("--help", "--help"),
    ],
)
def test_short_names_become_files(words: str, files: str) -> None:
    Path("my.yaml").touch()
    assert resolved(words.split()) == files.split()
    assert resolved(files.split()) == files.split()  # so that nobody need know whether it was done


@pytest.mark.parametrize("early", ["--seed_everything=1", "--data.source ImageFolder", "--model.init_args.epochs 2"])
def test_a_field_before_a_file_that_has_it_too_is_refused(early: str) -> None:
    check_order([*f"--config {DIGITS} --dry_run".split(), *early.split()])
    check_order(["--cnn.name", "resnet10t", "--config", LORM])  # which says nothing of it
    field = early.split()[0].partition("=")[0].replace(".init_args", "")
    with pytest.raises(ValueError, match=f"^{field} stands before --config .*digits.yaml, which overrides it"):
        check_order([*early.split(), "--config", DIGITS])


@pytest.mark.parametrize("command", ["fit", "split"])
def test_a_field_before_a_file_ends_a_run_before_it_begins(command: str) -> None:
    with pytest.raises(SystemExit, match=r"--data\.split\.tasks stands before --config"):
        main([command, "--data.split.tasks", "2", "--config", "digits"])


def test_the_current_folder_comes_before_the_checkout_and_a_file_before_a_name() -> None:
    Path("experiments").mkdir()
    Path("experiments/digits.yaml").write_text("# Mine. Of no use\nsetting: digits\n")
    assert resolved(["--config", "digits"]) == ["--config", "experiments/digits.yaml"]
    Path("digits").touch()
    assert resolved(["--config", "digits"]) == ["--config", "digits"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "config is not given: `fedlscl fit --config SETTING"),
        ("--model.block 3", "config is not given"),
        ("--config digts", "config is 'digts', must be a file, or the name .*; did you mean digits"),
        ("--config digits --method lrom", "method is 'lrom', must be the name of a method.*; did you mean lorm"),
        ("--config digits --method a/b", "method is 'a/b', which becomes part of a file's name"),
    ],
)
def test_unknown_names_are_told(words: str, complaint: str) -> None:
    with pytest.raises(SystemExit, match=complaint):
        main(["fit", *words.split()])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--a 1 --dry_run --b 2", (True, "--a 1 --b 2")),
        ("--dry-run true --b", (True, "--b")),
        ("--dry_run false --b", (False, "--b")),
        ("--b --dry_run=false", (False, "--b")),
        ("--a dry_run", (False, "--a dry_run")),
    ],
)
def test_a_flag_needs_no_value(words: str, expected: tuple[bool, str]) -> None:
    found, rest = flag(words.split(), "dry_run")
    assert (found, " ".join(rest)) == expected
    with pytest.raises(ValueError, match="dry_run is 'maybe'"):
        flag(["--dry_run=maybe"], "dry_run")


def test_an_option_is_taken_out_of_words() -> None:
    assert option(["--a", "1", "--out", "x", "--out=y"], "out") == ("y", ["--a", "1"])
    assert option(["--outer", "1"], "out") == (None, ["--outer", "1"])
    with pytest.raises(ValueError, match="out has no value behind it"):
        option(["--out"], "out")


def test_settings_and_methods_are_listed_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for command, kind in (("settings", "setting"), ("methods", "method")):
        main([command])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(shipped(kind))  # type: ignore[arg-type]
        assert all(len(line.split()) > 3 for line in lines)
    main(["--version"])
    assert capsys.readouterr().out == f"fedlscl {__version__}\n"


def test_the_short_help_names_fields_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits", "--help"])
    shown = capsys.readouterr().out
    assert shown == help.SHORT
    named = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    there = {f"--{name}" for name in Configuration(["--config", "digits"]).fields}
    there |= {f"--model.{name}" for name in parameters(FedLSCL)}
    missing = {*named} - there
    assert missing == {"--split", "--dry_run", "--data.source.root"}  # of the command, and a source's
    assert len(named) == 15


def test_misspelt_fields_are_told_with_the_one_that_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for word, meant in (
        ("--model.blok", "model.block?"),
        ("--model.continual.passess", "model.continual.passes?"),
        ("--server.stregth", "server.strength?"),
        ("--epochs", "model.epochs?"),
        ("--modle.rank", "model.rank?"),
        ("--data.split.client", "data.split.clients?"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", "digits", word, "3"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fedlscl: there is no field {word[2:]}; did you mean {meant}"), line


def test_a_field_that_another_method_has_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):  # heads in closed form train nothing
        main(["fit", "--config", "digits", "--method", "fed_ridge", "--model.epochs", "2"])
    told = "there is no field model.epochs; `fedlscl fit --model.help StatisticsClient` lists all"
    assert capsys.readouterr().err == f"fedlscl: {told}\n"
    main(["fit", "--config", "digits", "--method", "fed_ridge", "--help", "all"])
    shown = capsys.readouterr().out
    assert "\nmodel.head is Ridge" in shown
    assert "model.continual is" not in shown  # of the setting's Fed-LSCL
    main(["fit", "--config", "digits", "--help", "all"])
    assert "\nmodel.continual is Replay" in capsys.readouterr().out


def test_a_class_of_the_current_folder_is_found_behind_all_other_modules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine_here.py").write_text("from fedlscl.methods import FedAvgClient\nclass Mine(FedAvgClient): ...\n")
    Path("json.py").write_text("raise AssertionError('hides the module of Python')\n")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "digits", "--model", "mine_here.Mine", "--server", "FedAvg", "--print_config"])
    assert end.value.code == 0
    assert "class_path: mine_here.Mine" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "digits", "--model", "mine_nowhere.Mine"])
    assert end.value.code == 2
    assert "model is of 'mine_nowhere', but there is no such module" in capsys.readouterr().err


def test_what_the_environment_tells_wandb_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(ValueError, match=r"^WANDB_MODE is 'nonsense' in the environment: .*; correct it, or unset it$"):
        wandb_is("auto")
    assert wandb_is("disabled") == "disabled"


def test_how_far_a_run_has_come_is_read_off_what_it_says(tmp_path: Path) -> None:
    run = PlannedRun((), tmp_path / "run", 9)
    assert run.rounds_done == 0
    write_run(tmp_path / "other")
    assert PlannedRun((), tmp_path / "other", 9).rounds_done == 9
    run.run_dir.mkdir()
    (run.run_dir / LOG).write_text(
        "task 3/3  round 3/3  of an earlier try\nContinuing after round 3.\n"
        "task 2/3  round 2/3  accuracy on the classes seen so far 42.8 %\nthe small model of client 1 says the same\n"
    )
    assert run.rounds_done == 5


def test_the_shell_completes_commands_names_and_fields(tmp_path: Path) -> None:
    (tmp_path / "complete").write_text(completion(COMMANDS))

    def completed(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        script = (
            f"source complete; COMP_WORDS=(fedlscl {quoted}); COMP_CWORD={len(words)}; "
            '_fedlscl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("pr") == ["predict"]
    assert completed("fit", "--model.epo") == ["--model.epochs"]
    assert completed("fit", "--config", "dig") == ["digits"]
    assert completed("fit", "--method", "lorm_") == ["lorm_published", "lorm_replay"]
    assert completed("fit", "--data.split.cla") == ["--data.split.classes_per_task", "--data.split.classes_per_client"]
