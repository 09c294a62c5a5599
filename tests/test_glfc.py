"""GLFC: rebalanced losses, exemplars under a budget, the detected start of a task, and the proxy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import copy_of, fit, make_client, make_federation, make_trainer, output_of, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import fit_once
from fedlscl.memory import below
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.glfc.client import (
    TEACHERS,
    GLFCClient,
    binary,
    entropy,
    first_of_each,
    gradient_compensation,
    relation_distillation,
    weights,
)
from fedlscl.methods.glfc.gradients import encoded, encoding_net, labels_of
from fedlscl.methods.glfc.server import GLFCServer, Reconstruction
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.create import resize
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg

Make = Callable[..., Federation]
LENGTH = 8_136 + 769 * 8  # length of a gradient with the 8 classes of `Patterns`


def client(**changes: Any) -> Client:
    return make_client(GLFCClient, **{"continual": NoReplay(), "memory_size": 11, "perturbation_steps": 2, **changes})


def server(**changes: Any) -> GLFCServer:
    return GLFCServer(**{"iterations": 1, "monitors": 1, **changes})


@pytest.fixture
def body(make: Make) -> Any:
    return restore_client(make(client=client(), server=server()), 0)


def mask(classes: list[int], count: int) -> Tensor:
    return torch.isin(torch.arange(count), torch.tensor(classes))


# ---- losses


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 10_000), st.sampled_from([1.0, 200.0]))
def test_each_group_has_the_weight_of_its_size(labels: list[int], seed: int, scale: float) -> None:
    logits = scale * torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed))
    y, old = torch.tensor(labels), mask([0, 1], 4)
    omega = weights(logits, y, old)
    assert float(omega.sum()) == pytest.approx(len(labels), rel=1e-4)
    for group in (old[y], ~old[y]):
        if group.any():
            assert float(omega[group].mean()) == pytest.approx(1, rel=1e-4)
    assert weights(logits, y, mask([], 4)).tolist() == [1.0] * len(labels)


def test_the_weights_are_the_gradients_relative_to_their_group() -> None:
    # 1 - sigmoid: 0.25 and 0.75 in the old group, 0.5 alone in the new one
    logits = torch.tensor([[math.log(3), 0.0], [-math.log(3), 0.0], [9.0, 0.0]], requires_grad=True)
    omega = weights(logits, torch.tensor([0, 0, 1]), mask([0], 2))
    torch.testing.assert_close(omega, torch.tensor([0.5, 1.5, 1.0]))
    assert not omega.requires_grad


def test_the_losses_are_those_of_the_formulas() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=rng, requires_grad=True)
    labels, seen, old = torch.tensor([0, 3, 1]), [0, 1, 3], [0]
    soft = torch.rand(3, 5, generator=rng)
    omega = weights(logits, labels, mask(old, 5))

    def cross_entropy(row: int, column: int, target: float) -> float:
        p = 1 / (1 + math.exp(-float(logits[row, column].detach())))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    compensated, related = [], []
    for row, label in enumerate(labels.tolist()):
        for column in seen:
            target = float(column == label)
            compensated.append(float(omega[row]) * cross_entropy(row, column, target))
            related.append(cross_entropy(row, column, float(soft[row, column]) if column in old else target))
    one = gradient_compensation(logits, labels, mask(seen, 5), mask(old, 5))
    other = relation_distillation(logits, labels, mask(seen, 5), mask(old, 5), soft)
    assert float(one.detach()) == pytest.approx(sum(compensated) / 9, rel=1e-5)
    assert float(other.detach()) == pytest.approx(sum(related) / 9, rel=1e-5)
    for loss in (one, other):
        (gradient,) = torch.autograd.grad(loss, [logits])
        assert not gradient[:, [2, 4]].any()
        assert bool(gradient[:, seen].all())


def test_the_entropy_is_that_of_the_given_classes() -> None:
    logits = torch.tensor([[1.0, 1.0, 70.0, 1.0], [50.0, 0.0, 0.0, 0.0]])
    found = entropy(logits, mask([0, 1, 3], 4))
    torch.testing.assert_close(found, torch.tensor([math.log(3), 0.0]), atol=1e-4, rtol=0)


# ---- the encoding net


def test_the_encoding_net_is_the_same_everywhere_and_as_large_as_published() -> None:
    before = torch.random.get_rng_state()
    one, other = encoding_net(100), encoding_net(100)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(one.state_dict(), other.state_dict())
    values = torch.cat([parameter.detach().flatten() for parameter in one.parameters()])
    assert len(values) == 85_036
    assert -0.5 <= float(values.min()) < -0.49
    assert 0.49 < float(values.max()) <= 0.5


@pytest.mark.parametrize("classes", [2, 11])
def test_the_label_of_a_gradient_is_found(classes: int) -> None:
    net, rng = encoding_net(classes), torch.Generator().manual_seed(1)
    labels = torch.arange(classes).repeat(3)
    images = torch.rand(len(labels), 3, 32, 32, generator=rng)
    gradients = torch.stack([encoded(net, x[None], y[None]) for x, y in zip(images, labels, strict=True)])
    assert labels_of(gradients, classes).tolist() == labels.tolist()


def test_a_gradient_is_that_of_all_weights() -> None:
    net, image, label = encoding_net(3), torch.rand(1, 3, 32, 32), torch.tensor([2])
    found = encoded(net, image, label)
    F.cross_entropy(net(image), label).backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])
    torch.testing.assert_close(found, wanted)


def test_an_image_is_fitted_to_its_gradient() -> None:
    net, rng = encoding_net(3), torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 32, 32, generator=rng)
    gradients = torch.stack([encoded(net, truth[n : n + 1], torch.tensor([n + 1])) for n in range(2)])
    module = Reconstruction(gradients, 3, server(iterations=12, learning_rate=0.1, monitors=3), rng)
    near = truth + 0.1 * torch.randn(truth.shape, generator=rng)  # from afar it takes hundreds of iterations
    with torch.no_grad():
        for image, start in zip(module.images, near, strict=True):
            image.copy_(start[None])
    fit_once(make_trainer(), module)
    assert module.labels.tolist() == [1, 2]
    for number, last in enumerate(module.last):
        assert len(last) == 3
        assert torch.equal(last[-1], module.images[number].detach())
        distances = [float((image[0] - truth[number]).norm()) for image in last]
        assert distances[-1] < 0.5 * float((near[number] - truth[number]).norm())
        assert distances[-1] < distances[0]


# ---- exemplars


def test_the_first_of_each_label() -> None:
    assert first_of_each(torch.tensor([5, 3, 5, 5, 3, 7]), 2).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each(torch.tensor([5, 3]), 0).tolist() == []
    assert first_of_each(torch.empty(0, dtype=torch.int64), 4).tolist() == []


def lists(body: Any, indices: Tensor) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, label in zip(indices.tolist(), body.data.labels(indices).tolist(), strict=True):
        found.setdefault(label, []).append(index)
    return found


def test_exemplars_share_the_budget(tmp_path: Path, long_data: FederatedDataModule, vit: FrozenViT) -> None:
    federation = make_federation(tmp_path, long_data, vit, client(), server())
    body = restore_client(federation, 0)
    parts = body.data.tasks
    before: dict[int, list[int]] = {}
    for task, number in ((1, 1), (1, 2), (2, 3), (3, 4)):
        body.begin_round(Round(task, number, False, 0))
        learned = [label for part in parts[: task - 1] for label in part.classes]
        found = lists(body, body.memory.buffer)
        assert sorted(found) == sorted(learned)
        assert sum(map(len, found.values())) <= 11
        for label, chosen in found.items():
            available = sum(int((body.data.labels(torch.as_tensor(p.train)) == label).sum()) for p in parts)
            assert len(chosen) == len(set(chosen)) == min(11 // len(learned), available)
            assert chosen == before[label][: len(chosen)]
        used = [index for batch in body.train_dataloader() for index in batch.images.indices.tolist()]
        assert sorted(used) == sorted(body.memory.buffer.tolist() + parts[task - 1].train.tolist())
        fit(body, task, number)
        before = lists(body, body.memory.remembered)


def test_the_first_exemplar_is_the_image_nearest_the_class_mean(body: Any) -> None:
    fit(body, 1, 1)
    body.eval()
    for label, chosen in lists(body, body.memory.candidates).items():
        members = body.current[body.data.labels(body.current) == label].tolist()
        pixels, _ = body.data.batch("train", torch.tensor(members))
        with torch.no_grad():
            features = F.normalize(output_of(body, pixels).representation.double(), dim=1)
        nearest = (features - features.mean(dim=0)).norm(dim=1).argmin()
        assert chosen[0] == members[int(nearest)]


# ---- the start of a task


def test_the_gradients_of_a_task_s_prototypes_travel_once(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(), server=server(), rounds=2)
    run(federation)
    uploads = [message for message, _ in wire if isinstance(message, Upload)]
    assert len(uploads) == 12
    for message in uploads:
        assert ("gradients" in message.tensors) == (message.round in (1, 3))
        if "gradients" in message.tensors:
            classes = federation.template.data.split.clients[message.client].tasks[message.task - 1].classes
            gradients = message.tensors["gradients"]
            assert gradients.shape == (len(classes), LENGTH)
            assert labels_of(gradients, 8).tolist() == sorted(classes)


def test_without_perturbation_the_gradients_are_those_of_the_prototypes(make: Make) -> None:
    body = restore_client(make(client=client(perturbation_steps=0), server=server()), 1)
    fit(body, 1, 1)
    net = encoding_net(8)
    wanted = []
    for label, chosen in sorted(lists(body, body.memory.candidates).items()):
        pixels, _ = body.data.batch("train", torch.tensor(chosen[:1]))
        wanted.append(encoded(net, resize(resize(pixels, 16), 32), torch.tensor([label])))
    torch.testing.assert_close(body.outgoing()["gradients"], torch.stack(wanted))


def test_the_perturbation_lowers_each_image_s_loss(make: Make) -> None:
    body = restore_client(make(client=client(perturbation_steps=10, perturbation_rate=30.0), server=server()), 0)
    fit(body, 1, 1)
    body.eval()
    pixels, labels = body.data.batch("train", body.memory.candidates)
    images = resize(pixels, 16)

    def losses(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = body(images, {}).logits
        return binary(logits, F.one_hot(labels, 8).float(), body.seen_mask)

    moved = body.perturb(images, labels)
    assert bool((losses(moved) < losses(images)).all())
    # each on its own: the others in the batch have no part in it
    torch.testing.assert_close(body.perturb(images[:1], labels[:1]), moved[:1], rtol=1e-4, atol=1e-5)


def test_constant_entropy_is_silent(make: Make) -> None:
    body = restore_client(make(client=client(task_detect="entropy", threshold=0.0), server=server()), 0)
    received = copy_of(body.shared())
    signals = []
    for number in (1, 2, 3):
        body.download(Download(0, 1, number, 0, received))
        if number == 3:  # less certain
            with torch.no_grad():
                body.head.weight.mul_(0.0)
                body.head.bias.mul_(0.0)
        fit(body, 1, number)
        signals.append(body.signal)
        assert ("gradients" in body.outgoing()) == body.signal
    assert signals == [True, False, True]
    assert body.state()["memory.received.entropy"].tolist() == pytest.approx([math.log(2)], abs=1e-4)


def test_what_was_not_detected_is_not_yet_learned(make: Make) -> None:
    body = restore_client(make(client=client(task_detect="entropy", threshold=100.0), server=server()), 0)
    fit(body, 1, 1)
    fit(body, 2, 2)
    assert not body.signal
    assert len(body.memory.buffer) > 0
    assert not body.old.any()

    def replayed() -> bool:
        indices = {i for batch in body.train_dataloader() for i in batch.images.indices.tolist()}
        return bool(indices & set(body.memory.buffer.tolist()))

    assert not replayed()
    body.threshold = -100.0  # anything is a signal
    fit(body, 2, 3)
    assert body.signal
    assert replayed()
    assert body.old.nonzero().flatten().tolist() == list(body.data.tasks[0].classes)
    body.threshold = 100.0
    fit(body, 2, 4)  # and stays learned
    assert replayed()


# ---- teachers


def shifted(tensors: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: t + by if t.is_floating_point() else t.clone() for name, t in tensors.items()}


def test_the_teacher_is_the_latest_best_after_a_signal_and_then_the_previous(make: Make) -> None:
    federation = make(client=client(), server=server())
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    assert len(body.soft) == 0
    start = copy_of(body.shared())
    models = {"latest": shifted(start, 0.01), "previous": shifted(start, -0.02)}
    teachers = {f"teacher.{which}.{name}": t for which, model in models.items() for name, t in model.items()}
    message = Download(0, 1, 1, 0, {**start, **teachers})
    body.download(Download.from_bytes(message.to_bytes(), body.download_schema()))
    assert same(copy_of(body.shared()), start)
    for number, which in ((2, "latest"), (3, "previous")):
        fit(body, 2, number)
        other = restore_client(make(client=client(), server=server()), 0)
        other.adopt(models[which])
        other.eval()
        samples = torch.cat([body.current, body.memory.buffer])
        batch = next(iter(body.train_dataloader()))
        assert set(batch.images.indices.tolist()) <= set(samples.tolist())
        with torch.no_grad():
            wanted = output_of(other, batch.images.pixels).logits.sigmoid()
        torch.testing.assert_close(body.targets(batch.images), wanted, rtol=1e-4, atol=1e-5)


def test_a_step_has_both_halves_only_with_a_teacher(body: Any) -> None:
    fit(body, 1, 1)
    batch = next(iter(body.train_dataloader()))
    body.eval()
    output = body.output(batch.images)
    alone = body.collaborative_losses(output, batch)
    assert set(alone) == {"compensation"}
    body.soft = torch.full((len(body.asked), 8), 0.5)
    both = body.collaborative_losses(output, batch)
    assert set(both) == {"compensation", "relation"}
    torch.testing.assert_close(2 * both["compensation"], alone["compensation"])


class Told(GLFCServer):
    """Has its scores dictated."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(1, monitors=1)
        self.scores = scores

    def _reconstruct(self, gradients: Tensor, rng: torch.Generator, trainer: Any) -> dict[str, float]:
        self.labels = labels_of(gradients, self.classes)
        return {}

    def _score(self, model: Any, trainer: Any) -> Tensor:
        return torch.tensor([self.scores.pop(0)])


