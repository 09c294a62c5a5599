"""What is looked at in Fed-LSCL's small model: by hand, against formed products, and that looking changes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import copy_of, make_trainer, restore_client, task_images, train_images
from lightning.pytorch.loggers import Logger
from torch import Tensor

from fedlscl import seeds
from fedlscl.federation.algorithm import Federation
from fedlscl.methods import instruments
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.instruments import Generating
from fedlscl.models.adapters import LoRA, LowRank
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


class Kept(Logger):
    """Keeps what a fit logs."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(body: FedLSCL, task: int, round: int, ends_task: bool = False) -> dict[str, float]:
    """One client's round; what was logged in it."""
    kept = Kept()
    body.begin_round(Round(task, round, ends_task, 0))
    with seeds.seeded(0, "fit", body.index, round):
        make_trainer(kept).fit(body)
    return kept.values


def generated(values: dict[str, float]) -> dict[str, float]:
    return {n.removeprefix("generated/"): v for n, v in values.items() if n.startswith("generated/")}


def test_evenly_takes_the_ends_and_none_twice() -> None:
    images = torch.arange(10, 110)
    assert instruments.evenly(images, 4).tolist() == [10, 43, 76, 109]
    assert torch.equal(instruments.evenly(images[:3], 4), images[:3])


def test_the_mean_distance_is_that_of_all_pairs() -> None:
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert instruments.distance(corners) == pytest.approx((2 * math.sqrt(2) + 2) / 3)
    assert instruments.distance(corners[:1].expand(3, 2)) == 0


@pytest.mark.parametrize(
    ("vectors", "share"),
    [([[1.0, 0], [1, 0]], 0), ([[1.0, 0], [0, 1]], 0.5), ([[1.0, 0], [-1, 0]], 1), ([[0.0, 0], [0, 0]], 0)],
)
def test_the_share_that_varies(vectors: list[list[float]], share: float) -> None:
    assert instruments.varying(instruments.inner(torch.tensor(vectors))) == pytest.approx(share)


def test_a_spread_below_float32_is_seen() -> None:
    """1e-6 beside 1: the square of it would be lost in float32."""
    features = torch.tensor([[1.0, 1e-6], [1.0, -1e-6]])
    assert instruments.varying(instruments.inner(features)) == pytest.approx(1e-12, rel=1e-2)


def test_products_are_those_of_the_formed_matrices() -> None:
    rng = torch.Generator().manual_seed(0)
    lora = LoRA(torch.randn(5, 2, 4, generator=rng), torch.randn(5, 6, 2, generator=rng))
    formed = lora.b.double() @ lora.a.double()
    assert torch.allclose(instruments.products(lora), instruments.inner(formed))


