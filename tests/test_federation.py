"""Algorithm 1 with everything in it: who takes part, what travels, what must not matter."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CNN,
    VIT,
    Recorder,
    contents,
    copy_of,
    make_client,
    make_federation,
    outcome,
    restore_client,
    run,
    same,
)
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.fed_lscl import ExactO2D, FedLSCL, IterativeO2D
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.methods.small_model import SmallModelClient
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Schedule
from fedlscl.server import FedAvg, Isolated, Server

Make = Callable[..., Federation]


def states(federation: Federation) -> list[dict[str, Tensor]]:
    """A copy of every client's state."""
    return [copy_of(restore_client(federation, index).state()) for index in range(federation.clients)]


# ---- what must not matter


def test_equal_seeds_give_equal_runs(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    runs: list[Any] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # global state has no say
        np.random.seed(len(runs))
        wire.clear()
        results = outcome(run(make(seed=seed)))
        runs.append((results, contents(wire)))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("server", [ExactO2D(), IterativeO2D(epochs=1)], ids=["exact", "iterative"])
def test_no_optimizer_outlives_its_fit(make: Make, server: Server) -> None:
    """Its moments are twice the model, and a federation is hundreds of fits."""
    gc.collect()
    gc.disable()
    try:
        run(make(server=server))
        alive = [thing for thing in gc.get_objects() if type(thing) is torch.optim.Adam and thing.state]
    finally:
        gc.enable()
    assert alive == []


def test_mixed_precision_runs_to_the_same_numbers_again(make: Make) -> None:
    def trainer(logger: Any = None) -> RoundTrainer:
        made = RoundTrainer("cpu", precision="bf16-mixed")
        made.logger = logger
        return made

    outcomes = []
    for _ in range(2):
        federation = make()
        federation.template.trainer = trainer
        outcomes.append(outcome(run(federation)))
        assert all(result[4] == {} for result in outcomes[-1])  # nobody was left out
        assert federation.transport.worker.precomputed._belongs_to == (torch.device("cpu"), torch.bfloat16)
        assert restore_client(federation, 0).generator.weight.dtype == torch.float32
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcome(run(make()))


def test_a_cluster_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a SLURM job Lightning would load what it finds in the current folder, and take SIGUSR1 for itself."""
    for name, value in {"NTASKS": "1", "JOB_NAME": "job", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of somebody else")
    before = signal.getsignal(signal.SIGUSR1)
    seen = []

    class One(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.number = torch.nn.Parameter(torch.ones(()))

        def train_dataloader(self) -> range:
            return range(2)

        def training_step(self, batch: int) -> Tensor:
            seen.append(signal.getsignal(signal.SIGUSR1))
            return batch * self.number

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    RoundTrainer("cpu").fit(One())
    assert seen == [before] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["hpc_ckpt_1.ckpt"]


@pytest.mark.parametrize("server", [ExactO2D(), IterativeO2D(epochs=1)], ids=["exact", "iterative"])
def test_the_global_random_state_is_left_alone(make: Make, server: Server) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run(make(server=server))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_order_of_clients_does_not_matter(
    make: Make, wire: list[tuple[Message, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = outcome(run(make()))
    sent = contents(wire, Upload)
    wire.clear()
    participants = Schedule.participants
    monkeypatch.setattr(Schedule, "participants", lambda *a: participants(*a)[::-1])
    backward = outcome(run(make()))
    assert [m.client for m, _ in wire if m.kind == "upload" and m.round == 1] == [2, 1, 0]
    first = {key: value for key, value in sent.items() if key[2] == 1}
    assert {key: value for key, value in contents(wire, Upload).items() if key[2] == 1} == first
    for one, other in zip(forward, backward, strict=True):
        assert one[2] == other[2]  # bytes
        assert one[5] == other[5]  # accuracies


def test_a_client_alone_sends_what_it_sends_among_others(
    make: Make, wire: list[tuple[Message, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    next(make().run(Recorder()))
    among = contents(wire, Upload)
    wire.clear()
    monkeypatch.setattr(Schedule, "participants", lambda *a: [2])
    next(make().run(Recorder()))
    assert contents(wire, Upload) == {("upload", 2, 1): among["upload", 2, 1]}


# ---- the common start


def test_all_start_with_one_generator_and_their_own_models(make: Make) -> None:
    first, *others = states(make())
    for state in others:
        for name in first:
            if name.startswith("model.generator."):
                assert torch.equal(state[name], first[name])
            elif name.endswith("conv1.weight") or name.startswith("model.head."):
                assert not torch.equal(state[name], first[name]), name


def test_the_common_start_is_that_of_the_seed(make: Make) -> None:
    one, same_seed, other = (make(seed=seed).template.common_start for seed in (0, 0, 1))
    assert same(one, same_seed)
    assert not same(one, other)


# ---- what travels


def private_values(federation: Federation) -> dict[str, bytes]:
    """The contents, as bytes, of everything in the clients' states that is not to travel."""
    found = {}
    for index in range(federation.clients):
        body = restore_client(federation, index)
        shared = {tensor.data_ptr() for tensor in body.shared().values()}
        for name, tensor in body.state_dict(keep_vars=True).items():
            if tensor.data_ptr() not in shared and tensor.numel() > 1 and tensor.unique().numel() > 1:
                found[f"client {index} {name}"] = tensor.detach().numpy().tobytes()
    return found


def test_nothing_private_travels(make: Make, wire: list[tuple[Message, bytes]], data: FederatedDataModule) -> None:
    federation = make(rounds=2)
    private: dict[str, bytes] = {}
    for result in federation.run(Recorder()):
        private |= {f"round {result.round} {name}": value for name, value in private_values(federation).items()}
    assert len({name.split(" ", 4)[4] for name in private}) > 20  # all of CNN and head were looked at
    images = torch.from_numpy(data.dataset.train.images)
    for image in images:
        for form in (image, image.float(), image.float() / 255):
            private[f"image {len(private)}"] = form.numpy().tobytes()
    for client in data.split.clients:
        for part in client.tasks:
            labels = torch.as_tensor(data.dataset.train.labels[part.train])
            for form in (labels, labels.int(), labels.float()):
                private[f"labels {len(private)}"] = form.numpy().tobytes()
            for indices in (torch.as_tensor(part.train), torch.as_tensor(part.train).float()):
                private[f"indices {len(private)}"] = indices.numpy().tobytes()
    everything = b"".join(data for _, data in wire)
    assert [name for name, value in private.items() if value in everything] == []
    for message, _ in wire:
        names = {"weight", "bias", "features"} if isinstance(message, Upload) else {"weight", "bias"}
        assert set(message.tensors) == names


def test_everyone_gets_one_answer_a_round_and_every_byte_counts(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    results = run(make(rounds=2))
    for result in results:
        for kind, counted in ((Upload, result.bytes_up), (Download, result.bytes_down)):
            sent = [(m.client, len(data)) for m, data in wire if isinstance(m, kind) and m.round == result.round]
            assert sorted(client for client, _ in sent) == [0, 1, 2]
            assert dict(sent) == counted
    handouts = [m.client for m, _ in wire if m.round == 0]
    assert sorted(handouts) == [0, 1, 2]  # one common start each, before the first round


def test_an_answer_is_what_the_client_then_holds(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make()
    next(federation.run(Recorder()))
    for index in range(3):
        (answer,) = [m for m, _ in wire if isinstance(m, Download) and (m.client, m.round) == (index, 1)]
        stored = federation.store.read(f"client-{index}")
        assert stored is not None
        for name, tensor in answer.tensors.items():
            assert torch.equal(stored[f"model.generator.{name}"], tensor)
    answers = [m for m, _ in wire if isinstance(m, Download) and m.round == 1]
    assert not torch.equal(answers[0].tensors["weight"], answers[1].tensors["weight"])  # one by one


def test_without_exchange_nothing_travels(
    make: Make, wire: list[tuple[Message, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: dict[tuple[int, int], dict[str, Tensor]] = {}
    on_train_end = FedLSCL.on_train_end

    def spy(self: FedLSCL) -> None:
        on_train_end(self)
        fitted[self.index, self.round.number] = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    monkeypatch.setattr(FedLSCL, "on_train_end", spy)
    federation = make(server=Isolated())
    for result in federation.run(Recorder()):
        assert (result.bytes_down, result.bytes_up, result.skipped) == ({}, {}, {})
        for index, state in enumerate(states(federation)):
            for name, tensor in fitted[index, result.round].items():
                assert torch.equal(state[f"model.{name}"], tensor), name  # phi stays as it was trained here
    assert {(m.kind, m.round) for m, _ in wire} == {("download", 0)}  # the common start


def test_the_mean_reaches_all_even_the_absent(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=make_client(SmallModelClient, share="cnn"), server=FedAvg("uniform"), clients_per_round=2)
    result = next(federation.run(Recorder()))
    uploads = [m for m, _ in wire if isinstance(m, Upload)]
    assert len(uploads) == 2
    assert sorted(result.bytes_down) == [0, 1, 2]
    for state in states(federation):
        for name, tensor in uploads[0].tensors.items():
            one, two = tensor, uploads[1].tensors[name]
            wanted = (one + two) / 2 if tensor.is_floating_point() else torch.maximum(one, two)
            torch.testing.assert_close(state[f"model.{name}"], wanted, rtol=1e-6, atol=1e-7)


def test_the_weights_of_the_mean_are_the_numbers_of_images(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=make_client(FrozenViTClient, share="head"), server=FedAvg())
    next(federation.run(Recorder()))
    uploads = {m.client: m for m, _ in wire if isinstance(m, Upload)}
    images = {i: len(client.tasks[0].train) for i, client in enumerate(federation.template.data.split.clients)}
    assert {i: m.samples for i, m in uploads.items()} == images
    assert len(set(images.values())) > 1
    wanted = sum(m.tensors["bias"] * images[i] for i, m in uploads.items()) / sum(images.values())
    for state in states(federation):
        torch.testing.assert_close(state["model.head.bias"], wanted)


# ---- who takes part


def test_drawn_clients_are_as_many_as_asked_and_change(make: Make) -> None:
    federation = make(rounds=4, clients_per_round=2)
    recorder = Recorder()
    results = run(federation, recorder)
    drawn = [tuple(sorted(result.bytes_up)) for result in results]
    assert {len(clients) for clients in drawn} == {2}
    assert len(set(drawn)) > 1
    assert {client for clients in drawn for client in clients} == {0, 1, 2}
    visits = [(r.task, r.round, client) for r, clients in zip(results, drawn, strict=True) for client in clients]
    assert recorder.visits == visits
    assert recorder.turns == 16
    for result in results:
        assert sorted(result.bytes_down) == sorted(result.bytes_up)  # O2D answers who sent
        for values in result.accuracy.values():
            assert [len(row) for row in values] == [result.task] * 3  # the absent are evaluated as well


def test_the_draw_is_the_same_for_the_same_seed() -> None:
    schedule = Schedule(1, 4)
    rounds = list(schedule.after(0, 29, seed=5))
    draws = [schedule.participants(10, round) for round in rounds]
    assert draws == [Schedule(1, 4).participants(10, round) for round in rounds]
    assert all(len(set(draw)) == 4 and draw == sorted(draw) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert counts.min() > 0
    assert Schedule(1).participants(10, rounds[0]) == list(range(10))


@pytest.mark.parametrize("number", [0, -1, 4])
def test_an_impossible_number_of_participants_is_refused(make: Make, number: int) -> None:
    with pytest.raises(ValueError, match=rf"federation\.clients_per_round is {number}, .* 3 clients"):
        make(clients_per_round=number)


# ---- different CNNs


DIFFERENT = {"name": ["resnet18", "mobilenetv3_small_050", "resnet18"], "features": 16, "image_size": 32}


def test_clients_may_have_different_cnns(make: Make) -> None:
    federation = make(cnn=DIFFERENT)
    result = next(federation.run(Recorder()))
    assert result.skipped == {}
    assert sorted(result.bytes_down) == [0, 1, 2]
    kinds = [restore_client(federation, index).cnn.backbone.__class__.__name__ for index in range(3)]
    assert kinds == ["ResNet", "MobileNetV3", "ResNet"]


def test_different_cnns_cannot_be_averaged(make: Make) -> None:
    with pytest.raises(ValueError, match=r"cnn\.name lists different CNNs"):
        make(client=make_client(SmallModelClient, share="cnn"), server=FedAvg(), cnn=DIFFERENT)


@pytest.mark.parametrize("share", ["nothing", "cnn", "all"])
def test_every_way_to_share_runs(make: Make, share: str) -> None:
    federation = make(
        client=make_client(SmallModelClient, share=share), server=FedAvg() if share != "nothing" else Isolated()
    )
    assert [result.skipped for result in run(federation)] == [{}, {}]


def test_there_is_one_cnn_or_one_per_client(make: Make) -> None:
    with pytest.raises(ValueError, match=r"cnn\.name lists 2 models for 3 clients"):
        make(cnn={**CNN, "name": ["resnet18", "resnet18"]})


# ---- what it costs


def test_parameters_and_operations_of_a_frozen_vit_by_hand(make: Make) -> None:
    """4 patches of 3 x 8 x 8 and a class token, width 32, two heads, two blocks; then a linear head."""
    federation = make(client=make_client(FrozenViTClient), server=Isolated())
    run(federation)
    classes = federation.template.data.num_classes
    block = 5 * 32 * 96 + 2 * (2 * 5 * 5 * 16) + 5 * 32 * 32 + 2 * (5 * 32 * 128)
    # the last block is for the class token alone: q, W_k^T q and values of one token, and a row of attention over
    # whole tokens for each head
    last = 3 * 32 * 32 + 2 * (2 * 5 * 32) + 32 * 32 + 2 * (32 * 128)
    assert federation.cost() == {
        "resnet18": {
            "trained_parameters": 33 * classes,
            "flops_frozen": 2 * (4 * 32 * 192 + block + last),
            "flops": 2 * 32 * classes,
        }
    }


def test_counting_changes_no_client_and_the_cache_has_no_say(make: Make) -> None:
    counts = []
    for cache_mib in (0.0, 64.0):
        federation = make(vit=FrozenViT(**VIT, cache_mib=cache_mib))
        run(federation)
        before = states(federation)
        counts.append(federation.cost())
        assert counts[-1] == federation.cost()
        for old, new in zip(before, states(federation), strict=True):
            assert same(old, new)
    assert counts[0] == counts[1]


def test_operations_move_from_each_time_to_once_with_the_block_and_cnns_are_counted_apart(make: Make) -> None:
    found = []
    for block in (0, 1):
        federation = make(client=make_client(block=block), cnn=DIFFERENT)
        next(federation.run(Recorder()))
        found.append(federation.cost())
    assert set(found[0]) == {"resnet18", "mobilenetv3_small_050"}
    moved = {name: found[1][name]["flops_frozen"] - found[0][name]["flops_frozen"] for name in found[0]}
    assert set(moved.values()) == {2 * (5 * 32 * 96 + 2 * (2 * 5 * 5 * 16) + 5 * 32 * 32 + 2 * (5 * 32 * 128))}
    # a pair of rank 2 costs 32 + 96 a token and rank; in the last block 32 + 32 for the one q, and for W_k^T q and for
    # the values 32 and another 32 for each of 2 heads
    pairs = 2 * 2 * (5 * (32 + 96) - (32 + 32) - 2 * (32 + 2 * 32))
    for name, amount in moved.items():
        assert found[0][name]["flops"] - found[1][name]["flops"] == amount + pairs
    assert found[0]["resnet18"]["flops"] > found[0]["mobilenetv3_small_050"]["flops"]


# ---- going on


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_federation_equals_an_uninterrupted_one(
    make: Make, tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, stop: int
) -> None:
    whole = make(rounds=2, clients_per_round=2)
    expected = outcome(run(whole))
    options: dict[str, Any] = {"rounds": 2, "clients_per_round": 2}
    first = make_federation(tmp_path / "cut", data, vit, **options)
    commit, results = first.store.commit, []

    def stopped(progress: dict[str, Any]) -> None:
        if progress["round"] > stop:
            raise KeyboardInterrupt  # its states are written, but not committed
        commit(progress)

    first.store.commit = stopped  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        results.extend(first.run())
    again = make_federation(tmp_path / "cut", data, vit, **options)
    results += run(again)
    assert outcome(results) == expected
    for one, other in zip(states(whole), states(again), strict=True):
        assert same(one, other)
