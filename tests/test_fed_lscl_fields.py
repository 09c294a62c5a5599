"""Fields of Fed-LSCL that are off by default, and Eq. 4 in one mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CNN,
    fit,
    make_client,
    make_trainer,
    output_of,
    parameters,
    restore_client,
    task_images,
    train_images,
)
from torch import Tensor, nn

from fedlscl.batches import Batch
from fedlscl.continual import Continual, Replay
from fedlscl.federation.algorithm import Federation
from fedlscl.losses import masked_cross_entropy
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.lwf import GeneratedLwF
from fedlscl.models.cnn import SmallModel, SmallModelSpec
from fedlscl.schedule import Round

Make = Callable[..., Federation]


def client_of(make: Make, **changes: Any) -> FedLSCL:
    client: FedLSCL = restore_client(make(client=make_client(**changes)), 0)
    return client


def first_batch(body: FedLSCL, phase: str) -> Batch:
    """Of task 2, after one round of task 1."""
    fit(body, 1, 1)
    body.begin_round(Round(2, 2, False, 0))
    body.trainer = make_trainer()
    body.on_train_start()
    return next(batch for batch in body.train_dataloader() if batch.phase == phase)


def test_features_of_the_same_weights_are_at_no_distance(make: Make) -> None:
    """The small model has batch normalisation, which would tell the modes apart."""
    body = client_of(make, continual=Replay(lambda_e=1.0, lambda_w=1.0))
    batch = first_batch(body, "replay")
    assert any(isinstance(module, nn.BatchNorm2d) for module in body.cnn.modules())
    terms = body.losses(batch)
    assert terms["features"].item() < 1e-10
    assert terms["weights"].item() < 1e-10
    body.cnn.train()
    assert body.phase_losses(body.output(batch.images), batch)["features"].item() > 1e-3


@pytest.mark.parametrize("continual", [Replay(), GeneratedLwF()])
def test_in_the_collaborative_phase_the_small_model_is_in_training_mode(make: Make, continual: Continual) -> None:
    body = client_of(make, continual=continual)
    batch = first_batch(body, "collaborate")
    for mode in (False, True):
        body.cnn.train(mode)
        body.losses(batch)
        assert body.cnn.training


def test_a_replay_step_moves_the_small_model_and_not_its_statistics(make: Make) -> None:
    body = client_of(make)
    batch = first_batch(body, "replay")
    before = {name: buffer.clone() for name, buffer in body.cnn.named_buffers()}
    weights = [parameter for parameter in body.cnn.parameters() if parameter.ndim == 4]
    gradients = torch.autograd.grad(torch.stack(list(body.losses(batch).values())).sum(), weights)
    assert all(torch.equal(before[name], buffer) for name, buffer in body.cnn.named_buffers())
    assert all(bool(gradient.any()) for gradient in gradients)


def features_before(standardise: Any, images: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """The features as they are standardised, and of length 1."""
    torch.manual_seed(0)
    model = SmallModel(SmallModelSpec(**CNN), "resnet18", standardise=standardise).train(training)
    seen: list[Tensor] = []
    model.standardise.register_forward_hook(lambda _, inputs, output: seen.append(output))
    return model(images), seen[0]


def test_features_are_standardised_before_their_length_is_set() -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unit, rows = features_before("layer", images, training=True)
    assert torch.allclose(rows.mean(1), torch.zeros(6), atol=1e-5)
    assert torch.allclose(unit, rows / rows.norm(dim=1, keepdim=True), atol=1e-6)
    unit, columns = features_before("batch", images, training=True)
    assert torch.allclose(columns.mean(0), torch.zeros(16), atol=1e-5)
    assert torch.allclose(unit.norm(dim=1), torch.ones(6))
    # in evaluation an image's features depend on nothing but it
    together, one = (features_before("batch", part, training=False)[0] for part in (images, images[:1]))
    assert torch.allclose(together[:1], one, atol=1e-5)
    _, affine = features_before("layer_affine", images, training=True)
    assert torch.allclose(affine, rows)  # as it starts


def test_a_linear_map_may_follow_features_that_are_as_wide() -> None:
    spec = SmallModelSpec(**{**CNN, "features": 8})  # the width of the CNN
    assert isinstance(SmallModel(spec, "resnet18").project, nn.Identity)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert bool((SmallModel(spec, "resnet18")(images) >= 0).all())
    assert bool((SmallModel(spec, "resnet18", linear=True)(images) < 0).any())


def test_a_loss_of_the_small_models_own(make: Make) -> None:
    body = client_of(make, own_loss=0.5)
    before = parameters(body)
    batch = first_batch(body, "replay")
    assert not torch.equal(body.own_head.weight, before["own_head.weight"])
    terms = body.losses(batch)
    features = output_of(body, batch.images.pixels).generated["features"]
    expected = masked_cross_entropy(body.own_head(4 * features), batch.images.labels, body.seen_mask)
    assert terms["own"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert set(body.outgoing()) == {"weight", "bias", "features"}
    moved = next(body.cnn.parameters()), body.generator.weight
    of_cnn, of_generator = torch.autograd.grad(terms["own"], moved, allow_unused=True)
    assert bool(of_cnn.any())
    assert of_generator is None


def test_without_it_there_is_no_head_for_it(body: FedLSCL) -> None:
    assert not hasattr(body, "own_head")
    assert "own" not in body.losses(first_batch(body, "collaborate"))


def test_b_may_start_away_from_zero(make: Make, body: FedLSCL) -> None:
    other = client_of(make, start=0.1)
    size_a = 2 * 32
    assert not body.generator.weight[size_a:].any()
    assert other.generator.weight[size_a:].std().item() == pytest.approx(0.1, rel=0.1)
    images, _ = train_images(other, task_images(other, 1))
    frozen = other.precompute(images)
    assert not torch.allclose(other(images, frozen).representation, other.vit(images), atol=1e-4)


def test_parts_have_rates_of_their_own(make: Make) -> None:
    body = client_of(make, learning_rate=0.01, cnn_rate=0.5, generator_rate=2, head_rate=10, own_loss=1)
    groups = body.configure_optimizers().param_groups
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(body.parameters())) == len(rate_of)
    wanted = {"cnn": 0.005, "generator": 0.02, "head": 0.1, "own_head": 0.1}
    for name, parameter in body.named_parameters():
        assert rate_of[id(parameter)] == pytest.approx(wanted[name.partition(".")[0]])


def test_the_head_may_have_a_hidden_layer(make: Make) -> None:
    body = client_of(make, head_hidden=5)
    assert [tuple(p.shape) for p in body.head.parameters()] == [(5, 32), (5,), (8, 5), (8,)]


@pytest.mark.parametrize("name", ["own_loss", "start", "cnn_rate", "generator_rate", "head_rate", "head_hidden"])
def test_numbers_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name} is -1, must be at least 0"):
        make_client(FedLSCL, **{name: -1})
