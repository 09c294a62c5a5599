"""The masks and the metrics, against numbers worked out by hand and against the formulas' own invariants."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlscl.evaluation import (
    MASKS,
    MaskedAccuracy,
    average_incremental,
    backward_transfer,
    final_average,
    forgetting,
    masked_correct,
    summarise,
    table1,
)

NAN = float("nan")
PROPERTY = settings(max_examples=50, deadline=None)

# Two clients, three tasks; the expected values below are worked out on paper.
EXAMPLE = np.array(
    [
        [[80, NAN, NAN], [60, 90, NAN], [70, 50, 100]],
        [[40, NAN, NAN], [50, 60, NAN], [20, 30, 40]],
    ]
)


@st.composite
def accuracies(draw: st.DrawFn, min_tasks: int = 1) -> np.ndarray:
    """Draw a finished accuracy array (clients, N, N)."""
    clients, tasks = draw(st.integers(1, 4)), draw(st.integers(min_tasks, 4))
    acc = draw(arrays(np.float64, (clients, tasks, tasks), elements=st.floats(0, 100, width=32)))
    acc[:, np.triu(np.ones((tasks, tasks), dtype=bool), 1)] = np.nan
    return acc


def mask(classes: set[int], num_classes: int) -> torch.Tensor:
    return torch.tensor([label in classes for label in range(num_classes)])


def test_masks_limit_what_can_be_predicted() -> None:
    logits = torch.tensor([[9.0, 5.0, 7.0, 1.0, 0.0], [0.0, 5.0, 1.0, 8.0, 9.0], [0.0, 1.0, 2.0, 9.0, 0.0]])
    # Best of {1, 3}: 1, 3, 3. Best of {1, 2, 3}: 2, 3, 3. Best of {1, 2, 3, 4}: 2, 4, 3. Best of all: 0, 4, 3.
    masks = mask({1, 3}, 5).expand(3, 5), mask({1, 2, 3}, 5), mask({1, 2, 3, 4}, 5)
    correct = masked_correct(logits, torch.tensor([1, 3, 3]), *masks)
    assert tuple(correct) == MASKS
    assert correct["task"].tolist() == [True, True, True]
    assert correct["seen"].tolist() == [False, True, True]
    assert correct["federation"].tolist() == [False, False, True]
    assert correct["none"].tolist() == [False, False, True]
    # with the last class unknown to everybody, it is the second image's answer under no mask but the widest
    correct = masked_correct(logits, torch.tensor([1, 3, 3]), *masks[:2], mask({1, 2, 3}, 5))
    assert correct["federation"].tolist() == [False, True, True]


@PROPERTY
@given(st.integers(0, 2**31))
def test_a_wider_mask_never_helps(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 6, generator=rng)
    labels = torch.tensor([2, 5])[torch.randint(2, (16,), generator=rng)]
    widening = mask({2, 5}, 6).expand(16, 6), mask({0, 2, 5}, 6), mask({0, 2, 3, 5}, 6)
    correct = masked_correct(logits, labels, *widening)
    for narrow, wide in pairwise(MASKS):
        assert bool((correct[wide] <= correct[narrow]).all())
    every = masked_correct(logits, labels, *[mask(set(range(6)), 6).expand(16, 6)] * 3)
    assert torch.equal(every["task"], every["none"])


def test_every_sample_has_its_own_task() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    masks = torch.stack([mask({0}, 3), mask({1, 2}, 3)])
    correct = masked_correct(logits, torch.tensor([0, 1]), masks, mask({0, 1}, 3), mask({0, 1}, 3))
    assert correct["task"].tolist() == [True, False]


def test_hand_computed_example() -> None:
    assert table1(EXAMPLE) == [60, 75, 70]
    assert final_average(EXAMPLE) == pytest.approx((220 / 3 + 90 / 3) / 2)
    assert average_incremental(EXAMPLE) == pytest.approx(((80 + 75 + 220 / 3) / 3 + (40 + 55 + 30) / 3) / 2)
    # Client 0: (80 - 70, 90 - 50); client 1: (50 - 20, 60 - 30).
    assert forgetting(EXAMPLE) == pytest.approx(((10 + 40) / 2 + (30 + 30) / 2) / 2)
    # Client 0: (70 - 80, 50 - 90); client 1: (20 - 40, 30 - 60).
    assert backward_transfer(EXAMPLE) == pytest.approx(((-10 - 40) / 2 + (-20 - 30) / 2) / 2)


def test_the_last_row_is_not_in_the_maximum_of_forgetting() -> None:
    acc = np.array([[[50, NAN], [70, 90]]])
    assert forgetting(acc) == -20
    assert backward_transfer(acc) == 20


@PROPERTY
@given(st.floats(0, 100), st.integers(1, 3), st.integers(2, 4))
def test_a_constant_array_forgets_nothing(value: float, clients: int, tasks: int) -> None:
    acc = np.where(np.tril(np.ones((tasks, tasks), dtype=bool)), value, np.nan)[None].repeat(clients, 0)
    assert forgetting(acc) == backward_transfer(acc) == 0
    assert table1(acc) == pytest.approx([value] * tasks)
    assert final_average(acc) == pytest.approx(value)
    assert average_incremental(acc) == pytest.approx(value)


@PROPERTY
@given(accuracies(min_tasks=2))
def test_forgetting_is_at_least_minus_backward_transfer(acc: np.ndarray) -> None:
    lost, transfer = forgetting(acc), backward_transfer(acc)
    assert lost is not None
    assert transfer is not None
    assert lost >= -transfer - 1e-9


@PROPERTY
@given(accuracies(), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(acc: np.ndarray, random: object) -> None:
    order = list(range(len(acc)))
    random.shuffle(order)  # type: ignore[attr-defined]
    before, after = summarise(acc), summarise(acc[order])
    assert after.pop("matrix") == [before["matrix"][client] for client in order]
    before.pop("matrix")
    for name, value in before.items():
        assert after[name] == (None if value is None else pytest.approx(value))


@PROPERTY
@given(accuracies(min_tasks=2))
def test_a_federation_with_one_task_left_is_judged_on_the_others(acc: np.ndarray) -> None:
    unfinished = acc.copy()
    unfinished[:, -1] = np.nan
    whole, part = summarise(acc[:, :-1, :-1]), summarise(unfinished)
    assert len(part.pop("matrix")[0]) == acc.shape[1]
    whole.pop("matrix")
    assert part == whole


def test_one_task_has_neither_forgetting_nor_transfer() -> None:
    summary = summarise(EXAMPLE[:, :1, :1])
    assert summary["forgetting"] is None
    assert summary["backward_transfer"] is None
    assert summary["final_average"] == summary["average_incremental"] == 60
    assert summary["table1"] == [60]


def test_summary_is_json_with_null_where_nothing_was_measured() -> None:
    summary = json.loads(json.dumps(summarise(EXAMPLE), allow_nan=False))
    assert summary["matrix"] == [
        [[80, None, None], [60, 90, None], [70, 50, 100]],
        [[40, None, None], [50, 60, None], [20, 30, 40]],
    ]
    assert summary["table1"] == table1(EXAMPLE)
    assert summary["forgetting"] == forgetting(EXAMPLE)
    assert summary["backward_transfer"] == backward_transfer(EXAMPLE)


def test_a_client_without_test_images_of_a_task_counts_only_where_it_has_some() -> None:
    acc = EXAMPLE.copy()
    acc[1, :, 1] = NAN
    assert table1(acc) == [60, 90, 70]
    assert final_average(acc) == pytest.approx((220 / 3 + 30) / 2)
    assert forgetting(acc) == pytest.approx((25 + 30) / 2)
    assert backward_transfer(acc) == pytest.approx((-25 - 20) / 2)


@pytest.mark.parametrize(
    ("acc", "message"),
    [
        (np.zeros((2, 3)), r"got shape \(2, 3\)"),
        (np.zeros((1, 2, 3)), r"got shape \(1, 2, 3\)"),
        (np.full((1, 1, 1), 101.0), "0 to 100"),
        (np.zeros((1, 2, 2)), "later than"),
        (np.full((1, 2, 2), NAN), "first tasks"),
        (np.array([[[NAN, NAN], [1.0, 2.0]]]), "first tasks"),
    ],
)
def test_arrays_that_are_no_accuracy_are_refused(acc: np.ndarray, message: str) -> None:
    for metric in (table1, final_average, average_incremental, forgetting, backward_transfer, summarise):
        with pytest.raises(ValueError, match=message):
            metric(acc)


# ---- the metric that a client is tested with


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_metric_is_the_share_of_hits_by_task_however_it_is_fed(seed: int, size: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, 6, dtype=torch.bool)
    masks[0, [0, 3]], masks[1, [1, 4]] = True, True  # classes 2 and 5 are not the client's
    labels = torch.tensor([0, 3, 1, 4])[torch.randint(4, (17,), generator=rng)]
    logits = torch.randn(17, 6, generator=rng)
    federation = mask({0, 1, 3, 4, 5}, 6)  # class 5 is of another client
    metric = MaskedAccuracy(masks, federation)
    for part in torch.split(torch.arange(17), size):
        metric.update(logits[part], labels[part])
    found = metric.compute()
    assert tuple(found) == MASKS
    of_task = {0: 0, 3: 0, 1: 1, 4: 1}
    for number in (0, 1):
        rows = [row for row in range(17) if of_task[int(labels[row])] == number]
        for name, classes in (
            ("task", masks[number].nonzero().flatten().tolist()),
            ("seen", [0, 1, 3, 4]),
            ("federation", [0, 1, 3, 4, 5]),
            ("none", [*range(6)]),
        ):
            hits = [max(classes, key=lambda c, row=row: float(logits[row, c])) == int(labels[row]) for row in rows]
            wanted = 100 * sum(hits) / len(hits) if hits else math.nan
            assert found[name][number] == pytest.approx(wanted, nan_ok=True)


def test_the_metric_belongs_to_no_state_and_starts_afresh() -> None:
    metric = MaskedAccuracy(torch.eye(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    assert metric.state_dict() == {}
    metric.update(torch.eye(2), torch.tensor([0, 0]))
    assert metric.compute() == {"task": [100.0, pytest.approx(math.nan, nan_ok=True)],
                                "seen": [50.0, pytest.approx(math.nan, nan_ok=True)],
                                "federation": [50.0, pytest.approx(math.nan, nan_ok=True)],
                                "none": [50.0, pytest.approx(math.nan, nan_ok=True)]}  # fmt: skip
    metric.reset()
    assert not metric.hits.any()
    assert not metric.tested.any()
