"""Heads in closed form: each equals an independent solution on the pooled images, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_data, outcome, restore_client, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor

from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import MessageError, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.statistics.client import (
    JointStatisticsClient,
    LocalStatisticsClient,
    StatisticsClient,
    numbers_of,
    rounded,
)
from fedlscl.methods.statistics.heads import (
    STEP,
    STRENGTHS,
    ClassCovariances,
    ClassGaussians,
    ClassMeans,
    ClosedFormHead,
    Ridge,
    Solution,
    added,
    square,
    triangle,
)
from fedlscl.methods.statistics.server import StatisticsServer
from fedlscl.models.vit import FrozenViT
from fedlscl.server import Isolated

Make = Callable[..., Federation]
CLASSES, WIDTH, IMAGES = 4, 6, 60
HEADS: list[ClosedFormHead] = [ClassMeans(), Ridge(), Ridge(0.5, normalise=True), ClassCovariances(0.3, means=2)]


def images(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features on the grid around a mean for each class, labels and numbers."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(IMAGES) % (CLASSES - 1)  # of the last class there is none
    features = torch.randn(CLASSES, WIDTH, generator=rng)[labels] + torch.randn(IMAGES, WIDTH, generator=rng)
    return rounded(features), labels, torch.randperm(IMAGES, generator=rng)


def solved(head: ClosedFormHead, *of_clients: Tensor) -> Solution:
    """The head from clients with some of the images each, by their positions."""
    features, labels, numbers = images()
    sums = {n: head.sums(features[at], labels[at], numbers[at], CLASSES) for n, at in enumerate(of_clients)}
    return head.solve(sums if head.by_client else {0: added(sums.values())})


def test_ridge_is_least_squares_on_the_pooled_images() -> None:
    features, labels, _ = images()
    targets = np.eye(CLASSES)[labels]
    with_one = np.concatenate([features, np.ones((IMAGES, 1))], axis=1)
    expected = SklearnRidge(alpha=0.7, fit_intercept=False, solver="svd").fit(with_one, targets).coef_
    found = solved(Ridge(0.7), *torch.arange(IMAGES).split(13))
    np.testing.assert_allclose(np.column_stack([found.weight, found.bias]), expected, rtol=1e-9, atol=1e-12)
    normalised = solved(Ridge(0.7, normalise=True), torch.arange(IMAGES))
    norms = np.linalg.norm(expected[:3, :-1], axis=1)
    np.testing.assert_allclose(normalised.weight[:3], expected[:3, :-1] / norms[:, None], rtol=1e-9)
    np.testing.assert_allclose(normalised.bias[:3], expected[:3, -1] / norms, rtol=1e-9, atol=1e-12)


def test_the_strength_is_the_one_with_the_least_error_on_the_fifth_held_out() -> None:
    features, labels, numbers = images()
    targets, held = np.eye(CLASSES)[labels], (numbers % 5 == 4).numpy()
    with_one = np.concatenate([features, np.ones((IMAGES, 1))], axis=1)
    errors = []
    for strength in STRENGTHS:
        fit = SklearnRidge(alpha=strength, fit_intercept=False, solver="svd").fit(with_one[~held], targets[~held])
        errors.append(float(((targets[held] - with_one[held] @ fit.coef_.T) ** 2).sum()))
    best = STRENGTHS[int(np.argmin(errors))]
    assert 0 < STRENGTHS.index(best) < len(STRENGTHS) - 1  # neither end, where a wrong rule would end too
    auto = solved(Ridge(), torch.arange(IMAGES))
    assert auto.metrics["strength"] == best
    assert torch.allclose(auto.weight, solved(Ridge(best), torch.arange(IMAGES)).weight, rtol=1e-9)


def test_class_means_point_where_the_means_do() -> None:
    features, labels, _ = images()
    found = solved(ClassMeans(), *torch.arange(IMAGES).split(7))
    for label in range(CLASSES - 1):
        mean = features[labels == label].mean(dim=0)
        assert torch.allclose(found.weight[label], mean / mean.norm())
    assert not found.weight[CLASSES - 1].any()
    assert not found.bias.any()


def test_class_covariances_follow_the_formula() -> None:
    """Two clients with one mean a class each, in numbers that can be followed: p = 2, K = 2."""
    head = ClassCovariances(shrinkage=0.5)
    one = {"images": torch.tensor([[2.0, 1.0]]), "class_sums": torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])}
    two = {"images": torch.tensor([[2.0, 0.0]]), "class_sums": torch.tensor([[[6.0, 0.0], [0.0, 0.0]]])}
    sums = {n: {name: t.double() for name, t in client.items()} for n, client in enumerate((one, two))}
    # class 0: means (1, 0) and (3, 0) around (2, 0): Sigma = 2*1 + 2*1 in the first place, J - 1 = 1; n - 1 = 3
    # class 1: a single image: n - 1 = 0. g = (8, 3) / 5, n = 5
    g = np.array([8.0, 3.0]) / 5
    gram = 3 * (np.diag([4.0, 0.0]) + 0.5 * np.eye(2)) + 5 * np.outer(g, g) + 0.5 * np.eye(2)
    weight = np.linalg.solve(gram, np.array([[8.0, 0.0], [0.0, 3.0]]).T).T
    expected = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    np.testing.assert_allclose(head.solve(sums).weight, expected, rtol=1e-12)


def test_gaussians_have_the_moments_of_the_images() -> None:
    features, labels, numbers = images()
    for covariance in ("class", "shared"):
        head = ClassGaussians(covariance, shrinkage=1e-9)  # type: ignore[arg-type]
        total = head.sums(features, labels, numbers, CLASSES)
        means = total["class_sums"] / total["images"].clamp(min=1)[:, None]
        factors = head._spread(total, means)
        centred = [features[labels == c] - features[labels == c].mean(dim=0) for c in range(CLASSES - 1)]
        wanted = [x.T @ x / (len(x) - 1) for x in centred]
        if covariance == "shared":
            wanted = [sum(x.T @ x for x in centred) / (IMAGES - len(centred))]  # type: ignore[list-item]
        assert torch.allclose(factors.mT @ factors, torch.stack(wanted), atol=1e-8)


def test_a_head_of_gaussians_tells_the_classes_apart() -> None:
    features, labels, numbers = images()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = ClassGaussians().solve({0: ClassGaussians().sums(features, labels, numbers, CLASSES)})
    hits = (features @ found.weight.T + found.bias)[:, :-1].argmax(dim=1) == labels
    nearest = torch.cdist(features, torch.stack([features[labels == c].mean(dim=0) for c in range(3)])).argmin(dim=1)
    assert hits.double().mean() >= (nearest == labels).double().mean() - 0.05
    assert not found.weight[-1].any()


@given(seed=st.integers(0, 10**6), clients=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_who_has_the_images_and_in_what_order_changes_no_bit(seed: int, clients: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    features, labels, numbers = images()
    dealt = torch.randperm(IMAGES, generator=rng).tensor_split(clients)
    for head in (ClassMeans(), Ridge(), ClassGaussians("shared")):
        whole = head.sums(features, labels, numbers, CLASSES)
        parts = [head.sums(features[at], labels[at], numbers[at], CLASSES) for at in dealt]
        summed = added(parts[n] for n in torch.randperm(clients, generator=rng).tolist())
        assert all(torch.equal(whole[name], summed[name]) for name in whole)


@given(size=st.integers(1, 9))
def test_a_triangle_is_all_of_a_symmetric_matrix(size: int) -> None:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    symmetric = matrix + matrix.T
    assert torch.equal(square(triangle(symmetric)), symmetric)


def test_random_features_do_not_depend_on_the_batch(data: FederatedDataModule, vit: FrozenViT, make: Make) -> None:
    client = restore_client(make(client=StatisticsClient(Ridge(), 40), server=StatisticsServer()), 0)
    features = torch.randn(50, vit.width, generator=torch.Generator().manual_seed(1))
    whole = client.seen_by_head(features)
    assert torch.equal(whole, torch.cat([client.seen_by_head(part) for part in features.split(7)]))
    assert torch.equal(whole, (whole / STEP).round() * STEP)
    assert (whole >= 0).all()
    assert 0.3 < (whole > 0).double().mean() < 0.7


def pooled_head(head: ClosedFormHead, federation: Federation, data: FederatedDataModule, tasks: int) -> Solution:
    """The head from the features of all training images of all clients, one image after another."""
    client = restore_client(federation, 0)
    parts = []
    for index in range(federation.clients):
        at = torch.cat([torch.as_tensor(task.train) for task in data.split.clients[index].tasks[:tasks]])
        frozen = client.precomputed("train", at.numpy(), torch.device("cpu"))["features"]
        numbers = numbers_of(client.data.batch("train", at)[0])
        parts.append(head.sums(client.seen_by_head(frozen), client.data.labels(at), numbers, data.num_classes))
    return head.solve(dict(enumerate(parts)) if head.by_client else {0: added(parts)})


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_a_federation_has_the_head_of_the_pooled_images(make: Make, data: FederatedDataModule, head: Any) -> None:
    federation = make(client=StatisticsClient(head), server=StatisticsServer(), rounds=2)
    results = run(federation)
    for index in range(federation.clients):
        weight = restore_client(federation, index).memory.received["weight"]
        assert torch.equal(weight, pooled_head(head, federation, data, 2).weight.float())
    # the second round of a task brings nothing new, and no answer
    assert [len(result.bytes_down) for result in results] == [3, 0, 3, 0]
    assert all(max(results[n].bytes_up.values()) < 200 < min(results[n - 1].bytes_up.values()) for n in (1, 3))


def test_who_was_absent_sends_what_it_has_missed(make: Make, data: FederatedDataModule) -> None:
    federation = make(client=StatisticsClient(Ridge()), server=StatisticsServer(), rounds=3, clients_per_round=2)
    results = run(federation)
    assert {client for result in results[3:] for client in result.bytes_up} == {0, 1, 2}
    everybody = pooled_head(Ridge(), federation, data, 2)
    assert torch.equal(restore_client(federation, 0).memory.received["weight"], everybody.weight.float())


def test_alone_is_a_federation_of_one(make: Make, vit: FrozenViT, cache: Path) -> None:
    data = make_data(cache, clients=1, private_classes=4, public_classes=0)
    runs = [
        make(client=client, server=server, data=data)
        for client, server in (
            (StatisticsClient(Ridge()), StatisticsServer()),
            (LocalStatisticsClient(Ridge()), Isolated()),
        )
    ]
    accuracies = [[result.accuracy for result in run(federation)] for federation in runs]
    assert accuracies[0] == accuracies[1]
    heads = [restore_client(federation, 0).memory.received for federation in runs]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_joint_is_everything_at_once(make: Make, data: FederatedDataModule) -> None:
    federation = make(client=JointStatisticsClient(Ridge()), server=Isolated(), rounds=2)
    run(federation)
    for index in range(federation.clients):
        weight = restore_client(federation, index).memory.received["weight"]
        assert torch.equal(weight, pooled_head(Ridge(), federation, data, 2).weight.float())


def test_a_class_that_nobody_has_is_never_the_answer(make: Make, data: FederatedDataModule) -> None:
    federation = make(client=StatisticsClient(ClassMeans()), server=StatisticsServer())
    next(federation.run())
    client = restore_client(federation, 0)
    at = torch.as_tensor(data.split.clients[0].tasks[1].train)
    pixels, _ = client.data.batch("train", at)
    logits = client(pixels, client.precompute(pixels)).logits
    first = {label for part in data.split.clients for label in part.tasks[0].classes}
    assert first < set(range(data.num_classes))
    assert {n for n in range(data.num_classes) if torch.isfinite(logits[:, n]).all()} == first
    assert set(logits.argmax(dim=1).tolist()) <= first


def test_all_sums_or_none(make: Make) -> None:
    server = StatisticsServer()
    make(client=StatisticsClient(ClassMeans()), server=server)
    with pytest.raises(MessageError, match=r"has \['images'\] without \['class_sums'\]"):
        server.check(Upload(0, 1, 1, 5, {"images": torch.zeros(8, dtype=torch.float64)}))
    images = torch.tensor([2.0, 1.5, 0.5], dtype=torch.float64)
    for wrong in (images, images.round() * 3, torch.tensor([6.0, -1.0], dtype=torch.float64)):
        with pytest.raises(MessageError, match=r"upload is over \[.*\] images of the classes, must be over 5"):
            server.check(Upload(0, 1, 1, 5, {"images": wrong, "class_sums": images}))
    server.check(Upload(0, 1, 1, 5, {"images": torch.tensor([2.0, 3.0]), "class_sums": images}))
    server.check(Upload(0, 1, 1, 5, {}))


def test_a_gram_matrix_has_no_negative_direction() -> None:
    schema = Ridge(1.0).schema(WIDTH, CLASSES)
    features, labels, numbers = images()
    rule = schema["gram"].rule
    assert rule is not None
    honest = Ridge(1.0).sums(features, labels, numbers, CLASSES)["gram"]
    assert rule(honest) is None
    honest[0, 2] = -honest[0, 2]  # the second number on the diagonal
    assert "eigenvalue" in str(rule(honest))


@pytest.mark.parametrize("client", [FedAvgClient, LocalStatisticsClient])
def test_only_clients_that_send_sums_are_served(make: Make, client: type[Client]) -> None:
    settings: dict[str, Any] = {"continual": NoReplay()} if client is FedAvgClient else {"head": Ridge()}
    with pytest.raises(
        ValueError, match=r"needs clients that send 'class_sums', but model does not; take the model StatisticsClient"
    ):
        make(client=client(**settings), server=StatisticsServer())


def test_the_same_again(make: Make) -> None:
    runs = [run(make(client=StatisticsClient(Ridge(), 20), server=StatisticsServer(), rounds=2)) for _ in range(2)]
    assert outcome(runs[0]) == outcome(runs[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Ridge(0.0), "model.head.strength is 0.0, must be positive"),
        (lambda: ClassCovariances(shrinkage=-1.0), "model.head.shrinkage is -1.0, must be positive"),
        (lambda: ClassCovariances(means=0), "model.head.means is 0, must be at least 1"),
        (lambda: ClassGaussians(draws=0), "model.head.draws is 0, must be at least 1"),
        (lambda: StatisticsClient(Ridge(), projection=-1), "model.projection is -1, must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
