"""The record of a federation: what metrics.csv holds, what W&B really writes, what Lightning passes on."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from wandb.proto import wandb_internal_pb2
from wandb_server import WandbServer

from fedlscl.files import Damaged
from fedlscl.run.tracking import STEP_METRICS, ClientLogger, Tracker, mended


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give W&B the empty home of somebody who never logged in, and a server that does not answer."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # W&B reads its environment once per session
    yield home
    wandb.teardown()


def rows(run_dir: Path) -> list[tuple[str, ...]]:
    """Read metrics.csv, header included."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def plain(run_dir: Path, **options: Any) -> Tracker:
    """Open a record without W&B."""
    return Tracker(run_dir, wandb_mode="disabled", config={}, **options)


def wandb_records(path: Path) -> Iterator[Any]:
    """Read the protobuf records of a .wandb file (the LevelDB log format behind a 7-byte header)."""
    data, at, partial = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        partial += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(partial)
            partial = b""


def test_metrics_are_kept_in_long_form_and_read_back_exactly(tmp_path: Path) -> None:
    with plain(tmp_path / "new" / "run") as tracker:
        tracker.log({"client/0/loss": 1 / 3, "eval/seen": torch.tensor(97.5)}, task=1, round=1)
        tracker.log({"task/forgetting, all": math.nan, "server/x": math.inf}, task=2, round=6)
    header, *kept = rows(tmp_path / "new" / "run")
    assert header == ("task", "round", "metric", "value")
    assert [row[:3] for row in kept] == [
        ("1", "1", "client/0/loss"),
        ("1", "1", "eval/seen"),
        ("2", "6", "task/forgetting, all"),
        ("2", "6", "server/x"),
    ]
    assert [float(row[3]) for row in kept][:2] == [1 / 3, 97.5]
    assert math.isnan(float(kept[2][3]))
    assert math.isinf(float(kept[3][3]))


def test_a_record_is_on_disk_before_it_is_finished(tmp_path: Path) -> None:
    tracker = plain(tmp_path)
    tracker.log({"eval/a": 1.0}, task=1, round=1)
    assert tracker.flush() == (tmp_path / "metrics.csv").stat().st_size
    assert len(rows(tmp_path)) == 2
    tracker.finish()
    tracker.finish()


def test_a_resumed_record_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with plain(tmp_path) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
        size = tracker.flush()
        tracker.log({"eval/a": 2.0}, task=1, round=2)
        run_id = tracker.run_id
    with plain(tmp_path, run_id=run_id, metrics_bytes=size) as tracker:
        assert tracker.run_id == run_id
        assert tracker.flush() == size
        tracker.log({"eval/a": 3.0}, task=1, round=2)
    assert rows(tmp_path)[1:] == [("1", "1", "eval/a", "1.0"), ("1", "2", "eval/a", "3.0")]


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[int, str]:
    """A record with a committed row and one after it: the committed size and its checksum."""
    with plain(tmp_path) as tracker:
        tracker.log({"client/0/loss": 0.5, "eval/a": 1.0}, task=1, round=1)
        committed = tracker.flush(), tracker.metrics_sha256
        tracker.log({"eval/a": 2.0}, task=1, round=2)
    return committed


AGAIN = [({"eval/a": 1.0}, 1, 1)]
"""What the checkpoint knows of that record."""


def test_a_whole_record_is_gone_on_with_as_it_is(tmp_path: Path, recorded: tuple[int, str]) -> None:
    before = (tmp_path / "metrics.csv").read_bytes()
    assert mended(tmp_path / "metrics.csv", *recorded, lambda: pytest.fail("not needed")) == recorded[0]
    assert (tmp_path / "metrics.csv").read_bytes() == before
    with plain(tmp_path, metrics_bytes=recorded[0]) as tracker:
        assert tracker.metrics_sha256 == recorded[1]


def test_other_line_ends_are_changed_back(
    tmp_path: Path, recorded: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"\n", b"\r\n"))
    assert mended(path, *recorded, lambda: pytest.fail("not needed")) == recorded[0]
    assert path.read_bytes() == before[: recorded[0]]
    assert "had other line ends, which are changed back" in caplog.text