def test_the_best_model_is_kept_and_starts_anew_with_new_gradients(make: Make) -> None:
    proxy = Told([0.5, 0.4, 0.5, 0.1, 0.0])
    body = restore_client(make(client=client(), server=proxy), 0)
    start, empty = copy_of(body.shared()), Round(1, 1, False, 0)
    gradients = torch.zeros(2, LENGTH)
    sent, answers = [], []
    for number in range(6):
        tensors = shifted(start, number)
        extra = {"gradients": gradients} if number in (1, 4) else {}  # a first round without leaves nothing to score
        told, _ = proxy.aggregate({0: Upload(0, 1, 1, 5, {**tensors, **extra})}, Context(2, empty, make_trainer))
        assert set(told) == {0, 1}
        answer = told[1].tensors
        sent.append(tensors)
        answers.append({which: below(answer, f"teacher.{which}.") for which in TEACHERS})
        assert same({name: answer[name] for name in tensors}, tensors)
        proxy.load(copy_of(proxy.state()))
    kept = {"latest": {1: 1, 3: 3, 4: 4}, "previous": {4: 3}}  # by round the model that is sent
    for which, models in kept.items():
        for number, answer in enumerate(answers):
            assert same(answer[which], sent[models[number]] if number in models else {})
    assert same(below(proxy.teachers, "latest."), sent[4])
    assert same(below(proxy.teachers, "previous."), sent[3])


