"""Sums with noise: the accountant against published values, what an image adds, and how much noise there is."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import copy_of, make_client, make_federation, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.client import Client
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.methods.statistics.client import LocalStatisticsClient, StatisticsClient, rounded
from fedlscl.methods.statistics.heads import ClassCovariances, ClassMeans, Ridge, square
from fedlscl.methods.statistics.noisy import NOISE, NoisyHead, noisy, of_unit_length
from fedlscl.methods.statistics.server import StatisticsServer
from fedlscl.models.vit import FrozenViT
from fedlscl.privacy import (
    GRID,
    Privacy,
    best_auc,
    clipped,
    delta_of,
    epsilon_of,
    most_found,
    most_found_under,
    noise_multiplier,
    normal,
)
from fedlscl.run.summary import Promise

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import dp_sgd

Make = Callable[..., Federation]
CLASSES, WIDTH = 3, 5
HEADS = [ClassMeans(), Ridge(), Ridge(0.5, normalise=True)]


# ---- the accountant


@pytest.mark.parametrize(
    ("epsilon", "multiplier", "delta"), [(1, 1, 0.12693674), (1, 1 / 3, 0.78760074), (2, 1, 0.02092364)]
)
def test_the_accountant_has_published_values(epsilon: float, multiplier: float, delta: float) -> None:
    """Those that the tests of Google's dp_accounting expect of `GaussianPrivacyLoss`; it also has 0.344, see below."""
    assert delta_of(epsilon, multiplier) == pytest.approx(delta, abs=1e-8)
    assert noise_multiplier(epsilon, delta) == pytest.approx(multiplier, abs=1e-6)
    assert epsilon_of(multiplier, delta) == pytest.approx(epsilon, abs=1e-6)
    assert noise_multiplier(16, 1e-5) == pytest.approx(0.344, abs=5e-4)


def test_no_attack_finds_more_than_its_bound() -> None:
    """The bound by epsilon and delta is a tangent of the exact one, for each epsilon another; by hand at two places."""
    assert most_found(0.01, 1.0) == pytest.approx(0.0924, abs=1e-4)  # Phi(-2.3263 + 1)
    assert most_found_under(0.01, 1.0, 1e-5) == pytest.approx(0.027193, abs=1e-6)
    assert most_found_under(0.01, 8.0, 1e-5) == pytest.approx(1 - math.exp(-8) * (0.99 - 1e-5))
    for multiplier in (0.6, 1.08, 3.73):
        bounds = [most_found_under(0.01, epsilon, delta_of(epsilon, multiplier)) for epsilon in np.linspace(0, 8, 801)]
        assert min(bounds) == pytest.approx(most_found(0.01, multiplier), abs=1e-5)
    x = np.linspace(1e-5, 1 - 1e-5, 20001)
    area = np.trapezoid([most_found(float(f), 1.08) for f in x], x)
    assert best_auc(1.08) == pytest.approx(area, abs=1e-4)


def test_noise_is_below_what_renyi_divergence_asks_for() -> None:
    """The multipliers for epsilon 1, 4 and 8 at a delta of 1e-5 by RDP, which is an upper bound and not far above."""
    for epsilon, bound in ((1, 4.05), (4, 1.16), (8, 0.64)):
        assert 0.9 * bound < noise_multiplier(epsilon, 1e-5) < bound


@pytest.mark.parametrize(("epsilon", "multiplier"), [(0.5, 2.0), (2.0, 0.8), (8.0, 0.6)])
def test_delta_is_the_integral_that_defines_it(epsilon: float, multiplier: float) -> None:
    """The largest of P(A) - e^epsilon Q(A) for two Gaussians at a distance of 1, by adding up."""
    x = np.linspace(-12, 13, 400_001)
    p, q = (np.exp(-((x - at) ** 2) / (2 * multiplier**2)) / (multiplier * math.sqrt(2 * math.pi)) for at in (1, 0))
    integral = np.maximum(p - math.exp(epsilon) * q, 0).sum() * (x[1] - x[0])
    assert delta_of(epsilon, multiplier) == pytest.approx(integral, rel=1e-4)


