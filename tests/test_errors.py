"""Whatever goes wrong ends in a line that says what, and in the exit code of its kind; never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SETTING
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from test_cli import METHOD

from fedlscl.cli import COMMANDS, main
from fedlscl.client import Client
from fedlscl.federation.algorithm import Federation
from fedlscl.models.vit import FrozenViT
from fedlscl.run.errors import INTERRUPTED, MISUSED, TRACEBACK, UNEXPECTED, UNHEARD, complaint, one_line, told
from fedlscl.run.leash import VARIABLE
from fedlscl.run.sweep import LOG, PlannedRun, _let_go, _start

pytestmark = pytest.mark.usefixtures("command_line")
FEDLSCL = Path(sys.executable).parent / "fedlscl"


@pytest.fixture
def setting(tmp_path: Path, cache: Path) -> str:
    content = {**SETTING, **METHOD, "data": {**SETTING["data"], "cache_dir": str(cache)}, "federation": {"rounds": 1}}
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "setting.yaml")


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """What a command line is answered: the exit code and the one line; nothing may have been trained."""

    def run(*words: str) -> tuple[Any, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*words])
        code, said = end.value.code, capsys.readouterr().err
        if isinstance(code, str):  # which Python prints
            code, said = 1, f"{said}{code}\n"
        (line,) = said.splitlines()
        assert line.startswith("fedlscl: ")
        return code, line.removeprefix("fedlscl: ")

    return run


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--model.batch_size 1", 1, "model.batch_size is 1, must be at least 2"),
        ("--model.batch_size x", MISUSED, "model.batch_size is x, must be a whole number"),
        ("--model.continual.lambda_e x", MISUSED, "model.continual.lambda_e is x, must be a number"),
        ("--federation.rounds 1.5", MISUSED, "federation.rounds is 1.5, must be a whole number"),
        ("--trainer.precision 8", MISUSED, "trainer.precision is 8, must be one of '32-true', 'bf16-mixed', '16-m"),
        ("--federation.roundz 3", MISUSED, "there is no field federation.roundz; did you mean federation.rounds?"),
        ("--model.blocks 3", MISUSED, "there is no field model.blocks; did you mean model.block?"),
        ("--federation 3", MISUSED, "federation"),
        ("--seed_everything true", MISUSED, "seed_everything is true, must be a whole number or null"),
        ("--trainer.accelerator tpu", 1, "trainer.accelerator is tpu"),
        ("--tracking.project a/b", 1, "tracking.project is 'a/b', must have 1 to 128 characters"),
        ("--setting ..", 1, "setting is '..', which becomes part of a file's name"),
        ("--setting a/b", 1, "setting is 'a/b', which becomes part of a file's name"),
        ("--method 'a\nb'", 1, "method is 'a\\nb', which becomes part of a file's name"),
        ("--run_dir ~nobody-here/x", 1, "run_dir is '~nobody-here/x', but there is no home folder of that user"),
        ("--run_dir /dev/null/x", 1, "/dev/null"),
        ("--backbone.mean [0.5]", 1, "backbone.mean is [0.5], must be three numbers"),
        ("--backbone.mean [123,116,103]", 1, "backbone.mean is [123.0, 116.0, 103.0], must be numbers from 0 to 1"),
        ("--backbone.std [0,1,1]", 1, "backbone.std is [0.0, 1.0, 1.0], must be numbers above 0"),
        ("--backbone.std [.nan,1,1]", 1, "backbone.std is [nan, 1.0, 1.0], must be numbers above 0"),
        ("--backbone.image_size 0", 1, "backbone.image_size is 0, must be 1 to 4096 pixels"),
        ("--backbone.image_size 20", 1, "backbone.image_size is 20, must be a multiple of 8, the patches of"),
        ("--data.split.by x.csv", 1, "data.split.by is 'x.csv', but there is no such file; it must be a CSV file, fo"),
        ("--backbone.model_args.in_chans 1", 1, "backbone.model_args has 'in_chans', none of those that may be given"),
        ("--backbone.model_args.img_size 8", 1, "backbone.model_args has 'img_size', none of those"),
        ("--backbone.model_args.checkpoint_path x", 1, "backbone.model_args has 'checkpoint_path', none of those"),
        ("--backbone.model_args.num_heads 5", 1, "backbone.name, backbone.model_args: timm cannot make"),
        ("--backbone.model_args.global_pool ''", 1, "backbone.model_args"),
        ("--cnn.name swin_tiny_patch4_window7_224 --cnn.model_args {}", 1, "cnn.image_size: 'swin_tiny"),
        ("--cnn.model_args {channels:[4]}", 1, "cnn.image_size: 'resnet18' cannot take images of 16 px, or not with"),
        ("--cnn.model_args.pretrained_cfg {file:x}", 1, "cnn.model_args has 'pretrained_cfg', none of those"),
        ("--cnn.features 0", 1, "cnn.features is 0, must be 1 to 65536"),
        ("--cnn.weights nowhere.safetensors", 1, "cnn.weights: no file 'nowhere.safetensors', neither as a path nor"),
        ("--cnn.weights vit_glyph_patch8_32.fp16.safetensors", 1, "cnn.weights: '"),
        ("--cnn.weights {resnet18:x}", 1, "cnn.weights is {'resnet18': 'x'}, must be one file, since cnn.name is one"),
        ("--model.learning_rate .inf", 1, "model.learning_rate is inf, must be finite"),
        ("--data.device_mib .inf", 1, "data.device_mib is inf, must be finite"),
    ],
    ids=lambda value: value.split()[0].strip("-") if isinstance(value, str) and value[:2] == "--" else "",
)
def test_wrong_values_are_told_in_a_line(
    setting: str,
    words: str,
    code: int,
    text: str,
    answer: Callable[..., tuple[Any, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Client, "begin_round", lambda *a: pytest.fail("trained"))
    given = [word.replace("''", "").strip("'").replace(":", ": ") if "{" in word or "'" in word else word
             for word in words.split(" ")]  # fmt: skip
    found, line = answer("fit", "--config", setting, *given)
    assert found == code
    assert line.startswith(text), line


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds nothing"),
        (b"just text", "holds a str"),
        (b"- 1\n", "holds a list"),
        (b"model:\n  na\xefve: 3\n", ", line 2: this is not UTF-8"),
        (b"a: [1,\nb: 2", ", line 2: this is not YAML"),
        (b"a: \0", "not YAML"),
        (b"model: !!python/object/apply:os.system [ls]", ", line 1: this is not YAML"),
        (b"model: &a [*a]", "nested too deeply"),
    ],
)
def test_files_that_are_no_configuration_are_named(
    setting: str, tmp_path: Path, content: bytes, text: str, answer: Callable[..., tuple[Any, str]]
) -> None:
    (tmp_path / "change.yaml").write_bytes(content)
    code, line = answer("fit", "--config", setting, "--config", str(tmp_path / "change.yaml"))
    assert code == MISUSED
    assert text in line
    assert "change.yaml" in line or "nested" in text


@pytest.mark.parametrize(
    "name",
    [
        *("vit_base_patch16_dinov3", "vit_pe_core_base_patch16_224", "vit_relpos_base_patch16_224"),
        *("eva_giant_patch14_224", "vit_base_patch16_xp_224"),
    ],
)
def test_a_vit_that_is_not_plain_is_told_what_it_is_before_a_weight_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.create_model", lambda *a, **b: pytest.fail("made"))
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=rf"^backbone\.name: '{name}' is not a plain ViT: it.*; plain ones work, such"):
        FrozenViT(name)
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    vit = FrozenViT(**SETTING["backbone"])
    state = {name: tensor.contiguous() for name, tensor in vit.vit.state_dict().items()}
    for value in (float("nan"), float("inf")):
        wrong = {**state, "blocks.1.norm1.weight": torch.full_like(state["blocks.1.norm1.weight"], value)}
        save_file(wrong, tmp_path / "vit.safetensors")
        with pytest.raises(ValueError, match=r"vit\.safetensors': tensor 'blocks\.1\.norm1\.weight' holds NaN or inf"):
            FrozenViT(**SETTING["backbone"], weights=str(tmp_path / "vit.safetensors"))
    save_file({**state, "norm.weight": torch.ones(5), "norm.bias": torch.ones(5)}, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"'norm\.weight' is \(5,\) there, \(32,\) here, and 1 more like that; give"):
        FrozenViT(**SETTING["backbone"], weights=str(tmp_path / "vit.safetensors"))


# ---- what happens on the way


def test_nobody_finishing_a_round_is_a_line(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(self: Client, batch: Any, index: int) -> None:
        raise FloatingPointError("training diverged")

    monkeypatch.setattr(Client, "training_step", diverging)
    with pytest.raises(SystemExit, match=r"^fedlscl: no client finished round 1: client 0, 1, 2: .*training diverged"):
        main(["fit", "--config", setting, "--run_dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("is left out of round 1: FloatingPointError: training diverged") == 3


def test_a_bug_in_a_client_ends_the_run_and_leaves_its_traceback(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Client, batch: Any, index: int) -> None:
        raise AttributeError("what the author of a method has forgotten")

    monkeypatch.setattr(Client, "training_step", broken)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", setting, "--run_dir", str(tmp_path / "run")])
    assert end.value.code == UNEXPECTED
    kept = (tmp_path / "run" / TRACEBACK).read_text()
    assert "in broken" in kept
    assert "This happened to client 0 in round 1." in kept


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyError("x"), UNEXPECTED, "unexpected KeyError: 'x'; the traceback is in RUN/traceback.txt"),
        (AssertionError(), UNEXPECTED, "unexpected AssertionError; the traceback is in RUN/traceback.txt"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted; the same command goes on with a run"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv"),
            1,
            "metrics.csv: No space left on device; make",
        ),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "there is not enough memory: Def"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "a file of tensors cannot be read or"),
        (ValueError("a\nb\x1b[31m"), 1, "a b [31m"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_goes_wrong_in_a_run(
    setting: str,
    tmp_path: Path,
    error: BaseException,
    code: int,
    text: str,
    answer: Callable[..., tuple[Any, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Federation, "run", fail)
    try:
        found, line = answer("fit", "--config", setting, "--run_dir", str(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == code
    assert line.replace(str(tmp_path / "run"), "RUN").startswith(text)
    if code == UNEXPECTED:
        assert "in fail" in (tmp_path / "run" / TRACEBACK).read_text()


def test_without_a_run_folder_the_traceback_is_for_its_user_alone(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(COMMANDS, "fit", lambda words: {}["missing"])
    before = os.umask(0)
    try:
        code, line = answer("fit")
    finally:
        os.umask(before)
    (path,) = tmp_path.glob("fedlscl-*.txt")
    assert (code, line) == (UNEXPECTED, f"unexpected KeyError: 'missing'; the traceback is in {path}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "Traceback" in path.read_text()


def test_what_jsonargparse_says_about_what_is_not_of_this_package() -> None:
    assert complaint("something else\nand more") == "something else"
    assert one_line("a\n\tb\x00 c") == "a b c"
    assert len(one_line("word " * 1000)) < 700
    assert one_line("x" * 1000) == f"{'x' * 80}...{'x' * 80}"


def test_errors_of_others_are_told_or_not() -> None:
    with pytest.raises(SafetensorError) as broken:
        load(b"\xff" * 20)
    assert str(told(broken.value)).startswith("a file of tensors cannot be read or written: ")
    with pytest.raises(UnicodeDecodeError) as text:
        b"\xff".decode()
    assert "UTF-8" in str(told(text.value))
    with pytest.raises(json.JSONDecodeError) as cut:
        json.loads("{")
    assert "not JSON" in str(told(cut.value))
    with pytest.raises(RuntimeError) as foreign:
        torch.ones(2) @ torch.ones(3)
    assert told(foreign.value) is None  # its text means nothing to a user
    assert (
        told(FileNotFoundError(2, "No such file or directory", "a", None, "b")) == "a and b: No such file or directory"
    )


@pytest.mark.processes
def test_a_reader_that_has_heard_enough_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([FEDLSCL, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (UNHEARD, "")


@pytest.mark.processes
def test_ctrl_c_while_everything_is_imported(setting: str) -> None:
    """At the first import of torch, whenever that comes."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background of a script ignores it
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            sys.meta_path.remove(self)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from fedlscl.cli import main\n"
        f"main(['fit', '--config', {setting!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (INTERRUPTED, 1), done.stderr
    assert done.stderr.startswith("fedlscl: interrupted")


