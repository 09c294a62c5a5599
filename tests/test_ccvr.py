"""CCVR after FedAvg: sums over the averaged model's features in a task's last round, and the head that follows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import fit, make_client, make_trainer, output_of, parameters, restore_client, run, same
from torch import Tensor

from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Message, MessageError, Upload
from fedlscl.methods.ccvr import CalibratedFedAvgClient, CalibratedFedLoRAClient, CalibratingServer
from fedlscl.methods.statistics.heads import STEP, ClassGaussians, ClassMeans, ClosedFormHead
from fedlscl.schedule import Round

Make = Callable[..., Federation]
KINDS = [CalibratedFedAvgClient, CalibratedFedLoRAClient]


def federation(
    make: Make, head: ClosedFormHead, kind: type[Any] = CalibratedFedAvgClient, rounds: int = 2
) -> Federation:
    client = make_client(kind, continual=NoReplay(), train_mask="task", calibration=head, learning_rate=0.01)
    return make(client=client, server=CalibratingServer(), rounds=rounds)


def sums_of(upload: Any) -> dict[str, Tensor]:
    name = "calibration."
    return {n.removeprefix(name): t for n, t in upload.tensors.items() if n.startswith(name)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_round_of_a_task_trains_nothing_and_sums_up_what_the_head_sees(make: Make, kind: type[Any]) -> None:
    body = restore_client(federation(make, ClassMeans(), kind), 0)
    before = parameters(body)
    fit(body, 1, 1)
    trained = parameters(body)
    assert not same(before, trained)
    assert sums_of(body.upload()) == {}
    body.begin_round(Round(1, 2, True, 0))
    make_trainer().fit(body)
    assert same(trained, parameters(body))
    pixels, labels = body.data.batch("train", body.current)
    body.eval()
    with torch.no_grad():
        features = output_of(body, pixels).representation.double()
    expected = F.one_hot(labels, 8).double().T @ features
    sums = sums_of(body.upload())
    torch.testing.assert_close(sums["class_sums"], expected, atol=len(labels) * STEP, rtol=0)
    assert sums["images"].tolist() == labels.bincount(minlength=8).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_classes_with_sums_are_solved_for_and_the_others_averaged(
    make: Make, kind: type[Any], wire: list[tuple[Message, bytes]]
) -> None:
    run(federation(make, ClassMeans(), kind))
    by_round: dict[int, list[Message]] = {}
    answers: dict[int, Message] = {}
    for message, _ in wire:
        if isinstance(message, Upload):
            by_round.setdefault(message.round, []).append(message)
        elif message.round:
            answers[message.round] = message
    total = torch.zeros(8, body_width(by_round[2][0]), dtype=torch.float64)
    images = torch.zeros(8, dtype=torch.float64)
    for number in (1, 2, 3, 4):
        mean = sum(m.samples * m.tensors["head.weight"].double() for m in by_round[number])
        mean = mean / sum(m.samples for m in by_round[number])
        for message in by_round[number]:
            assert bool(sums_of(message)) is (number % 2 == 0)
            if number % 2 == 0:
                total += sums_of(message)["class_sums"]
                images += sums_of(message)["images"]
        weight = answers[number].tensors["head.weight"].double()
        known = images > 0 if number % 2 == 0 else torch.zeros(8, dtype=torch.bool)
        torch.testing.assert_close(weight[known], F.normalize(total[known], dim=1), atol=1e-6, rtol=0)
        torch.testing.assert_close(weight[~known], mean[~known], atol=1e-6, rtol=1e-5)
        if number % 2 == 0:
            assert known.any()
            assert not answers[number].tensors["head.bias"][known].any()


def body_width(upload: Message) -> int:
    return int(upload.tensors["head.weight"].shape[1])


def test_the_sums_of_finished_tasks_outlive_the_process(make: Make) -> None:
    whole = federation(make, ClassGaussians(draws=5, steps=5))
    run(whole)
    other = CalibratingServer()
    other.begin(whole.template.first.upload_schema(), whole.template.first.download_schema(), whole_model(whole))
    assert other.state() == {}
    other.load(whole.server.state())
    assert same(dict(other.state()), dict(whole.server.state()))
    counted = whole.server.state()["calibration.0.images"]
    clients = whole.template.data.split.clients
    assert int(counted.sum()) == sum(len(task.train) for client in clients for task in client.tasks)


def whole_model(of: Federation) -> Callable[[], Any]:
    return lambda: of.template.new_model(of.template.cnn.name_of(0))


def test_sums_over_other_images_than_there_are_are_refused(make: Make) -> None:
    of = federation(make, ClassMeans())
    body = restore_client(of, 0)
    fit(body, 1, 1)
    body.begin_round(Round(1, 2, True, 0))
    make_trainer().fit(body)
    upload = body.upload()
    of.server.check(upload)
    with pytest.raises(MessageError, match="must be over"):
        of.server.check(replace(upload, samples=upload.samples + 1))
    part = {name: tensor for name, tensor in upload.tensors.items() if name != "calibration.images"}
    with pytest.raises(MessageError, match="without"):
        of.server.check(replace(upload, tensors=part))


def test_one_round_of_a_task_trains_nothing_which_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(federation(make, ClassMeans(), rounds=1))
    assert [record for record in caplog.records if "federation.rounds is 1" in record.getMessage()]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(federation(make, ClassMeans()))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_it_is_refused_for_clients_that_send_no_sums(make: Make) -> None:
    from fedlscl.methods.fedavg import FedAvgClient

    with pytest.raises(ValueError, match="needs clients that send 'calibration'"):
        make(client=make_client(FedAvgClient, continual=NoReplay()), server=CalibratingServer())