def test_a_lost_record_is_written_anew_from_the_checkpoint(
    tmp_path: Path, recorded: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    path.unlink()
    size = mended(path, *recorded, lambda: AGAIN)
    assert rows(tmp_path) == [("task", "round", "metric", "value"), ("1", "1", "eval/a", "1.0")]
    assert size == path.stat().st_size
    assert f"'{path}' was missing; it is written anew" in caplog.text
    with plain(tmp_path, metrics_bytes=size) as tracker:
        tracker.log({"eval/a": 2.0}, task=1, round=2)
    assert mended(path, *recorded, lambda: AGAIN) == size  # killed before the checkpoint knew of it


def test_a_damaged_record_is_refused_with_what_can_be_done(tmp_path: Path, recorded: tuple[int, str]) -> None:
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    for at in range(recorded[0]):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(
            Damaged, match=r"metrics\.csv' is damaged: put back a copy, or delete it, and the run goes on"
        ):
            mended(path, *recorded, lambda: AGAIN)
    path.write_bytes(content[: recorded[0] - 1])
    with pytest.raises(Damaged, match=r"metrics\.csv' is damaged"):
        mended(path, *recorded, lambda: AGAIN)


def test_a_full_disk_is_named_with_the_file_and_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        full = False

        def write(self, content: Any) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content) or 0

    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedWriter(Full(self, mode)))
    tracker = plain(tmp_path)
    monkeypatch.setattr(Full, "full", True)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.csv"), tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
    monkeypatch.setattr(Full, "full", False)
    tracker = plain(tmp_path)
    tracker._csv.write(b"1,1,eval/a,1.0\n")
    monkeypatch.setattr(Full, "full", True)
    with pytest.raises(KeyError, match="first"), tracker:
        raise KeyError("first")


def test_a_new_record_replaces_an_old_one(tmp_path: Path) -> None:
    with plain(tmp_path) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
        old = tracker.run_id
    with plain(tmp_path) as tracker:
        assert tracker.run_id != old
    assert rows(tmp_path) == [("task", "round", "metric", "value")]


