"""TARGET: distillation on synthetic images, and how the server makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Recorder, copy_of, fit, make_client, make_trainer, outcome, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl.batches import Output
from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import fit_once
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.data_free import batch_statistics
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.target import client as target_client
from fedlscl.methods.target import server as target_server
from fedlscl.methods.target import synthesis
from fedlscl.methods.target.client import TARGETClient
from fedlscl.methods.target.server import TARGETServer
from fedlscl.methods.target.synthesis import ImageGenerator, Inversion, InversionSettings
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.create import resize
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import FedAvg

Make = Callable[..., Federation]
SMALL: dict[str, Any] = {"synthesis_rounds": 2, "steps": 2, "batch_size": 4}
OLD = torch.tensor([True, False, True, True, False])


def client(kind: type[Client] = TARGETClient, **changes: Any) -> Client:
    return make_client(kind, **{"continual": NoReplay(), "train_mask": "task", **changes})


def server(**changes: Any) -> TARGETServer:
    return TARGETServer(**{**SMALL, **changes})


# ---- what clients minimise


def test_the_distillation_is_the_formula() -> None:
    logits, teacher = torch.randn(3, 5), torch.randn(3, 3)
    columns = [0, 2, 3]
    total = 0.0
    for b in range(3):
        wanted = [math.exp(float(z) / 2) for z in teacher[b]]
        mine = [math.exp(float(logits[b, c]) / 2) for c in columns]
        total -= sum(w / sum(wanted) * math.log(m / sum(mine)) for w, m in zip(wanted, mine, strict=True))
    assert float(target_client.distillation(logits[:, OLD], teacher, 2.0)) == pytest.approx(total / 3, rel=1e-5)


def test_new_columns_get_no_gradient_and_the_teacher_is_the_minimum(make: Make) -> None:
    body = restore_client(make(client=client(), server=server()), 0)
    fit(body, 1, 1)
    boundary(body, count=4)
    received = body.memory.received
    old = received["classes"]
    assert 0 < int(old.sum()) < body.num_classes
    student = body.old_logits(received["images"])
    (gradient,) = torch.autograd.grad(
        target_client.distillation(student, torch.randn(student.shape), 2.0), body.head.bias, retain_graph=True
    )
    assert not gradient[~old].any()
    assert bool((gradient[old] != 0).all())
    (gradient,) = torch.autograd.grad(target_client.distillation(student, student.detach(), 2.0), student)
    assert float(gradient.abs().max()) < 1e-7


def hear(body: Client, message: Download) -> None:
    """Take an answer as a worker does."""
    body.download(message)
    body.trainer = make_trainer()
    body.eval()
    with torch.no_grad():
        body.on_download_end()


def boundary(body: Client, number: int = 1, count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """What a server says at the end of a task."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=rng)
    classes = torch.zeros(body.num_classes, dtype=torch.bool)
    classes[[1, 4]] = True
    tensors = {**copy_of(body.shared()), "images": images, "classes": classes}
    hear(body, Download(0, number, number, 0, tensors))
    return tensors


def test_the_first_task_is_fedavg_to_the_last_bit(make: Make) -> None:
    results = [
        run(make(client=client(TARGETClient), server=server(weighting="samples")))[0],
        run(make(client=client(FedAvgClient), server=FedAvg()))[0],
    ]
    assert results[0].accuracy == results[1].accuracy
    states = []
    for kind in (TARGETClient, FedAvgClient):
        body = restore_client(make(client=client(kind), server=server() if kind is TARGETClient else FedAvg()), 0)
        fit(body, 1, 1)
        states.append(copy_of(body.state()))
    assert same(*states)


def test_the_client_keeps_images_and_their_teachers_logits_unchanged(make: Make) -> None:
    body = restore_client(make(client=client(), server=server()), 0)
    fit(body, 1, 1)
    sent = boundary(body)
    body.eval()
    with torch.no_grad():
        wanted = body(sent["images"], {}).logits[:, [1, 4]]
    received = copy_of(body.memory.received)
    assert set(received) == {"images", "logits", "classes"}
    torch.testing.assert_close(received["logits"], wanted, rtol=1e-4, atol=1e-5)
    assert received["images"].equal(sent["images"])
    fit(body, 2, 2)
    hear(body, Download(0, 2, 2, 0, copy_of(body.shared())))  # an answer in the middle of a task
    body.begin_evaluation(2)
    make_trainer().test(body, verbose=False)
    assert same(body.memory.received, received)
    assert body.state()["memory.received.logits"].equal(received["logits"])
    again = boundary(body, number=2, count=3, seed=1)
    assert body.memory.received["images"].equal(again["images"])
    assert body.memory.received["logits"].shape == (3, 2)


