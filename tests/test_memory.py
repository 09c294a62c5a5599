"""Which samples are kept: against a reference written without tensors, and the balance that always holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.memory import (
    SELECTIONS,
    Archive,
    Memory,
    Ranking,
    above,
    below,
    herding,
    lowest_loss,
    random,
    ranked,
    select,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_herding(order: list[int], rows: list[list[float]]) -> bool:
    """iCaRL's rule, word for word: next comes a sample that brings the running mean closest to the class mean."""
    unit = [[v / max(math.hypot(*row), 1e-12) for v in row] for row in rows]
    width = len(unit[0])
    target = [sum(row[k] for row in unit) / len(unit) for k in range(width)]

    def distance(chosen: list[int]) -> float:
        mean = [sum(unit[i][k] for i in chosen) / len(chosen) for k in range(width)]
        return math.dist(mean, target)

    for count, sample in enumerate(order):
        before = order[:count]
        closest = min(distance([*before, other]) for other in range(len(unit)) if other not in before)
        if distance([*before, sample]) > closest + 1e-9:  # rounding may settle a tie either way
            return False
    return True


def test_the_lowest_losses_come_first_and_ties_keep_their_order() -> None:
    losses = torch.tensor([0.5, 0.1, 0.5, -1.0, 0.1, 9.0])
    assert lowest_loss(losses, torch.zeros(6, 1), rng()).tolist() == [3, 1, 4, 0, 2, 5]


def test_herding_by_hand() -> None:
    # the mean of the three unit vectors is (1/3, 2/3): (0, 1) is nearest, then (1, 0) brings the mean to (1/2, 1/2)
    features = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 7.0]])
    assert herding(torch.zeros(3), features, rng()).tolist() == [1, 0, 2]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_herding_is_icarls_without_repeats(count: int, width: int, seed: int) -> None:
    features = torch.randn(count, width, generator=rng(seed), dtype=torch.float64) + 0.3
    order = herding(torch.zeros(count), features, rng()).tolist()
    assert sorted(order) == list(range(count))
    assert is_herding(order, features.tolist())


def test_herding_never_repeats_where_all_samples_are_alike_or_zero() -> None:
    for features in (torch.ones(5, 3), torch.zeros(5, 3), torch.eye(3)[[0, 0, 0, 1, 1]]):
        assert sorted(herding(torch.zeros(5), features, rng()).tolist()) == [0, 1, 2, 3, 4]


def test_herding_judges_by_direction_and_not_by_length() -> None:
    features = torch.randn(9, 4, generator=rng(5)) + 0.5
    scaled = features * torch.linspace(0.01, 100, 9)[:, None]
    assert herding(torch.zeros(9), features, rng()).tolist() == herding(torch.zeros(9), scaled, rng()).tolist()


def test_a_random_order_follows_its_generator() -> None:
    losses, features = torch.zeros(50), torch.zeros(50, 1)
    state = torch.random.get_rng_state()
    one, same, other = (random(losses, features, rng(seed)).tolist() for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert sorted(one) == list(range(50))
    assert torch.equal(torch.random.get_rng_state(), state)
    first = [int(random(losses[:4], features[:4], rng(seed))[0]) for seed in range(400)]
    assert min(first.count(k) for k in range(4)) > 60


def test_select_by_hand() -> None:
    labels = torch.tensor([7, 2, 7, 2, 7, 9])
    losses = torch.tensor([0.3, 0.2, 0.1, 0.4, 0.2, 5.0])
    kept = select(lowest_loss, losses, torch.zeros(6, 1), labels, 2, rng())
    assert kept.tolist() == [1, 2, 3, 4, 5]
    assert select(lowest_loss, losses, torch.zeros(6, 1), labels, 1, rng()).tolist() == [1, 2, 5]
    assert select(lowest_loss, losses, torch.zeros(6, 1), labels, 0, rng()).tolist() == []


def test_each_class_is_ranked_by_its_own_samples() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    losses, features = torch.rand(7, generator=rng(1)), torch.randn(7, 3, generator=rng(2))
    for ranking in (lowest_loss, herding):
        kept = select(ranking, losses, features, labels, 2, rng()).tolist()
        for label in (0, 1):
            members = (labels == label).nonzero().squeeze(1)
            order = ranking(losses[members], features[members], rng())
            assert [k for k in kept if labels[k] == label] == members[order[:2]].sort().values.tolist()


@given(
    st.sampled_from(sorted(SELECTIONS)),
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_what_holds_for_every_selection(name: str, classes: list[int], per_class: int, seed: int) -> None:
    ranking: Ranking = SELECTIONS[name]
    labels = torch.tensor(classes)
    losses = torch.rand(len(classes), generator=rng(seed))
    features = torch.randn(len(classes), 3, generator=rng(seed + 1))
    kept = select(ranking, losses, features, labels, per_class, rng(seed))
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    for label in set(classes):
        assert int((labels[kept] == label).sum()) == min(per_class, classes.count(label))
    assert kept.equal(select(ranking, losses, features, labels, per_class, rng(seed)))
    more = select(ranking, losses, features, labels, per_class + 1, rng(seed))
    if name != "random":
        assert set(kept.tolist()) <= set(more.tolist())


def test_lowest_loss_keeps_nothing_that_is_worse_than_what_it_leaves() -> None:
    labels = torch.arange(60) % 3
    losses = torch.rand(60, generator=rng(4))
    kept = select(lowest_loss, losses, torch.zeros(60, 1), labels, 5, rng())
    left = torch.ones(60, dtype=torch.bool)
    left[kept] = False
    for label in range(3):
        assert losses[kept][labels[kept] == label].max() <= losses[left & (labels == label)].min()


def test_the_samples_of_each_class_are_ranked_class_by_class() -> None:
    losses, labels = torch.tensor([3.0, 1.0, 2.0, 0.5, 1.0]), torch.tensor([4, 0, 4, 0, 4])
    found = list(ranked(lowest_loss, losses, torch.zeros(5, 1), labels, rng()))
    assert [positions.tolist() for positions in found] == [[3, 1], [4, 2, 0]]


def test_a_prefix_is_put_before_names_and_taken_off() -> None:
    tensors = {"a": torch.ones(1), "b.c": torch.zeros(2)}
    named = above(tensors, "x.")
    assert list(named) == ["x.a", "x.b.c"]
    assert below({**named, "xa": torch.ones(1)}, "x.") == tensors


def test_the_names_that_configurations_use_stay() -> None:
    assert {"lowest_loss", "herding", "random"} <= set(SELECTIONS)
    with pytest.raises(KeyError):
        SELECTIONS["highest_loss"]


# ---- what finished tasks leave behind


def test_an_archive_keeps_copies_by_task_and_comes_back_from_tensors() -> None:
    live = torch.ones(2, requires_grad=True)
    archive = Archive()
    archive.keep(10, {"a.b": live})
    archive.keep(2, {"a.b": torch.zeros(2), "c": torch.tensor(1)})
    with torch.no_grad():
        live.zero_()
    memory = Memory.from_tensors(Memory(archive=archive).to_tensors())
    assert list(memory.archive) == [2, 10]  # by number, not by text
    assert memory.archive[10]["a.b"].tolist() == [1, 1]
    assert memory.archive[2]["c"].dtype == torch.int64
    assert memory.archive.stacked("a.b", live).tolist() == [[0, 0], [1, 1]]
    assert Archive().stacked("a.b", live).shape == (0, 2)
