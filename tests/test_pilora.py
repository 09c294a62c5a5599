"""PILoRA: pairs that add up over tasks, prototypes weighed anew, and what of both travels and stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CNN,
    Recorder,
    copy_of,
    fit,
    make_client,
    make_data,
    make_federation,
    make_trainer,
    output_of,
    parameters,
    restore_client,
    run,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl.batches import Batch, Images, Output
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, MessageError, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.pilora.client import PILoRAClient, fused, overlap
from fedlscl.methods.pilora.prototypes import distances, weights
from fedlscl.methods.pilora.server import PILoRAServer
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg

Make = Callable[..., Federation]
Wire = list[tuple[Message, bytes]]
SHARE = math.exp(5) / (math.exp(5) + 4)  # 0.974, of the only one among five who trains a class


def client(**changes: Any) -> Any:
    return make_client(PILoRAClient, **{"continual": NoReplay(), "buffer_size": 0, "rank": 2, **changes})


@pytest.fixture
def body(make: Make) -> Any:
    """Client 0, which has learned nothing yet."""
    return restore_client(make(client=client(), server=PILoRAServer()), 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(body: Any, task: int) -> Tensor:
    pixels: Tensor = body.data.batch("train", body.data.tasks[task - 1].train)[0]
    return pixels


def sent(wire: Wire, kind: type[Message], round: int) -> dict[int, Any]:
    """The messages of one kind in one round by client; the handout is of round 0."""
    return {m.client: m for m, _ in wire if isinstance(m, kind) and m.round == round}


def current(data: FederatedDataModule, index: int, task: int) -> list[int]:
    return list(data.split.clients[index].tasks[task - 1].classes)


# ---- the model


def test_the_products_of_all_tasks_are_added_to_q_and_v_alone(body: Any) -> None:
    width, images = body.vit.width, torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    plain = body.vit(images)
    torch.testing.assert_close(output_of(body, images).representation, plain)  # every B begins at zero
    products = torch.zeros(3, width, width)
    for task in (1, 2, 3):
        body._open(task)
        with torch.no_grad():
            body.a.copy_(random(*body.a.shape, seed=task))
            body.b.copy_(0.1 * random(*body.b.shape, seed=10 + task))
            for part, row in ((0, 0), (1, 2)):  # q and v among q, k, v
                products[row] += body.b[part] @ body.a[part]
    assert body.earlier_a.shape == (2, 2 * body.rank, width)
    vit = copy.deepcopy(body.vit)
    with torch.no_grad():
        vit.vit.blocks[0].attn.qkv.weight += products.flatten(0, 1)
    features = vit(images)
    assert not torch.allclose(features, plain, atol=0.1)
    output = output_of(body, images)
    torch.testing.assert_close(output.representation, features, rtol=1e-4, atol=1e-5)
    wanted = torch.stack([(features - c).norm(dim=1) / math.sqrt(width) for c in body.prototypes], dim=1)
    torch.testing.assert_close(-output.logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_block_is_the_one_that_was_asked_for(make: Make) -> None:
    body = restore_client(make(client=client(block=1)), 0)
    with torch.no_grad():
        body.b.copy_(random(*body.b.shape))
    vit, images = copy.deepcopy(body.vit), torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        for part, row in ((0, 0), (1, 2)):
            vit.vit.blocks[1].attn.qkv.weight[row * vit.width :][: vit.width] += body.b[part] @ body.a[part]
    torch.testing.assert_close(output_of(body, images).representation, vit(images), rtol=1e-4, atol=1e-5)


def test_a_fused_pair_leaves_keys_alone() -> None:
    a, b = random(2, 3, 5, seed=1), random(2, 5, 3, seed=2)
    lora = fused(a, b)
    assert lora.a.shape == (6, 5)
    wanted = torch.cat([b[0] @ a[0], torch.zeros(5, 5), b[1] @ a[1]])
    torch.testing.assert_close(lora.b @ lora.a, wanted)


def test_distances_are_those_computed_by_hand() -> None:
    features = torch.tensor([[3.0, 4.0], [1.0, 1.0]], requires_grad=True)
    found = distances(features, torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    wanted = torch.tensor([[5 / math.sqrt(2), 0.0], [1.0, math.sqrt(13 / 2)]])
    torch.testing.assert_close(found.detach(), wanted, atol=1e-15, rtol=1e-6)
    found[0, 1].backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert features.grad.tolist() == [[0, 0], [0, 0]]
    assert distances(features.detach().bfloat16(), torch.zeros(1, 2)).dtype == torch.float32


# ---- the objective


def test_orthogonal_rows_cost_nothing_and_others_their_products() -> None:
    rows = torch.linalg.qr(random(8, 8))[0]
    a, earlier = torch.stack([rows[:2], rows[2:4]]), torch.stack([rows[4:8], rows[[0, 1, 6, 7]]])
    assert float(overlap(a, earlier)) < 1e-5  # v is orthogonal to its own past, whatever q is
    a, earlier = random(2, 2, 5, seed=1), random(2, 4, 5, seed=2)
    wanted = sum(abs(float(one @ other)) for part in (0, 1) for one in a[part] for other in earlier[part])
    assert float(overlap(a, earlier)) == pytest.approx(wanted, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(overlap(a, earlier)) == pytest.approx(wanted, rel=1e-5)


def losses_of(body: Any, output: Output, labels: Tensor) -> dict[str, float]:
    images = Images(labels.numpy(), torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), labels)
    terms = body.collaborative_losses(output, Batch("collaborate", images, {}, torch.zeros(len(labels))))
    return {name: float(term.detach()) for name, term in terms.items()}


def test_the_terms_are_those_of_the_formulas(make: Make) -> None:
    body = restore_client(make(client=client(compactness=0.2, sparsity=0.3, orthogonality=0.7)), 0)
    labels = torch.tensor([1, 1, 0])
    delta = random(3, body.num_classes).abs()
    output = Output(-delta, torch.zeros(3, 1))
    found = losses_of(body, output, labels)
    a = body.a.detach().clone()
    own = [float(delta[row, label]) for row, label in enumerate(labels.tolist())]
    # against all classes, whatever the client has
    everything = [-mine - math.log(float((-delta[row]).exp().sum())) for row, mine in enumerate(own)]
    assert found == {
        "cross_entropy": pytest.approx(-sum(everything) / 3, rel=1e-5),
        "compactness": pytest.approx(0.2 * sum(own) / 3, rel=1e-5),
        "sparsity": pytest.approx(0.3 * float(a.abs().sum()), rel=1e-5),
    }
    body._open(1)
    assert losses_of(body, output, labels) == found  # the first task has nothing to be orthogonal to
    body._open(2)
    with torch.no_grad():
        body.a.copy_(random(*body.a.shape))
    products = sum(float((body.a.detach()[part] @ a[part].T).abs().sum()) for part in (0, 1))
    assert losses_of(body, output, labels)["orthogonality"] == pytest.approx(0.7 * products, rel=1e-5)


def test_the_published_weights_are_the_defaults() -> None:
    body = PILoRAClient(continual=NoReplay())
    assert body.weights == {"compactness": 0.001, "sparsity": 0.01, "orthogonality": 0.5}
    assert (body.block, body.rank, PILoRAServer().temperature) == (0, 4, 0.2)


def test_pair_and_prototypes_may_have_rates_of_their_own(make: Make) -> None:
    for own, wanted in (({}, [0.5, 0.5]), ({"lora_learning_rate": 0.0, "prototype_learning_rate": 2.0}, [0.0, 2.0])):
        body = restore_client(make(client=client(learning_rate=0.5, **own)), 0)
        groups = body.configure_optimizers().param_groups
        assert [group["lr"] for group in groups] == wanted
        assert [[id(p) for p in group["params"]] for group in groups] == [
            [id(body.a), id(body.b)],
            [id(body.prototypes)],
        ]
        assert {group["weight_decay"] for group in groups} == {0}
    before = parameters(body)
    fit(body, 1, 1)
    moved = {name for name, tensor in parameters(body).items() if not torch.equal(tensor, before[name])}
    assert moved == {"prototypes"}


# ---- weights of prototypes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 3.0]))
def test_weights_sum_to_one_and_the_nearest_has_the_largest(
    count: int, held: int, seed: int, temperature: float
) -> None:
    candidates, means = random(count, 3, seed=seed), random(held, 3, seed=seed + 1)
    u = weights(candidates, means, temperature)
    far = [sum(float((c.double() - f.double()).norm()) for f in means) for c in candidates]
    assert float(u.sum()) == pytest.approx(1)
    assert int(u.argmax()) == far.index(min(far))
    assert int(u.argmin()) == far.index(max(far))
    if count > 1:  # an independent reference
        low, high = 1 / max(far), 1 / min(far)
        raised = [math.exp((1 / one - low) / (high - low) / temperature) for one in far]
        assert u.tolist() == pytest.approx([one / sum(raised) for one in raised])


def test_equal_distances_have_equal_weights() -> None:
    one = random(1, 4)
    assert weights(one, random(3, 4, seed=1), 0.2).tolist() == [1]
    assert weights(one.expand(3, 4), random(3, 4, seed=1), 0.2).tolist() == pytest.approx([1 / 3] * 3)
    assert weights(one.expand(2, 4), one, 0.2).tolist() == [0.5, 0.5]  # no distance at all
    around = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    assert weights(around, torch.ones(1, 2), 0.2).tolist() == pytest.approx([1 / 3] * 3)


def test_one_on_the_mean_itself_is_the_nearest() -> None:
    u = weights(torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), torch.ones(1, 2), 0.2)
    assert u.tolist() == pytest.approx([SHARE * (math.exp(5) + 4) / (math.exp(5) + 2), *[1 / (math.exp(5) + 2)] * 2])


def test_four_unchanged_copies_leave_the_trainer_0_974() -> None:
    copies = random(1, 6).expand(4, 6)
    u = weights(torch.cat([torch.full((1, 6), 5.0), copies]), torch.full((1, 6), 5.5), 0.2)
    assert u.tolist() == pytest.approx([SHARE, *[(1 - SHARE) / 4] * 4], abs=1e-12)
    assert round(SHARE, 3) == 0.974


# ---- the server


def upload(index: int, samples: int, rows: dict[int, tuple[Tensor, Tensor]], others: tuple[int, ...] = ()) -> Upload:
    """What a client sends of d = 2, K = 4 and r = 1: by class its prototype and mean, and classes without images."""
    pair = {"a": torch.full((2, 1, 2), float(index)), "b": torch.full((2, 2, 1), 10.0 * index)}
    prototypes, means = (torch.stack(column) for column in zip(*rows.values(), strict=True))
    return Upload(
        index,
        1,
        1,
        samples,
        {**pair, "prototypes": prototypes, "means": means, "classes": torch.tensor([*rows, *others])},
    )


def answered(server: PILoRAServer, uploads: dict[int, Upload], clients: int, round: int) -> dict[int, Any]:
    """The tensors of a server's answers in a round."""
    answers, metrics = server.aggregate(uploads, Context(clients, Round(1, round, False, 0), make_trainer))
    assert metrics == {}
    return {index: answer.tensors for index, answer in answers.items()}