def test_the_mean_is_uniform_and_scored_on_the_monitor_images(make: Make) -> None:
    proxy = server(iterations=3, monitors=2)
    body = restore_client(make(client=client(), server=proxy), 0)
    start = copy_of(body.shared())
    start["head.weight"].zero_()
    start["head.bias"].copy_(torch.arange(8.0))  # it says class 7 whatever it sees
    net, rng = encoding_net(8), seeds.generator(0, "test")
    gradients = torch.stack(
        [encoded(net, torch.rand(1, 3, 32, 32, generator=rng), torch.tensor([label])) for label in (7, 1, 7)]
    )
    uploads = {
        0: Upload(0, 1, 1, 1, {**start, "gradients": gradients[:1]}),
        1: Upload(
            1, 1, 1, 99, {**shifted(start, 2.0), "head.weight": start["head.weight"], "gradients": gradients[1:]}
        ),
    }
    answers, metrics = proxy.aggregate(uploads, Context(2, Round(1, 1, False, 0), make_trainer))
    torch.testing.assert_close(answers[0].tensors["head.bias"], torch.arange(8.0) + 1)
    assert proxy.labels.tolist() == [7, 7, 1, 1, 7, 7]
    assert proxy.images.shape == (6, 3, 32, 32)
    assert 0 <= float(proxy.images.min()) <= float(proxy.images.max()) <= 1
    assert metrics["score"] == pytest.approx(100 * 2 / 3)
    assert metrics["mismatch"] > 0