@pytest.mark.parametrize("size", [-1, 0, 5, 30, 10_000])
def test_a_size_that_ends_no_row_is_refused_and_nothing_is_lost(tmp_path: Path, size: int) -> None:
    with plain(tmp_path) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
    before = rows(tmp_path)
    with pytest.raises(ValueError, match=f"metrics_bytes={size} "):
        plain(tmp_path, metrics_bytes=size)
    assert rows(tmp_path) == before


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics_bytes=7"):
        plain(tmp_path, metrics_bytes=7)
    with pytest.raises(ValueError, match=r"wandb_mode .* got 'on'"):
        Tracker(tmp_path, wandb_mode="on", config={})  # type: ignore[arg-type]
    with plain(tmp_path) as tracker:
        with pytest.raises(ValueError, match="round=0"):
            tracker.log({"eval/a": 1.0}, task=1, round=0)
        with pytest.raises(ValueError, match=r"\['round'\]"):
            tracker.log({"round": 1.0}, task=1, round=1)
        with pytest.raises(ValueError, match="table 'eval/t' must have 2 cells"):
            tracker.table("eval/t", ["a", "b"], [[1, 2], [1]])
        with pytest.raises(FileNotFoundError, match=r"no\.png"):
            tracker.image("plot", tmp_path / "no.png")
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("mode", ["disabled", "auto"])
def test_disabled_does_without_wandb(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, wandb_mode=mode, config={}) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
        tracker.table("t", ["a"], [[1]])
        tracker.image("plot", tmp_path / "metrics.csv")
        tracker.summary({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_auto_without_a_login_is_offline_and_silent(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Pytest's standard input refuses to be read, so a prompt would fail here.
    with Tracker(tmp_path / "run", config={"seed": 1}, name="first") as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    with pytest.raises(ValueError, match="nobody is logged in"):
        Tracker(tmp_path / "run", wandb_mode="online", config={})
    assert capfd.readouterr() == ("", "")


def test_auto_with_a_login_but_no_server_falls_back_with_a_warning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}")
    monkeypatch.setattr("fedlscl.run.tracking.INIT_TIMEOUT", 0.5)
    with (
        pytest.warns(UserWarning, match="tracked offline"),
        Tracker(tmp_path / "run", config={}) as tracker,
    ):
        tracker.log({"eval/a": 1.0}, task=1, round=1)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    with pytest.raises(wandb.Error):
        Tracker(tmp_path / "run", wandb_mode="online", config={})


@pytest.mark.parametrize("switched", ["environment", "settings"])
def test_auto_respects_a_user_who_switched_to_offline(
    switched: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if switched == "environment":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:
        (home / ".config" / "wandb").mkdir(parents=True)
        (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    with Tracker(tmp_path / "run", config={}) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_an_offline_run_holds_everything_and_is_resumed_under_its_id(home: Path, tmp_path: Path) -> None:
    offline, picture = tmp_path / "run", tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    with Tracker(offline, wandb_mode="offline", config={"seed": 42}, name="first") as tracker:
        tracker.log({"client/0/loss": 0.5}, task=1, round=1)
        tracker.log({"task/forgetting": 3.0}, task=2, round=4)
        tracker.table("eval/matrix", ["a", "b"], [[1, 2]])
        tracker.image("plot", picture)
        tracker.summary({"final": 7.0})
        run_id, size = tracker.run_id, tracker.flush()
    again: dict[str, Any] = {"run_id": run_id, "metrics_bytes": size}
    time.sleep(1)  # W&B names a run's folder after the second in which it began
    with Tracker(offline, wandb_mode="offline", config={"seed": 42}, **again) as tracker:
        tracker.log({"client/0/loss": 0.25}, task=2, round=5)
        assert tracker.run_id == run_id
    assert [row[3] for row in rows(offline)[1:]] == ["0.5", "3.0", "0.25"]

    wanted = (
        {"client/0/loss": 0.5, "task": 1, "round": 1},
        {"task/forgetting": 3.0, "task": 2, "round": 4},
        {"client/0/loss": 0.25, "task": 2, "round": 5},
    )
    for _ in range(3000):  # W&B's own process may still be writing
        files = (offline / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
        records = [record for file in files for record in wandb_records(file)]
        history = [
            {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        logged = [{key: value for key, value in row.items() if key[0] != "_"} for row in history]
        if all(row in logged for row in wanted):
            break
        time.sleep(0.1)
    for row in wanted:
        assert row in logged
    globs = [record.metric for record in records if record.metric.glob_name]
    assert {metric.glob_name: metric.step_metric for metric in globs} == STEP_METRICS
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert summary["final"] == "7.0"
    media = {path.name.split("_")[0] for path in offline.glob("wandb/*/files/media/*/**/*") if path.is_file()}
    assert media == {"matrix", "plot"}


def test_when_wandb_fails_the_record_goes_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may die, its server refuse a table: said once, and no reason to lose a run."""
    with Tracker(tmp_path, wandb_mode="offline", config={}) as tracker:
        assert tracker._run is not None
        finish = tracker._run.finish

        def fail(*_: Any, **__: Any) -> None:
            raise ConnectionResetError("Connection lost")

        for name in ("log", "finish"):
            monkeypatch.setattr(tracker._run, name, fail)
        with pytest.warns(UserWarning, match="W&B failed, the run goes on.*Connection lost") as warned:
            tracker.log({"eval/a": 1.0}, task=1, round=1)
        with warnings.catch_warnings(action="error"):  # once is enough
            tracker.table("t", ["a"], [[1]])
            tracker.image("plot", tmp_path / "metrics.csv")
            tracker.log({"eval/a": 2.0}, task=1, round=2)
            tracker.finish()
        assert len(warned) == 1
    assert [row[3] for row in rows(tmp_path)[1:]] == ["1.0", "2.0"]
    finish()


class Told(Logger):
    """A logger of Lightning's that notes what it is told, and fails when it is asked to."""

    name = version = "told"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.broken = False

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("config", params))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.broken:
            raise OSError("full")
        self.calls.append((dict(metrics), step))

    def finalize(self, status: str) -> None:
        self.calls.append((status,))


def test_a_logger_of_lightnings_is_told_everything_and_does_no_harm(tmp_path: Path) -> None:
    logger = Told()
    with Tracker(tmp_path, wandb_mode="disabled", config={"seed": 3}, logger=logger) as tracker:
        tracker.log({"eval/a": 1.0}, task=1, round=1)
        ClientLogger(tracker, "client/0", task=1, round=2).log_metrics({"loss": 2.0, "epoch": 0}, step=77)
        logger.broken = True
        with pytest.warns(UserWarning, match="Told failed, the run goes on without what it was told: OSError"):
            tracker.log({"eval/a": 3.0}, task=1, round=3)
        tracker.log({"eval/a": 4.0}, task=1, round=4)  # once is enough
    assert logger.calls == [("config", {"seed": 3}), ({"eval/a": 1}, 1), ({"client/0/loss": 2}, 2), ("success",)]
    assert [row[3] for row in rows(tmp_path)[1:]] == ["1.0", "2.0", "3.0", "4.0"]


def test_a_server_that_went_away_is_not_waited_for(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlscl.run.tracking.FINISH_TIMEOUT", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        tracker = Tracker(tmp_path / "run", wandb_mode="online", config={})
    tracker.log({"eval/a": 1.0}, task=1, round=1)
    with pytest.warns(UserWarning, match="W&B failed, the run goes on.*Timed out"):
        tracker.finish()
    assert [row[3] for row in rows(tmp_path / "run")[1:]] == ["1.0"]


class Toy(LightningModule):
    """One weight whose logged loss is known: the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor) -> Tensor:
        self.log("loss", batch.mean(), on_step=False, on_epoch=True, batch_size=len(batch))
        return (self.weight - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # between Lightning 2.6 and torch 2.15
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_what_a_client_logs_lands_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with plain(tmp_path / "run") as tracker:
        for round in (4, 5):
            trainer = Trainer(
                logger=ClientLogger(tracker, prefix="client/3", task=2, round=round),
                max_epochs=2,
                accelerator="cpu",
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            trainer.fit(Toy(), DataLoader(torch.arange(6.0) * round, batch_size=4))
    # The mean of 0..5 is 2.5; one row per epoch, and neither Lightning's epoch nor a file of its own.
    assert rows(tmp_path / "run")[1:] == [
        ("2", "4", "client/3/loss", "10.0"),
        ("2", "4", "client/3/loss", "10.0"),
        ("2", "5", "client/3/loss", "12.5"),
        ("2", "5", "client/3/loss", "12.5"),
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.csv", "run"]
