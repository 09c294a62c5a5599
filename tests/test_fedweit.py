"""FedWeIT: decomposed weights, what travels of them, and what is kept of finished tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import copy_of, fit, make_client, make_trainer, outcome, restore_client, run, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl.batches import Batch, Images, Output
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.evaluation import MASKS
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, MessageError, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.fedweit.client import FedWeITClient
from fedlscl.methods.fedweit.decomposition import attended, beyond, dense, drift, entries, join, kept_channels
from fedlscl.methods.fedweit.server import FedWeITServer, merge
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Context

Make = Callable[..., Federation]


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0}
    return make_client(FedWeITClient, **{**own, **settings})


@pytest.fixture
def body(make: Make) -> Any:
    """Client 0, which has learned nothing yet."""
    return restore_client(make(client=client(), server=FedWeITServer()), 0)


def give_knowledge(body: Any, vectors: Tensor) -> None:
    """Send a client the A of others, W as it is."""
    joined = join([entries(vector) for vector in vectors])
    others = {f"others.{name}": tensor for name, tensor in joined.items()}
    tensors = {**copy_of(body.shared()), **others}
    body.download(Download.from_bytes(Download(0, 1, 1, 0, tensors).to_bytes(), body.download_schema()))


def images_of(body: Any, task: int) -> tuple[Tensor, Tensor]:
    pixels, labels = body.data.batch("test", torch.as_tensor(body.data.tasks[task - 1].test))
    return pixels, labels


def test_logits_of(body: Any, task: int, tasks: int) -> Tensor:
    body.begin_evaluation(tasks)
    body.on_test_start()
    pixels, labels = images_of(body, task)
    numbers = body.accuracy.task_of_class[labels]
    assert set(numbers.tolist()) == {task - 1}
    with torch.no_grad():
        logits: Tensor = body.test_logits(Images(labels.numpy(), pixels, labels), numbers)
    return logits


test_logits_of.__test__ = False  # type: ignore[attr-defined]


# ---- weights


@pytest.mark.parametrize("others", [0, 2])
def test_open_masks_and_nothing_added_are_the_plain_cnn(body: Any, others: int) -> None:
    body.knowledge = torch.randn(others, len(body.adaptive))
    body.attention = nn.Parameter(torch.zeros(others, len(body.shapes)))
    with torch.no_grad():
        body.adaptive.zero_()
        body.mask.fill_(200.0)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for mode in (True, False):
        body.train(mode)
        start = copy_of(body.cnn.state_dict())
        plain = body.head(body.cnn(images))
        statistics = copy_of(body.cnn.state_dict())
        body.cnn.load_state_dict(start)
        assert torch.equal(body(images, {}).logits, plain)
        assert same(copy_of(body.cnn.state_dict()), statistics)  # those of batch normalisation move alike
    with torch.no_grad():
        body.mask.fill_(0.0)
    assert not torch.allclose(body(images, {}).logits, plain)


def test_the_weights_are_those_of_the_formula(body: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    body.knowledge = torch.randn(2, len(body.adaptive), generator=generator)
    body.attention = nn.Parameter(torch.randn(2, len(body.shapes), generator=generator))
    with torch.no_grad():
        body.adaptive.copy_(torch.randn(len(body.adaptive), generator=generator))
        body.mask.copy_(torch.randn(len(body.mask), generator=generator))
    found = body._theta(body.mask, body._added(True))
    modules = dict(body.cnn.named_modules())
    weighted = [n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(found) == {f"{name}.weight" for name in weighted}
    place = channel = 0
    for number, name in enumerate(weighted):
        weight: Any = modules[name].weight
        wanted = torch.empty_like(weight)
        for c in range(len(weight)):
            for i in range(weight[c].numel()):
                theta = weight[c].flatten()[i] * body.mask[channel].sigmoid() + body.adaptive[place]
                for j in range(2):
                    theta = theta + body.attention[j, number] * body.knowledge[j, place]
                wanted[c].view(-1)[i] = theta.detach()
                place += 1
            channel += 1
        torch.testing.assert_close(found[f"{name}.weight"], wanted)
        if number == 2:  # slow, and three maps show the layout
            break


def test_everything_in_the_weights_is_trained(body: Any) -> None:
    body.attention = nn.Parameter(torch.ones(1, len(body.shapes)))
    body.knowledge = 0.1 * torch.randn(1, len(body.adaptive), generator=torch.Generator().manual_seed(0))
    for name, gamma in body.cnn.named_parameters():
        if name.endswith(("bn1.weight", "bn2.weight")):  # timm begins with zeros, behind which nothing is trained
            nn.init.ones_(gamma)
    body(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), {}).logits.sum().backward()
    for name in ("adaptive", "mask", "attention"):
        assert bool(getattr(body, name).grad.any())
    assert all(bool(weight.grad.any()) for weight in body.shared().values())


def test_attention_weighs_map_by_map() -> None:
    attention = torch.tensor([[1.0, 10.0], [2.0, 0.0]])
    knowledge = torch.tensor([[1.0, 2, 3, 4, 5], [1.0, 1, 1, 1, 1]])
    assert attended(attention, knowledge, [3, 2]).tolist() == [3, 4, 5, 40, 50]


def test_small_entries_of_a_count_in_training_only(body: Any) -> None:
    with torch.no_grad():
        body.adaptive.fill_(5e-4)
        body.adaptive[:3] = torch.tensor([2e-3, -2e-3, 1e-3])
    assert torch.equal(body._added(True), body.adaptive)
    assert torch.equal(body._added(False)[:3], torch.tensor([2e-3, -2e-3, 0]))
    assert not body._added(False)[3:].any()
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    body.eval()
    with torch.no_grad():
        before = body(images, {}).logits
        body.adaptive.copy_(beyond(body.adaptive, 1e-3))
        assert torch.equal(body(images, {}).logits, before)


# ---- objective


def literal_drift(
    weights: list[Tensor], masks: list[list[Tensor]], adaptives: list[list[Tensor]], wanted: list[list[Tensor]]
) -> Tensor:
    """The published form, with A and theta*."""
    total = torch.zeros(())
    for mask, adaptive, theta in zip(masks, adaptives, wanted, strict=True):
        for w, m, a, t in zip(weights, mask, adaptive, theta, strict=True):
            total = total + (w * m.sigmoid().view(-1, *[1] * (w.ndim - 1)) + a - t).square().sum() / 2
    return total


def test_the_drift_is_the_published_distance() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = [(3, 2, 2, 2), (4, 3)]
    before = [draw(*shape) for shape in shapes]
    masks = [[draw(shape[0]) for shape in shapes] for _ in range(3)]
    adaptives = [[draw(*shape) for shape in shapes] for _ in range(3)]
    thetas = [
        [w * m.sigmoid().view(-1, *[1] * (w.ndim - 1)) + a for w, m, a in zip(before, mask, adaptive, strict=True)]
        for mask, adaptive in zip(masks, adaptives, strict=True)
    ]
    held = [torch.stack([mask[number].sigmoid() ** 2 for mask in masks]).sum(0) for number in range(2)]
    now = [(w + draw(*w.shape)).requires_grad_() for w in before]
    found, wanted = drift(now, before, held), literal_drift(now, masks, adaptives, thetas)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, now), torch.autograd.grad(wanted, now), strict=True):
        torch.testing.assert_close(one, other)
    assert float(drift(before, before, held)) == 0


def losses_of(body: Any) -> dict[str, Tensor]:
    labels = torch.as_tensor(body.data.tasks[body.round.task - 1].classes)
    output = Output(torch.zeros(len(labels), body.num_classes), torch.zeros(len(labels), 1))
    batch = Batch("collaborate", Images(labels.numpy(), torch.zeros(0), labels), {}, torch.zeros(len(labels)))
    body.on_train_start()
    terms: dict[str, Tensor] = body.collaborative_losses(output, batch)
    return {name: term.detach() for name, term in terms.items()}


def test_the_terms_of_the_objective(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(body, 1, 1)
    weights = body._flat_weights()
    squared = float(body.adaptive.detach().square().sum() + body.mask.detach().square().sum())
    terms = losses_of(body)
    assert set(terms) == {"cross_entropy", "decay", "sparsity"}
    assert float(terms["cross_entropy"]) == pytest.approx(0.693147, abs=1e-5)  # two classes
    assert float(terms["decay"]) == pytest.approx(0.5e-4 * (squared + float(weights.square().sum())), rel=1e-4)
    assert float(terms["sparsity"]) == pytest.approx(1e-3 * float(body.adaptive.detach().abs().sum()), rel=1e-4)

    body.begin_round(Round(2, 2, False, 0))
    squared = float(body.adaptive.detach().square().sum() + body.mask.detach().square().sum())
    terms = losses_of(body)
    assert float(terms["drift"]) == 0  # W is where the task began
    assert float(terms["decay"]) == pytest.approx(0.5e-4 * squared, rel=1e-4)
    assert float(terms["cross_entropy"]) == pytest.approx(0.693147, abs=1e-5)  # of this task alone
    with torch.no_grad():
        for weight in body.shared().values():
            weight += 0.1
    gates = torch.cat(
        [m.sigmoid().square() * s / c for m, s, c in zip(
            body.memory.archive[1]["mask"].split(body.channels), body.sizes, body.channels, strict=True)]
    )  # fmt: skip
    assert float(losses_of(body)["drift"]) == pytest.approx(100 * 0.5 * 0.01 * float(gates.sum()), rel=1e-3)


def test_the_drift_term_holds_the_shared_weights(make: Make) -> None:
    moved = []
    for strength in (0.0, 1e4):
        body = restore_client(make(client=client(drift=strength, epochs=3), server=FedWeITServer()), 0)
        fit(body, 1, 1)
        before = body._flat_weights()
        fit(body, 2, 2)
        moved.append(float((body._flat_weights() - before).abs().mean()))
    assert moved[1] < 0.7 * moved[0]


# ---- aggregation and messages


def test_with_full_masks_the_mean_is_plain() -> None:
    models = [torch.randn(3, 2, 1, 1) for _ in range(4)]
    every = torch.ones(3, dtype=torch.bool)
    merged = merge({"w": (model, every)} for model in models)
    torch.testing.assert_close(merged["w"], torch.stack(models).mean(0))
    assert torch.equal(merge([{"w": (models[0], every)}] * 3)["w"], models[0])


def test_a_channel_is_the_mean_of_those_who_sent_it() -> None:
    one = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([True, True, False, False])
    two = torch.tensor([[5.0, 6], [7, 8]]), torch.tensor([False, True, True, False])
    merged = merge([{"w": one}, {"w": two}])["w"]
    assert merged.tolist() == [[1, 2], [4, 5], [7, 8], [0, 0]]
    assert merged.dtype == torch.float32
    assert one[0].tolist() == [[1, 2], [3, 4]]


def test_what_nobody_sent_stays_as_it_was(body: Any) -> None:
    before = copy_of(body.shared())
    sent = {name: torch.randn_like(weight) for name, weight in before.items()}
    for weight in sent.values():
        weight[1] = 0
    body.download(Download(0, 1, 1, 0, sent))
    for name, weight in body.shared().items():
        assert torch.equal(weight[1], before[name][1])
        assert torch.equal(weight[[0, *range(2, len(weight))]], sent[name][[0, *range(2, len(weight))]])
    assert body.memory.received == {}


def test_channels_beyond_the_quantile_are_kept() -> None:
    mask = torch.tensor([0.1, -0.9, 0.3, -0.2, 0.5, 0.4, -0.6, 0.7, 0.8, 1.0])
    assert kept_channels(mask, 0.3).tolist() == [False, True, False, False, True, True, True, True, True, True]
    assert kept_channels(mask, 0.0).sum() == 9
    assert kept_channels(torch.tensor([0.4]), 0.3).tolist() == [True]
    assert kept_channels(torch.zeros(4), 0.3).all()


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1.5, -2.0, 1e-30, 3.0e5]), min_size=7, max_size=7), min_size=1, max_size=4
    )
)
def test_sparse_vectors_survive_the_journey(values: list[list[float]]) -> None:
    vectors = torch.tensor(values)
    parts = [entries(vector) for vector in vectors]
    for part, vector in zip(parts, vectors, strict=True):
        assert part["places"].dtype == torch.int32
        assert len(part["places"]) == len(part["values"]) == max(1, int((vector != 0).sum()))
    assert torch.equal(dense(join(parts), 7), vectors)


def test_a_message_has_the_bytes_of_the_formula(vit: FrozenViT) -> None:
    body = client().assemble(vit, SmallModelSpec("resnet18", 512, 32), "resnet18", 100)
    assert (sum(body.sizes), sum(body.channels)) == (11_166_912, 4_800)
    with torch.no_grad():
        body.mask.copy_(torch.randn(4_800))
        body.adaptive[5] = 2e-3
        body.adaptive[[7, 11_000_000]] = -1.0
        body.adaptive[8] = 1e-3
    masks, channels = body.mask.detach().split(body.channels), 0
    values = 0
    for weight, mask in zip(body.shared().values(), masks, strict=True):
        kept = int((mask.abs() > mask.abs().quantile(0.3)).sum())
        channels += kept
        values += kept * weight[0].numel()
    assert 0.69 < channels / 4_800 < 0.72
    for ends, adaptive in ((False, 0), (True, 3)):
        body.round = Round(1, 1, ends, 0)
        sent = body.outgoing()
        assert sum(tensor.nbytes for tensor in sent.values()) == 4 * values + 4_800 + 8 * adaptive
        Upload.from_bytes(Upload(0, 1, 1, 1, sent).to_bytes(), body.upload_schema())
    assert sent["adaptive.places"].tolist() == [5, 7, 11_000_000]
    assert sum(spec.max_bytes for spec in body.download_schema().values() if not spec.optional) == 4 * 11_166_912


def test_an_empty_a_is_sent_as_one_zero(body: Any) -> None:
    body.round = Round(1, 1, True, 0)
    sent = Upload.from_bytes(Upload(0, 1, 1, 1, body.outgoing()).to_bytes(), body.upload_schema()).tensors
    assert (sent["adaptive.places"].tolist(), sent["adaptive.values"].tolist()) == ([0], [0])


# ---- from task to task


def test_the_knowledge_base_is_what_the_others_had(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(), server=FedWeITServer(), rounds=2)
    rounds = federation.run()

    for _ in range(2):
        result = next(rounds)
        body = restore_client(federation, 1)
        assert body.attention.shape == (0, len(body.shapes))
    uploads = {m.client: m.tensors for m, _ in wire if isinstance(m, Upload) and m.round == 2}
    downloads = {m.client: m.tensors for m, _ in wire if isinstance(m, Download) and m.round == 2}
    first = next(m.tensors for m, _ in wire if isinstance(m, Upload) and m.round == 1)
    assert "adaptive.places" not in first
    size, count = len(body.adaptive), {i: len(tensors["adaptive.places"]) for i, tensors in uploads.items()}
    assert sum(t.nbytes for t in downloads[1].values()) == 4 * size + 8 * (count[0] + count[2]) + 4 * 2
    trained = {index: restore_client(federation, index).adaptive.detach().clone() for index in (0, 2)}

    next(rounds)
    body = restore_client(federation, 1)
    assert body.attention.shape == (2, len(body.shapes))
    assert torch.equal(body.knowledge, torch.stack([beyond(trained[0], 1e-3), beyond(trained[2], 1e-3)]))
    assert 0 < float((body.knowledge != 0).float().mean()) < 1
    base = body.knowledge.clone()
    next(rounds)  # what comes now is for the task after
    body = restore_client(federation, 1)
    assert torch.equal(body.knowledge, base)
    assert {"places", "next.places", "reference"} <= set(body.memory.received)
    assert len(result.bytes_down) == 3


def test_who_sent_no_a_is_in_nobodys_knowledge_base(vit: FrozenViT) -> None:
    every = torch.ones(1, dtype=torch.bool)
    server = FedWeITServer()
    body = client().assemble(
        vit, SmallModelSpec("resnet18", 16, 16, model_args={"channels": [4, 4, 8, 8]}), "resnet18", 4
    )
    server.begin(body.upload_schema(), body.download_schema(), nn.Identity)
    server.names = ("w",)

    def upload(index: int, **more: Tensor) -> Upload:
        return Upload(index, 1, 1, 1, {"w": torch.full((1, 1), float(index)), "w.kept": every, **more})

    part = {"adaptive.places": torch.tensor([3], dtype=torch.int32), "adaptive.values": torch.tensor([2.0])}
    server.check(upload(2, **part))
    for wrong, complaint in (
        ({"w.kept": ~every}, "'w' has not as many channels as 'w.kept' says"),
        ({"adaptive.places": part["adaptive.places"]}, "without the other"),
        ({"adaptive.values": part["adaptive.values"]}, "without the other"),
        ({**part, "adaptive.values": torch.ones(2)}, "must be a number from 0 to"),
        ({**part, "adaptive.places": part["adaptive.places"] - 4}, "must be a number from 0 to"),
        ({**part, "adaptive.places": part["adaptive.places"] - 3 + sum(body.sizes)}, "must be a number from 0 to"),
    ):
        sent = upload(2)
        with pytest.raises(MessageError, match=complaint):
            server.check(replace(sent, tensors={**sent.tensors, **wrong}))
    context = Context(4, Round(1, 1, True, 0), make_trainer)
    found, metrics = server.aggregate({0: upload(0), 2: upload(2, **part)}, context)
    assert metrics == {}
    assert set(found) == {0, 1, 2, 3}
    answers = {index: answer.tensors for index, answer in found.items()}
    assert all(answers[index]["w"].item() == 1 for index in range(4))
    assert set(answers[2]) == {"w"}
    for index in (0, 1, 3):
        assert answers[index]["others.counts"].tolist() == [1]
        assert answers[index]["others.places"].tolist() == [3]


def test_a_task_begins_with_new_parameters(body: Any) -> None:
    body.begin_round(Round(1, 1, False, 0))
    assert torch.equal(body.adaptive, body._flat_weights() / 3)
    first = body.mask.detach().clone()
    assert 0.5 < float(torch.cat([m * len(m) ** 0.5 for m in first.split(body.channels)]).std()) < 1.5
    body.begin_round(Round(1, 2, False, 0))
    assert torch.equal(body.mask, first)
    give_knowledge(body, torch.eye(2, len(body.adaptive)))
    body.begin_round(Round(2, 3, False, 0))
    assert not torch.equal(body.mask, first)
    assert body.attention.shape == (2, len(body.shapes))
    assert bool(body.attention.all())
    assert torch.equal(body.memory.received["reference"], body._flat_weights())


def test_a_finished_task_is_classified_with_its_own_parameters(body: Any) -> None:
    torch.manual_seed(0)
    give_knowledge(body, torch.randn(2, len(body.adaptive)))  # so that attention takes part in the first task
    fit(body, 1, 1)
    shared = copy_of(body.shared())
    before = test_logits_of(body, 1, 1)
    classes = list(body.data.tasks[0].classes)
    assert before[:, classes].isfinite().all()
    fit(body, 2, 2)
    body.load(copy_of(body.state()))
    moved = test_logits_of(body, 1, 2)
    assert not torch.equal(moved, before)  # by the drift of W alone
    second = test_logits_of(body, 2, 2)
    body.adopt(shared)
    assert torch.equal(test_logits_of(body, 1, 2), before)
    assert not torch.equal(test_logits_of(body, 2, 2), second)
    later = list(body.data.tasks[1].classes)
    assert torch.isinf(test_logits_of(body, 1, 2)[:, later]).all()
    assert torch.isinf(second[:, classes]).all()


def test_images_of_several_tasks_may_be_in_one_batch(body: Any) -> None:
    fit(body, 1, 1)
    fit(body, 2, 2)
    alone = [test_logits_of(body, task, 2) for task in (1, 2)]
    parts = [images_of(body, task) for task in (1, 2)]
    pixels, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batch = Images(labels.numpy(), pixels[order], labels[order])
    with torch.no_grad():
        together = body.test_logits(batch, body.accuracy.task_of_class[labels[order]])
    torch.testing.assert_close(together, torch.cat(alone)[order], rtol=1e-4, atol=1e-5)


def test_who_catches_up_has_one_set_for_all_it_missed(make: Make, long_data: FederatedDataModule) -> None:
    body = restore_client(make(client=client(), server=FedWeITServer(), data=long_data), 0)
    fit(body, 2, 1)  # absent in all rounds of the first task
    assert body.memory.archive == {}
    both = [test_logits_of(body, task, 2) for task in (1, 2)]
    shared = copy_of(body.shared())
    fit(body, 3, 2)
    assert list(body.memory.archive) == [2]
    body.adopt(shared)
    assert all(torch.equal(test_logits_of(body, task, 3), both[task - 1]) for task in (1, 2))
    body.load(copy_of(body.state()))
    assert all(torch.equal(test_logits_of(body, task, 3), both[task - 1]) for task in (1, 2))


def test_every_finished_task_has_a_set(make: Make, long_data: FederatedDataModule) -> None:
    body = restore_client(make(client=client(), server=FedWeITServer(), data=long_data), 0)
    start, learned = copy_of(body.shared()), []
    for task in (1, 2, 3):
        fit(body, task, task)
        body.adopt(start)
        learned.append(test_logits_of(body, task, task))
    assert list(body.memory.archive) == [1, 2]
    assert all(torch.equal(test_logits_of(body, task, 3), learned[task - 1]) for task in (1, 2, 3))


def test_a_state_is_all_there_is(body: Any) -> None:
    fit(body, 1, 1)
    give_knowledge(body, torch.randn(2, len(body.adaptive)))
    fit(body, 2, 2)
    give_knowledge(body, torch.randn(1, len(body.adaptive)))
    state = copy_of(body.state())
    assert {name.split(".")[2] for name in state if name.startswith("memory.archive.")} == {"1"}
    assert "memory.archive.1.backbone.bn1.running_mean" in state
    knowledge = body.knowledge.clone()
    fresh = body.initial_state(0)
    assert not [name for name in fresh if name.startswith(("memory.archive.", "memory.received."))]
    body.load(fresh)
    assert body.attention.shape[0] == len(body.knowledge) == 0
    body.load(state)
    assert same(body.state(), state)
    assert torch.equal(body.knowledge, knowledge)


def test_the_task_is_known_so_the_masks_agree(make: Make) -> None:
    federation = make(client=client(epochs=3), server=FedWeITServer())
    results = run(federation)
    assert federation.template.client.task_aware == MASKS
    for result in results:
        assert all(result.accuracy[mask] == result.accuracy["task"] for mask in MASKS)
    assert outcome(results) != []


# ---- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"decay": -1}, r"model\.decay is -1, must be at least 0"),
        ({"sparsity": -0.5}, r"model\.sparsity is -0\.5, must be at least 0"),
        ({"drift": float("nan")}, r"model\.drift is nan, must be at least 0"),
        ({"pruned": 1.0}, r"model\.pruned is 1\.0, must be at least 0 and below 1"),
        ({"train_mask": "seen"}, r"model\.train_mask is seen, must be task"),
        ({"continual": Replay()}, r"model\.continual is Replay, must be NoReplay"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        client(**settings)


def test_the_server_is_for_its_clients(make: Make) -> None:
    with pytest.raises(ValueError, match=r"FedWeITServer, .* send 'adaptive', .* the model FedWeITClient"):
        make(client=make_client(FedAvgClient, train_mask="task"), server=FedWeITServer())
