"""Random crops and flips: by hand, of training images alone, from the client's own stream, past every cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fit, make_client, make_federation, make_trainer, outcome, restore_client, run, same
from torch import Tensor

from fedlscl.batches import Augmented, Batch, Images
from fedlscl.client import Client
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.augmentation import crop_flip, draw
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.methods.fed_l2p import FedL2PClient
from fedlscl.methods.fed_lora import FedLoRAClient
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.fedmgp.client import FedMGPClient
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.methods.glfc.client import GLFCClient
from fedlscl.methods.lwf import GeneratedLwF, LwF
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import FedAvg

Make = Callable[..., Federation]

IMAGE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8).expand(1, 3, 3, 3)


@pytest.mark.parametrize(
    ("down", "right", "flipped", "expected"),
    [
        (0, 0, False, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        (1, 0, False, [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),
        (0, -1, False, [[0, 1, 2], [0, 4, 5], [0, 7, 8]]),
        (0, 0, True, [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
        (-1, 2, True, [[0, 0, 0], [0, 0, 3], [0, 0, 6]]),  # cropped first: 3 0 0
    ],
)
def test_crops_by_hand(down: int, right: int, flipped: bool, expected: list[list[int]]) -> None:
    found = crop_flip(IMAGE, torch.tensor([[down, right]]), torch.tensor([flipped]))
    assert found.dtype == torch.uint8
    assert found[0].tolist() == [expected] * 3


def test_each_image_has_a_crop_of_its_own() -> None:
    images = torch.randint(1, 256, (40, 3, 8, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    moved, flipped = draw((8, 16), 40, torch.Generator().manual_seed(1))
    for image, (down, right), flip, found in zip(
        images, moved.tolist(), flipped.tolist(), crop_flip(images, moved, flipped), strict=True
    ):
        padded = torch.nn.functional.pad(image, (2, 2, 1, 1))
        crop = padded[:, 1 + down : 9 + down, 2 + right : 18 + right]
        assert torch.equal(found, crop.flip(2) if flip else crop)


def test_draws_reach_an_eighth_of_the_image_in_both_directions() -> None:
    moved, flipped = draw((8, 32), 2000, torch.Generator().manual_seed(0))
    assert sorted(set(moved[:, 0].tolist())) == [-1, 0, 1]
    assert sorted(set(moved[:, 1].tolist())) == list(range(-4, 5))
    assert 900 < int(flipped.sum()) < 1100
    small, _ = draw((7, 7), 100, torch.Generator().manual_seed(0))
    assert not small.any()


# ---- in a client's round


def averaging(kind: type[Client] = FedAvgClient, **changes: Any) -> Client:
    return make_client(kind, **{"continual": NoReplay(), "augment": "crop_flip", **changes})


def batches(make: Make, client: Client, index: int = 0, number: int = 1) -> list[Batch]:
    body = restore_client(make(client=client, server=FedAvg()), index)
    body.begin_round(Round(1, number, False, 0))
    return list(body.train_dataloader())


def as_they_are(batch: Batch, data: FederatedDataModule) -> Tensor:
    return data.batch("train", batch.images.indices)[0]


def test_the_same_images_in_the_same_order_are_shown_otherwise(make: Make, data: FederatedDataModule) -> None:
    plain, shown = batches(make, averaging(augment=None)), batches(make, averaging())
    for before, after in zip(plain, shown, strict=True):
        assert before.images.indices.tolist() == after.images.indices.tolist()
        assert torch.equal(before.images.labels, after.images.labels)
        assert torch.equal(before.images.pixels, as_they_are(before, data))
        assert (type(before.images), type(after.images)) == (Images, Augmented)
    changed = [b.images.pixels.flatten(1).ne(as_they_are(b, data).flatten(1)).any(1) for b in shown]
    # one crop of 18 is the image itself
    assert torch.cat(changed).float().mean() > 0.7


def test_each_client_and_round_has_a_stream_of_its_own(make: Make) -> None:
    def first(index: int, number: int) -> Tensor:
        client = averaging()
        body = restore_client(make(client=client, server=FedAvg()), index)
        body.begin_round(Round(1, number, False, 0))
        return torch.randint(2**30, (4,), generator=body.train_dataloader().augment)

    assert torch.equal(first(0, 1), first(0, 1))
    assert len({tuple(first(*place).tolist()) for place in ((0, 1), (1, 1), (0, 2))}) == 3


def test_an_interrupted_run_ends_with_the_same_numbers_and_clients_do_not_touch_each_other(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT
) -> None:
    def federation(name: str, **options: Any) -> Federation:
        client = averaging(FrozenViTClient, share="head")
        return make_federation(tmp_path / name, data, vit, client, FedAvg(), rounds=2, **options)

    whole = outcome(run(federation("whole")))
    rounds = federation("cut").run()
    cut = [next(rounds), next(rounds), next(rounds)]
    rounds.close()
    assert outcome([*cut, *run(federation("cut"))]) == whole
    alone, among = restore_client(federation("a"), 2), restore_client(federation("b"), 0)
    fit(alone, 1, 1)
    after = alone.state()
    fit(among, 1, 1)
    other = restore_client(federation("b"), 2)
    fit(other, 1, 1)
    assert same(after, other.state())


def test_off_is_as_if_it_were_not_there_and_on_trains_otherwise(make: Make) -> None:
    def trained(client: Client) -> dict[str, Tensor]:
        body = restore_client(make(client=client, server=FedAvg()), 0)
        fit(body, 1, 1)
        state: dict[str, Tensor] = body.state()
        return state

    off = make_client(FedAvgClient, continual=NoReplay())
    assert off.augment is None
    assert same(trained(off), trained(averaging(augment=None)))
    assert not same(trained(off), trained(averaging()))


# ---- what is not augmented, and what is not cached


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FrozenViTClient, {}),
        (FedLoRAClient, {}),
        (FedL2PClient, {}),
        (FedMGPClient, {"train_mask": "task", "blocks": (1,), "hidden": 8}),
    ],
)
def test_a_frozen_model_sees_the_augmented_images(make: Make, kind: type[Client], settings: dict[str, Any]) -> None:
    body: Any = restore_client(make(client=averaging(kind, buffer_size=0, **settings)), 0)
    asked: list[Any] = []
    seen: list[Tensor] = []
    shown: list[Tensor] = []
    lookup, precompute, losses = body.precomputed, body.precompute, body.losses
    body.precomputed = lambda *which: asked.append(which) or lookup(*which)
    body.precompute = lambda images: seen.append(images) or precompute(images)
    body.losses = lambda batch: shown.append(batch.images.pixels) or losses(batch)
    fit(body, 1, 1)
    assert shown
    assert all(torch.equal(one, other) for one, other in zip(seen, shown, strict=True))
    assert not asked  # a cache knows images as they are
    body.begin_evaluation(1)
    make_trainer().test(body, verbose=False)
    assert {which[0] for which in asked} == {body.data.evaluate_on}


def buffered(make: Make, client: Client) -> tuple[Client, list[Batch]]:
    """The batches of the second task, whose first has filled the buffer."""
    body = restore_client(make(client=client), 0)
    fit(body, 1, 1)
    fit(body, 2, 2)
    return body, [batch for batch in body.train_dataloader() if batch.phase == "replay"]


def test_images_whose_outputs_were_kept_are_shown_as_they_are(make: Make, data: FederatedDataModule) -> None:
    _, replayed = buffered(make, averaging(FedLSCL, continual=Replay(passes=3)))
    changed, kept = [], 0
    for batch in replayed:
        assert batch.snapshot
        for pixels, image, known in zip(batch.images.pixels, as_they_are(batch, data), batch.observed, strict=True):
            if known:
                kept += 1
                assert torch.equal(pixels, image)
            else:
                changed.append(not torch.equal(pixels, image))
    assert kept
    assert any(changed)


def test_replayed_images_that_nothing_is_compared_with_are_augmented(make: Make, data: FederatedDataModule) -> None:
    body, replayed = buffered(make, averaging(FrozenViTClient, continual=Replay(passes=3)))
    old, changed = set(body.memory.buffer.tolist()), []
    for batch in replayed:
        for index, pixels, image in zip(
            batch.images.indices.tolist(), batch.images.pixels, as_they_are(batch, data), strict=True
        ):
            changed += [not torch.equal(pixels, image)] * (index in old)
    assert any(changed)


def test_where_outputs_were_kept_of_all_images_it_is_refused() -> None:
    for kind, continual in ((FedAvgClient, LwF()), (FedLSCL, GeneratedLwF()), (GLFCClient, NoReplay())):
        with pytest.raises(ValueError, match=r"model.augment is crop_flip, but .* the images as they are; take null"):
            averaging(kind, continual=continual)
