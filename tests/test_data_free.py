"""What TARGET and MFCL share: who fits whom, what is kept, and the statistics that batch normalisation meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import copy_of, make_client, make_trainer, restore_client, same
from torch import nn

from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Upload
from fedlscl.methods.data_free import DataFreeClient, DataFreeServer, Generator, batch_statistics
from fedlscl.methods.mfcl.client import MFCLClient
from fedlscl.methods.mfcl.server import MFCLServer
from fedlscl.methods.target.client import TARGETClient
from fedlscl.methods.target.server import TARGETServer
from fedlscl.schedule import Round
from fedlscl.server import Context

Make = Callable[..., Federation]
METHODS: dict[str, tuple[type[DataFreeClient], type[DataFreeServer], dict[str, Any]]] = {
    "target": (TARGETClient, TARGETServer, {"synthesis_rounds": 1, "steps": 1, "batch_size": 4}),
    "mfcl": (MFCLClient, MFCLServer, {"steps": 1, "batch_size": 4}),
}


def built(make: Make, client: str, server: str) -> Federation:
    kind, (_, served, settings) = METHODS[client][0], METHODS[server]
    return make(client=make_client(kind, continual=NoReplay(), train_mask="task"), server=served(**settings))


@pytest.mark.parametrize(("client", "server"), [("target", "mfcl"), ("mfcl", "target")])
def test_neither_takes_what_the_other_hands_out(make: Make, client: str, server: str) -> None:
    name = METHODS[server][1].__name__
    with pytest.raises(ValueError, match=f"{name}, .* take back '.*', .* the model {METHODS[server][0].__name__}"):
        built(make, client, server)


@pytest.mark.parametrize("method", METHODS)
def test_only_a_task_s_last_answer_brings_something_and_old_grows_with_every_upload(make: Make, method: str) -> None:
    federation = built(make, method, method)
    body, server = restore_client(federation, 0), federation.server
    assert isinstance(server, DataFreeServer)
    model = copy_of(body.shared())

    def old(*classes: int) -> torch.Tensor:
        return torch.isin(torch.arange(body.num_classes), torch.tensor(classes))

    def answers(number: int, ends: bool, *told: tuple[int, ...]) -> Any:
        uploads = {i: Upload(i, 1, number, 1, {**model, "classes": old(*classes)}) for i, classes in enumerate(told)}
        server.load(copy_of(server.state()))
        told, metrics = server.aggregate(uploads, Context(3, Round(1, number, ends, 0), make_trainer))
        return [told[index].tensors for index in range(3)], metrics

    middle, metrics = answers(1, False, (1, 2), (2, 5))
    assert same(middle[2], model)
    assert metrics == {}
    (_, _, last), metrics = answers(2, True, (1,))
    assert last["classes"].equal(old(1, 2, 5))
    assert set(last) - set(model) == {name for name in last if name.partition(".")[0] in server.gives} | {"classes"}
    assert metrics
    (first, _, _), metrics = answers(3, False, (1,))
    assert set(first) == set(model)
    assert metrics == {}

    body.download(Download(0, 1, 2, 0, last))
    kept = copy_of(body.memory.received)
    assert {name for name in kept if not name.startswith("teacher.")} == set(last) - set(model)
    body.download(Download(0, 1, 3, 0, model))
    assert same(body.memory.received, kept)


@pytest.mark.parametrize(("bias", "epsilon"), [(True, 0.8), (False, 1e-5)])
def test_a_generator_is_a_linear_map_and_stages(bias: bool, epsilon: float) -> None:
    generator = Generator(7, (6, 5, 4), 12, [nn.Sigmoid()], bias, epsilon)
    assert generator(torch.randn(2, 7)).shape == (2, 3, 12, 12)
    linear, _, first, *stages = generator.layers
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (7, 6 * 3 * 3)
    convolutions = [m for m in stages if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.bias is not None) for c in convolutions] == [
        *[(6, 5, bias), (5, 4, bias)],
        (4, 3, True),
    ]
    assert [m.eps for m in (first, *stages) if isinstance(m, nn.BatchNorm2d)] == [1e-5, epsilon, epsilon]


def test_the_statistics_are_those_of_every_layers_input_and_have_a_graph() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with batch_statistics(model) as met:
        model(x)
    assert [one.layer for one in met] == [model[0], model[2]]
    inside = model[1](model[0](x))
    for one, seen in zip(met, (x, inside), strict=True):
        by_channel = seen.transpose(0, 1).flatten(1)
        torch.testing.assert_close(one.now, torch.stack([by_channel.mean(1), by_channel.var(1, unbiased=False)]))
    met[1].now[1].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    model(x)
    assert len(met) == 2  # nothing is collected outside


def test_other_normalisations_have_none() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 4), nn.BatchNorm2d(4, track_running_stats=False))
    with batch_statistics(model) as met:
        model(torch.randn(2, 4, 3, 3))
    assert met == []