def test_a_step_draws_as_many_synthetic_images_as_it_has_real_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    body = restore_client(make(client=client(strength=3.0), server=server()), 0)
    fit(body, 1, 1)
    boundary(body, count=40)
    seen = []
    forward, distil = TARGETClient.forward, target_client.distillation

    def watch(self: TARGETClient, images: Tensor, frozen: Any) -> Output:
        seen.append(images)
        return forward(self, images, frozen)

    values = []

    def note(*args: Any) -> Tensor:
        values.append(distil(*args))
        return values[-1]

    monkeypatch.setattr(TARGETClient, "forward", watch)
    monkeypatch.setattr(target_client, "distillation", note)
    body.begin_round(Round(2, 2, False, 0))
    trainer = make_trainer()
    trainer.fit(body)
    real, synthetic = seen[: 2 * len(values) : 2], seen[1 : 2 * len(values) : 2]
    assert [len(images) for images in real] == [len(images) for images in synthetic]
    pool = {image.numpy().tobytes() for image in body.memory.received["images"]}
    drawn = [[image.numpy().tobytes() for image in images] for images in synthetic]
    assert all(image in pool for images in drawn for image in images)
    assert len({tuple(images) for images in drawn}) == len(drawn) > 1
    logged = float(trainer.callback_metrics["collaborate/distillation"])
    sizes = [len(images) for images in real]
    mean = sum(float(v.detach()) * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)
    assert logged == pytest.approx(3.0 * mean, rel=1e-4)


def test_distillation_holds_the_old_columns(make: Make) -> None:
    drift = []
    for strength in (0.0, 25.0):
        body = restore_client(make(client=client(strength=strength, epochs=4), server=server()), 0)
        fit(body, 1, 1)
        boundary(body, count=40)
        fit(body, 2, 2)
        body.eval()
        received = body.memory.received
        with torch.no_grad():
            now = body.old_logits(received["images"])
            drift.append(float(target_client.distillation(now, received["logits"], 2.0)))
    assert drift[1] < drift[0]


# ---- what travels


def test_messages_have_the_bytes_of_the_formula(make: Make, wire: list[tuple[Message, bytes]], vit: FrozenViT) -> None:
    federation = make(client=client(), server=server(synthesis_rounds=3, batch_size=2), rounds=2)
    body = restore_client(federation, 0)
    model, classes = sum(tensor.nbytes for tensor in body.shared().values()), body.num_classes
    run(federation)
    learned = torch.zeros(classes, dtype=torch.bool)
    for message, _ in wire:
        size = sum(tensor.nbytes for tensor in message.tensors.values())
        if message.round == 0:
            assert size == model
        elif isinstance(message, Upload):
            assert size == model + classes
            tasks = federation.template.data.split.clients[message.client].tasks[: message.task]
            own = sorted(label for part in tasks for label in part.classes)
            assert message.tensors["classes"].nonzero().flatten().tolist() == own
            learned[own] = True
        elif message.round % 2:
            assert size == model
        else:
            assert size == model + 3 * 6 * 16**2 + classes  # no larger than the CNN takes them
            assert message.tensors["images"].shape == (6, 3, 16, 16)
            assert message.tensors["classes"].equal(learned)
    downloads = [m.tensors for m, _ in wire if isinstance(m, Download) and m.round in (2, 4)]
    assert len(downloads) == 6
    assert not downloads[0]["images"].equal(downloads[-1]["images"])
    paper = client().assemble(vit, SmallModelSpec("resnet18", 512, 32), "resnet18", 100)
    specs = paper.upload_schema().values()
    assert sum(spec.max_bytes for spec in specs) == 4 * (11_176_512 + 513 * 100 + 9_600) + 160 + 100


