"""The head averaged row by row: means by hand, and what happens to rows that nobody or only one client trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import copy_of, make_client, restore_client, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.methods.row_average import COUNTS, CountingFrozenViTClient, RowAverage, row_means
from fedlscl.robust import average

Make = Callable[..., Federation]
ROWS = ["weight", "bias"]


def federation(make: Make) -> Federation:
    client = make_client(CountingFrozenViTClient, continual=NoReplay(), train_mask="task", share="head")
    return make(client=client, server=RowAverage(ROWS))


def test_the_means_by_hand() -> None:
    plain = {"weight": torch.full((3, 2), 9.0), "bias": torch.full((3,), 9.0)}
    first = {
        "weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "bias": torch.tensor([1.0, 2.0, 3.0]),
        COUNTS: torch.tensor([1, 4, 0]),
    }
    second = {"weight": -first["weight"], "bias": -first["bias"], COUNTS: torch.tensor([3, 0, 0])}
    means = row_means(plain, [first, second])
    # class 0: (1 x - 3 x) / 4; class 1 is the first client's alone; class 2 nobody's
    assert means["weight"].tolist() == [[-0.5, -1.0], [3.0, 4.0], [9.0, 9.0]]
    assert means["bias"].tolist() == [-0.5, 2.0, 9.0]
    assert plain["bias"].tolist() == [9.0] * 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_with_equal_counts_in_every_class_it_is_the_mean_by_samples(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(counts))
    models = [{"weight": torch.randn(4, 3, generator=generator)} for _ in counts]
    plain = average(zip(models, counts, strict=True))
    counted = [{**model, COUNTS: torch.full((4,), n)} for model, n in zip(models, counts, strict=True)]
    torch.testing.assert_close(row_means({"weight": torch.zeros(4, 3)}, counted)["weight"], plain["weight"])


def test_a_class_of_one_client_is_adopted_and_untouched_ones_stay(
    make: Make, wire: list[tuple[Message, bytes]]
) -> None:
    fed = federation(make)
    before = copy_of(restore_client(fed, 0).shared())
    results = run(fed)
    assert all(not result.skipped for result in results)
    uploads = {m.client: m for m, _ in wire if isinstance(m, Upload) and m.round == 1}
    answer = next(m for m, _ in wire if isinstance(m, Download) and m.round == 1)
    counts = torch.stack([uploads[client].tensors[COUNTS] for client in sorted(uploads)])
    for client, split in enumerate(fed.template.data.split.clients):
        labels = fed.template.data.dataset.train.labels[split.tasks[0].train]
        assert counts[client].tolist() == [int((labels == c).sum()) for c in range(fed.template.data.num_classes)]
    owners = (counts > 0).sum(0)
    assert (owners == 0).any()
    assert (owners == 1).any()
    for c, owned in enumerate(owners.tolist()):
        if owned == 0:
            assert torch.equal(answer.tensors["weight"][c], before["weight"][c])
        if owned == 1:
            owner = int(counts[:, c].argmax())
            assert torch.equal(answer.tensors["weight"][c], uploads[owner].tensors["weight"][c])


def test_the_bytes_of_the_formula(make: Make) -> None:
    body = restore_client(federation(make), 0)
    width, classes = body.vit.width, body.num_classes
    assert sum(spec.max_bytes for spec in body.download_schema().values()) == 4 * (width + 1) * classes
    assert sum(spec.max_bytes for spec in body.upload_schema().values()) == 4 * (width + 1) * classes + 8 * classes


def test_impossible_settings_are_named(make: Make) -> None:
    silent = make_client(FrozenViTClient, continual=NoReplay(), share="head")
    with pytest.raises(ValueError, match=r"RowAverage, .* send 'class_counts', .* CountingFrozenViTClient"):
        make(client=silent, server=RowAverage(ROWS))
    counting = make_client(CountingFrozenViTClient, continual=NoReplay(), share="head", hidden=5)
    with pytest.raises(ValueError, match=r"server\.rows names 'weight'.*\['2\.weight', '2\.bias'\]"):
        make(client=counting, server=RowAverage(ROWS))
    with pytest.raises(ValueError, match=r"server\.rows names '0\.weight'"):
        make(client=counting, server=RowAverage(["2.weight", "0.weight"]))


def test_images_that_are_replayed_would_not_be_counted() -> None:
    with pytest.raises(ValueError, match=r"model\.continual is Replay, must be NoReplay for CountingFrozenViTClient"):
        make_client(CountingFrozenViTClient, share="head")


def test_a_count_below_zero_has_no_weight() -> None:
    models: list[dict[str, Tensor]] = [
        {"bias": torch.tensor([1.0, 1.0]), COUNTS: torch.tensor([2, -5])},
        {"bias": torch.tensor([5.0, 5.0]), COUNTS: torch.tensor([2, 1])},
    ]
    assert row_means({"bias": torch.zeros(2)}, models)["bias"].tolist() == [3.0, 5.0]
