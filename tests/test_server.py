"""The servers that every method can use, and the mean they take."""

from __future__ import annotations

import inspect
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor, nn

from fedlscl.messages import TensorSpec, Upload
from fedlscl.robust import average
from fedlscl.schedule import Round
from fedlscl.server import Answer, Context, FedAvg, Isolated, OnDemand, Server, Sum


def no_model() -> nn.Module:
    raise AssertionError("nobody asked for a model")


def no_trainer() -> Trainer:
    raise AssertionError("a mean needs no fit")


def upload(client: int, samples: int, **tensors: Tensor) -> Upload:
    return Upload(client, 1, 1, samples, tensors)


def context(clients: int) -> Context:
    return Context(clients, Round(1, 1, True, 0), no_trainer)


UPLOADS = {
    0: upload(0, 10, weight=torch.tensor([[1.0, 2.0]]), steps=torch.tensor(7)),
    2: upload(2, 30, weight=torch.tensor([[5.0, -2.0]]), steps=torch.tensor(3)),
}


def test_the_weighted_mean_by_hand() -> None:
    mean = average((upload.tensors, upload.samples) for upload in UPLOADS.values())
    assert mean["weight"].tolist() == [[4.0, -1.0]]
    assert mean["weight"].dtype == torch.float32
    assert mean["steps"].tolist() == 7
    assert mean["steps"].dtype == torch.int64


def test_tensors_of_every_shape_and_counters_of_every_kind() -> None:
    models = [
        {"x": torch.tensor(1.0), "y": torch.zeros(0, 3), "z": torch.ones(2, 3, 4), "n": torch.tensor([1, 9]),
         "b": torch.tensor([True, False])},
        {"x": torch.tensor(4.0), "y": torch.zeros(0, 3), "z": 7 * torch.ones(2, 3, 4), "n": torch.tensor([5, 2]),
         "b": torch.tensor([False, False])},
    ]  # fmt: skip
    mean = average(zip(models, [2, 1], strict=True))
    assert float(mean["x"]) == pytest.approx(2)
    assert mean["x"].shape == ()
    assert mean["y"].shape == (0, 3)
    torch.testing.assert_close(mean["z"], 3 * torch.ones(2, 3, 4))
    assert mean["n"].tolist() == [5, 9]
    assert mean["b"].tolist() == [True, False]


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=8).filter(any),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_what_holds_for_every_mean(weights: list[int], seed: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    models = [{"x": torch.randn(3, 2, generator=rng, dtype=torch.float64).to(dtype)} for _ in weights]
    before = [model["x"].clone() for model in models]
    mean = average(zip(models, weights, strict=True))["x"]
    assert all(torch.equal(model["x"], old) for model, old in zip(models, before, strict=True))
    assert mean.dtype == dtype

    wanted = sum(w / sum(weights) * model["x"].double() for w, model in zip(weights, models, strict=True))
    torch.testing.assert_close(mean.double(), wanted, rtol=1e-5, atol=1e-6)
    stacked = torch.stack(before)
    assert bool((mean >= stacked.amin(0) - 1e-6).all())
    assert bool((mean <= stacked.amax(0) + 1e-6).all())
    same = average((models[0], weight) for weight in weights)["x"]
    torch.testing.assert_close(same, models[0]["x"], rtol=1e-7 if dtype == torch.float32 else 1e-14, atol=0)
    scaled = average((model, 3 * w) for model, w in zip(models, weights, strict=True))["x"]
    torch.testing.assert_close(scaled, mean, rtol=1e-6, atol=1e-7)


def test_a_weight_of_zero_is_no_vote() -> None:
    models = [{"x": torch.tensor([1.0])}, {"x": torch.tensor([100.0])}]
    assert average(zip(models, [5, 0], strict=True))["x"].tolist() == [1.0]


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [3, -1], [-1, -1]])
def test_weights_that_make_no_mean_are_named(weights: list[int]) -> None:
    with pytest.raises(ValueError, match=r"weights \[.*\] must not be negative and must have a positive sum"):
        average(({"x": torch.ones(1)}, weight) for weight in weights)