def served(uploads: dict[int, Upload], clients: int, **changes: Any) -> tuple[PILoRAServer, Any, Tensor]:
    """A server after one round, its answers, and the prototypes before."""
    model = nn.Module()
    model.prototypes = nn.Parameter(random(4, 2))
    server = PILoRAServer(**changes)
    server.begin({"means": ...}, {}, lambda: model)  # type: ignore[dict-item]
    before = server.prototypes.clone()
    answers = answered(server, uploads, clients, 1)
    assert torch.equal(model.prototypes, before)  # type: ignore[arg-type]
    return server, answers, before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"classes": torch.tensor([0, 4])}, "'classes' must be different numbers from 0 to 3"),
        ({"classes": torch.tensor([0, -1])}, "'classes' must be different numbers from 0 to 3"),
        ({"classes": torch.tensor([1, 1])}, "'classes' must be different numbers from 0 to 3"),
        ({"means": torch.zeros(1, 2)}, "2 prototypes, 1 means and 2 classes do not fit together"),
        ({"classes": torch.tensor([3])}, "2 prototypes, 2 means and 1 classes do not fit together"),
    ],
    ids=["beyond", "negative", "twice", "means", "few classes"],
)
def test_an_upload_that_contradicts_itself_is_refused(changes: dict[str, Tensor], complaint: str) -> None:
    good = upload(0, 8, {0: (random(2), random(2)), 2: (random(2), random(2))})
    server, _, _ = served({0: good}, 2)
    server.check(good)
    with pytest.raises(MessageError, match=complaint):
        server.check(replace(good, tensors={**good.tensors, **changes}))


