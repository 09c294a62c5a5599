"""What clients and servers offer to methods: strategies that act while a task is learned, servers with a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Recorder,
    copy_of,
    fit,
    make_client,
    make_data,
    make_federation,
    make_trainer,
    outcome,
    restore_client,
    run,
    same,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from fedlscl.batches import Batch, Images, Output
from fedlscl.client import Client
from fedlscl.continual import Continual, NoReplay, Step
from fedlscl.data.module import FederatedDataModule
from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import fit_once
from fedlscl.losses import masked_cross_entropy
from fedlscl.messages import Download, Message, MessageError, Schema, TensorSpec, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Answer, Answers, Context, FedAvg, Metrics

Make = Callable[..., Federation]


class Watching(Continual):
    """Observes the current task's logits and consolidates; notes everything."""

    observes = "current"

    def __init__(self) -> None:
        self.consolidated: list[tuple[dict[str, Tensor], list[float], dict[str, Tensor]]] = []
        self.steps: list[Step] = []

    def __deepcopy__(self, memo: Any) -> Watching:
        return self  # a federation copies its client

    def preserved(self, output: Output) -> dict[str, Tensor]:
        return {"logits": output.logits}

    def consolidate(
        self, parameters: Mapping[str, Tensor], losses: Iterator[Tensor], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        values = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in gradients)
            values.append(float(loss.detach()))
        self.consolidated.append((copy_of(parameters), values, dict(kept)))
        return {"calls": kept.get("calls", torch.zeros(1)) + 1}

    def collaborative_losses(self, step: Step) -> dict[str, Tensor]:
        self.steps.append(step)
        return {"extra": 0 * step.output.logits.sum()}


@pytest.fixture
def watched(make: Make) -> tuple[Watching, Client]:
    strategy = Watching()
    client = make_client(FedAvgClient, continual=strategy, train_mask="task", buffer_size=0)
    return strategy, restore_client(make(client=client, server=FedAvg()), 0)


def test_a_task_is_consolidated_once_with_the_model_received_last(watched: tuple[Watching, Client]) -> None:
    strategy, body = watched
    fit(body, 1, 1)
    fit(body, 1, 2)
    assert strategy.consolidated == []
    received = {name: t + 0.01 if t.is_floating_point() else t for name, t in copy_of(body.shared()).items()}
    body.download(Download(0, 1, 2, 0, received))
    body.eval()
    part = body.data.tasks[0]
    pixels, labels = body.data.batch("train", part.train)
    classes = torch.zeros(body.num_classes, dtype=torch.bool)
    classes[list(part.classes)] = True
    with torch.no_grad():
        wanted = masked_cross_entropy(body(pixels, {}).logits, labels, classes, reduction="none")
    fit(body, 2, 3)
    fit(body, 2, 4)
    ((parameters, losses, before),) = strategy.consolidated
    assert before == {}
    assert all(torch.equal(tensor, received[name]) for name, tensor in parameters.items())
    torch.testing.assert_close(torch.tensor(losses).sort().values, wanted.sort().values, rtol=1e-4, atol=1e-5)
    assert body.memory.kept["calls"].tolist() == [1]
    assert body.state()["memory.kept.calls"].tolist() == [1]
    assert body.learned_mask.tolist() == classes.tolist()


def test_the_outputs_of_the_received_model_come_with_the_current_images(watched: tuple[Watching, Client]) -> None:
    strategy, body = watched
    fit(body, 1, 1)
    assert all(step.snapshot == {} and not step.observed.any() for step in strategy.steps)
    body.eval()
    current = torch.as_tensor(body.data.tasks[1].train)
    pixels, _ = body.data.batch("train", current)
    with torch.no_grad():
        logits = body(pixels, {}).logits
    strategy.steps.clear()
    fit(body, 2, 2)
    fit(body, 2, 3)  # still those of the model with which the task began
    assert strategy.steps
    found = torch.cat([step.snapshot["logits"] for step in strategy.steps])
    assert bool(torch.cat([step.observed for step in strategy.steps]).all())
    assert len(found) == 2 * len(current)  # one epoch a round
    distance = torch.cdist(found, logits, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.min(dim=1).values.max()) < 1e-4
    assert sorted(distance.argmin(dim=1).tolist()) == sorted(2 * list(range(len(current))))
    assert all(set(step.parameters) == {name for name, _ in body.named_parameters()} for step in strategy.steps)
    assert all(step.kept["calls"].tolist() == [1] for step in strategy.steps)