def fedavg(weighting: Literal["samples", "uniform"] = "samples") -> FedAvg:
    """A server whose clients take back all that they send."""
    server = FedAvg(weighting)
    schema = {name: TensorSpec.like(tensor) for name, tensor in UPLOADS[0].tensors.items()}
    server.begin(schema, schema, no_model)
    return server


def test_fedavg_averages_what_clients_take_back_and_needs_something_to_average() -> None:
    schema = {name: TensorSpec.like(tensor) for name, tensor in UPLOADS[0].tensors.items()}
    server = FedAvg()
    server.begin(schema, {"weight": schema["weight"]}, no_model)
    assert set(server.aggregate(UPLOADS, context(1))[0][0].tensors) == {"weight"}
    with pytest.raises(ValueError, match="nothing to average"):
        server.begin(schema, {}, no_model)


def test_fedavg_answers_everyone_with_the_mean_absent_clients_included() -> None:
    answers, metrics = fedavg().aggregate(UPLOADS, context(4))
    assert metrics == {}
    assert sorted(answers) == [0, 1, 2, 3]
    for answer in answers.values():
        assert answer.tensors["weight"].tolist() == [[4.0, -1.0]]
        assert answer.tensors["steps"] == 7
    uniform, _ = fedavg("uniform").aggregate(UPLOADS, context(4))
    assert sorted(uniform) == [0, 1, 2, 3]
    assert uniform[1].tensors["weight"].tolist() == [[3.0, 0.0]]
    assert UPLOADS[0].tensors["weight"].tolist() == [[1.0, 2.0]]


def test_the_mean_of_one_upload_is_that_upload() -> None:
    answers, _ = fedavg().aggregate({2: UPLOADS[2]}, context(3))
    assert torch.equal(answers[0].tensors["weight"], UPLOADS[2].tensors["weight"])


def test_isolated_clients_send_nothing_and_get_no_answer() -> None:
    assert not Isolated.listens
    assert FedAvg.listens
    with pytest.raises(NotImplementedError, match="send nothing"):
        Isolated().aggregate(UPLOADS, context(4))


def test_a_server_must_say_how_it_aggregates_and_wants_no_images_of_its_own() -> None:
    assert inspect.isabstract(Server)
    assert FedAvg().server_images == Isolated().server_images == 0


def test_answers_on_demand_are_computed_when_asked_for() -> None:
    computed = []

    def answer(client: int) -> Answer:
        computed.append(client)
        return Answer({"x": torch.tensor(client)})

    answers = OnDemand([4, 2], answer)
    assert list(answers) == [4, 2]
    assert len(answers) == 2
    assert 3 not in answers
    assert 4 in answers
    assert computed == []
    assert answers[2].tensors["x"] == 2
    assert computed == [2]


def test_the_mean_holds_one_model_at_a_time() -> None:
    alive: set[int] = set()

    class Model(dict[str, Tensor]):
        def __init__(self, number: int) -> None:
            super().__init__(x=torch.full((2,), float(number)))
            self.number = number
            alive.add(number)
            assert len(alive) <= 2  # the one at hand and the next

        def __del__(self) -> None:
            alive.discard(self.number)

    assert average((Model(number), 1) for number in range(9))["x"].tolist() == [4.0, 4.0]


def test_sums_are_for_clients_that_expect_them() -> None:
    schema = {"x": TensorSpec((2,))}
    sums = {"x_sum": TensorSpec((2,))}
    server = Sum()
    server.begin(schema, sums, no_model)
    uploads = {index: upload(index, 1, x=torch.tensor([1.0, 2.0**-30 * index])) for index in (0, 1, 3)}
    answers, _ = server.aggregate(uploads, context(5))
    assert set(answers) == {0, 1, 3}
    assert answers[1].tensors["x_sum"].tolist() == [3.0, 2.0**-30 * 4]
    assert answers[1].tensors["x_sum"].dtype == torch.float32
    for downloads in (schema, {}, {**sums, "y_sum": TensorSpec((1,))}, {"x_sum": TensorSpec((3,))}):
        with pytest.raises(ValueError, match="not what model takes back"):
            server.begin(schema, downloads, no_model)
    with pytest.raises(ValueError, match="wants 'x_sum' back"):
        FedAvg().begin(schema, sums, no_model)
