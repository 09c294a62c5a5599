"""The discriminants on several blocks: each head and each score against one from the images, and who chooses what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_vit, outcome, restore_client, run
from numpy.typing import NDArray
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.methods.fed_discriminants import (
    CHOICES,
    Choice,
    Discriminants,
    DiscriminantsClient,
    DiscriminantsServer,
)
from fedlscl.methods.statistics.client import rounded
from fedlscl.methods.statistics.heads import added

Make = Callable[..., Federation]
CLASSES, WIDTH, IMAGES = 4, 3, 40


def images() -> tuple[Tensor, Tensor]:
    """Two vectors an image, with a class of a single image and one of none."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % 2
    labels[7] = 2
    means = torch.randn(CLASSES, 2 * WIDTH, generator=rng)
    return rounded(means[labels] + torch.randn(IMAGES, 2 * WIDTH, generator=rng)), labels


def of(head: Discriminants, at: Tensor) -> dict[str, Tensor]:
    """The sums over some of the images."""
    features, labels = images()
    return head.sums(features[at], labels[at], at, CLASSES)


def scatter(x: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of (x - mu)(x - mu)^T within classes."""
    return sum((np.cov(x[labels == c].T, bias=True) * (labels == c).sum() for c in np.unique(labels)), np.zeros(()))


def scores(x: Any, means: Any, shrunk: Any, middle: Any, lengths: Any = None) -> Any:
    """Of Gaussians with these means and one covariance, or of weights divided by these lengths."""
    apart = (means - middle).T
    solved = np.linalg.solve(shrunk, apart)
    if lengths is not None:
        return (x - middle) @ solved / lengths
    return (x - middle) @ solved - (apart * solved).sum(axis=0) / 2


@pytest.mark.parametrize("unit", [False, True])
def test_the_head_is_the_sum_of_the_discriminants_of_the_pooled_images(unit: bool) -> None:
    features, labels = (part.numpy() for part in images())
    head, choice = Discriminants(2), Choice((1.0, 0.25, 9.0, 9.0), 0.3, unit)  # the second block is not there
    total = added(of(head, part) for part in torch.arange(IMAGES).split(13))
    expected = np.zeros((IMAGES, 3))
    for weight, x in zip((1.0, 0.25), (features[:, :WIDTH], features[:, WIDTH:]), strict=True):
        covariance = scatter(x, labels) / (IMAGES - 3)
        shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        means = np.stack([x[labels == c].mean(axis=0) for c in range(3)])
        middle = x.mean(axis=0)
        lengths = np.linalg.norm(np.linalg.solve(shrunk, (means - middle).T), axis=0) if unit else None
        expected += weight * scores(x, means, shrunk, middle, lengths)
    found = head.solve({0: total}, choice)
    np.testing.assert_allclose((features @ found.weight.numpy().T + found.bias.numpy())[:, :3], expected, rtol=1e-9)
    assert head.counts(total).tolist() == [20, 19, 1, 0]


def test_weights_are_those_of_the_last_block_first() -> None:
    assert Discriminants(4).weights(Choice((1, 2, 3, 4), 0.1, False)) == [3, 4, 1, 2]
    assert Discriminants(4).weights(Choice((1, 2), 0.1, False)) == [0, 0, 1, 2]


def test_a_left_out_image_is_in_no_sum() -> None:
    features, labels = (part.numpy() for part in images())
    head = Discriminants(2)
    total = of(head, torch.arange(IMAGES))
    for number, fitted in enumerate(head.discriminants(total, 0.2)):
        x = features[:, number * WIDTH : (number + 1) * WIDTH]
        covariance = scatter(x, labels) / (IMAGES - 3)
        middle, all_means = x.mean(axis=0), np.stack([x[labels == c].mean(axis=0) for c in range(3)])
        whole = 0.8 * covariance + 0.2 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        lengths = np.linalg.norm(np.linalg.solve(whole, (all_means - middle).T), axis=0)
        plain, unit = (part.numpy() for part in fitted.left_out(torch.tensor(x), torch.tensor(labels)))
        for at in range(IMAGES):
            others = np.arange(IMAGES) != at if labels[at] != 2 else np.ones(IMAGES, dtype=bool)
            without = scatter(x[others], labels[others]) / (IMAGES - 3)  # trace and degrees of freedom stay
            shrunk = 0.8 * without + 0.2 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
            means = np.stack([x[others & (labels == c)].mean(axis=0) for c in range(3)])
            np.testing.assert_allclose(plain[at, :3], scores(x[at], means, shrunk, middle), rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(
                unit[at, :3], scores(x[at], means, shrunk, middle, lengths), rtol=1e-8, atol=1e-9
            )


def test_hits_are_counted_among_the_classes_that_compete() -> None:
    features, labels = images()
    head = Discriminants(2)
    total = of(head, torch.arange(IMAGES))
    own = torch.zeros(CLASSES, dtype=torch.bool)
    own[1] = True
    assert head.hits(total, features, labels, own).tolist() == [19] * len(CHOICES)
    own[0] = True
    hits = head.hits(total, features, labels, own)
    assert hits.max() < IMAGES
    assert hits.min() > 19
    assert len(hits.unique()) > 1  # the choices are not alike


def test_every_client_has_the_head_of_all_images_with_its_own_choice(make: Make, data: FederatedDataModule) -> None:
    federation = make(client=DiscriminantsClient(), server=DiscriminantsServer(), rounds=2)
    results = run(federation)
    clients = [restore_client(federation, 0)]
    head, sums = clients[0].head, []
    for index in range(federation.clients):
        client = restore_client(federation, index)
        at = torch.cat([torch.as_tensor(task.train) for task in data.split.clients[index].tasks])
        frozen = client.precomputed("train", at.numpy(), torch.device("cpu"))["features"]
        sums.append(head.sums(client.seen_by_head(frozen), client.data.labels(at), at, data.num_classes))
    for index in range(federation.clients):
        client = restore_client(federation, index)
        weight = head.solve({0: added(sums)}, CHOICES[client.choice()]).weight.float()
        assert torch.equal(client.memory.received["weight"], weight)
        trained = [len(task.train) for task in data.split.clients[index].tasks]
        assert all(0 < row.max() <= number for row, number in zip(client.hits, trained, strict=True))
    # the second round of a task brings nothing new, and no answer
    assert [len(result.bytes_down) for result in results] == [3, 0, 3, 0]
    again = run(make(client=DiscriminantsClient(), server=DiscriminantsServer(), rounds=2))
    assert outcome(again) == outcome(results)


def test_summaries_end_with_the_feature_of_the_vit() -> None:
    vit = make_vit()
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = vit.summaries(pixels, 2)
    assert found.shape == (3, 4, vit.width)
    assert torch.allclose(found[:, 2], vit(pixels), atol=1e-5)
    tokens = vit.encode(vit.lower(vit.prepare(pixels), 0), 0)
    assert torch.allclose(found[:, 3], tokens[:, vit.num_prefix_tokens :].mean(dim=1), atol=1e-5)
