"""What the frozen model computes once: the right outputs, each computed once, within its limit, to the same numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_client, make_data, make_federation, make_vit, outcome, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.models.cache import FrozenCache, Part

CPU = torch.device("cpu")
MIB = 2**20


class Compute:
    """Outputs that tell every image apart, and a record of the batches that were asked for."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.batches.append(images)
        return {"pixels": images.flatten(1).float() / 255, "first": images[:, 0, 0, 0].long()}

    @property
    def computed(self) -> Counter[bytes]:
        # the first call only looks at shapes
        return Counter(image.numpy().tobytes() for batch in self.batches[1:] for image in batch)


def of_split(data: FederatedDataModule, part: Part) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Every image that the split uses of one part, once."""
    tasks = [task for client in data.split.clients for task in client.tasks]
    used = [task.train for task in tasks] if part == "train" else []
    used += [task.test for task in tasks] if part == data.split.evaluate_on else []
    return np.unique(np.concatenate(used))


@pytest.fixture(params=["official", "holdout30"])
def split_data(request: pytest.FixtureRequest, cache: Path) -> FederatedDataModule:
    return make_data(cache, local_test=request.param, min_public_images=4)


@given(seed=st.integers(0, 999), limit=st.sampled_from([0.0, 0.01, 0.03, 100.0]))
@settings(max_examples=25, deadline=None)
def test_whatever_is_asked_for_in_whatever_order_is_what_would_be_computed(
    data: FederatedDataModule, seed: int, limit: float
) -> None:
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlscl.models.cache.GROUP", int(rng.integers(1, 9)))
        precomputed = FrozenCache(data, Compute(), limit)
    for _ in range(8):
        precomputed.begin_task(int(rng.integers(1, 3)))
        part: Part = "train" if rng.random() < 0.5 else "test"
        indices = rng.choice(of_split(data, part), int(rng.integers(1, 40)))
        found = precomputed(part, indices, CPU)
        wanted = Compute()(data.batch(part, indices)[0])
        assert same(found, wanted)


def test_every_image_is_computed_once(split_data: FederatedDataModule) -> None:
    compute = Compute()
    precomputed = FrozenCache(split_data, compute, 100)
    for _ in range(3):
        for client in split_data.split.clients:
            for task in client.tasks:
                precomputed("train", task.train, CPU)
                precomputed(split_data.split.evaluate_on, task.test, CPU)
    assert set(compute.computed.values()) == {1}
    used = {p: of_split(split_data, p) for p in ("train", "test") if p in ("train", split_data.split.evaluate_on)}
    assert sum(compute.computed.values()) == sum(len(indices) for indices in used.values())


def test_images_are_computed_in_groups_that_do_not_depend_on_who_asks_first(
    data: FederatedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run asks in another order, and a kernel may round differently in another batch."""
    monkeypatch.setattr("fedlscl.models.cache.GROUP", 5)
    groups = []
    for order in (1, -1):
        compute = Compute()
        precomputed = FrozenCache(data, compute, 100)
        for index in of_split(data, "train")[::order]:
            precomputed("train", np.array([index]), CPU)
        groups.append({batch.numpy().tobytes() for batch in compute.batches[1:]})
        assert max(len(batch) for batch in compute.batches) == 5
    assert groups[0] == groups[1]


def test_images_outside_of_the_split_are_computed_and_not_kept(cache: Path) -> None:
    data = make_data(cache, train_per_class=10, min_public_images=3)
    unused = np.setdiff1d(np.arange(len(data.dataset.train.labels)), of_split(data, "train"))[:3]
    compute = Compute()
    precomputed = FrozenCache(data, compute, 100)
    mixed = np.concatenate([unused, of_split(data, "train")[:2]])
    for _ in range(2):
        assert same(precomputed("train", mixed, CPU), Compute()(data.batch("train", mixed)[0]))
    image = data.batch("train", unused[:1])[0][0].numpy().tobytes()
    assert compute.computed[image] == 2


@pytest.mark.parametrize(("limit_bytes", "groups"), [(0, 0), (10**9, None)])
def test_the_limit_bounds_what_is_kept(data: FederatedDataModule, limit_bytes: int, groups: int | None) -> None:
    precomputed = FrozenCache(data, Compute(), limit_bytes / MIB)
    everything = of_split(data, "train")
    precomputed("train", everything, CPU)
    rows = {len(kept) for kept in precomputed._kept.values()}
    assert rows == {0 if groups == 0 else len(everything) + len(of_split(data, "test"))}


def test_a_limit_in_between_keeps_whole_groups_within_it(data: FederatedDataModule) -> None:
    size = 3 * 8 * 8 * 4 + 8  # bytes of one image's outputs
    first = data.split.clients[0].tasks[0].train
    for room in (len(first) - 1, len(first)):
        compute = Compute()
        precomputed = FrozenCache(data, compute, room * size / MIB)
        for _ in range(2):
            precomputed("train", first, CPU)
        assert len(precomputed._kept["first"]) == room
        assert set(compute.computed.values()) == {1 if room == len(first) else 2}