def test_old_are_the_classes_of_all_who_ever_uploaded_and_the_absent_are_told(make: Make) -> None:
    federation = make(client=client(), server=server(), clients_per_round=1)
    results = run(federation)
    assert [len(result.bytes_up) for result in results] == [1, 1]
    assert all(len(result.bytes_down) == 3 for result in results)
    wanted = {
        label
        for result in results
        for index in result.bytes_up
        for part in federation.template.data.split.clients[index].tasks[: result.task]
        for label in part.classes
    }
    for index in range(3):
        received = restore_client(federation, index).memory.received
        assert set(received["classes"].nonzero().flatten().tolist()) == wanted
        assert received["logits"].shape == (8, len(wanted))


def test_the_model_that_is_inverted_is_the_one_that_travels(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Inversion] = []

    def spy(trainer: Any, module: Inversion) -> None:
        made.append(module)
        before = copy_of(module.teacher.state_dict())
        fit_once(trainer, module)
        assert same(module.teacher.state_dict(), before)

    federation = make(client=client(), server=server())
    monkeypatch.setattr(target_server, "fit_once", spy)
    next(federation.run(Recorder()))
    assert len(made) == 1
    body = restore_client(federation, 2)
    assert same(copy_of(made[0].teacher.state_dict()), copy_of(body.shared()))
    start = restore_client(make(client=client(), server=server()), 0).shared()
    assert same(copy_of(made[0].student.state_dict()), copy_of(start))  # untrained: the warm-up is not over


# ---- what the server minimises


