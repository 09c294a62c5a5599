"""The statistics that batch normalisation meets."""

from __future__ import annotations

import torch
from torch import nn

from fedlscl.methods.data_free import batch_statistics


def test_the_statistics_are_those_of_every_layers_input_and_have_a_graph() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with batch_statistics(model) as met:
        model(x)
    assert [one.layer for one in met] == [model[0], model[2]]
    inside = model[1](model[0](x))
    for one, seen in zip(met, (x, inside), strict=True):
        by_channel = seen.transpose(0, 1).flatten(1)
        torch.testing.assert_close(one.mean, by_channel.mean(1))
        torch.testing.assert_close(one.variance, by_channel.var(1, unbiased=False))
    met[1].variance.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    model(x)
    assert len(met) == 2  # nothing is collected outside


def test_other_normalisations_have_none() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 4), nn.BatchNorm2d(4, track_running_stats=False))
    with batch_statistics(model) as met:
        model(torch.randn(2, 4, 3, 3))
    assert met == []