def test_a_class_is_updated_by_those_who_train_it() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])
    mean = torch.tensor([1.0, 1.0])
    uploads = {
        0: upload(0, 1, {2: (one, mean)}, others=(3,)),
        2: upload(2, 3, {0: (one, mean), 2: (two, torch.tensor([0.0, 1.0]))}),
    }
    server, answers, before = served(uploads, 4)
    # far from the means (1, 1) and (0, 1) are (1, 0) by 1 + sqrt 2 and (0, 4) by sqrt 10 + 3
    nearer = math.exp(5) / (math.exp(5) + 1)
    row = nearer * one + (1 - nearer) * two
    torch.testing.assert_close(server.prototypes, torch.stack([one, before[1], row, before[3]]))
    torch.testing.assert_close(answers[0]["prototypes"], torch.stack([row, before[3]]))
    torch.testing.assert_close(answers[2]["prototypes"], torch.stack([one, row]))
    for index in range(4):
        assert set(answers[index]) == {"a", "b"} | ({"prototypes"} if index in uploads else set())
        torch.testing.assert_close(answers[index]["a"], torch.full((2, 1, 2), 1.5))  # 0 once and 2 three times
        torch.testing.assert_close(answers[index]["b"], torch.full((2, 2, 1), 15.0))


def test_all_clients_may_count_with_their_unchanged_copies() -> None:
    mine, mean = torch.tensor([7.0, 7.0]), torch.tensor([7.0, 8.0])
    server, answers, before = served({3: upload(3, 1, {1: (mine, mean)})}, 5, proto_clients="all")
    row = SHARE * mine + (1 - SHARE) * before[1]
    torch.testing.assert_close(answers[3]["prototypes"], row[None])
    again = upload(0, 1, {1: (mine, mean)})
    other = PILoRAServer(proto_clients="all")
    other.load(server.state())  # the copies of a later round are what was answered last
    answers = answered(other, {0: again}, 5, 2)
    torch.testing.assert_close(answers[0]["prototypes"], (SHARE * mine + (1 - SHARE) * row)[None])
    torch.testing.assert_close(server.prototypes[1], row)  # not that of the other