def test_a_gradient_that_cannot_be_inverted_gives_no_images(make: Make) -> None:
    proxy = server()
    body = restore_client(make(client=client(), server=proxy), 0)
    upload = Upload(0, 1, 1, 1, {**copy_of(body.shared()), "gradients": torch.full((1, LENGTH), 1e30)})
    _, metrics = proxy.aggregate({0: upload}, Context(1, Round(1, 1, False, 0), make_trainer))
    assert all(bool(tensor.isfinite().all()) for tensor in proxy.state().values())
    assert len(proxy.images) == len(proxy.labels) == 0
    assert metrics == {}


# ---- messages and settings


@pytest.mark.parametrize(("classes", "size"), [(100, 340_144), (200, 647_744)])
def test_a_message_has_the_bytes_of_the_formula(vit: FrozenViT, classes: int, size: int) -> None:
    body: Any = client().assemble(vit, SmallModelSpec("resnet18", 512, 32), "resnet18", classes)
    model = 4 * (11_176_512 + 513 * classes + 9_600) + 160
    up = body.upload_schema()
    assert up["gradients"].max_bytes == classes * size
    assert sum(spec.max_bytes for name, spec in up.items() if name != "gradients") == model
    down = body.download_schema()
    assert sum(spec.max_bytes for spec in down.values() if not spec.optional) == model
    for which in TEACHERS:
        assert sum(s.max_bytes for n, s in down.items() if n.startswith(f"teacher.{which}.")) == model
    assert sum(tensor.nbytes for tensor in body.shared().values()) == model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": -1}, r"model\.memory_size is -1, must be at least 0"),
        ({"threshold": math.nan}, r"model\.threshold is nan"),
        ({"perturbation_steps": -1}, r"model\.perturbation_steps is -1"),
        ({"perturbation_rate": -0.1}, r"model\.perturbation_rate is -0\.1"),
        ({"snapshot": "local"}, r"model\.snapshot is local, must be deployed for GLFCClient"),
    ],
)
def test_wrong_settings_of_the_client_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, r"server\.iterations is 0, must be at least 1"),
        ({"learning_rate": 0.0}, r"server\.learning_rate is 0\.0, must be positive"),
        ({"monitors": 2}, r"server\.monitors is 2, must be between 1 and the 1 iterations"),
    ],
)
def test_wrong_settings_of_the_server_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server(**settings)


def test_a_client_and_a_server_that_do_not_fit_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"GLFCServer, .* send 'gradients', .* the model GLFCClient"):
        make(client=make_client(FedAvgClient, continual=NoReplay()), server=server())
    federation = make(client=client(), server=FedAvg())  # GLFC without its proxy has no teacher, but is possible
    assert isinstance(restore_client(federation, 0), nn.Module)