@given(epsilon=st.floats(0.01, 100), delta=st.floats(1e-12, 0.01))
@settings(deadline=None, max_examples=30)
def test_noise_is_just_enough(epsilon: float, delta: float) -> None:
    multiplier = noise_multiplier(epsilon, delta)
    assert delta_of(epsilon, multiplier) <= delta < delta_of(epsilon, multiplier * (1 - 1e-6))
    assert epsilon_of(multiplier, delta) == pytest.approx(epsilon, rel=1e-5)


def test_several_releases_are_one_with_less_noise() -> None:
    once, client = Privacy(4), Privacy(4, unit="client", clip=10)
    assert client.multiplier(5) == pytest.approx(once.multiplier(5) * 5**0.5)
    assert once.spent(5, 0) == pytest.approx(4) == client.spent(5, 0)
    assert once.spent(5, 1) == pytest.approx(epsilon_of(once.multiplier(5) / 2**0.5, 1e-5))
    assert 4 < client.spent(5, 1) < once.spent(5, 1)


def test_steps_are_accounted_for_as_elsewhere() -> None:
    """Opacus 1.6.0's `compute_rdp` and `get_privacy_spent` at whole orders up to 256, and a published value."""
    for rate, multiplier, steps, epsilon in (
        (0.01, 4.0, 10_000, 1.0354900660362476),
        (250 / 60_000, 1.3, 3_600, 0.9422002181627518),
        (0.17, 2.0, 30, 2.5433339704264064),
        (16 / 90, 1.08, 90, 12.009814301315929),
    ):
        assert dp_sgd.epsilon_of_steps(rate, multiplier, steps, 1e-5) == pytest.approx(epsilon, rel=1e-9)
    # Abadi et al. (2016), section 5.1: q = 0.01, z = 4, 10000 steps have epsilon 1.26, by the conversion of then
    bounds = 10_000 * dp_sgd.renyi(0.01, 4.0) - math.log(1e-5) / (dp_sgd.ORDERS - 1)
    assert min(bounds) == pytest.approx(1.26, abs=5e-3)
    found = dp_sgd.multiplier_for(4, 1e-5, 0.17, 30)
    assert 3.99 < dp_sgd.epsilon_of_steps(0.17, found, 30, 1e-5) <= 4
    assert dp_sgd.multiplier_for(4, 1e-5, 1, 9) == pytest.approx(3 * noise_multiplier(4, 1e-5))


def test_gradients_of_a_linear_head_are_clipped_one_by_one() -> None:
    """As autograd has them, image by image; some of these are longer than 1 and some are not."""
    rng = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(6, WIDTH, generator=rng) * torch.linspace(0.1, 2, 6)[:, None],
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    head, wanted, lengths = torch.nn.Linear(WIDTH, CLASSES), torch.zeros(CLASSES, WIDTH + 1), list[float]()
    torch.nn.init.zeros_(head.weight)
    for x, y in zip(features, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(head(x[None]), y[None])
        weight, bias = torch.autograd.grad(loss, [head.weight, head.bias])
        gradient = torch.cat([weight, bias[:, None]], dim=1)
        lengths.append(float(gradient.norm()))
        wanted += gradient / gradient.norm().clamp(min=1)
    assert min(lengths) < 1 < max(lengths)
    torch.testing.assert_close(dp_sgd.clipped_gradients(head(features), labels, features), wanted)


# ---- what an image adds


@given(seed=st.integers(0, 10**6), size=st.floats(0, 1e4))
@settings(deadline=None, max_examples=30)
def test_features_are_never_longer_than_1_and_hardly_shorter(seed: int, size: float) -> None:
    features = rounded(torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)) * size)
    found = of_unit_length(features)
    whole = (found * 2**12).long()
    assert torch.equal(whole.double() / 2**12, found)
    lengths = whole.square().sum(dim=1)  # exactly
    assert bool((lengths <= 2**24).all())
    assert bool((lengths[features.norm(dim=1) > 1] > 0.99 * 2**24).all())