def test_each_client_has_one_copy_among_all() -> None:
    near, far, mean = torch.tensor([9.0, 9.0]), torch.tensor([8.0, 9.0]), torch.tensor([9.0, 9.5])
    uploads = {0: upload(0, 1, {1: (near, mean)}), 4: upload(4, 1, {1: (far, mean)})}
    server, _, before = served(uploads, 5, proto_clients="all")
    u = weights(torch.stack([near, far, *[before[1]] * 3]), torch.stack([mean, mean]), 0.2).float()
    torch.testing.assert_close(server.prototypes[1], u[0] * near + u[1] * far + u[2:].sum() * before[1])


def test_equal_copies_are_a_fixed_point() -> None:
    same_row, mean = torch.tensor([0.3, 0.7]), torch.tensor([0.1, 0.2])
    uploads = {index: upload(index, 1, {0: (same_row, mean)}) for index in range(3)}
    assert torch.equal(served(uploads, 3)[1][1]["prototypes"][0], same_row)


# ---- what travels


@pytest.mark.parametrize("classes", [100, 200])
def test_messages_have_the_bytes_of_the_formulas(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vit: Any = SimpleNamespace(width=768, depth=12)
    body = client(rank=4).assemble(vit, SmallModelSpec(**CNN), "resnet18", classes)
    monkeypatch.setattr(body, "_classes", lambda: (torch.arange(8), torch.arange(0)))
    body.means = torch.zeros(8, 768)
    tensors = {name: tensor.detach() for name, tensor in body.outgoing().items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == 98_368
    message = Upload.from_bytes(Upload(0, 1, 1, 9, tensors).to_bytes(), body.upload_schema())
    server = PILoRAServer()
    server.begin(body.upload_schema(), body.download_schema(), lambda: body)
    answers = answered(server, {0: message}, 2, 1)
    assert sum(tensor.nbytes for tensor in answers[0].values()) == 73_728
    assert sum(tensor.nbytes for tensor in answers[1].values()) == 4 * 16 * 768
    assert set(Download.from_bytes(Download(0, 1, 1, 0, answers[0]).to_bytes(), body.download_schema()).tensors) == {
        *("a", "b", "prototypes")
    }


def test_a_client_sends_its_current_classes_and_their_means(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=PILoRAServer(), rounds=2)
    run(federation)
    width = federation.template.vit.width
    for round, task in ((2, 1), (3, 2)):
        for index, message in sent(wire, Upload, round).items():
            classes = current(federation.template.data, index, task)
            assert message.tensors["classes"].tolist() == classes
            assert message.tensors["prototypes"].shape == message.tensors["means"].shape == (2, width)
            size = sum(tensor.nbytes for tensor in message.tensors.values())
            assert size == 4 * (8 * width + 2 * len(classes) * width) + 8 * len(classes)
            answer = sent(wire, Download, round)[index]
            assert sum(tensor.nbytes for tensor in answer.tensors.values()) == 4 * (8 * width + 2 * width)


def test_a_mean_is_that_of_the_features_after_training(body: Any) -> None:
    fit(body, 1, 1)
    body.eval()
    images = images_of(body, 1)
    labels = body.data.labels(torch.as_tensor(body.data.tasks[0].train))
    with torch.no_grad():
        features = output_of(body, images).representation
    tensors = body.outgoing()
    for row, label in enumerate(tensors["classes"].tolist()):
        torch.testing.assert_close(tensors["means"][row], features[labels == label].mean(0), rtol=1e-4, atol=1e-5)
        assert torch.equal(tensors["prototypes"][row], body.prototypes[label])


def test_after_a_round_the_pair_is_the_mean_by_hand(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=PILoRAServer())
    run(federation)
    messages = sent(wire, Upload, 2)
    total = sum(m.samples for m in messages.values())
    for name in ("a", "b"):
        mean = sum(m.samples * m.tensors[name].double() for m in messages.values()) / total
        for index in range(3):
            torch.testing.assert_close(restore_client(federation, index).shared()[name].double(), mean)


# ---- tasks


def test_a_round_trains_the_current_pair_and_prototypes_alone(make: Make) -> None:
    body = restore_client(make(client=client(epochs=2)), 0)
    fit(body, 1, 1)
    first = parameters(body)
    fit(body, 2, 2)
    assert torch.equal(body.earlier_a, first["a"])
    assert torch.equal(body.earlier_b, first["b"])
    second = parameters(body)
    moved = (second["prototypes"] != first["prototypes"]).any(dim=1).nonzero().squeeze(1).tolist()
    assert moved == list(body.data.tasks[1].classes)
    assert bool((second["b"] != 0).any())
    fit(body, 2, 3)
    assert torch.equal(body.earlier_a, first["a"])  # a task's second round opens nothing


def test_a_new_pair_changes_nothing_at_first_and_is_the_same_for_all(make: Make) -> None:
    federation = make(client=client(), server=PILoRAServer())
    results = federation.run(Recorder())
    next(results)
    images, opened = images_of(restore_client(federation, 0), 1), []
    for index in range(3):
        body = restore_client(federation, index)
        body.eval()
        before, last = output_of(body, images).representation.detach(), body.a.detach().clone()
        body.begin_round(Round(2, 2, True, 0))
        body.eval()
        torch.testing.assert_close(output_of(body, images).representation.detach(), before)
        assert not torch.equal(body.a, last)
        assert bool((body.b == 0).all())
        assert float(body.a.detach().abs().max()) <= 1 / math.sqrt(body.vit.width)
        opened.append(body.a.detach().clone())
    assert torch.equal(opened[0], opened[1])
    assert torch.equal(opened[0], opened[2])
    body.begin_round(Round(3, 3, True, 0))
    assert not torch.equal(body.a, opened[0])


@pytest.mark.parametrize("present", [None, 1])
def test_everyone_has_the_pairs_as_they_were_answered_last(
    make: Make, long_data: FederatedDataModule, wire: Wire, present: int | None
) -> None:
    """With everybody in each round, and with one client, so that the others meet tasks in a download alone."""
    federation = make(data=long_data, client=client(), server=PILoRAServer(), rounds=2, clients_per_round=present)
    run(federation)
    ends = [sent(wire, Download, round) for round in (2, 4, 6)]
    for index in range(3):
        body = restore_client(federation, index)
        assert torch.equal(body.earlier_a, torch.cat([end[index].tensors["a"] for end in ends[:2]], 1))
        assert torch.equal(body.earlier_b, torch.cat([end[index].tensors["b"] for end in ends[:2]], 2))
        assert torch.equal(body.a, ends[2][index].tensors["a"])
        assert same(copy_of({"a": body.a, "b": body.b}), {name: ends[2][0].tensors[name] for name in ("a", "b")})


def test_what_a_client_has_learned_stays_though_others_train_it(
    make: Make, long_data: FederatedDataModule, wire: Wire
) -> None:
    federation = make(data=long_data, client=client(), server=PILoRAServer(), rounds=2)
    after: list[list[Tensor]] = []
    for _ in federation.run(Recorder()):
        after.append([restore_client(federation, index).prototypes.detach().clone() for index in range(3)])
    shared = 0
    for index in range(3):
        for task in (1, 2, 3):
            for label in current(long_data, index, task):
                history = torch.stack([prototypes[index][label] for prototypes in after])
                start = sent(wire, Download, 0)[index].tensors["prototypes"][label]
                for round in range(6):  # moved in its own two rounds, still before and after them
                    before = history[round - 1] if round else start
                    assert torch.equal(history[round], before) == (round // 2 != task - 1)
                later = [i for i in range(3) for t in range(task + 1, 4) if label in current(long_data, i, t)]
                shared += len(later)
                for other in later:
                    assert not torch.equal(after[-1][other][label], history[-1])
    assert shared > 0  # there are classes that are old for one and current for another


def test_those_who_train_a_class_now_get_the_same_prototype(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=PILoRAServer())
    run(federation)
    seen: dict[tuple[int, int], Tensor] = {}
    met = 0
    for round in (1, 2):
        for index, message in sent(wire, Download, round).items():
            for label, row in zip(
                current(federation.template.data, index, round), message.tensors["prototypes"], strict=True
            ):
                met += (round, label) in seen
                assert torch.equal(seen.setdefault((round, label), row), row)
                if round == 2:
                    assert torch.equal(restore_client(federation, index).prototypes[label], row)
    assert met > 0


def test_a_class_without_images_is_answered_and_not_voted_on(
    tmp_path: Path, cache: Path, vit: FrozenViT, wire: Wire
) -> None:
    data = make_data(cache, tasks=1, private_classes=1, public_classes=1, min_public_images=0, dirichlet_alpha=1e-3)
    lacking = {
        index: set(current(data, index, 1)) - set(data.dataset.train.labels[data.split.clients[index].tasks[0].train])
        for index in range(3)
    }
    owner = next(index for index, labels in lacking.items() if not labels)
    poor = next(index for index, labels in lacking.items() if labels)
    (label,) = lacking[poor]
    federation = make_federation(tmp_path, data, vit, client(), PILoRAServer())
    run(federation)
    message = sent(wire, Upload, 1)[poor]
    assert message.tensors["classes"].tolist()[-1] == label
    assert len(message.tensors["prototypes"]) == len(message.tensors["means"]) == 1
    answered = restore_client(federation, poor).prototypes[label]
    trained = sent(wire, Upload, 1)[owner].tensors
    assert torch.equal(answered, trained["prototypes"][trained["classes"].tolist().index(label)])


def test_one_who_was_absent_learns_two_tasks_under_the_pair_of_the_second(
    make: Make, wire: Wire, long_data: FederatedDataModule
) -> None:
    federation = make(data=long_data, client=client(), server=PILoRAServer(), clients_per_round=1)
    run(federation)
    caught_up = [m for m, _ in wire if isinstance(m, Upload) and len(m.tensors["classes"]) > 2]
    for message in caught_up:
        numbers = message.tensors["classes"].tolist()
        own = {label for task in range(1, message.task + 1) for label in current(long_data, message.client, task)}
        assert set(numbers) <= own
        answer = sent(wire, Download, message.round)[message.client]
        assert len(answer.tensors["prototypes"]) == len(numbers)
    assert caught_up
    absent = [m for m, _ in wire if isinstance(m, Download) and m.round > 0 and "prototypes" not in m.tensors]
    assert len(absent) == 2 * 3


# ---- training under autocast, and settings


def test_distances_and_gradients_are_float32_under_autocast(body: Any) -> None:
    body.begin_round(Round(1, 1, False, 0))
    images = images_of(body, 1)
    labels = body.data.labels(torch.as_tensor(body.data.tasks[0].train))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = output_of(body, images)
        loss = F.cross_entropy(output.logits, labels)
    assert output.logits.dtype == loss.dtype == torch.float32
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool((body.b.grad != 0).any())
    rows = (body.prototypes.grad != 0).any(dim=1).nonzero().squeeze(1).tolist()
    assert rows == list(body.data.tasks[0].classes)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rank": 0}, r"model\.rank is 0, must be at least 1"),
        ({"sparsity": -1.0}, r"model\.sparsity is -1\.0, must be at least 0"),
        ({"lora_learning_rate": -1.0}, r"model\.lora_learning_rate is -1\.0, must be at least 0"),
        ({"continual": Replay()}, r"model\.continual is Replay, must be NoReplay"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        client(**settings)


def test_a_block_that_is_not_there_is_named(make: Make) -> None:
    with pytest.raises(ValueError, match=r"model\.block is 2, but vit_tiny_patch16_224 has blocks 0 to 1"):
        make(client=client(block=2))


def test_a_server_that_does_not_fit_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"server\.temperature is 0, must be positive"):
        PILoRAServer(temperature=0)
    with pytest.raises(ValueError, match=r"PILoRAServer, .* send 'means', .* the model PILoRAClient"):
        make(client=make_client(FedAvgClient), server=PILoRAServer())
    federation = make(client=client(), server=FedAvg())  # averages the pair, and leaves every client its prototypes
    assert all(result.skipped == {} for result in run(federation))
