"""LwF: distillation over the learned classes, Eq. 4 on current images, and both inside a federation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CNN, copy_of, fit, make_client, outcome, output_of, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.continual import Continual, NoReplay, Replay, Step
from fedlscl.federation.algorithm import Federation
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.lwf import GeneratedLwF, LwF, softened_cross_entropy
from fedlscl.server import FedAvg

Make = Callable[..., Federation]
OLD = torch.tensor([True, True, False])
BOTH = torch.ones(2)


def client(kind: type[Client], continual: Continual, **settings: Any) -> Client:
    return make_client(kind, continual=continual, train_mask="task", **settings)


def step(output: Output, snapshot: dict[str, Tensor], observed: Tensor = BOTH, learned: Tensor = OLD) -> Step:
    seen = torch.ones(3, dtype=torch.bool)
    return Step(output, torch.tensor([2, 2]), seen, learned, snapshot, observed, {}, {})


# ---- logits


def test_the_softened_cross_entropy_by_hand() -> None:
    # at T = 2 the old columns give p = (3/4, 1/4) and q = (1/2, 1/2); the third column has no part in it
    now = torch.tensor([[2 * math.log(3), 0.0, 50.0]])
    before = torch.tensor([[1.0, 1.0, -50.0]])
    wanted = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert float(softened_cross_entropy(now, before, OLD, torch.ones(1), 2.0)) == pytest.approx(wanted, rel=1e-6)
    loss = LwF(strength=3).collaborative_losses(step(Output(now, now), {"logits": before}, torch.ones(1)))
    assert set(loss) == {"lwf"}
    assert float(loss["lwf"]) == pytest.approx(3 * wanted, rel=1e-6)


def test_only_observed_samples_count() -> None:
    now, before = torch.randn(2, 3), torch.randn(2, 3)
    one = softened_cross_entropy(now[:1], before[:1], OLD, torch.ones(1), 2.0)
    assert torch.equal(softened_cross_entropy(now, before, OLD, torch.tensor([1.0, 0.0]), 2.0), one)
    assert softened_cross_entropy(now, before, OLD, torch.zeros(2), 2.0) == 0


@given(st.integers(0, 1000), st.integers(1, 5), st.floats(0.5, 5))
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_the_difference_of_the_predictions(seed: int, samples: int, temperature: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    now, before = (torch.randn(samples, 4, generator=rng).requires_grad_() for _ in range(2))
    classes = torch.tensor([True, False, True, True])
    softened_cross_entropy(now, before, classes, torch.ones(samples), temperature).backward()
    assert before.grad is None  # the teacher is frozen
    assert now.grad is not None
    p, q = (torch.softmax(z.detach()[:, classes] / temperature, 1) for z in (now, before))
    torch.testing.assert_close(now.grad[:, classes], (p - q) / temperature / samples)
    assert not now.grad[:, ~classes].any()


def test_an_unchanged_model_has_nothing_to_learn() -> None:
    logits = torch.randn(2, 3).requires_grad_()
    LwF().collaborative_losses(step(Output(logits, logits), {"logits": logits.detach().clone()}))["lwf"].backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-7


def test_without_an_old_class_only_the_cross_entropy_is_left() -> None:
    logits = torch.randn(2, 3).requires_grad_()
    assert LwF().collaborative_losses(step(Output(logits, logits), {})) == {}
    loss = softened_cross_entropy(logits, logits, ~OLD & OLD, BOTH, 2.0)
    loss.backward()
    assert loss.detach() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


# ---- what is generated

NOW = {"features": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "weights": torch.tensor([[1.0, 1, 1], [0, 0, 0]])}
BEFORE = {"features": torch.tensor([[0.0, 0.0], [0.0, 5.0]]), "weights": torch.tensor([[0.0, 0, 0], [0, 0, 4]])}


def generated(values: dict[str, Tensor]) -> Output:
    return Output(torch.zeros(2, 3), torch.zeros(2, 1), values)


def test_the_distances_have_their_weights() -> None:
    strategy = GeneratedLwF(lambda_e=3.0, lambda_w=0.5)
    got = strategy.collaborative_losses(step(generated(NOW), BEFORE))
    assert {name: float(term) for name, term in got.items()} == {"features": 3 * (1 + 9) / 2, "weights": (3 + 16) / 4}
    got = strategy.collaborative_losses(step(generated(NOW), BEFORE, torch.tensor([1.0, 0.0])))
    assert {name: float(term) for name, term in got.items()} == {"features": 3, "weights": 1.5}
    assert strategy.preserved(generated(NOW)) == NOW
    assert strategy.collaborative_losses(step(generated(NOW), {})) == {}


def test_unchanged_features_and_weights_have_no_gradient() -> None:
    now = {name: value.clone().requires_grad_() for name, value in NOW.items()}
    terms = GeneratedLwF().collaborative_losses(step(generated(now), NOW))
    for name, gradient in zip(now, torch.autograd.grad(sum(terms.values()), list(now.values())), strict=True):  # type: ignore[arg-type]
        assert float(terms[name].detach()) == 0
        assert not gradient.any()


def test_the_weights_are_those_of_replay() -> None:
    assert GeneratedLwF().weights == Replay().weights


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (LwF, "strength", -1, "must be at least 0"),
        (LwF, "temperature", 0, "must be positive"),
        (GeneratedLwF, "lambda_e", -1, "must be at least 0"),
        (GeneratedLwF, "lambda_w", -1, "must be at least 0"),
    ],
)
def test_a_bad_setting_is_named(kind: Any, name: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"continual\.{name} is {value}, {wanted}"):
        kind(**{name: value})


# ---- in a federation


def test_the_strategy_for_generated_weights_refuses_a_model_without(make: Make) -> None:
    body = restore_client(make(client=client(FedAvgClient, GeneratedLwF()), server=FedAvg()), 0)
    with pytest.raises(ValueError, match=r"generates nothing .* take LwF"):
        fit(body, 1, 1)


@pytest.mark.parametrize(
    ("kind", "continual", "names"),
    [(FedAvgClient, LwF(), {"logits"}), (FedLSCL, GeneratedLwF(), {"features", "weights"})],
)
def test_the_snapshot_is_of_the_received_model_on_current_images(
    make: Make, kind: type[Client], continual: Continual, names: set[str]
) -> None:
    federation = make(client=client(kind, continual), server=FedAvg() if kind is FedAvgClient else ExactO2D())
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    assert body.memory.snapshot == {}
    body.eval()
    pixels, _ = body.data.batch("train", torch.as_tensor(body.data.tasks[1].train))
    with torch.no_grad():
        output = output_of(body, pixels)
    wanted = {"logits": output.logits, **output.generated}
    fit(body, 2, 2)
    snapshot = copy_of(body.memory.snapshot)
    assert set(snapshot) == names
    for name, value in snapshot.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    fit(body, 2, 3)
    assert same(snapshot, body.memory.snapshot)  # frozen for the task
    assert not any(phase == "replay" for phase, _ in body.plan)


def test_the_old_classes_are_the_clients_own(make: Make) -> None:
    """Rows of the head for classes that are neither learned nor current are left alone, learned ones are not."""
    for continual in (LwF(), NoReplay()):
        body: Any = restore_client(make(client=client(FedAvgClient, continual), server=FedAvg()), 0)
        fit(body, 1, 1)
        before = body.head.weight.detach().clone()
        fit(body, 2, 2)
        moved = (body.head.weight.detach() != before).any(dim=1)
        assert torch.equal(moved, body.seen_mask if isinstance(continual, LwF) else body.current_mask)


@pytest.mark.parametrize(
    ("kind", "continual"), [(FedAvgClient, LwF(strength=0)), (FedLSCL, GeneratedLwF(lambda_e=0, lambda_w=0))]
)
def test_without_its_term_nothing_changes_to_the_last_bit(make: Make, kind: type[Client], continual: Continual) -> None:
    def server() -> Any:
        return FedAvg() if kind is FedAvgClient else ExactO2D()

    one = make(client=client(kind, NoReplay()), server=server())
    two = make(client=client(kind, continual), server=server())
    assert outcome(run(one)) == outcome(run(two))
    for index in range(3):
        plain = copy_of(restore_client(one, index).state())
        kept = copy_of(restore_client(two, index).state())
        assert same(plain, {name: tensor for name, tensor in kept.items() if ".snapshot." not in name})


def test_a_strong_term_keeps_the_generated_weights_in_place(make: Make) -> None:
    # with batch normalisation the model in training would not be the one that is compared here
    cnn = {**CNN, "model_args": {**CNN["model_args"], "norm_layer": "groupnorm1"}}
    distances = []
    for strength in (0.0, 100.0):
        started = client(FedLSCL, GeneratedLwF(strength, strength), epochs=6)
        federation = make(client=started, server=ExactO2D(), cnn=cnn)
        body: Any = restore_client(federation, 0)
        fit(body, 1, 1)
        fit(body, 2, 2)
        body.eval()
        pixels, _ = body.data.batch("train", body.current)
        with torch.no_grad():
            now = body.generate(pixels)
        distances.append([float((now[name] - value).square().sum()) for name, value in body.memory.snapshot.items()])
    assert all(held < 0.5 * free for free, held in zip(*distances, strict=True))