def test_a_local_snapshot_of_images_to_come_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.snapshot is local, .* take deployed"):
        make_client(FedAvgClient, continual=Watching(), snapshot="local")


class Settled(FedAvgClient):
    """Works in one way only."""

    required = (("train_mask", "task"), ("continual", NoReplay))


class Quiet(NoReplay):
    """A strategy of a user's own, of which a method cannot know what it does."""


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"train_mask": "seen"}, r"model\.train_mask is seen, must be task for Settled"),
        ({"continual": Watching()}, r"model\.continual is Watching, must be NoReplay for Settled"),
        ({"continual": Quiet()}, r"model\.continual is Quiet, must be NoReplay for Settled"),
    ],
)
def test_a_setting_that_the_method_requires_is_named(settings: dict[str, Any], text: str) -> None:
    suitable = {"train_mask": "task", "continual": NoReplay()}
    assert make_client(Settled, **suitable).train_mask == "task"
    with pytest.raises(ValueError, match=text):
        make_client(Settled, **{**suitable, **settings})


# ---- servers


class Choosy(FedAvg):
    """Serves clients that send `a` and take back `b`."""

    serves, needs, gives = "SomeClient", ("a",), ("b",)


@pytest.mark.parametrize(
    ("up", "down", "problem"),
    [
        (["x", "ab.weight"], ["x", "b.bias"], "send 'a', but model does not"),
        (["x", "a.weight"], ["x", "ab"], "take back 'b', but model does not"),
        (["x", "a"], [], "take back 'b', but model does not"),
    ],
)
def test_a_server_refuses_clients_without_what_it_needs(up: list[str], down: list[str], problem: str) -> None:
    one = TensorSpec((1,))
    server = Choosy()
    fitting = dict.fromkeys(["x", "a.weight"], one), {"x": one, "b": TensorSpec((1,), optional=True)}
    server.begin(*fitting, lambda: pytest.fail("no model is wanted"))
    assert server.names == ("x",)
    with pytest.raises(ValueError, match=f"server is Choosy, .*clients that {problem}; take the model SomeClient, or"):
        server.begin(dict.fromkeys(up, one), dict.fromkeys(down, one), lambda: pytest.fail("no model is wanted"))


class Ageing(FedAvg):
    """Counts its rounds, tells the clients how many there have been, and fits a model of its own."""

    def begin(self, uploads: Schema, downloads: Schema, model: Callable[[], nn.Module]) -> None:
        super().begin(uploads, downloads, model)
        self.age, self.model, self.drawn = torch.zeros(1), model(), torch.zeros(1)
        self.heard: list[Round] = []

    def state(self) -> dict[str, Tensor]:
        return {"age": self.age}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.age = state["age"]

    def aggregate(self, uploads: Mapping[int, Upload], context: Context) -> tuple[Answers, Metrics]:
        self.age = self.age + 1
        self.heard.append(context.round)
        self.drawn = torch.rand(1)
        fit_once(context.trainer(), BoringModel())
        answers, _ = super().aggregate(uploads, context)
        extra = {"age": self.age} if context.round.ends_task else {}
        told = {index: Answer({**answer.tensors, **extra}) for index, answer in answers.items()}
        return told, {"age": float(self.age), "drawn": float(self.drawn)}


class Told(FedAvgClient):
    """Takes the server's age where it comes."""

    def download(self, message: Download) -> None:
        tensors = dict(message.tensors)
        if (age := tensors.pop("age", None)) is not None:
            self.memory.received["age"] = age
        self.adopt(tensors)

    def download_schema(self) -> Schema:
        return {**super().download_schema(), "age": TensorSpec((1,), optional=True)}


