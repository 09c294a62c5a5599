"""MFCL: the generator that the server trains without data, and the clients that replay its images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CNN, Recorder, copy_of, fit, make_client, make_trainer, restore_client, run, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fedlscl import seeds
from fedlscl.batches import Batch, Images
from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import fit_once
from fedlscl.memory import below
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.data_free import Met, batch_statistics
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.mfcl.client import MFCLClient, distillation, head_loss
from fedlscl.methods.mfcl.generator import (
    GeneratorSettings,
    GeneratorTraining,
    ImageGenerator,
    as_pixels,
    blurring,
    imbalance,
    normal_divergence,
    statistics_divergence,
)
from fedlscl.methods.mfcl.server import MFCLServer
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round

Make = Callable[..., Federation]
Wire = list[tuple[Message, bytes]]


def client(kind: type[FedAvgClient] = MFCLClient, **changes: Any) -> Any:
    own = {"samples": 6} if kind is MFCLClient else {}
    return make_client(kind, **{"continual": NoReplay(), "train_mask": "task", "buffer_size": 0, **own, **changes})


def server(**changes: Any) -> MFCLServer:
    return MFCLServer(**{"steps": 2, "batch_size": 4, **changes})


def assembled(vit: FrozenViT, classes: int = 5, **cnn: Any) -> MFCLClient:
    spec = SmallModelSpec(**{**CNN, **cnn})
    body = client().assemble(vit, spec, "resnet18", classes)
    assert isinstance(body, MFCLClient)
    return body


# ---- the generator


@pytest.mark.parametrize(
    ("size", "parameters", "channels", "normalisations", "size_in_bytes"),
    [(32, 8_423_939, 323, 4, 33_698_372), (224, 3_326_275, 387, 7, 13_308_252)],
)
def test_the_generators_have_the_published_sizes(
    size: int, parameters: int, channels: int, normalisations: int, size_in_bytes: int
) -> None:
    with torch.device("meta"):
        generator = ImageGenerator(size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    found = sum(tensor.nbytes for tensor in generator.state_dict().values())
    assert found == size_in_bytes == 4 * (parameters + 2 * channels) + 8 * normalisations


@pytest.mark.parametrize("size", [4, 16, 64, 128])
def test_the_images_are_as_large_as_the_cnn_takes_them_and_normalised(size: int) -> None:
    with seeds.seeded(0, "generator"):
        images = ImageGenerator(size)(torch.randn(8, 1000))
    assert images.shape == (8, 3, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    deviation = images.std(
        (0, 2, 3), unbiased=False
    )  # below 1 where what the last layer gets is so small that its epsilon counts
    assert bool(((deviation > 0.8) & (deviation < 1.001)).all())


@pytest.mark.parametrize(("size", "factor"), [(30, 4), (2, 4), (100, 8), (200, 32)])
def test_sizes_that_doubling_does_not_reach_are_refused(size: int, factor: int) -> None:
    with pytest.raises(ValueError, match=rf"cnn\.image_size is {size}, .* a multiple of {factor}"):
        ImageGenerator(size)


def test_a_sample_depends_on_its_own_numbers_alone() -> None:
    generator = ImageGenerator(8).eval()
    z = torch.randn(5, 1000)
    before = copy_of(generator.state_dict())
    torch.testing.assert_close(generator(z)[:2], generator(z[:2]))
    assert same(generator.state_dict(), before)


def test_the_small_model_sees_what_the_generator_made(vit: FrozenViT) -> None:
    cnn = assembled(vit).cnn.eval()
    x = 3 * torch.randn(4, 3, 16, 16)  # far outside of what pixels can be
    seen = []
    cnn.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cnn(as_pixels(x, cnn))
    torch.testing.assert_close(seen[0], x)


# ---- its loss


def test_the_balance_is_that_of_the_mean_prediction() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 3.0, 0.5]])
    p = logits.softmax(1).mean(0)
    wanted = 1 + sum(float(q) * math.log(float(q)) for q in p) / math.log(3)
    assert float(imbalance(logits)) == pytest.approx(wanted, rel=1e-5)


def test_the_balance_of_a_uniform_mean_is_0_and_of_one_class_1() -> None:
    one_each = 50 * torch.eye(4)  # each image is of a class, and no class has more
    assert float(imbalance(one_each)) == pytest.approx(0, abs=1e-6)
    assert float(imbalance(torch.zeros(3, 7))) == pytest.approx(0, abs=1e-6)
    assert float(imbalance(one_each[:1].expand(4, 4))) == pytest.approx(1, abs=1e-6)
    assert float(imbalance(torch.randn(4, 1))) == 0


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1e4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_balance_is_between_0_and_1_and_has_a_gradient(count: int, classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    value = imbalance(logits)
    assert -1e-5 <= float(value.detach()) <= 1 + 1e-5
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(gradient.isfinite().all())


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, other_mean = torch.randn(6), torch.randn(6)
    variance, other_variance = torch.rand(6) + 0.1, torch.rand(6) + 0.1
    found = normal_divergence(mean, variance, other_mean, other_variance)
    wanted = kl_divergence(Normal(mean, variance.sqrt()), Normal(other_mean, other_variance.sqrt()))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, normal_divergence(other_mean, other_variance, mean, variance))


def test_matching_statistics_cost_nothing_and_others_do() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(8, 3, 5, 5)

    def found() -> Tensor:
        with batch_statistics(model) as met:
            like = model(x)
        return statistics_divergence(met, like)

    for _ in range(2):  # what the second layer meets depends on the first
        with batch_statistics(model) as met:
            model(x)
        for layer, now in met:
            layer.running_mean, layer.running_var = now.detach()
    assert float(found().detach()) == pytest.approx(0, abs=1e-6)
    last: Any = model[2]
    last.running_mean = last.running_mean + torch.tensor([1.0, 0.0])
    # one of two channels of one of two layers
    wanted = 0.5 / float(met[1].now[1, 0].detach() + last.eps) / 4
    assert float(found().detach()) == pytest.approx(wanted, rel=1e-4)


def test_channels_that_are_constant_keep_the_divergence_finite() -> None:
    layer = nn.BatchNorm2d(2)
    layer.running_var = torch.tensor([0.0, 1.0])
    met = [Met(layer, torch.zeros(2, 2))]
    assert math.isfinite(float(statistics_divergence(met, torch.zeros(1))))


def test_without_batch_normalisation_there_are_no_statistics() -> None:
    with batch_statistics(nn.Sequential(nn.GroupNorm(1, 3))) as met:
        assert float(statistics_divergence(met, torch.ones(2))) == 0


def test_blurring_is_a_convolution_with_reflected_edges() -> None:
    x = torch.randn(2, 3, 8, 8)
    d = torch.arange(-2.0, 3.0).square()
    kernel = torch.exp(-(d[:, None] + d) / 4)
    kernel = (kernel / kernel.sum()).expand(3, 1, 5, 5)
    wanted = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    a = blurring(8)
    torch.testing.assert_close(a @ x @ a.T, wanted)


@pytest.fixture
def training(vit: FrozenViT) -> GeneratorTraining:
    learned = torch.tensor([True, False, True, True, False])
    with seeds.seeded(0, "training"):
        body = assembled(vit)
        body.train()
        for _ in range(20):  # running statistics other than those it is born with
            body(2 * torch.rand(16, 3, 16, 16), {})
        return GeneratorTraining(body, learned, GeneratorSettings(steps=25, batch_size=16))


def test_the_loss_has_its_four_terms(training: GeneratorTraining) -> None:
    training.teacher.eval()
    with seeds.seeded(1):
        value = training.training_step(0, 0)
    with seeds.seeded(1):
        x = training.generator(torch.randn(16, 1000))
    inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
    layers = [m for m in training.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, passed: inputs.append((layer, passed[0])))
    z = training.teacher.head(training.teacher.cnn.project(training.teacher.cnn.backbone(x)))[:, [0, 2, 3]]
    assert len(inputs) == len(layers) > 2
    p = z.softmax(1).mean(0)
    wanted = F.cross_entropy(z / 1000, z.argmax(1)) + 1 + (p * p.log()).sum() / math.log(3)
    for layer, x_in in inputs:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        batch = Normal(x_in.mean((0, 2, 3)), (x_in.var((0, 2, 3), unbiased=False) + layer.eps).sqrt())
        known = Normal(layer.running_mean, (layer.running_var + layer.eps).sqrt())
        wanted = wanted + 50 / len(layers) * kl_divergence(known, batch).mean()
    blurred = training.blurring @ x @ training.blurring.T
    wanted = wanted + 1e-3 * (x - blurred).square().mean()
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)
    assert set(training.record) == {"cross_entropy", "balance", "statistics", "smoothness", "shown"}
    assert float(training.record["shown"]) == pytest.approx(len(z.argmax(1).unique()) / 3)


def test_training_moves_the_generator_towards_the_statistics_and_leaves_the_teacher(
    training: GeneratorTraining,
) -> None:
    teacher, generator = copy_of(training.teacher.state_dict()), copy_of(dict(training.generator.named_parameters()))
    with seeds.seeded(0):
        training.teacher.eval()
        before = training.training_step(0, 0).detach()
        training.train()
        fit_once(make_trainer(), training)
    record = training.record
    after = sum(float(value) for name, value in record.items() if name != "shown")
    assert after < 0.5 * float(before)
    assert same(training.teacher.state_dict(), teacher)
    moved = dict(training.generator.named_parameters())
    assert all(not torch.equal(tensor, moved[name]) for name, tensor in generator.items())


# ---- the clients' losses


def test_only_the_head_learns_from_the_detached_term() -> None:
    backbone, head = nn.Linear(4, 3), nn.Linear(3, 5)
    features = backbone(torch.randn(6, 4))
    labels, classes = torch.tensor([0, 1, 1, 3, 0, 3]), torch.tensor([True, True, False, True, False])
    value = head_loss(head, features, labels, classes)
    logits = head(features)[:, [0, 1, 3]]
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.tensor([0, 1, 1, 2, 0, 2])))
    gradients = torch.autograd.grad(value, [*backbone.parameters(), *head.parameters()], allow_unused=True)
    assert gradients[:2] == (None, None)
    assert gradients[2] is not None
    assert gradients[2].any(1).tolist() == classes.tolist()


def test_the_distance_to_the_teacher_by_hand() -> None:
    weight, bias = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.5, 0.0])
    features = torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]], requires_grad=True)
    before = torch.tensor([[1.5, 3.0], [0.5, 2.0], [0.5, 0.0]])
    # distances: 0, (0, -1), (2, 2); squared sums 0, 1, 8; two classes, three images
    value = distillation(features, before, weight, bias)
    assert float(value.detach()) == pytest.approx(9 / 6)
    same_features = distillation(features, F.linear(features, weight, bias).detach(), weight, bias)
    assert float(same_features.detach()) == 0
    (gradient,) = torch.autograd.grad(value, features)
    assert bool(gradient[1:].any())
    assert not bool(gradient[0].any())


@pytest.fixture
def taught(make: Make) -> MFCLClient:
    """Client 0 after a task, with what the server made of it."""
    federation = make(client=client(), server=server())
    next(federation.run(Recorder()))
    body: MFCLClient = restore_client(federation, 0)
    return body


def replaying(body: MFCLClient) -> Batch:
    """Get ready for the second task as a fit does, in evaluation mode; returns some of its images."""
    body.begin_round(Round(2, 2, True, 0))
    body.past = body._past()
    body.latent_rng = body.rng("latent")
    body.eval()
    indices = body.current[:5]
    return Batch("collaborate", Images(indices.numpy(), *body.data.batch("train", indices)), {}, torch.zeros(5))


def test_the_terms_of_replay_are_those_of_the_formula(taught: MFCLClient) -> None:
    body = taught
    teacher_cnn, teacher_head = copy.deepcopy(body.cnn).eval(), copy.deepcopy(body.head)  # as received
    batch = replaying(body)
    z = torch.randn(6, 1000, generator=body.rng("latent"))
    generator = ImageGenerator(16).eval()
    generator.load_state_dict(below(body.memory.received, "generator."))
    old = body.memory.received["classes"]
    assert 2 < int(old.sum()) < len(old)  # of all clients, and not everything
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    terms = body.collaborative_losses(body(batch.images.pixels, {}), batch)

    pixels, labels = batch.images.pixels, batch.images.labels
    made = generator(z) * body.cnn.std + body.cnn.mean
    f = torch.cat([body.cnn(pixels), body.cnn(made)])
    f_old = torch.cat([teacher_cnn(pixels), teacher_cnn(made)])
    old_logits = teacher_head(f_old).masked_fill(~old, -torch.inf)
    both = torch.cat([labels, old_logits[5:].argmax(1)])
    seen = old | body.data.class_mask(1, 2)
    h_old = [teacher_head(part)[:, old] for part in (f, f_old)]
    wanted = {
        "cross_entropy": F.cross_entropy(body.head(f[:5]).masked_fill(~body.data.class_mask(1, 2), -torch.inf), labels),
        "head": F.cross_entropy(body.head(f).masked_fill(~seen, -torch.inf), both),
        "distillation": 0.1 * ((h_old[0] - h_old[1]).square().sum(1) / int(old.sum())).mean(),
    }
    torch.testing.assert_close(terms, wanted, rtol=1e-4, atol=1e-5)

    networks = {"cnn": list(body.cnn.parameters()), "head": list(body.head.parameters())}
    for term, trains in (("cross_entropy", {"cnn", "head"}), ("head", {"head"}), ("distillation", {"cnn"})):
        for name, parameters in networks.items():
            gradients = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in gradients) == (name in trains), (term, name)


def test_the_received_model_is_at_no_distance_to_its_teacher(taught: MFCLClient) -> None:
    batch = replaying(taught)
    terms = taught.collaborative_losses(taught(batch.images.pixels, {}), batch)
    assert float(terms["distillation"].detach()) == pytest.approx(0, abs=1e-9)
    assert float(terms["head"].detach()) > 0


def test_every_step_draws_anew_and_every_round_from_a_stream_of_its_own(taught: MFCLClient) -> None:
    batch = replaying(taught)
    with torch.no_grad():
        output = taught(batch.images.pixels, {})
        first, second = (float(taught.collaborative_losses(output, batch)["head"]) for _ in range(2))
        taught.latent_rng = taught.rng("latent")
        again = float(taught.collaborative_losses(output, batch)["head"])
    assert first == again != second


def test_teacher_and_generator_stay_out_of_the_module_tree(taught: MFCLClient) -> None:
    names = set(taught.state_dict())
    received = copy_of(taught.memory.received)
    replaying(taught)
    assert set(taught.state_dict()) == names
    assert all(parameter.requires_grad for parameter in taught.parameters())
    fit(taught, 2, 2)
    assert taught.past is None
    assert set(taught.state_dict()) == names
    assert same(taught.memory.received, received)  # a round changes neither of them
    assert not torch.equal(taught.head.weight, received["teacher.head.weight"])


def test_in_the_first_task_it_is_fedavg(make: Make) -> None:
    states = []
    for kind in (MFCLClient, FedAvgClient):
        body = restore_client(make(client=client(kind), server=server() if kind is MFCLClient else None), 0)
        fit(body, 1, 1)
        states.append(copy_of(body.state_dict()))
    assert same(*states)


# ---- what travels


def test_a_generator_comes_when_a_task_ends(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=server(), rounds=2)
    results = run(federation)
    data = federation.template.data
    uploads = {(m.client, m.round): m for m, _ in wire if isinstance(m, Upload)}
    for (index, round), message in uploads.items():
        mask = torch.zeros(data.num_classes, dtype=torch.bool)
        mask[list(data.split.clients[index].tasks[(round - 1) // 2].classes)] = True
        assert torch.equal(message.tensors["classes"], mask)
    learned = torch.zeros(data.num_classes, dtype=torch.bool)
    shared = set(restore_client(federation, 0).shared())
    names = {f"generator.{name}" for name in ImageGenerator(16).state_dict()} | {"classes"}
    for round in (1, 2, 3, 4):
        answers = [m.tensors for m, _ in wire if isinstance(m, Download) and m.round == round]
        assert len(answers) == 3
        assert all(same(answer, answers[0]) for answer in answers)
        if round % 2:
            learned = torch.stack([learned, *(uploads[i, round].tensors["classes"] for i in range(3))]).any(0)
            assert set(answers[0]) == shared
            assert results[round - 1].server == {}
        else:
            assert set(answers[0]) == shared | names
            assert torch.equal(answers[0]["classes"], learned)
            assert set(results[round - 1].server) == {"cross_entropy", "balance", "statistics", "smoothness", "shown"}
    for index in range(3):
        received = restore_client(federation, index).memory.received
        assert same(below(received, "teacher."), {name: answers[0][name] for name in shared})
        assert same({name: t for name, t in received.items() if name in names}, {n: answers[0][n] for n in names})


def test_absent_clients_get_the_generator_too(make: Make) -> None:
    federation = make(client=client(), server=server(), clients_per_round=1)
    results = run(federation)
    assert all(result.skipped == {} for result in results)
    assert all(set(result.bytes_down) == {0, 1, 2} for result in results)
    assert all("generator.layers.0.weight" in restore_client(federation, i).memory.received for i in range(3))


def test_the_generator_goes_on_from_where_it_stopped(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=server(learning_rate=0.0))  # only running statistics can move
    run(federation)
    first, second = (
        next(below(m.tensors, "generator.") for m, _ in wire if isinstance(m, Download) and m.round == round)
        for round in (1, 2)
    )
    assert torch.equal(first["layers.0.weight"], second["layers.0.weight"])
    assert first["layers.2.num_batches_tracked"].tolist() == 2
    assert second["layers.2.num_batches_tracked"].tolist() == 4
    assert not torch.equal(first["layers.2.running_mean"], second["layers.2.running_mean"])


def test_a_cnn_without_batch_normalisation_will_do(make: Make) -> None:
    cnn = {**CNN, "model_args": {**CNN["model_args"], "norm_layer": "groupnorm1"}}
    results = run(make(client=client(), server=server(), cnn=cnn))
    assert all(result.skipped == {} for result in results)
    assert [result.server["statistics"] for result in results] == [0, 0]


# ---- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_weight": -1}, r"model\.head_weight is -1, must be at least 0"),
        ({"distillation_weight": math.nan}, r"model\.distillation_weight is nan, must be at least 0"),
        ({"samples": 1}, r"model\.samples is 1, must be at least 2"),
    ],
)
def test_a_clients_setting_out_of_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"server\.steps is 0, must be at least 1"),
        ({"batch_size": 1}, r"server\.batch_size is 1, must be at least 2"),
        ({"learning_rate": -1.0}, r"server\.learning_rate is -1\.0, must be at least 0"),
        ({"balance": -1.0}, r"server\.balance is -1\.0"),
        ({"statistics": -1.0}, r"server\.statistics is -1\.0"),
        ({"smoothness": -1.0}, r"server\.smoothness is -1\.0"),
        ({"temperature": 0.0}, r"server\.temperature is 0\.0, must be positive"),
    ],
)
def test_a_servers_setting_out_of_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server(**change)


def test_the_server_refuses_clients_that_take_no_generator(make: Make) -> None:
    with pytest.raises(ValueError, match=r"MFCLServer, .* send 'classes', .* the model MFCLClient"):
        make(client=client(FedAvgClient), server=server())
    with pytest.raises(ValueError, match=r"cnn\.image_size is 18, .* a multiple of 4"):
        make(client=client(), server=server(), cnn={**CNN, "image_size": 18})