def test_ctrl_c_of_which_an_import_has_made_another_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compiled modules do, whose errors do not say what they came of."""

    def lost(words: list[str]) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("cannot import name 'spam'")

    monkeypatch.setitem(COMMANDS, "fit", lost)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main(["fit"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == INTERRUPTED
    assert capsys.readouterr().err.startswith("fedlscl: interrupted")


@pytest.mark.processes
def test_what_another_platform_lacks_is_not_missed(tmp_path: Path) -> None:
    from made_runs import write_run

    write_run(tmp_path / "runs" / "a")
    script = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "from fedlscl.cli import main\n"
        "main(['--help']); main(['tables', 'runs'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- paths


def test_every_path_knows_the_home_folder(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_runs import write_run

    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    write_run(home / "runs" / "a")
    main(["tables", "~/runs", "--out", "~/tables"])
    main(["report", "~/runs/a", "--out", "~/report.html"])
    main(["deal", "~/shares", "--config", setting])
    assert {path.name for path in home.iterdir()} == {"runs", "tables", "report.html", "shares"}
    weights = {name: tensor.contiguous() for name, tensor in FrozenViT(**SETTING["backbone"]).vit.state_dict().items()}
    save_file(weights, home / "vit.safetensors")
    monkeypatch.setattr(Federation, "run", lambda *_: iter(()))
    with pytest.raises(SystemExit):
        main(["fit", "--config", setting, "--run_dir=~/run", "--backbone.weights=~/vit.safetensors"])
    assert (home / "run" / "config.yaml").is_file()
    assert not [path for path in Path().rglob("~*")]


def test_shares_dealt_anew_leave_no_image_of_those_before(setting: str, tmp_path: Path) -> None:
    folder = tmp_path / "shares"
    main(["deal", str(folder), "--config", setting])
    (folder / "client-2" / "state").write_text("of a client")
    (folder / "notes").mkdir()
    (folder / "notes" / "share.json").write_text("not ours")
    split = {"clients": 2, "private_classes": 1, "public_classes": 3}
    main(["deal", str(folder), "--config", setting, *(f"--data.split.{name}={value}" for name, value in split.items())])
    assert {path.name for path in (folder / "client-2").iterdir()} == {"state"}
    assert (folder / "notes" / "share.json").read_text() == "not ours"
    labels = np.load(folder / "client-1" / "train-labels.npy")
    assert len(set(labels.tolist())) == 4


# ---- the tiny version of what experiments/torture.py does


def test_wrong_configurations_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    from reliability import fields

    mini = fields.write(tmp_path)
    rng, wrong = random.Random(1), []
    for number in range(6):
        case = fields.draw(rng, mini, tmp_path, number)
        if found := fields.problem(case, fields.tried(case.words, tmp_path)):
            wrong.append((case.what, found))
    assert wrong == []
    assert (
        fields.problem(fields.Case("nothing", [], ("x",)), fields.tried(["--config", str(mini)], tmp_path)) is not None
    )


def test_a_run_goes_with_its_sweep(tmp_path: Path) -> None:
    """However the sweep ends: the pipe that only it holds open is closed then."""
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "from fedlscl.run.leash import follow\n"
        "follow(); print('up', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    run = PlannedRun((sys.executable, "-c", script), tmp_path)
    process = _start(run, {**os.environ, VARIABLE: "1"})
    while "up" not in (tmp_path / LOG).read_text():
        assert process.poll() is None
    _let_go(process)
    assert process.wait() == 143
