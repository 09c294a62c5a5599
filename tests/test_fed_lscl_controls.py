"""The controls of Fed-LSCL differ from it in one thing each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import CNN, fit, make_client, outputs, parameters, restore_client, run, task_images, train_images
from torch import Tensor

from fedlscl.continual import NoReplay, Replay
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.transport import InProcess
from fedlscl.messages import Message, Upload
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.fed_lscl_controls import FedLSCLAveraged, FedLSCLStatic, SideBySide
from fedlscl.server import FedAvg, Isolated

Make = Callable[..., Federation]


@pytest.fixture
def static(make: Make) -> FedLSCLStatic:
    client: FedLSCLStatic = restore_client(make(client=make_client(FedLSCLStatic)), 0)
    return client


@pytest.fixture
def whole(make: Make) -> FedLSCL:
    """A client of Fed-LSCL itself."""
    client: FedLSCL = restore_client(make(), 0)
    return client


def test_without_the_small_model_all_begins_as_with_it(static: FedLSCLStatic, whole: FedLSCL) -> None:
    start, other = parameters(static), parameters(whole)
    assert set(start) == {name for name in other if not name.startswith("cnn.")}
    assert all(torch.equal(start[name], other[name]) for name in start)


def test_without_the_small_model_all_images_have_one_lora(static: FedLSCLStatic) -> None:
    fit(static, 1, 1)
    found = outputs(static, task_images(static, 1))
    assert torch.equal(found["weights"], found["weights"][:1].expand_as(found["weights"]))
    assert torch.allclose(found["features"].norm(dim=1), torch.ones(len(found["features"])))
    assert float(found["weights"].abs().max()) > 0


def test_the_merged_lora_is_that_of_training(static: FedLSCLStatic) -> None:
    fit(static, 1, 1)
    images, _ = train_images(static, task_images(static, 1))
    frozen = static.precompute(images)
    static.train()
    trained = static(images, frozen).logits
    static.eval()
    with torch.no_grad():
        merged = static(images, frozen).logits
        plain = static.head(static.vit.upper(frozen["tokens"], static.block))
    assert torch.allclose(merged, trained, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-3)


def test_it_trains_as_fed_lscl_does_with_a_constant_feature(
    static: FedLSCLStatic, whole: FedLSCL, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in (static, whole):
        client.gradient_clip = None
    constant = torch.full((16,), 0.25)
    monkeypatch.setattr(FedLSCL, "features", lambda self, images: constant.expand(len(images), -1))
    for task in (1, 2):
        for client in (static, whole):
            fit(client, task, task)
    for name, value in parameters(static).items():
        assert torch.allclose(value, parameters(whole)[name], atol=1e-4), name


def test_no_cnn_is_counted(make: Make) -> None:
    counts = {}
    for kind in (FedLSCL, FedLSCLStatic):
        federation = make(client=make_client(kind))
        (counts[kind],) = federation.cost().values()
    phi, head = 17 * 256, 33 * 8
    assert counts[FedLSCLStatic]["trained_parameters"] == phi + head
    assert counts[FedLSCLStatic]["flops"] < counts[FedLSCL]["flops"]


def test_one_without_a_small_model_is_not_warned_of_it(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run(make(client=make_client(FedLSCLStatic)))
    assert "says the same" not in caplog.text


def test_averaged_generators_are_the_mean_of_what_clients_sent(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=make_client(FedLSCLAveraged), server=FedAvg("uniform"))
    run(federation)
    last = [message for message, _ in wire if isinstance(message, Upload) and message.round == 2]
    assert len(last) == 3
    assert all(set(upload.tensors) == {"weight", "bias"} for upload in last)
    for name in ("weight", "bias"):
        mean = torch.stack([upload.tensors[name] for upload in last]).mean(0)
        found: list[Tensor] = [restore_client(federation, index).shared()[name].clone() for index in range(3)]
        assert all(torch.allclose(tensor, mean, atol=1e-6) for tensor in found)
    heads = [restore_client(federation, index).head.weight.clone() for index in range(2)]
    assert not torch.equal(*heads)


def test_clients_train_alike_whether_their_generators_are_averaged_or_not(make: Make) -> None:
    """Before the first answer."""
    states = []
    for kind in (FedLSCL, FedLSCLAveraged):
        federation = make(client=make_client(kind), server=Isolated())
        assert isinstance(federation.transport, InProcess)
        run(federation)
        states.append(parameters(restore_client(federation, 1)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_are_kept_for_the_replay_alone() -> None:
    for kind, kept in ((FedLSCL, 3), (FedLSCLAveraged, 0)):
        assert make_client(kind, continual=NoReplay()).images_kept(2, True) == kept
        assert make_client(kind, continual=Replay()).images_kept(2, True) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("standardise", "batch"), ("linear", True), ("own_loss", 1), ("cnn_rate", 2)]
)
def test_settings_of_a_small_model_are_refused_where_there_is_none(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name} is {value}, must be .* no small model"):
        make_client(FedLSCLStatic, **{name: value})


def test_a_start_of_zeros_keeps_every_cnn_as_it_was_drawn(make: Make) -> None:
    """What a malicious server would send: see docs/privacy.md, and the check of nodes on Flower against it."""
    # batch normalisation would move what Eq. 4 compares, and with it the CNN
    federation = make(cnn={**CNN, "model_args": {**CNN["model_args"], "norm_layer": "groupnorm1"}})
    drawn = [parameters(restore_client(federation, index)) for index in range(3)]
    for tensor in federation.template.common_start.values():
        tensor.zero_()
    run(federation)
    for index, start in enumerate(drawn):
        end = parameters(restore_client(federation, index))
        assert all(torch.equal(start[name], end[name]) for name in start if name.startswith("cnn."))
        assert not any(bool(end[f"generator.{name}"].any()) for name in ("weight", "bias"))
        assert not torch.equal(start["head.weight"], end["head.weight"])


def test_side_by_side_both_models_are_heard_and_the_vit_is_not_trained(make: Make) -> None:
    """Logits are H [16 E, f] with f the frozen ViT's own features; both parts of H learn, and the ViT does not move."""
    client: SideBySide = restore_client(make(client=make_client(SideBySide), server=Isolated()), 0)
    begun = {name: value.clone() for name, value in client.vit.state_dict().items()}
    start = client.head.weight.detach().clone()
    fit(client, 1, 1)
    client.eval()
    images, _ = train_images(client, task_images(client, 1))
    with torch.no_grad():
        both = torch.cat([16 * client.cnn(images), client.vit(images)], dim=1)
        expected = both @ client.head.weight.T + client.head.bias
        assert torch.allclose(client(images, client.precompute(images)).logits, expected, atol=1e-5)
    assert both.shape[1] == CNN["features"] + client.vit.width
    moved = (client.head.weight != start).any(dim=0)
    assert moved.all()
    assert all(torch.equal(value, begun[name]) for name, value in client.vit.state_dict().items())
    assert client.shared() == {}
