"""What a client keeps between rounds: the snapshot, the buffer, its state, and what it has missed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    fit,
    make_client,
    make_federation,
    output_of,
    outputs,
    restore_client,
    run,
    same,
    task_images,
    train_images,
)
from torch import Tensor

from fedlscl.batches import Output
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


def deliver(body: FedLSCL, seed: int) -> None:
    """Hand the client shared tensors unlike its own."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: t + 0.05 * torch.randn(t.shape, generator=rng) for name, t in body.shared().items()}
    body.download(Download(body.index, 1, 1, 0, tensors))


# ---- the snapshot


def count_snapshots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    preserved = Replay.preserved

    def spy(self: Replay, output: Output) -> dict[str, Tensor]:
        counts.append(len(output.logits))  # all fit in one batch
        return preserved(self, output)

    monkeypatch.setattr(Replay, "preserved", spy)
    return counts


def test_deployed_snapshot_is_the_model_after_the_last_download(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = restore_client(federation, 0)
    counts = count_snapshots(monkeypatch)
    fit(body, 1, 1)
    deliver(body, 1)
    deployed = outputs(body, body.memory.candidates)
    fit(body, 2, 2)
    taken = body.memory.snapshot
    assert set(taken) == {"features", "weights"}
    for name in taken:
        torch.testing.assert_close(taken[name], deployed[name], rtol=0, atol=1e-6)
    deliver(body, 2)
    fit(body, 2, 3)
    assert same(body.memory.snapshot, taken)  # not renewed within a task
    assert counts == [len(body.memory.buffer)]
    assert not torch.allclose(outputs(body, body.memory.buffer)["weights"], taken["weights"], atol=1e-4)


def test_local_snapshot_is_the_model_before_the_last_download(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT
) -> None:
    body = restore_client(make_federation(tmp_path, data, vit, make_client(snapshot="local")), 0)
    fit(body, 1, 1)
    deliver(body, 1)
    fit(body, 1, 2)
    local = outputs(body, body.memory.candidates)
    deliver(body, 2)
    assert not torch.allclose(outputs(body, body.memory.candidates)["weights"], local["weights"], atol=1e-4)
    for round in (3, 4):
        fit(body, 2, round)
        for name, value in local.items():
            torch.testing.assert_close(body.memory.snapshot[name], value, rtol=0, atol=1e-6)
        deliver(body, round)


def test_without_replay_the_snapshot_is_never_taken(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_snapshots(monkeypatch)
    body = restore_client(make_federation(tmp_path, data, vit, make_client(continual=NoReplay())), 0)
    fit(body, 1, 1)
    fit(body, 2, 2)
    assert counts == []
    assert len(body.memory.buffer) > 0  # the buffer is there nevertheless: its features travel


# ---- the buffer


def test_the_buffer_holds_the_samples_of_lowest_loss(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    current = task_images(body, 1)
    images, labels = train_images(body, current)
    classes = body.data.tasks[0].classes
    body.eval()
    with torch.no_grad():
        logits = output_of(body, images).logits
    wanted = set()
    for label in classes:
        mine = (labels == label).nonzero().flatten().tolist()
        loss = {i: float(logits[i, list(classes)].logsumexp(0) - logits[i, label]) for i in mine}
        wanted |= {int(current[i]) for i in sorted(mine, key=loss.__getitem__)[:3]}
    assert set(body.memory.remembered.tolist()) == wanted
    body.begin_round(Round(2, 2, False, 0))
    assert set(body.memory.buffer.tolist()) == wanted
    fit(body, 2, 2)
    kept = body.data.labels(body.memory.remembered)
    own = [label for part in body.data.tasks for label in part.classes]
    available = body.data.labels(task_images(body, 1, 2))
    assert {c: int((kept == c).sum()) for c in own} == {c: min(3, int((available == c).sum())) for c in own}


def test_uploaded_features_are_those_of_the_buffer(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    sent, wanted = body.upload().tensors["features"], outputs(body, body.memory.remembered)["features"]
    distances = torch.cdist(sent, wanted)
    order = distances.argmin(dim=1)
    assert sorted(order.tolist()) == list(range(len(wanted)))
    assert distances.min(dim=1).values.max() < 1e-5
    fit(body, 2, 2)
    features = body.upload().tensors["features"]
    assert len(features) == len(body.memory.buffer) + len(body.memory.candidates)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


def test_uploaded_features_are_a_set_whose_order_tells_nothing_of_the_buffer(federation: Federation) -> None:
    """That of the buffer is by class, and who knows the run's seed could undo any shuffle that is drawn from it."""
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    sent, in_buffer = body.upload().tensors["features"], body.feature_set
    assert sent.tolist() == sorted(in_buffer.tolist()) != in_buffer.tolist()
    for order in (torch.arange(len(in_buffer)).flip(0), torch.randperm(len(in_buffer))):
        body.feature_set = in_buffer[order]
        assert torch.equal(body.upload().tensors["features"], sent)


def test_no_buffer_no_replay(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    body = restore_client(make_federation(tmp_path, data, vit, make_client(FrozenViTClient, buffer_size=0)), 0)
    for task in (1, 2):
        fit(body, task, task)
        assert {phase for phase, _ in body.plan} == {"collaborate"}
        assert len(body.memory.remembered) == 0


@pytest.mark.parametrize("selection", ["herding", "random"])
def test_other_selections_are_balanced_and_repeatable(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, selection: str
) -> None:
    kept = []
    for attempt in range(2):
        federation = make_federation(tmp_path / str(attempt), data, vit, make_client(selection=selection))
        body = restore_client(federation, 0)
        fit(body, 1, 1)
        kept.append(body.memory.remembered)
    assert torch.equal(*kept)
    labels = torch.as_tensor(data.dataset.train.labels)
    counts = {c: int((labels[task_images(body, 1)] == c).sum()) for c in data.split.clients[0].tasks[0].classes}
    assert {c: int((labels[kept[0]] == c).sum()) for c in counts} == {c: min(3, n) for c, n in counts.items()}


# ---- state


def test_a_client_goes_on_from_its_state_to_the_last_bit(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT
) -> None:
    settings = make_client(snapshot="local", continual=Replay(passes=2))
    one, other = (make_federation(tmp_path / name, data, vit, settings) for name in ("one", "other"))
    body = restore_client(one, 1)
    fit(body, 1, 1)
    fit(body, 2, 2)
    state = {name: tensor.clone() for name, tensor in body.state().items()}
    stranger = restore_client(other, 2)  # another client, with another past
    fit(stranger, 1, 1)
    stranger.restore(1, data, other.transport.worker.precomputed, state)
    assert same(stranger.state(), state)
    assert stranger.memory.begun == 2
    assert stranger.memory.learned == 1
    for client in (body, stranger):
        fit(client, 2, 3)
    assert same(stranger.state(), body.state())
    assert same(stranger.upload().tensors, body.upload().tensors)
    assert not same(stranger.state(), state)


def test_the_state_survives_the_disk(federation: Federation) -> None:
    run(federation)
    for index in range(3):
        state = restore_client(federation, index).state()
        stored = federation.store.read(f"client-{index}")
        assert stored is not None
        assert same(stored, state)


def test_the_state_holds_no_part_of_the_vit(body: FedLSCL, vit: FrozenViT) -> None:
    fit(body, 1, 1)
    fit(body, 2, 2)
    state = body.state()
    shapes = {tuple(tensor.shape) for name, tensor in state.items() if name.startswith("model.")}
    assert not any(".vit" in name or name.startswith("model.vit") for name in state)
    assert tuple(vit.vit.blocks[0].mlp.fc1.weight.shape) not in shapes
    values = {t.numpy().tobytes() for t in vit.state_dict().values() if t.numel() > 1 and t.unique().numel() > 1}
    assert not values & {t.contiguous().numpy().tobytes() for t in state.values()}
    assert all(not tensor.requires_grad and tensor.device.type == "cpu" for tensor in state.values())


def test_an_absent_client_catches_up(tmp_path: Path, long_data: FederatedDataModule, vit: FrozenViT) -> None:
    body = restore_client(make_federation(tmp_path, long_data, vit), 0)
    fit(body, 1, 1)
    first = body.memory.candidates.clone()
    fit(body, 3, 3)
    assert set(body.current.tolist()) == set(task_images(body, 2, 3).tolist())
    assert torch.equal(body.memory.buffer, first)
    parts = long_data.split.clients[0].tasks
    assert set(body.current_mask.nonzero().flatten().tolist()) == {*parts[1].classes, *parts[2].classes}
    labels = torch.as_tensor(long_data.dataset.train.labels)
    assert set(labels[body.memory.candidates].tolist()) <= {*parts[1].classes, *parts[2].classes}
    assert body.upload().samples == len(parts[1].train) + len(parts[2].train)


def test_a_client_that_first_comes_late_learns_everything(
    tmp_path: Path, long_data: FederatedDataModule, vit: FrozenViT
) -> None:
    body = restore_client(make_federation(tmp_path, long_data, vit), 0)
    fit(body, 2, 2)
    assert set(body.current.tolist()) == set(task_images(body, 1, 2).tolist())
    assert {phase for phase, _ in body.plan} == {"collaborate"}
    fit(body, 3, 3)
    assert set(body.current.tolist()) == set(task_images(body, 3).tolist())
    labels = torch.as_tensor(long_data.dataset.train.labels)
    early = [label for part in long_data.split.clients[0].tasks[:2] for label in part.classes]
    assert set(labels[body.memory.buffer].tolist()) == set(early)