@pytest.mark.parametrize("head", [noisy(head) for head in HEADS], ids=lambda head: type(head).__name__)
def test_an_image_adds_at_most_1(head: NoisyHead) -> None:
    scales = head.scales(WIDTH, CLASSES)

    def added(features: Tensor, label: int) -> float:
        found = head.sums(features[None], torch.tensor([label]), torch.zeros(1), CLASSES)
        assert set(found) == {*scales, NOISE}
        return sum(float((found[name] / scale).square().sum()) for name, scale in scales.items()) ** 0.5

    rng = torch.Generator().manual_seed(3)
    for label in range(CLASSES):
        features = torch.randn(WIDTH, generator=rng, dtype=torch.float64)
        assert added(features / features.norm(), label) == pytest.approx(1)  # no noise is wasted
        assert added(features / features.norm() * 0.9, label) < 1
    assert added(torch.eye(WIDTH, dtype=torch.float64)[0], 0) == pytest.approx(1)


def test_a_client_is_scaled_down_to_its_clip() -> None:
    scales = noisy(Ridge()).scales(WIDTH, CLASSES)
    large = {
        name: (torch.rand(scale.shape, dtype=torch.float64) * 50 / GRID).round() * GRID
        for name, scale in scales.items()
    }
    found = clipped(large, scales, 7.0)
    length = sum(float((found[name] / scale).square().sum()) for name, scale in scales.items()) ** 0.5
    assert 6.999 < length <= 7
    assert all(torch.equal((tensor / GRID).round() * GRID, tensor) for tensor in found.values())
    assert all(bool((found[name].sign() == large[name].sign()).all()) for name in scales)
    assert same(clipped(found, scales, 7.1), found)


# ---- how much noise there is


def test_noise_is_normal_and_on_the_grid() -> None:
    drawn = normal(b"k" * 32, 200_001)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    inside = [float((np.abs(drawn) < bound).mean()) for bound in (0.5, 1, 2, 3)]
    np.testing.assert_allclose(inside, [math.erf(bound / 2**0.5) for bound in (0.5, 1, 2, 3)], atol=0.005)
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_000:200_000])[0, 1]) < 0.02
    assert not np.array_equal(drawn[:9], normal(b"l" * 32, 9))
    noise = Privacy(1).noisy({"x": torch.zeros(1000)}, {"x": torch.ones(1000)}, 3.0, b"k" * 32)["x"] / GRID
    assert torch.equal(noise, noise.round())


@pytest.mark.parametrize("secure", [None, True])
@pytest.mark.parametrize("head", [ClassMeans(), Ridge()], ids=lambda head: type(head).__name__)
def test_sums_have_the_noise_that_is_stated(make: Make, head: Any, secure: bool | None) -> None:
    """Of three clients two must stay in a secure sum, so that each adds half of the variance."""
    privacy = Privacy(2.0, noise="seed")
    made = [
        make(client=StatisticsClient(head, privacy=p), server=StatisticsServer(), secure=secure, rounds=1)
        for p in (privacy, Privacy(100.0, 0.99, noise="seed"))  # with next to no noise
    ]
    for federation in made:
        run(federation)
    (found, exact), z = (federation.server.sums for federation in made), noise_multiplier(2.0, 1e-5)  # type: ignore[attr-defined]
    per_release = 3 * z**2 / (2 if secure else 1)
    assert float(found[0][NOISE]) == pytest.approx(2 * per_release)
    client = restore_client(made[0], 0)
    for name, scale in client.head.scales(client.features, client.num_classes).items():  # type: ignore[attr-defined]
        noise = (found[0][name] - exact[0][name]) / scale
        assert float(noise.std()) == pytest.approx((2 * per_release) ** 0.5, rel=4 / (2 * noise.numel()) ** 0.5)
        assert abs(float(noise.mean())) < 4 * (2 * per_release / noise.numel()) ** 0.5


def test_what_is_promised_to_clients_takes_more_noise(make: Make) -> None:
    """As long as five images, in a release for each of two tasks."""
    client = StatisticsClient(ClassMeans(), privacy=Privacy(2.0, unit="client", clip=5.0))
    federation = make(client=client, server=StatisticsServer())
    next(federation.run())
    variance = float(federation.server.sums[0][NOISE])  # type: ignore[attr-defined]
    assert variance == pytest.approx(3 * 2 * (5 * noise_multiplier(2.0, 1e-5)) ** 2)