def test_what_is_said_of_a_model_is_what_its_networks_give(body: FedLSCL, vit: FrozenViT) -> None:
    values = generated(fit(body, 1, 1))
    images, _ = train_images(body, instruments.evenly(task_images(body, 1)))
    body.eval()
    with torch.no_grad():
        out = body.generate(images)
        a, b = body.generator.split(out["weights"])
        tokens = body.precompute(images)["tokens"]
        block: Any = vit.vit.blocks[1]
        h = block.norm1(tokens)
        added, before = h @ (b @ a).mT, block.attn.qkv(h)
        frozen = vit.upper(tokens, 1)
        adapted = vit.upper(tokens, 1, [LowRank(1, LoRA(a, b))])
    e = out["features"].double()
    assert values["feature_variance"] == pytest.approx(float((e - e.mean(0)).square().sum(1).mean()), rel=1e-4)
    pairs = [float((x - y).norm()) for i, x in enumerate(e) for y in e[:i]]
    assert values["feature_distance"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    for name, vectors in (("weight_variance", out["weights"]), ("product_variance", b @ a)):
        v = vectors.double().flatten(1)
        share = (v - v.mean(0)).square().sum(1).mean() / v.square().sum(1).mean()
        assert values[name] == pytest.approx(float(share), rel=1e-4)
    assert values["qkv_change"] == pytest.approx(
        float((added.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).mean()), rel=1e-4
    )
    change = ((adapted - frozen).norm(dim=1) / frozen.norm(dim=1))[
        instruments.evenly(torch.arange(len(images)), instruments.THROUGH)
    ]
    assert len(change) == instruments.THROUGH
    assert values["class_token_change"] == pytest.approx(float(change.mean()), rel=1e-3)
    assert values.keys().isdisjoint({"shuffled_cost", "mean_cost"})  # only after a task's last round


def test_mixing_up_costs_nothing_where_all_images_have_one_lora(body: FedLSCL) -> None:
    body.generator.register_forward_hook(lambda _, inputs, output: output[:1].expand_as(output))
    values = generated(fit(body, 1, 1, ends_task=True))
    assert (values["shuffled_cost"], values["mean_cost"]) == (0, 0)
    assert values["weight_variance"] == pytest.approx(0, abs=1e-12)
    assert values["product_variance"] == pytest.approx(0, abs=1e-12)


def test_mixing_up_costs_all_where_the_lora_alone_tells_the_classes_apart(
    body: FedLSCL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is replaced by one that reads the class off W, and phi by one that writes it there."""
    first, second = body.data.tasks[0].classes

    def generate(self: FedLSCL, images: Tensor) -> dict[str, Tensor]:
        pixels, labels = train_images(self, task_images(self, 1))
        which = (images.flatten(1)[:, None] == pixels.flatten(1)[None]).all(2).int().argmax(1)
        sign = torch.where(labels[which] == first, 1.0, -1.0)
        return {"features": sign[:, None], "weights": sign[:, None].expand(-1, self.generator.out_features)}

    monkeypatch.setattr(FedLSCL, "generate", generate)
    body.begin_round(Round(1, 1, True, 0))
    body.trainer = make_trainer()

    def logits_under(weights: Tensor, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), body.num_classes)
        logits[:, first], logits[:, second] = weights[:, 0], -weights[:, 0]
        return logits

    def looked_at(images: Any) -> dict[str, Tensor]:
        return {**body.generate(images.pixels), "qkv": torch.ones(len(images.pixels))}

    def with_and_without(weights: Tensor) -> Callable[[Any], dict[str, Tensor]]:
        return lambda images: {"logits": logits_under(weights, images.labels), "class_token": torch.ones(len(weights))}

    monkeypatch.setattr(body, "_generated", looked_at)
    monkeypatch.setattr(body, "_with_and_without", with_and_without)
    monkeypatch.setattr(body, "_logits_under", logits_under)
    values = generated(body.diagnose())
    labels = body.data.labels(instruments.evenly(instruments.evenly(body.current), 2 * instruments.THROUGH))
    order = torch.randperm(len(labels), generator=body.rng("diagnosis"))
    assert values["shuffled_cost"] == pytest.approx(100 * float((labels[order] != labels).double().mean()))
    assert 0 < values["shuffled_cost"] < 100
    chosen = first if (labels == first).sum() >= (labels == second).sum() else second
    assert values["mean_cost"] == pytest.approx(100 * float((labels != chosen).double().mean()))


@pytest.mark.parametrize("size", [3, 128])
def test_weights_of_others_reach_their_images(body: FedLSCL, size: int) -> None:
    """In batches of any size; with their own they have their own logits."""
    fit(body, 1, 1)
    body.evaluation_batch_size = size
    images = task_images(body, 1)
    weights = body.observe(images, body._generated)["weights"]
    logits = body.observe(images, body._with_and_without(weights))["logits"]
    assert torch.equal(body._logits_under(weights, images), logits)
    assert torch.allclose(body.observe(images)["logits"], logits, atol=1e-5)
    turned = weights.flip(0)
    assert torch.allclose(
        body._logits_under(turned, images.flip(0)).flip(0), body._logits_under(turned.flip(0), images)
    )


def test_lengths_of_gradients_are_those_of_the_steps(body: FedLSCL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the steps, after they are clipped."""
    seen: list[dict[str, float]] = []

    def spy(self: FedLSCL, _: Any) -> None:
        parts: Mapping[str, Any] = {"cnn": self.cnn, "generator": self.generator, "head": self.head}
        squares = {n: sum(p.grad.square().sum() for p in part.parameters()) for n, part in parts.items()}
        seen.append({name: float(square) ** 0.5 for name, square in squares.items()})

    monkeypatch.setattr(FedLSCL, "on_before_optimizer_step", spy)
    monkeypatch.setattr(instruments, "EVERY", 2)
    body.gradient_clip, body.epochs = 1e-3, 3
    values = fit(body, 1, 1)
    assert len(seen) > 3
    seen = seen[::2]
    for name in ("cnn", "generator", "head"):
        mean = sum(step[name] for step in seen) / len(seen)
        assert values[f"gradient/{name}"] == pytest.approx(mean, rel=1e-4)
    assert seen[0]["cnn"] == 0  # while B is zero


def test_looking_changes_nothing(make: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch) -> None:
    """States, uploads and torch's random numbers are the same without it, over two tasks."""

    def whole() -> tuple[list[dict[str, Tensor]], Tensor]:
        federation = make(rounds=2)
        torch.manual_seed(0)
        list(federation.run())
        return [copy_of(restore_client(federation, index).state()) for index in range(3)], torch.rand(1)

    states, drawn = whole()
    monkeypatch.setattr(Generating, "diagnose", lambda self: {})
    monkeypatch.setattr(Generating, "on_train_batch_end", lambda self, *_: None)
    without, drawn_without = whole()
    assert torch.equal(drawn, drawn_without)
    for one, other in zip(states, without, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_small_model_that_says_the_same_of_all_is_told_once(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruments, "ALIKE", 2.0)
    with caplog.at_level(logging.WARNING, "fedlscl"):
        list(federation.run())
    (record,) = [r for r in caplog.records if "says the same of every image" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the small model of client 0 says the same of every image after task 1:")


def test_one_whose_features_differ_is_not_told(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instruments, "ALIKE", 0.0)
    list(federation.run())
    assert not [r for r in caplog.records if "says the same" in r.getMessage()]


def test_a_single_image_has_nothing_to_differ_from(body: FedLSCL) -> None:
    body.begin_round(Round(1, 1, True, 0))
    body.current = body.current[:1]
    assert body.diagnose() == {}
