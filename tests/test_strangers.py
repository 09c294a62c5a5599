"""What methods' own rules imply of an upload, hostile messages and values, and how Flower's processes are started."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_client, restore_client
from torch import Tensor

from fedlscl.continual import NoReplay
from fedlscl.data.module import FederatedDataModule
from fedlscl.deployment.flower import start
from fedlscl.deployment.shares import LocalShare, deal
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import MessageError, Upload
from fedlscl.methods.fed_lscl_sums import FedLSCLSums, of_unit_length
from fedlscl.methods.lorm.client import LAYERS, LoRMClient
from fedlscl.methods.lorm.server import LoRMServer
from fedlscl.methods.o2d import second_moments
from fedlscl.methods.row_average import COUNTS, RowAverage
from fedlscl.methods.target.client import TARGETClient
from fedlscl.methods.target.server import TARGETServer
from fedlscl.server import Sum

Make = Callable[..., Federation]
ROOT = Path(__file__).parent.parent


def upload(samples: int = 4, **tensors: Tensor) -> Upload:
    return Upload(0, 1, 1, samples, tensors)


# ---- methods


def test_moments_of_features_of_unit_length(make: Make) -> None:
    x = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    gram = second_moments(x).float()
    assert of_unit_length(gram) is None
    assert str(of_unit_length(second_moments(3 * x).float())).startswith(
        "is of features whose mean squared length is 9"
    )
    assert str(of_unit_length(2 * gram)).startswith("is of features whose mean squared length is 2, with 2 behind")
    turned = gram.clone()
    turned[0, 1] = turned[1, 0] = 1.0
    assert "eigenvalue" in str(of_unit_length(turned))
    body = restore_client(make(client=make_client(FedLSCLSums, strength=0.5), server=Sum()), 0)
    assert body.upload_schema()["gram"].rule is of_unit_length
    assert body.download_schema()["gram_sum"].rule is None  # a sum of means is no mean


def test_a_count_of_each_class_adds_up_to_the_images() -> None:
    server = RowAverage(["weight"])
    server.check(upload(4, **{COUNTS: torch.tensor([3, 1])}))
    with pytest.raises(MessageError, match="'class_counts' adds up to 5 images, of 4"):
        server.check(upload(4, **{COUNTS: torch.tensor([3, 2])}))


def test_only_the_factor_whose_turn_it_is(make: Make) -> None:
    """The other one would end the run, where the server looks for it."""
    federation = make(client=make_client(LoRMClient, continual=NoReplay(), rank=2), server=LoRMServer())
    factors = {which: {f"{which}.{layer}": torch.zeros(1) for layer in LAYERS} for which in "ab"}
    federation.server.check(upload(**factors["b"]))
    for wrong in (factors["a"], {**factors["a"], **factors["b"]}, {}, dict(list(factors["b"].items())[1:])):
        with pytest.raises(MessageError, match="this round is for the factor b of all layers"):
            federation.server.check(upload(**wrong))


def test_who_has_learned_has_learned_something(make: Make) -> None:
    kind: Any = TARGETClient
    federation = make(client=make_client(kind, continual=NoReplay()), server=TARGETServer(batch_size=8))
    with pytest.raises(MessageError, match="'classes' names no class"):
        federation.server.check(upload(classes=torch.zeros(3, dtype=torch.bool)))
    federation.server.check(upload(classes=torch.tensor([False, True, False])))


# ---- the parts of torture.py


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `reliability` be imported, as torture.py does it."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


@pytest.mark.usefixtures("torture", "command_line")
def test_damaged_messages_end_in_message_errors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reliability import messages

    monkeypatch.setattr(messages, "METHODS", ("fedweit", "fed_lscl_sums"))
    text, faults = messages.run(tmp_path, 0, 150)
    assert faults == 0, text
    assert text.startswith("150 messages of 2 methods (fedweit, fed_lscl_sums)")


@pytest.mark.usefixtures("torture", "command_line")
def test_no_values_end_a_run_or_harm_another_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge ones are refused by name; others move what is averaged, less under a median."""
    from reliability import values

    chosen = {name: values.ATTACKS[name] for name in ("all 1e15", "signs flipped", "samples negative")}
    monkeypatch.setattr(values, "ATTACKS", chosen)
    monkeypatch.setattr(values, "exchanging", lambda: ["fedvit"])
    monkeypatch.setattr(values, "AVERAGES", ("median",))
    monkeypatch.setattr(values, "among_alike", lambda folder: ("", 0))
    text, faults = values.run(tmp_path, 0, values.COUNT)
    assert faults == 0, text
    rows = {
        tuple(c.strip() for c in line.split("|")[1:3]): line.split("|") for line in text.splitlines() if "|" in line
    }
    assert rows["fedvit", "none"][4:6] == [" 3 ", " 2 "]
    assert rows["fedvit", "median"][4:6] == [" 1 ", " 0 "]


# ---- Flower's processes and shares


def test_what_flower_writes_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        there = tmp_path / "superlink.db"
        there.touch(mode=0o644)
        start.private(["flower-superlink", "--database", str(there)])
        (tmp_path / "new").touch()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (there, tmp_path / "new")} == {0o600}


def test_a_node_that_is_refused_tries_again_and_gives_up() -> None:
    waited: list[float] = []
    ends = iter([(1, True), (1, True), (0, False)])
    assert start.again_while_refused(lambda: next(ends), waited.append) == 0
    assert waited == [5.0, 10.0]
    waited.clear()
    assert start.again_while_refused(lambda: (1, True), waited.append) == 1
    assert waited == list(start.DELAYS)
    assert start.again_while_refused(lambda: (3, False), waited.append) == 3


def test_refused_is_what_a_node_says_before_it_ends(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    said = "print('Exit Code: 305')"
    assert start.node([sys.executable, "-c", f"{said}; raise SystemExit(1)"]) == (1, True)
    assert start.node([sys.executable, "-c", said]) == (0, False)  # it has ended well
    assert b"Exit Code: 305" in capfdbinary.readouterr().out
    assert start.main(["rm", "-r"]) == 2


def test_a_refused_node_that_is_told_to_end_does_not_try_again() -> None:
    ends = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))"
    said = "print('Exit Code: 305', flush=True); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    assert start.node([sys.executable, "-c", f"{ends}; {said}"]) == (1, False)
    assert signal.getsignal(signal.SIGTERM) is before  # which ends a node that waits for its next try


def test_the_server_s_share_says_how_many_images_clients_have(data: FederatedDataModule, tmp_path: Path) -> None:
    *_, folder = deal(data, 0, tmp_path)
    share = LocalShare(folder)
    for client, split in enumerate(data.split.clients):
        assert share.samples_of(client) == data.samples_of(client) == tuple(len(task.train) for task in split.tasks)
    content = json.loads((folder / "share.json").read_text())
    without = {name: value for name, value in content.items() if name != "samples"}
    (folder / "share.json").write_text(json.dumps(without))
    assert LocalShare(folder).samples_of(1) == ()  # one that was written by hand need not say
    for wrong in ([[1, 2]], [[1, 2], [1, 2], [1, -2]], [[1], [1], [1]], "many", [[1.0, 2], [1, 2], [1, 2]]):
        (folder / "share.json").write_text(json.dumps({**content, "samples": wrong}))
        with pytest.raises(ValueError, match="samples must be for each of 3 clients a list of 2 whole numbers"):
            LocalShare(folder)
