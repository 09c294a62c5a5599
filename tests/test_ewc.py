"""EWC: the Fisher information image by image, the penalty, and both inside a federation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import copy_of, fit, make_client, outcome, parameters, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.continual import Continual, NoReplay, Step
from fedlscl.federation.algorithm import Federation
from fedlscl.losses import masked_cross_entropy
from fedlscl.messages import Download
from fedlscl.methods.ewc import EWC, fisher, penalty
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.server import FedAvg

Make = Callable[..., Federation]


def averaging(make: Make, continual: Continual) -> Federation:
    client = make_client(FedAvgClient, continual=continual, train_mask="task", buffer_size=0)
    return make(client=client, server=FedAvg())


def step(now: dict[str, Tensor], kept: dict[str, Tensor]) -> Step:
    nothing = torch.zeros(1)
    return Step(Output(nothing, nothing), nothing, nothing, nothing, {}, nothing, now, kept)


# ---- the functions


def squares(w: Tensor, points: list[tuple[float, float]]) -> Iterator[Tensor]:
    """(w x - y)^2 / 2 of each point, whose gradient is (w x - y) x."""
    for x, y in points:
        yield (w * x - y).square().sum() / 2


def test_gradients_are_squared_before_the_mean() -> None:
    w, idle = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.ones(3))
    found = fisher({"w": w, "idle": idle}, squares(w, [(1, 0), (1, 4), (3, 5)]))
    # gradients 2, -2 and 3: their mean is 1, the mean of their squares 17 / 3
    torch.testing.assert_close(found["w"], torch.tensor([17 / 3]))
    assert found["idle"].tolist() == [0, 0, 0]
    assert w.grad is None


def test_the_penalty_and_its_gradient_by_hand() -> None:
    now = {"a": nn.Parameter(torch.tensor([3.0, -1.0])), "b": nn.Parameter(torch.tensor([[2.0]]))}
    kept = {
        **{"fisher.a": torch.tensor([0.5, 9.0]), "anchor.a": torch.tensor([1.0, -1.0])},
        **{"fisher.b": torch.tensor([[2.0]]), "anchor.b": torch.tensor([[5.0]])},
    }
    loss = EWC(strength=10).collaborative_losses(step(now, kept))  # type: ignore[arg-type]
    assert set(loss) == {"ewc"}
    assert float(loss["ewc"].detach()) == 5 * (0.5 * 4 + 0 + 2 * 9)
    gradients = torch.autograd.grad(loss["ewc"], list(now.values()))
    assert [g.flatten().tolist() for g in gradients] == [[10 * 0.5 * 2, 0], [10 * 2 * -3]]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_nothing_is_to_pay_where_the_task_ended(points: list[tuple[float, float]], start: float) -> None:
    w = nn.Parameter(torch.tensor([start]))
    kept = EWC().consolidate({"w": w}, squares(w, points), {})
    assert bool((kept["fisher.w"] >= 0).all())
    assert bool((kept["fisher.w"] <= 1e-4).all())
    value = penalty({"w": w}, kept)
    (gradient,) = torch.autograd.grad(value, w)
    assert (float(value.detach()), float(gradient)) == (0, 0)


def test_the_first_task_is_free() -> None:
    assert EWC().collaborative_losses(step({"w": torch.ones(1)}, {})) == {}


# ---- what is kept


def test_what_is_new_is_clamped_and_added() -> None:
    w = nn.Parameter(torch.tensor([2.0, 0.1]))

    def losses() -> Iterator[Tensor]:
        yield w.square().sum() / 2  # the gradient is w itself

    strategy = EWC(gamma=0.5, clamp=1.0)
    first = strategy.consolidate({"w": w}, losses(), {})
    torch.testing.assert_close(first["fisher.w"], torch.tensor([1.0, 0.01]))
    assert first["anchor.w"].tolist() == w.tolist()
    before = copy_of(first)
    with torch.no_grad():
        w.copy_(torch.tensor([0.3, -5.0]))
    assert same(first, before)  # what is kept does not follow the model
    second = strategy.consolidate({"w": w}, losses(), first)
    torch.testing.assert_close(second["fisher.w"], torch.tensor([0.5 + 0.09, 0.005 + 1.0]))
    assert second["anchor.w"].tolist() == w.tolist()
    assert same(first, before)
    assert not any(tensor.requires_grad for tensor in second.values())


@pytest.mark.parametrize(("samples", "wanted"), [(2, 2), (None, 5), (9, 5)])
def test_no_more_losses_are_asked_for_than_needed(samples: int | None, wanted: int) -> None:
    w, asked = nn.Parameter(torch.ones(1)), []

    def losses() -> Iterator[Tensor]:
        for number in range(5):
            asked.append(number)
            yield number * w.sum()

    kept = EWC(clamp=100, samples=samples).consolidate({"w": w}, losses(), {})
    assert len(asked) == wanted
    assert float(kept["fisher.w"]) == sum(number**2 for number in range(wanted)) / wanted


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("strength", -1, "must be at least 0"),
        ("strength", float("nan"), "must be at least 0"),
        ("gamma", 1.5, "must be between 0 and 1"),
        ("clamp", 0, "must be positive"),
        ("samples", 0, "must be at least 1, or null"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: float, wanted: str) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"continual\.{name} is {value}, {wanted}"):
        EWC(**settings)


# ---- in a federation


def reference(body: Client, number: int, classes: Tensor) -> dict[str, Tensor]:
    """F_n of one task of the model as it is now, image by image with torch.func."""
    pixels, labels = body.data.batch("train", torch.as_tensor(body.data.tasks[number].train))
    body.eval()
    frozen = body.precompute(pixels)

    def loss(now: dict[str, Tensor], row: int) -> Tensor:
        some = slice(row, row + 1)
        inputs = (pixels[some], {name: tensor[some] for name, tensor in frozen.items()})
        return masked_cross_entropy(torch.func.functional_call(body, now, inputs).logits, labels[some], classes)

    sums = {name: torch.zeros_like(value) for name, value in parameters(body).items()}
    for row in range(len(pixels)):
        for name, gradient in torch.func.grad(loss)(parameters(body), row).items():
            sums[name] += gradient**2 / len(pixels)
    return sums


@pytest.mark.parametrize("kind", [FedAvgClient, FedLSCL])
def test_the_received_model_is_measured_and_rows_of_new_classes_are_free(make: Make, kind: type[Client]) -> None:
    client = make_client(kind, continual=EWC(clamp=1e9, samples=None), train_mask="task")
    body: Any = restore_client(make(client=client, server=FedAvg() if kind is FedAvgClient else ExactO2D()), 0)
    fit(body, 1, 1)
    assert body.memory.kept == {}
    body.download(Download(0, 1, 1, 0, {n: t + 0.01 for n, t in copy_of(body.shared()).items()}))
    received = parameters(body)
    first = body.data.class_mask(0, 1)
    wanted = reference(body, 0, first)
    fit(body, 2, 2)
    kept = copy_of(body.memory.kept)
    assert set(kept) == {f"{group}.{name}" for group in ("fisher", "anchor") for name in received}
    for name, value in received.items():
        assert torch.equal(kept[f"anchor.{name}"], value)
        torch.testing.assert_close(kept[f"fisher.{name}"], wanted[name], rtol=1e-3, atol=1e-7)
    rows = kept["fisher.head.weight"].abs().sum(dim=1) + kept["fisher.head.bias"]
    assert torch.equal(rows > 0, first)
    fit(body, 2, 3)
    assert same(kept, body.memory.kept)  # once a task


def test_without_its_term_it_is_fedavg_to_the_last_bit(make: Make) -> None:
    one, two = averaging(make, NoReplay()), averaging(make, EWC(strength=0))
    assert outcome(run(one)) == outcome(run(two))
    for index in range(3):
        plain = copy_of(restore_client(one, index).state())
        held = copy_of(restore_client(two, index).state())
        assert same(plain, {name: tensor for name, tensor in held.items() if ".kept." not in name})


def test_a_strong_penalty_keeps_what_matters_in_place(make: Make) -> None:
    left = []
    for strength in (0.0, 1e6):
        body = restore_client(averaging(make, EWC(strength=strength)), 0)
        fit(body, 1, 1)
        fit(body, 2, 2)
        left.append(float(penalty(parameters(body), body.memory.kept)))
    assert 0 < left[1] < 0.5 * left[0]