def ageing(folder: Path, data: FederatedDataModule, vit: FrozenViT) -> Federation:
    return make_federation(folder, data, vit, make_client(Told, train_mask="task"), Ageing(), rounds=2)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_server_with_a_memory_is_resumed(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    recorder = Recorder()
    whole = run(ageing(tmp_path / "one", data, vit), recorder)
    results = []
    for _ in range(4):
        federation = ageing(tmp_path / "other", data, vit)
        result = next(federation.run(Recorder()))
        results.append(result)
    assert outcome(results) == outcome(whole)
    assert [r.server["age"] for r in whole] == [1, 2, 3, 4]
    assert len({r.server["drawn"] for r in whole}) == 4
    assert recorder.served_rounds == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert recorder.steps[-1] == (64, 64)
    assert restore_client(federation, 1).memory.received["age"].tolist() == [4]
    sizes = [result.bytes_down[0] for result in whole]
    assert sizes[0] == sizes[2] < sizes[1] == sizes[3]


def test_a_server_hears_where_it_is_and_gets_a_model(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    federation = ageing(tmp_path, data, vit)
    server: Any = federation.server
    shared = restore_client(federation, 0).shared()
    assert set(server.model.state_dict()) == set(shared)
    output = server.model(torch.rand(2, 3, 8, 8), {})
    assert output.logits.shape == (2, data.num_classes)
    next(federation.run(Recorder()))
    assert server.heard == [Round(1, 1, False, 0)]


def test_the_rounds_of_a_schedule() -> None:
    rounds = list(Schedule(2).after(1, 2, seed=9))
    assert rounds == [Round(1, 2, True, 9), Round(2, 3, False, 9), Round(2, 4, True, 9)]
    assert list(Schedule(2).after(4, 2, seed=9)) == []


# ---- messages and images


def test_an_optional_tensor_may_be_missing_but_not_wrong() -> None:
    schema = {"x": TensorSpec((2,)), "y": TensorSpec((1,), optional=True)}

    def received(tensors: dict[str, Tensor]) -> Message:
        return Download.from_bytes(Download(0, 1, 1, 0, tensors).to_bytes(), schema)

    assert set(received({"x": torch.zeros(2)}).tensors) == {"x"}
    assert same(received({"x": torch.zeros(2), "y": torch.ones(1)}).tensors, {"x": torch.zeros(2), "y": torch.ones(1)})
    with pytest.raises(MessageError, match=r"lacks tensors \['x'\]"):
        received({"y": torch.ones(1)})
    with pytest.raises(MessageError, match="'y' has shape"):
        received({"x": torch.zeros(2), "y": torch.ones(2)})


def test_images_may_be_floats(vit: FrozenViT, make: Make) -> None:
    body = restore_client(make(client=make_client(FedAvgClient, train_mask="task"), server=FedAvg()), 0)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    body.eval()
    torch.testing.assert_close(body(images, {}).logits, body(images.float() / 255, {}).logits)
    grown = (images.float() / 255).requires_grad_()
    body(grown, {}).logits.sum().backward()
    assert grown.grad is not None
    assert bool(grown.grad.any())


class Oracle(FedAvgClient):
    """Knows the task of a test image, and predicts its first class."""

    task_aware = MASKS

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        firsts = torch.tensor([part.classes[0] for part in self.data.tasks])
        return nn.functional.one_hot(firsts[tasks], self.num_classes).float()


def test_a_task_aware_method_is_told_the_task(make: Make) -> None:
    federation = make(client=make_client(Oracle, train_mask="task"), server=FedAvg())
    result = run(federation)[-1]
    labels = torch.as_tensor(federation.template.data.dataset.test.labels)
    for index, one in enumerate(federation.template.data.split.clients):
        for number, part in enumerate(one.tasks):
            share = (labels[torch.as_tensor(part.test)] == part.classes[0]).double().mean()
            assert result.accuracy["none"][index][number] == pytest.approx(100 * float(share))


# ------------------------------------------------------------------ gradients of bounded length


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_is_cut_to_its_largest_norm(make: Make, monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    """Also behind the scaler of 16-mixed, whose factor is none of the gradient's length."""
    federation = make(client=make_client(FedAvgClient, continual=NoReplay(), gradient_clip=1e-3), server=FedAvg())
    body, norms = restore_client(federation, 0), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward = body.manual_backward

    class Looking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            norms.append(torch.stack([p.grad.norm() for p in body.parameters()]).norm().item())
            if scaled:
                scaler.update()  # as 16-mixed does it after a step
            return super().step(closure)

    monkeypatch.setattr(body, "configure_optimizers", lambda: Looking(body.parameters(), lr=0.1))
    trainer = make_trainer()
    if scaled:
        monkeypatch.setattr(trainer.precision_plugin, "scaler", scaler, raising=False)
        monkeypatch.setattr(body, "manual_backward", lambda loss: backward(scaler.scale(loss)))
    body.begin_round(Round(1, 1, False, 0))
    trainer.fit(body)
    assert norms == pytest.approx([1e-3] * len(body.plan), rel=1e-3)


def test_a_short_gradient_stays_as_it_is(make: Make) -> None:
    found = []
    for clip in (None, 1e6):
        federation = make(client=make_client(FedAvgClient, continual=NoReplay(), gradient_clip=clip), server=FedAvg())
        body = restore_client(federation, 0)
        fit(body, 1, 1)
        found.append(copy_of(body.state()))
    assert same(*found)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_an_impossible_bound_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=r"model.gradient_clip is .*, must be positive, or null"):
        make_client(FedAvgClient, gradient_clip=clip)


# ------------------------------------------------------------------ phases of a method's own


class Phases(FedAvgClient):
    """First the head alone, then all."""

    def passes(self, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        samples = self.epoch(0, len(self.current))
        yield "head", samples
        yield "all", samples[:3]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        output = self.output(batch.images, "train")
        features = output.representation.detach() if batch.phase == "head" else output.representation
        return {"own": nn.functional.cross_entropy(self.head(features), batch.images.labels)}


def test_a_method_may_have_phases_of_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make(client=make_client(Phases, continual=NoReplay()), server=FedAvg())
    body, logged, before = restore_client(federation, 0), [], {}
    monkeypatch.setattr(Phases, "tally", lambda self, terms, weight: logged.append((list(terms), weight)))
    body.begin_round(Round(1, 1, False, 0))
    steps = [phase for phase, _ in body.plan]
    assert steps == sorted(steps, reverse=True)
    assert [len(samples) for phase, samples in body.plan if phase == "all"] == [3]
    body.plan = [step for step in body.plan if step[0] == "head"]
    before = copy_of(dict(body.named_parameters()))
    make_trainer().fit(body)
    moved = {name for name, parameter in body.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert logged == [(["head/own"], len(samples)) for _, samples in body.plan]


# ------------------------------------------------------------------ images that a server holds


class Holding(FedAvg):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.server_images = count

    def hold(self, images: Tensor, labels: Tensor) -> None:
        self.held = images, labels


def test_a_server_gets_the_public_images_it_asks_for(make: Make) -> None:
    server = Holding(2)
    federation = make(client=make_client(FedAvgClient, continual=NoReplay()), server=server)
    images, labels = server.held
    assert labels.tolist() == sorted([*range(8)] * 2)
    assert images.shape == (16, 3, 8, 8)
    assert images.dtype == torch.uint8
    train = federation.template.data.dataset.train
    places = [np.flatnonzero((train.images == image.numpy()).all(axis=(1, 2, 3))).tolist() for image in images]
    assert [int(train.labels[place]) for (place,) in places] == labels.tolist()


def test_public_images_are_those_of_no_client_as_far_as_they_go(cache: Path) -> None:
    data = make_data(cache, train_per_class=10)
    held = {int(i) for client in data.split.clients for part in client.tasks for i in part.train}
    train = data.dataset.train
    free = {label: {i for i in np.flatnonzero(train.labels == label).tolist() if i not in held} for label in range(8)}
    used = {label for client in data.split.clients for part in client.tasks for label in part.classes}
    assert {len(free[label]) for label in used} == {2}

    def places(per_class: int) -> dict[int, list[int]]:
        images, labels = data.server_images(per_class)
        found: dict[int, list[int]] = {label: [] for label in range(8)}
        for image, label in zip(images.numpy(), labels.tolist(), strict=True):
            found[label].append(int(np.flatnonzero((train.images == image).all(axis=(1, 2, 3)))[0]))
        return found

    for label in used:
        assert set(places(2)[label]) == free[label]
        assert set(places(3)[label]) > free[label]
        assert len(set(places(99)[label])) == 12
    assert places(3) == places(3)


def test_images_held_out_for_evaluation_are_not_public(cache: Path) -> None:
    data = make_data(cache, local_test="holdout30")
    evaluated = {int(i) for client in data.split.clients for part in client.tasks for i in part.test}
    images, _ = data.server_images(99)
    shown = {image.tobytes() for image in images.numpy()}
    train = data.dataset.train.images
    assert evaluated
    assert not any(train[i].tobytes() in shown for i in evaluated)
    assert len(shown) == len(train) - len(evaluated)
