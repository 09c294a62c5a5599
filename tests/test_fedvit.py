"""FedViT: the frozen ViT with a federated head, linear or with a hidden layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CNN, copy_of, fit, make_client, make_data, output_of, restore_client, run, same
from torch import Tensor

from fedlscl.continual import NoReplay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.server import FedAvg

Make = Callable[..., Federation]


def client(**settings: Any) -> Any:
    return make_client(FrozenViTClient, **{"continual": NoReplay(), "train_mask": "task", "share": "head", **settings})


@pytest.mark.parametrize(
    ("hidden", "classes", "wanted"),
    [(0, 100, 307_600), (0, 200, 615_200), (512, 100, 1_780_112), (512, 200, 1_985_312)],
)
def test_a_message_has_the_bytes_of_the_formula(hidden: int, classes: int, wanted: int) -> None:
    vit: Any = SimpleNamespace(width=768)
    body = client(hidden=hidden).assemble(vit, SmallModelSpec(**CNN), "resnet18", classes)
    assert sum(tensor.nbytes for tensor in body.outgoing().values()) == wanted
    assert sum(spec.max_bytes for spec in body.upload_schema().values()) == wanted
    assert body.upload_schema() == body.download_schema()


@pytest.mark.parametrize(
    ("hidden", "names"), [(0, {"weight", "bias"}), (7, {"0.weight", "0.bias", "2.weight", "2.bias"})]
)
def test_the_head_travels_and_nothing_else(
    make: Make, vit: FrozenViT, wire: list[tuple[Message, bytes]], hidden: int, names: set[str]
) -> None:
    before = copy_of(vit.state_dict())
    federation = make(client=client(hidden=hidden), server=FedAvg())
    run(federation)
    assert {m.round for m, _ in wire if isinstance(m, Upload)} == {1, 2}
    assert all(set(m.tensors) == names for m, _ in wire)
    assert set(restore_client(federation, 0).head.state_dict()) == names
    assert same(copy_of(vit.state_dict()), before)  # the ViT is what it was
    assert not vit.training


def test_two_clients_get_the_mean_computed_by_hand(make: Make, wire: list[tuple[Message, bytes]], cache: Any) -> None:
    data: FederatedDataModule = make_data(cache, clients=2, tasks=1, private_classes=1, public_classes=1)
    federation = make(data=data, client=client(hidden=3), server=FedAvg())
    run(federation)
    first, second = ({m.client: m for m, _ in wire if isinstance(m, Upload)}[index] for index in (0, 1))
    assert first.samples != second.samples
    total = first.samples + second.samples
    answers = [m for m, _ in wire if isinstance(m, Download) and m.round == 1]
    assert len(answers) == 2
    for name, one in first.tensors.items():
        two = second.tensors[name]
        assert not torch.equal(one, two)
        mean = (first.samples * one.double() + second.samples * two.double()) / total
        for answer in answers:
            torch.testing.assert_close(answer.tensors[name].double(), mean, rtol=1e-6, atol=1e-7)
        for index in (0, 1):
            assert torch.equal(restore_client(federation, index).shared()[name], answers[0].tensors[name])


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_logits_are_those_of_the_formula(make: Make, hidden: int) -> None:
    body = restore_client(make(client=client(hidden=hidden), server=FedAvg()), 0)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    features = body.vit(images)
    weights = {name: tensor.detach() for name, tensor in body.shared().items()}
    wanted: Tensor
    if hidden:
        assert weights["0.weight"].shape == (hidden, body.vit.width)
        inner = (features @ weights["0.weight"].T + weights["0.bias"]).clamp(min=0)
        wanted = inner @ weights["2.weight"].T + weights["2.bias"]
    else:
        wanted = features @ weights["weight"].T + weights["bias"]
    output = output_of(body, images)
    torch.testing.assert_close(output.logits, wanted)
    assert torch.equal(output.representation, features)


def test_a_round_moves_the_rows_of_the_task_alone(make: Make) -> None:
    body = restore_client(make(client=client(), server=FedAvg()), 0)
    before = body.head.weight.detach().clone()
    fit(body, 1, 1)
    moved = (body.head.weight.detach() != before).any(dim=1)
    assert moved.nonzero().squeeze(1).tolist() == list(body.data.tasks[0].classes)


def test_a_negative_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.hidden is -1, must be at least 1, or 0 for a linear head"):
        client(hidden=-1)
