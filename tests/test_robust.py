"""Averages that one upload cannot take over, and uploads beside each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.messages import TensorSpec, Upload
from fedlscl.robust import ALL, CHANGE, SAMPLES, Averaging, average, change, medians, outliers, sizes
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg

Models = list[tuple[dict[str, Tensor], int]]


def models(*rows: list[float], weight: int = 1) -> Models:
    return [({"x": torch.tensor(row)}, weight) for row in rows]


# ---- averages


def test_without_robustness_it_is_the_mean_to_the_last_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    sent = [({"x": torch.randn(7, generator=rng)}, n) for n in (3, 5, 9)]
    assert torch.equal(Averaging()(sent, {})["x"], average(sent)["x"])
    assert Averaging().state() == {}


def test_the_median_of_each_number_by_hand() -> None:
    """Of three the middle one, of four the mean of the middle two; weights are without effect, counters likewise."""
    sent: Models = [
        ({"x": torch.tensor([1.0, 9.0]), "n": torch.tensor(7)}, 1),
        ({"x": torch.tensor([2.0, 1e15]), "n": torch.tensor(2**40)}, 10**6),
        ({"x": torch.tensor([-1e15, 5.0]), "n": torch.tensor(3)}, 1),
    ]
    found = Averaging("median")(sent, {})
    assert found["x"].tolist() == [1.0, 9.0]
    assert found["n"].tolist() == 7
    assert found["x"].dtype == torch.float32
    assert Averaging("median")(models([1.0], [2.0], [4.0], [100.0]), {})["x"].tolist() == [3.0]


@pytest.mark.parametrize(
    ("trim", "clients", "left"),
    [(0.2, 5, [1, 2, 3]), (0.2, 3, [1]), (0.01, 4, [1, 2]), (0.4, 10, [4, 5]), (0.2, 2, [0, 1]), (0.2, 1, [0])],
)
def test_a_trimmed_mean_leaves_out_a_fraction_at_either_end(trim: float, clients: int, left: list[int]) -> None:
    """Rounded up, so that one bad client of three has no say; where there are too few, all count."""
    values = [float(2**n) for n in range(clients)]
    found = Averaging("trimmed_mean", trim)(models(*[[v] for v in values[::-1]]), {})["x"]
    assert found.tolist() == pytest.approx([sum(values[n] for n in left) / len(left)])


def test_clipping_scales_a_far_update_to_the_median_length() -> None:
    """Updates from (1, 0) of lengths 1, 2 and 100: the last becomes 2 long, in its own direction."""
    start = {"x": torch.tensor([1.0, 0.0])}
    averaging = Averaging("clip")
    sent = models([1.0, 1.0], [3.0, 0.0], [1.0, -100.0], weight=2)
    found = averaging(sent, start)["x"]
    assert found.tolist() == pytest.approx([5 / 3, -1 / 3])
    # and the next updates are those from this answer, also in a server that goes on from what it remembered
    other = Averaging("clip")
    other.load(averaging.state())
    near = models(*[[float(v) for v in found + step] for step in (torch.tensor([0.0, 0.1]),) * 2], [500.0, 0.0])
    moved = other(near, start)["x"] - found
    assert float(moved.norm()) <= 0.1 + 1e-5


def test_clipping_leaves_equal_updates_and_counters_alone() -> None:
    sent: Models = [({"x": torch.tensor([2.0]), "n": torch.tensor(5)}, 1)] * 3
    found = Averaging("clip")(sent, {"x": torch.zeros(1), "n": torch.tensor(0)})
    assert found["x"].tolist() == [2.0]
    assert found["n"].tolist() == 5


@given(
    st.sampled_from(["median", "trimmed_mean", "clip"]),
    st.lists(st.floats(-1, 1), min_size=4, max_size=8),
    st.floats(-1e15, 1e15),
)
@settings(max_examples=60, deadline=None)
def test_one_client_cannot_move_it_beyond_the_others(robust: str, honest: list[float], bad: float) -> None:
    found = Averaging(robust)(models(*[[v] for v in honest], [bad]), {})["x"]  # type: ignore[arg-type]
    assert min(*honest, -1.0) - 1e-5 <= float(found) <= max(*honest, 1.0) + 1e-5


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"robust": "mode"}, "server.robust is mode, must be none, clip, median or trimmed_mean"),
        ({"trim": 0.5}, "server.trim is 0.5, must be above 0 and below 0.5"),
        ({"trim": math.nan}, "server.trim is nan"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FedAvg(**fields)  # type: ignore[arg-type]


def test_fedavg_with_a_median_answers_with_it() -> None:
    server = FedAvg(robust="median")
    schema = {"x": TensorSpec((1,))}
    server.begin(schema, schema, lambda: pytest.fail("no model is wanted"))
    uploads = {n: Upload(n, 1, 1, 1, {"x": torch.tensor([v])}) for n, v in enumerate((1.0, 3.0, 1e15))}
    context = Context(3, Round(1, 1, False, 0), lambda: pytest.fail("nothing is trained"))
    answers, _ = server.aggregate(uploads, context)
    assert answers[0].tensors["x"].tolist() == [3.0]


# ---- uploads beside each other


def test_the_size_of_a_tensor_is_its_root_mean_square() -> None:
    found = sizes({"x": torch.tensor([3.0, 4.0]), "y": torch.zeros(2), "n": torch.tensor([10**6])})
    assert found == {"x": pytest.approx(math.sqrt(12.5)), "y": 0.0, ALL: pytest.approx(2.5)}


def three(x: float, **more: float) -> dict[int, dict[str, float]]:
    return {0: {"x": 1.0, ALL: 1.0}, 1: {"x": x, ALL: x, **more}, 2: {"x": 2.0, ALL: 2.0}}


def test_who_is_far_above_the_median_is_named() -> None:
    assert outliers(three(199.0), {}, 100) == {}  # the median is 2
    (reason,) = outliers(three(201.0), {}, 100).values()
    assert reason == "the root mean square of 'x' is 201, more than 100 times the 2 that is usual"
    assert list(outliers({**three(1.0), 3: {"x": 1e15}, 4: {"x": 1.0}}, {}, 100)) == [3]


def test_small_values_make_nobody_an_outlier() -> None:
    """A client that sends next to nothing must not put the others in the wrong."""
    assert outliers(three(1e-9), {}, 100) == {}
    assert outliers({0: {"x": 1.0, ALL: 1.0}, 1: {"x": 0.0, ALL: 0.0}}, {"x": 1.0, ALL: 1.0}, 100) == {}


def test_of_two_the_start_decides_and_one_is_compared_with_it() -> None:
    before = {"x": 1.0, ALL: 1.0}
    two = {0: {"x": 1e9, ALL: 1e9}, 1: {"x": 2.0, ALL: 2.0}}
    assert list(outliers(two, before, 100)) == [0]
    assert outliers(two, {}, 100) == {}  # nobody can say which of them is wrong
    assert list(outliers({0: {"x": 101.0, ALL: 101.0}}, before, 100)) == [0]
    assert outliers({0: {"y": 1e9, ALL: 1e9}}, before, 100) == {}  # nothing is known of y


def test_where_the_others_send_zeros_or_nothing_all_that_they_send_is_the_measure() -> None:
    found = {0: {"x": 0.0, ALL: 1.0}, 1: {"x": 50.0, ALL: 1.0}, 2: {"x": 0.0, ALL: 1.0}}
    assert outliers(found, {}, 100) == {}
    found[1]["x"] = 1e6
    assert list(outliers(found, {}, 100)) == [1]
    alone = {0: {ALL: 1.0}, 1: {ALL: 1.0, "optional": 1e15}, 2: {ALL: 1.0}}
    assert list(outliers(alone, {}, 100)) == [1]


def test_a_number_of_samples_that_nobody_knows_is_compared_as_well() -> None:
    found = three(1.0)
    for client, samples in enumerate((40.0, 1e17, 60.0)):
        found[client][SAMPLES] = samples
    assert outliers(found, {}, 100) == {1: "the number of samples is 1e+17, more than 100 times the 60 that is usual"}


def test_a_change_is_that_of_what_both_have() -> None:
    sent = {"x": torch.tensor([4.0, 6.0]), "n": torch.tensor([9]), "other shape": torch.ones(3), "own": torch.ones(1)}
    common = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor([1]), "other shape": torch.ones(2)}
    assert change(sent, common) == {CHANGE: pytest.approx(math.sqrt(12.5))}
    assert change(sent, {}) == {}


def test_one_client_cannot_make_a_plain_mean_grow_without_end() -> None:
    """Each upload is 50 times what its client was given, so below 100 times the median, and the mean grows 17 times."""
    common: dict[str, torch.Tensor] = {"x": torch.ones(4)}
    said: list[str] = []
    for _ in range(20):
        sent = {n: {"x": common["x"] + 0.1 * (-1) ** n} for n in range(3)}
        sent[1] = {"x": 50 * common["x"]}
        found = {n: {**sizes(tensors), **change(tensors, common)} for n, tensors in sent.items()}
        assert outliers({n: sizes(tensors) for n, tensors in sent.items()}, {}, 100) == {}
        reasons = outliers(found, {}, 100)
        assert set(reasons) == {1}
        said += reasons.values()
        common = average((tensors, 1) for n, tensors in sent.items() if n not in reasons)
    assert said[0] == (
        "the root mean square of what it changed of the common model is 49, more than 100 times the 0.1 that is usual"
    )


def test_medians_are_those_of_who_sent_it() -> None:
    assert medians({0: {"x": 1.0}, 1: {"x": 5.0, "y": 2.0}, 2: {"x": 3.0}}) == {"x": 3.0, "y": 2.0}