def test_room_goes_to_the_current_task_and_what_is_still_wanted_stays(data: FederatedDataModule) -> None:
    """Training images of the task first, then the test images until then: there is room for no more in task 2."""
    size = 3 * 8 * 8 * 4 + 8  # bytes of one image's outputs
    tasks = [[client.tasks[number] for client in data.split.clients] for number in range(2)]
    train = [np.unique(np.concatenate([task.train for task in those])) for those in tasks]
    test = [np.unique(np.concatenate([task.test for task in those])) for those in tasks]
    new = np.setdiff1d(test[1], test[0])
    compute = Compute()
    precomputed = FrozenCache(data, compute, (len(train[1]) + len(test[0]) + len(new)) * size / MIB)
    for number in range(2):
        precomputed.begin_task(number + 1)
        for _ in range(2):
            precomputed("train", train[number], CPU)
            precomputed("test", np.union1d(*test[: number + 1]) if number else test[0], CPU)
    assert set(compute.computed.values()) == {1}
    precomputed("train", train[0], CPU)  # these have made room
    again = Counter(image.numpy().tobytes() for image in data.batch("train", train[0])[0])
    assert all(compute.computed[image] == 2 for image in again)


def test_what_a_too_small_limit_costs_is_said_once(data: FederatedDataModule, caplog: pytest.LogCaptureFixture) -> None:
    size, some = 3 * 8 * 8 * 4 + 8, of_split(data, "train")[:2]  # bytes of one image's outputs
    first, images = (
        len(data.split.clients[0].tasks[0].train),
        len(of_split(data, "train")) + len(of_split(data, "test")),
    )
    for limit in (0, images * size / MIB):  # asked for, and enough
        FrozenCache(data, Compute(), limit)("train", some, CPU)
    assert caplog.messages == []
    precomputed = FrozenCache(data, Compute(), first * size / MIB)
    for _ in range(2):
        precomputed("train", some, CPU)
    (said,) = caplog.messages
    assert f"enough for {first} of {images} images" in said
    assert f"; {math.ceil(images * size / MIB)} keeps all" in said


def test_another_precision_begins_anew(data: FederatedDataModule) -> None:
    weight = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0))
    precomputed = FrozenCache(data, lambda images: {"y": images.flatten(1).float() @ weight}, 100)
    some = of_split(data, "train")[:2]
    full = precomputed("train", some, CPU)["y"]
    with torch.autocast("cpu", torch.bfloat16):
        half = precomputed("train", some, CPU)["y"]
    assert full.dtype == torch.float32
    assert half.dtype == torch.bfloat16  # what it was computed in: nothing is rounded beyond that
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=20)
    assert torch.equal(precomputed("train", some, CPU)["y"], full)


def test_where_nothing_is_precomputed_no_image_is_touched(
    data: FederatedDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    precomputed = FrozenCache(data, lambda images: {}, 100)
    assert precomputed("train", of_split(data, "train")[:2], CPU) == {}
    monkeypatch.setattr(data, "batch", lambda *a: pytest.fail("touched"))
    assert precomputed("train", of_split(data, "train"), CPU) == {}


def test_what_a_test_has_computed_can_be_trained_on(data: FederatedDataModule) -> None:
    precomputed = FrozenCache(data, Compute(), 100)
    some = of_split(data, "train")[:2]
    with torch.inference_mode():
        precomputed("train", some, CPU)
    weight = torch.ones(1, requires_grad=True)
    (weight * precomputed("train", some, CPU)["pixels"]).sum().backward()
    assert weight.grad is not None


def test_what_is_handed_out_can_be_changed_without_harm(data: FederatedDataModule) -> None:
    precomputed = FrozenCache(data, Compute(), 100)
    some = of_split(data, "train")[:2]
    before = precomputed("train", some, CPU)["pixels"].clone()
    precomputed("train", some, CPU)["pixels"].zero_()
    assert torch.equal(precomputed("train", some, CPU)["pixels"], before)


# ---- in a federation


@pytest.fixture
def federation_with(tmp_path: Path, data: FederatedDataModule) -> Callable[..., Federation]:
    def build(cache_mib: float, kind: Any = None) -> Federation:
        vit = make_vit()
        vit.cache_mib = cache_mib
        client = make_client(kind) if kind else None
        return make_federation(tmp_path / f"{cache_mib}", data, vit, client)

    return build


@pytest.mark.parametrize("kind", [None, FrozenViTClient])
def test_a_run_is_the_same_with_and_without(federation_with: Callable[..., Federation], kind: Any) -> None:
    outcomes = [outcome(run(federation_with(cache_mib, kind))) for cache_mib in (0, 0.05, 1000)]
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert one[:6] == two[:6]
            assert one[6] == pytest.approx(two[6], rel=1e-4)


def test_the_frozen_blocks_run_once_for_each_image(federation_with: Callable[..., Federation]) -> None:
    federation = federation_with(1000)
    images = 0

    def count(_: Any, inputs: tuple[Tensor], __: Any) -> None:
        nonlocal images
        images += len(inputs[0])

    federation.template.vit.vit.blocks[0].register_forward_hook(count)  # block 1 is the adapted one
    run(federation)
    wanted = len(of_split(federation.template.data, "train")) + len(of_split(federation.template.data, "test"))
    assert images == wanted + 1  # one image to see the shapes