class Net(nn.Module):
    """A network that answers as a client's body."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.GroupNorm(1, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor, frozen: Any) -> Output:
        features = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        return Output(self.head(features), features)


def inversion(teacher: nn.Module | None = None, **changes: Any) -> Inversion:
    made = InversionSettings(**{**SMALL, **changes})
    torch.manual_seed(0)
    return Inversion(teacher or Net(), Net(), OLD, made, image_size=8)


def invert(**changes: Any) -> Inversion:
    module = inversion(**changes)
    fit_once(make_trainer(), module)
    return module


def test_matching_statistics_have_no_distance() -> None:
    net, images = Net().eval(), torch.rand(6, 3, 8, 8)
    with batch_statistics(net) as met:
        like = net(images, {}).logits
    inside = net.conv(images).transpose(0, 1).flatten(1).detach()
    away = float(synthesis.statistics_distance(met, [], like).detach())
    wanted = (1 - inside.var(1, unbiased=False)).norm() + inside.mean(1).norm()  # a new layer has variance 1, mean 0
    assert away == pytest.approx(float(wanted), rel=1e-4)
    assert net.norm.running_mean is not None
    assert net.norm.running_var is not None
    now = met[0].now.detach()
    net.norm.running_mean.copy_(now[0])
    net.norm.running_var.copy_(now[1])
    assert float(synthesis.statistics_distance(met, [], like).detach()) == 0
    # a batch counts for a tenth, the rounds before for the rest
    off = [torch.stack([now[0] + 1, now[1]])]
    assert float(synthesis.statistics_distance(met, off, like).detach()) == pytest.approx(0.9 * 2, rel=1e-4)
    assert synthesis.mixed([], off) == off
    later = synthesis.mixed(off, [now])
    torch.testing.assert_close(later[0][0], now[0] + 0.9)


def test_without_batch_normalisation_there_are_no_statistics() -> None:
    with batch_statistics(Net(norm=False)) as met:
        assert float(synthesis.statistics_distance(met, [], torch.ones(2, 3))) == 0
    assert invert(teacher=Net(norm=False)).means()["statistics"] == 0
    assert invert().means()["statistics"] > 0


def test_only_where_they_agree_is_the_student_an_adversary() -> None:
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    p, q = teacher[0].softmax(0), student[0].detach().softmax(0)
    wanted = -float((p * (p / q).log()).sum()) / 2
    value = synthesis.adversarial(student, teacher)
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-5)
    value.backward()
    assert student.grad is not None
    assert bool(student.grad[0].any())
    assert not student.grad[1].any()


def test_the_students_divergence_is_that_of_softened_predictions() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    p, q = (teacher / 20).double().softmax(1), (student / 20).double().softmax(1)
    wanted = 400 * float((p * (p / q).log()).sum(1).mean())
    assert float(synthesis.softened_divergence(student, teacher, 20.0)) == pytest.approx(wanted, rel=1e-2)
    assert float(synthesis.softened_divergence(teacher, teacher, 20.0)) == 0


@pytest.mark.parametrize(("size", "wanted"), [(8, 8), (16, 56), (16, 10)])
def test_images_are_enlarged_as_the_client_does_it(size: int, wanted: int) -> None:
    images, matrix = torch.rand(2, 3, size, size), synthesis.enlarging(size, wanted)
    torch.testing.assert_close((matrix @ images @ matrix.T).clamp(0, 1), resize(images, wanted), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([4, 8, 12, 16]))
def test_an_augmented_image_is_shifted_and_perhaps_flipped(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    images, reach = torch.rand(3, 3, size, size), size // 8
    padded = nn.functional.pad(images, (reach,) * 4)
    starts = range(2 * reach + 1)
    for image, around in zip(synthesis.augment(images), padded, strict=True):
        windows = [around[:, y : y + size, x : x + size] for y in starts for x in starts]
        assert any(image.equal(w) or image.equal(w.flip(2)) for w in windows)


def test_augmentation_flips_and_moves_some() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(1.0, 17.0).expand(64, 3, 16, 16)
    shown = synthesis.augment(ramp)
    flipped = [bool(image[0, 8, 7] > image[0, 8, 8]) for image in shown]
    assert 16 < sum(flipped) < 48
    assert len({tuple(image[0, 8].tolist()) for image in shown}) == 10  # 5 shifts, flipped and not


@pytest.mark.parametrize("size", [4, 16])
def test_a_generator_draws_images_in_their_range(size: int) -> None:
    generator = ImageGenerator(size)
    images = generator(100 * torch.randn(3, 256)).detach()
    assert images.shape == (3, 3, size, size)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    shapes = [tuple(parameter.shape) for parameter in generator.parameters() if parameter.ndim > 1]
    assert shapes == [(128 * (size // 4) ** 2, 256), (128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]


def test_the_generator_follows_its_copy() -> None:
    own, copied = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    copied.weight.grad = torch.tensor([[1.0, 2.0]])
    synthesis.follow_gradients(own, copied)
    copied.weight.grad = torch.tensor([[3.0, -1.0]])
    synthesis.follow_gradients(own, copied)
    assert own.weight.grad is not None
    assert own.weight.grad.tolist() == [[4, 1]]
    synthesis.follow_copy(own, copied)
    torch.testing.assert_close(own.weight - own.weight.grad, copied.weight)


class Colours(nn.Module):
    """Tells the old classes by the mean of a colour each."""

    def forward(self, images: Tensor, frozen: Any) -> Output:
        logits = torch.zeros(len(images), len(OLD))
        logits[:, OLD] = 20 * images.mean(dim=(2, 3))
        return Output(logits, logits)


def test_images_come_to_be_taken_for_their_classes() -> None:
    found = {}
    for steps in (1, 30):
        module = inversion(
            Colours(),
            statistics=0.0,
            steps=steps,
            synthesis_rounds=1,
            batch_size=16,
            generator_rate=5e-3,
            latent_rate=0.05,
        )
        fit_once(make_trainer(), module)
        found[steps] = module.record[0]
    assert found[1]["recognised"] < 0.7  # one of three classes by chance
    assert found[1]["cross_entropy"] > 0.3
    assert found[30]["recognised"] > 0.9
    assert found[30]["cross_entropy"] < 0.1


@pytest.mark.parametrize("meta", ["maml", "reptile"])
def test_every_round_keeps_a_batch_of_its_own(meta: str) -> None:
    images = torch.cat(invert(meta=meta, steps=2, synthesis_rounds=4, batch_size=16).images)
    assert images.shape == (4 * 16, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) == 64


def test_the_kept_batch_has_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = inversion(steps=4, synthesis_rounds=1)
    losses, shown = iter([3.0, 1.0, 2.0, 5.0]), []

    def objective(images: Tensor, targets: Tensor, number: int) -> Any:
        shown.append(images.detach().clone())
        return {"cross_entropy": 0 * images.sum() + next(losses)}, 0.5, []

    monkeypatch.setattr(module, "_objective", objective)
    fit_once(make_trainer(), module)
    assert module.record == [{"cross_entropy": 1.0, "recognised": 0.5}]
    assert module.images[0].equal((255 * shown[1]).round().to(torch.uint8))


@pytest.mark.parametrize("meta", ["maml", "reptile"])
def test_every_round_begins_with_a_copy_and_ends_with_a_step_of_the_generator(
    monkeypatch: pytest.MonkeyPatch, meta: str
) -> None:
    module = inversion(steps=2, synthesis_rounds=3, meta=meta)
    objective, starts, moments = module._objective, [], []

    def watch(images: Tensor, targets: Tensor, number: int) -> Any:
        generator, copied = (copy_of(dict(net.named_parameters())) for net in (module.generator, module.copied))
        starts.append((generator, same(generator, copied)))
        optimizers: Any = module.optimizers()
        moments.append(len(optimizers[0].optimizer.state))
        return objective(images, targets, number)

    first = copy_of(dict(module.generator.named_parameters()))
    monkeypatch.setattr(module, "_objective", watch)
    fit_once(make_trainer(), module)
    assert [copied for _, copied in starts] == 3 * [True, False]
    assert [count == 0 for count in moments] == 3 * [True, False]
    assert same(starts[0][0], first)
    assert same(starts[1][0], first)
    assert not same(starts[2][0], first)
    assert not same(starts[4][0], starts[2][0])
    assert not same(dict(module.generator.named_parameters()), starts[4][0])


def test_student_and_adversary_wait_for_the_end_of_the_warm_up() -> None:
    def student(**changes: Any) -> tuple[bool, list[bool]]:
        module = inversion(**{"synthesis_rounds": 3, "student_steps": 2, **changes})
        before = copy_of(dict(module.student.named_parameters()))
        fit_once(make_trainer(), module)
        moved = not same(before, copy_of(dict(module.student.named_parameters())))
        return moved, ["adversarial" in record for record in module.record]

    assert student(warm_up=20) == (False, [False, False, False])
    assert student(warm_up=3) == (False, [False, False, False])
    assert student(warm_up=2) == (True, [False, False, True])
    assert student(warm_up=0) == (True, [True, True, True])
    assert student(warm_up=0, student_steps=0) == (False, [True, True, True])


def test_the_student_learns_from_the_teacher() -> None:
    def gap(steps: int) -> float:
        module = inversion(student_steps=steps, warm_up=1, batch_size=16)
        fit_once(make_trainer(), module)
        images = torch.cat(module.images).float() / 255
        module.student.train()  # batch normalisation has hardly met anything
        with torch.no_grad():
            student, teacher = (net(images, {}).logits[:, OLD] for net in (module.student, module.teacher))
        return float(synthesis.softened_divergence(student, teacher, 20.0))

    assert gap(40) < 0.5 * gap(0)


def test_the_same_seed_inverts_alike(make: Make) -> None:
    def federation() -> Federation:
        return make(client=client(), server=server(warm_up=1, student_steps=2, meta="reptile"))

    results = [run(federation()) for _ in range(2)]
    assert outcome(results[0]) == outcome(results[1])
    assert set(results[0][0].server) == {"statistics", "cross_entropy", "recognised", "adversarial"}


# ---- settings


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("synthesis_rounds", 0, "must be at least 1"),
        ("batch_size", 1, "must be at least 2"),
        ("gen_size", 3, "must be at least 4"),
        ("statistics", float("nan"), "must be at least 0"),
        ("student_temperature", 0, "must be positive"),
        ("meta", "adam", "must be maml or reptile"),
    ],
)
def test_a_bad_setting_of_the_server_is_named(name: str, value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"server\.{name} is {value}, {problem}"):
        TARGETServer(**{name: value})


def test_a_bad_setting_of_the_client_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.strength is -1, must be at least 0"):
        client(strength=-1)
    with pytest.raises(ValueError, match=r"model\.temperature is 0, must be positive"):
        client(temperature=0)


def test_more_images_than_a_client_takes_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"synthesis_rounds is 70000 .* not be above the 65536 images"):
        make(client=client(), server=server(synthesis_rounds=70000))


def test_a_client_of_another_method_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"TARGETServer, .* send 'classes', .* the model TARGETClient"):
        make(client=client(FedAvgClient), server=server())


@pytest.mark.parametrize(("wanted", "side"), [(64, 16), (10, 8), (16, 16)])
def test_images_are_no_larger_than_the_cnn_takes_them(make: Make, wanted: int, side: int) -> None:
    made: Any = make(client=client(), server=server(gen_size=wanted)).server
    assert (made.settings.side(made.image_size), made.image_size) == (side, 16)