def test_noise_of_the_seed_is_the_same_again_and_that_of_the_system_is_not(make: Make) -> None:
    def weight(noise: Any) -> Tensor:
        client = StatisticsClient(ClassMeans(), privacy=Privacy(4.0, noise=noise))
        federation = make(client=client, server=StatisticsServer(), secure=True, rounds=1)
        next(federation.run())
        return copy_of(restore_client(federation, 0).memory.received)["weight"]

    assert torch.equal(weight("seed"), weight("seed"))
    assert not torch.equal(weight("system"), weight("system"))


def test_the_penalty_of_auto_is_the_norm_of_the_noise() -> None:
    head = noisy(Ridge())
    size, z = 60, 5.0
    scales = head.scales(size, CLASSES)
    zeros = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    noise = Privacy(1).noisy(zeros, scales, z, b"n" * 32)
    solution = head.solve({0: {**noise, NOISE: torch.tensor(z**2, dtype=torch.float64)}})
    norm = float(torch.linalg.eigvalsh(square(noise["gram"])).abs().max())
    assert solution.metrics["strength"] == pytest.approx(norm, rel=0.15)
    assert bool(solution.weight.isfinite().all())


def test_little_noise_leads_to_the_head_without_noise(make: Make) -> None:
    """But for the intercept, which there is none of."""
    client = StatisticsClient(Ridge(0.3), privacy=Privacy(100.0, 0.99, noise="seed"))
    federation = make(client=client, server=StatisticsServer(), rounds=1)
    results = run(federation)
    assert results[-1].mean("seen") > 80


# ---- a round that is repeated


def test_a_round_that_is_repeated_is_paid_for(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun() -> Federation:
        client = StatisticsClient(ClassMeans(), privacy=Privacy(4.0))
        return make_federation(tmp_path / "run", data, vit, client, StatisticsServer())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    first = begun()
    assert first.released_again == 0
    with monkeypatch.context() as patch:
        patch.setattr(StatisticsServer, "aggregate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(first)
    again = begun()
    run(again)
    assert again.released_again == 1
    assert len(again.history) == 2
    assert begun().released_again == 1


# ---- what is refused


def test_methods_that_train_what_they_send_are_refused() -> None:
    privacy = Privacy(4.0)
    cases: list[tuple[Callable[[], Client], str]] = [
        (lambda: make_client(FedLSCL, privacy=privacy), r"but FedLSCL trains phi on the images .*T = sum of C_i Phi_i"),
        (lambda: make_client(FrozenViTClient, share="head", privacy=privacy), r"parameters that it trains.*DP-SGD"),
        (lambda: LocalStatisticsClient(Ridge(), privacy=privacy), "LocalStatisticsClient sends nothing"),
        (lambda: StatisticsClient(ClassCovariances(), privacy=privacy), "model.head ClassCovariances divides by"),
    ]
    for made, words in cases:
        with pytest.raises(ValueError, match=words):
            made()


def test_more_rounds_would_be_more_noise(make: Make) -> None:
    client = StatisticsClient(ClassMeans(), privacy=Privacy(4.0))
    with pytest.raises(ValueError, match=r"federation.rounds is 2, .* take 1$"):
        make(client=client, server=StatisticsServer(), secure=True, rounds=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epsilon": 0}, "epsilon is 0, must be positive"),
        ({"epsilon": 1e3}, "epsilon is 1000.0, must be at most 100"),
        ({"epsilon": 1, "delta": 1.0}, "delta is 1.0, must be above 0 and below 1"),
        ({"epsilon": 1, "clip": 3.0}, "clip is 3.0, must for the unit image be null"),
        ({"epsilon": 1, "unit": "client"}, "clip is None, must for the unit client be a number of images"),
        ({"epsilon": 1, "unit": "client", "clip": -1.0}, "clip is -1.0, must be positive"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Privacy(**fields)


def test_what_is_promised_is_told_in_a_line() -> None:
    promise = Promise(5.2, 1e-5, "image", "seed", "sum", 1.08, 2)
    assert promise.text.startswith("differential privacy of each image: epsilon 5.2, delta 1e-05 over 2 releases")
    assert "protects nobody" in promise.text
    assert "nobody" not in Promise(5.2, 1e-5, "image", "system", "sum", 1.08, 2).text
