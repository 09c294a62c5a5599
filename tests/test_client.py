"""One client: what a round trains and what it leaves alone, its plan, snapshot, buffer, masks and state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    fit,
    make_client,
    make_federation,
    make_trainer,
    output_of,
    parameters,
    restore_client,
    same,
    task_images,
    train_images,
)
from torch import Tensor

from fedlscl import seeds
from fedlscl.batches import Batch, Images, Output, make_plan
from fedlscl.client import Client
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download
from fedlscl.methods.fed_lora import FedLoRAClient
from fedlscl.methods.fed_lscl import FedLSCL
from fedlscl.methods.frozen_vit import FrozenViTClient
from fedlscl.methods.lorm.client import LoRMClient
from fedlscl.methods.pilora.client import PILoRAClient
from fedlscl.methods.small_model import SmallModelClient
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round


def digest(vit: FrozenViT) -> str:
    state = hashlib.sha256()
    for name, tensor in vit.state_dict().items():
        state.update(name.encode() + tensor.cpu().numpy().tobytes())
    return state.hexdigest()


# ---- LoRA, injected and merged


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FedLoRAClient, {"layers": ["attn.qkv", "mlp.fc2"]}),
        (PILoRAClient, {"block": 1, "continual": NoReplay()}),
        (LoRMClient, {"rank": 3, "continual": NoReplay()}),
    ],
)
def test_evaluation_and_prediction_merge_what_gradients_see_injected(
    tmp_path: Path, data: FederatedDataModule, vit: FrozenViT, kind: type[Client], settings: dict[str, Any]
) -> None:
    federation, before = make_federation(tmp_path, data, vit, client=make_client(kind, **settings)), digest(vit)
    body: Any = restore_client(federation, 0)
    body.merges = 1  # LoRM: the current task is a part of what is deployed
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    body.eval()
    images, _ = train_images(body, task_images(body, 1, 2))
    injected = output_of(body, images)
    assert float((injected.representation.detach() - vit(images)).abs().max()) > 0.1
    for mode in (torch.no_grad, torch.inference_mode):
        body.eval()
        with mode():
            merged = output_of(body, images)
        assert len(body._merged) == 1
        torch.testing.assert_close(merged.logits, injected.logits.detach(), rtol=1e-4, atol=1e-4)
    assert body._merged[0] not in [*body.modules()]
    assert not any("_merged" in name for name in body.state())
    body.train()
    assert body._merged == ()
    output_of(body, images).logits.square().sum().backward()  # what inference has made is in no graph
    assert digest(vit) == before


# ---- what a round trains


def test_at_the_start_the_adapted_vit_is_the_frozen_one(body: FedLSCL, vit: FrozenViT) -> None:
    images, _ = train_images(body, task_images(body, 1, 2))
    body.eval()
    with torch.no_grad():
        output = output_of(body, images)
        assert torch.equal(output.representation, vit(images))
        # not because generator and hook do nothing: any B matrix unlike zero shows
        size_a = body.generator.rank * body.generator.width
        body.generator.bias[size_a:] += 0.1
        assert not torch.allclose(output_of(body, images).representation, output.representation, atol=1e-4)


def test_a_fit_moves_all_three_parts_and_not_the_vit(body: FedLSCL, vit: FrozenViT) -> None:
    before, frozen = parameters(body), digest(vit)
    size_a = body.generator.rank * body.generator.width
    body.epochs = 3  # B starts at zero and so does the last scale of each CNN block: gradients reach them step by step
    fit(body, task=1, round=1)
    after = parameters(body)
    seen = list(body.data.tasks[0].classes)
    for name in before:
        rows = seen if name.startswith("head.") else slice(None)
        assert not torch.equal(before[name][rows], after[name][rows]), name
    for part in (slice(None, size_a), slice(size_a, None)):  # A as well as B
        assert not torch.equal(before["generator.weight"][part], after["generator.weight"][part])
        assert not torch.equal(before["generator.bias"][part], after["generator.bias"][part])
    assert {name.split(".")[0] for name in before} == {"cnn", "generator", "head"}
    assert digest(vit) == frozen
    assert not any(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize("mask", ["task", "seen"])
def test_no_class_outside_the_training_mask_is_trained(
    federation: Federation, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = restore_client(federation, 0)
    first, second = (set(part.classes) for part in body.data.tasks)
    wanted = {"collaborate": second if mask == "task" else first | second, "replay": first | second}
    body.train_mask = mask
    fit(body, 1, 1)
    steps: list[tuple[str, set[int]]] = []

    def spy(self: FedLSCL, loss: Tensor) -> None:
        torch.autograd.backward(loss)
        weight, bias = self.head.weight.grad, self.head.bias.grad
        assert weight is not None
        assert bias is not None
        rows = (weight.abs().sum(dim=1) + bias.abs()).nonzero().flatten()
        steps.append((phases[len(steps)], set(rows.tolist())))

    monkeypatch.setattr(Client, "manual_backward", spy)
    body.begin_round(Round(2, 2, False, 0))
    phases = [phase for phase, _ in body.plan]
    make_trainer().fit(body)
    assert {phase for phase, _ in steps} == {"collaborate", "replay"}
    for phase, classes in steps:
        assert classes == wanted[phase], phase


def test_an_epoch_lowers_the_loss(body: FedLSCL) -> None:
    body.epochs, body.learning_rate = 8, 1e-2
    images, labels = train_images(body, task_images(body, 1))
    mask = torch.zeros(body.num_classes, dtype=torch.bool)
    mask[list(body.data.tasks[0].classes)] = True

    def loss() -> float:
        body.eval()
        with torch.no_grad():
            return float(
                F.cross_entropy(output_of(body, images).logits[:, mask], torch.unique(labels, return_inverse=True)[1])
            )

    before = loss()
    fit(body, 1, 1)
    assert loss() < 0.8 * before


# ---- the plan


def test_a_round_goes_through_the_task_and_then_through_the_buffer(federation: Federation) -> None:
    body = restore_client(federation, 0)
    body.epochs, body.continual = 3, Replay(passes=2, current=False)
    body.begin_round(Round(1, 1, False, 0))
    assert {phase for phase, _ in body.plan} == {"collaborate"}  # nothing to replay in the first task
    fit(body, 1, 1)
    body.begin_round(Round(2, 2, False, 0))
    phases = [phase for phase, _ in body.plan]
    assert phases == sorted(phases)  # collaborate before replay
    m, n = len(body.memory.buffer), len(body.current)
    assert m > 0
    assert set(body.current.tolist()) == set(task_images(body, 2).tolist())
    for phase, passes, positions in (("collaborate", 3, range(m, m + n)), ("replay", 2, range(m))):
        steps = torch.cat([part for name, part in body.plan if name == phase])
        each = steps.view(passes, -1)
        assert all(sorted(row) == list(positions) for row in each.tolist()), phase
        assert len({tuple(row) for row in each.tolist()}) == passes  # every pass in an order of its own
    assert all(2 <= len(part) <= body.batch_size for _, part in body.plan)


def test_what_a_batch_holds(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    buffered = set(body.memory.candidates.tolist())
    fit(body, 2, 2)
    memory, pixels = body.memory, {}
    for index in torch.cat([memory.buffer, body.current]).tolist():
        image, of_class = train_images(body, torch.tensor([index]))
        pixels[image.numpy().tobytes()] = (index, int(of_class))
    drawn: list[int] = []
    for batch in body.train_dataloader():
        for row, image in enumerate(batch.images.pixels):
            index, label = pixels[image.numpy().tobytes()]
            assert int(batch.images.indices[row]) == index
            assert int(batch.images.labels[row]) == label
            known = index in buffered
            assert bool(batch.observed[row]) is known
            if batch.phase == "collaborate":
                assert not known
                assert batch.snapshot == {}
            elif known:
                position = memory.buffer.tolist().index(index)
                for name, values in memory.snapshot.items():
                    assert torch.equal(batch.snapshot[name][row], values[position])
            else:
                drawn.append(label)
    # as many current samples of a class as the buffer may hold
    classes = body.data.tasks[1].classes
    available = body.data.labels(body.current)
    assert {c: drawn.count(c) for c in classes} == {c: min(3, int((available == c).sum())) for c in classes}


@pytest.mark.parametrize("size", range(2, 7))
def test_no_batch_is_left_with_one_image(body: FedLSCL, size: int) -> None:
    for n in range(2, 40):
        body.batch_size = size
        body.memory.begun = 0
        body.begin_round(Round(1, 1, False, 0))
        body.current = body.current.new_zeros(n)
        lengths = [len(part) for _, part in make_plan(body.passes(body.rng("order")), size, body.rng("order"))]
        assert sum(lengths) == n
        assert min(lengths) >= 2, (n, lengths)
        assert max(lengths) <= max(size, 3)  # three images do not go into pairs


# ---- evaluation


def test_accuracy_under_each_mask(body: FedLSCL) -> None:
    (one, two), (three, four) = (part.classes for part in body.data.tasks)
    foreign = next(label for label in range(8) if label not in (one, two, three, four))
    # Everywhere: foreign > three > one > two > four
    scores = torch.zeros(64, 8)
    scores[:, [foreign, three, one, two, four]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    body.forward = lambda images, frozen: Output(scores[: len(images)], scores)  # type: ignore[method-assign]
    body.begin_evaluation(2)
    make_trainer().test(body, verbose=False)
    # each class has 4 test images; task: `one` wins task 1 and `three` task 2; seen: `three` wins; none: `foreign` wins
    missed = [0.0, 0.0]  # in two tasks the federation has all classes
    assert body.accuracy.compute() == {"task": [50.0, 50.0], "seen": [0.0, 50.0], "federation": missed, "none": missed}
    body.begin_evaluation(1)
    make_trainer().test(body, verbose=False)
    known = [0.0 if body.data.federation_mask(1)[foreign] else 50.0]
    assert body.accuracy.compute() == {"task": [50.0], "seen": [50.0], "federation": known, "none": [0.0]}


def test_accuracy_does_not_depend_on_the_batches_of_the_evaluation(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    found = []
    for size in (1, 3, 128):
        body.evaluation_batch_size = size
        body.begin_evaluation(2)
        make_trainer().test(body, verbose=False)
        found.append(body.accuracy.compute())
    assert found[0] == found[1] == found[2]


def test_evaluation_changes_nothing(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    before = {name: tensor.clone() for name, tensor in body.state().items()}
    body.begin_evaluation(1)
    make_trainer().test(body, verbose=False)
    assert same(body.state(), before)


# ---- the other methods' clients, and settings


def test_small_model_shares_what_it_says(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    names = {}
    for share in ("nothing", "cnn", "all"):
        client = make_client(SmallModelClient, share=share)
        names[share] = set(restore_client(make_federation(tmp_path / share, data, vit, client), 0).shared())
    assert names["nothing"] == set()
    assert {name.split(".")[0] for name in names["cnn"]} == {"cnn"}
    assert any(name.endswith("running_mean") for name in names["cnn"])
    assert names["all"] - names["cnn"] == {"head.weight", "head.bias"}


def test_a_download_reaches_the_live_tensors(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    for kind, share in ((SmallModelClient, {"share": "all"}), (FrozenViTClient, {"share": "head"}), (FedLSCL, {})):
        body = restore_client(make_federation(tmp_path / kind.__name__, data, vit, make_client(kind, **share)), 0)
        wanted = {name: torch.full_like(tensor, 3) for name, tensor in body.shared().items()}
        body.download(Download(0, 1, 1, 0, wanted))
        assert same({name: t.detach() for name, t in body.shared().items()}, wanted)
        state = body.state()
        assert sum(bool((t == 3).all()) for n, t in state.items() if n.startswith("model.")) == len(wanted)


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        (FedLSCL, {"epochs": 0}, "model.epochs is 0"),
        (FedLSCL, {"batch_size": 1}, "model.batch_size is 1"),
        (FedLSCL, {"evaluation_batch_size": 0}, "model.evaluation_batch_size is 0"),
        (FedLSCL, {"buffer_size": 0}, "model.buffer_size is 0"),
        (FedLSCL, {"buffer_size": -1}, "model.buffer_size is -1"),
        (FedLSCL, {"learning_rate": -0.1}, "model.learning_rate is -0.1"),
        (FedLSCL, {"rank": 0}, "model.rank is 0"),
    ],
)
def test_impossible_settings_are_refused(kind: type[Client], settings: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_client(kind, **settings)


def test_the_terms_of_a_replay_step_by_hand(federation: Federation) -> None:
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    body.continual = Replay(lambda_e=2.0, lambda_w=0.5, passes=1)
    body.begin_round(Round(2, 2, False, 0))
    classes = sorted(label for part in body.data.tasks for label in part.classes)
    images, _ = train_images(body, task_images(body, 1, 2)[:4])
    body.eval()
    with torch.no_grad():
        output = output_of(body, images)
    labels = torch.tensor(classes)
    before = {name: value + 1 for name, value in output.generated.items()}
    known = torch.tensor([1.0, 0.0, 1.0, 0.0])
    terms = body.replay_losses(output, Batch("replay", Images(np.arange(4), images, labels), before, known))
    logits = output.logits[:, classes]
    assert set(terms) == {"cross_entropy", "features", "weights"}
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(logits, torch.arange(4)))
    # every number differs by 1, so the squared distance is the width: 16 features, 4 * 2 * 32 weights
    torch.testing.assert_close(terms["features"], torch.tensor(2.0 * 16))
    torch.testing.assert_close(terms["weights"], torch.tensor(0.5 * 256))


def test_the_order_of_a_round_depends_on_seed_client_and_round_only(federation: Federation) -> None:
    body = restore_client(federation, 0)

    def order(round: int, seed: int) -> list[int]:
        body.begin_round(Round(1, round, False, seed))
        return torch.cat([part for _, part in body.plan]).tolist()

    first = order(1, 0)
    torch.rand(3)
    assert order(1, 0) == first
    assert order(2, 0) != first
    assert order(1, 1) != first
    with seeds.seeded(1):
        assert order(1, 0) == first
