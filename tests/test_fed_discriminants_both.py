"""Discriminants on both models: what travels in which round, the head that follows, and who is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import fit, make_trainer, outcome, restore_client, run, same
from torch import Tensor

from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.store import client_name
from fedlscl.messages import Download, Message, MessageError, Upload
from fedlscl.methods.fed_discriminants import CHOICES, CHOICES_OF_BOTH, Choice, Discriminants
from fedlscl.methods.fed_discriminants_both import BothDiscriminantsClient, BothDiscriminantsServer
from fedlscl.methods.statistics.client import rounded
from fedlscl.methods.statistics.heads import added
from fedlscl.robust import sizes
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg, Total

Make = Callable[..., Federation]
CLASSES, WIDTH, SMALL, IMAGES = 3, 4, 2, 30


def federation(make: Make, **options: Any) -> Federation:
    client = BothDiscriminantsClient(learning_rate=0.01, epochs=1)
    return make(client=client, server=BothDiscriminantsServer(), **{"rounds": 3, **options})


def summed_up(body: BothDiscriminantsClient) -> None:
    body.begin_round(Round(1, 2, True, 0))
    make_trainer().fit(body)


def small(tensors: Any) -> set[str]:
    return {name for name in tensors if name.startswith("cnn.")}


def images() -> tuple[Tensor, Tensor]:
    """A vector of the ViT that tells the last class from the others, and one of the small model for the first two."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    features = torch.randn(IMAGES, WIDTH + SMALL, generator=rng)
    features[:, 0] += 9.0 * (labels == 2)
    features[:, WIDTH] += 9.0 * (labels == 1)
    return rounded(features), labels


def test_the_small_models_scores_are_discriminants_of_their_own_times_the_weights_of_all_others() -> None:
    features, labels = images()
    numbers = torch.arange(IMAGES)
    both, vit = Discriminants(2, SMALL), Discriminants(2)
    total = both.sums(features, labels, numbers, CLASSES)
    assert {name: tuple(of.shape) for name, of in total.items()} == both.shapes(WIDTH + SMALL, CLASSES)
    of_vit = vit.sums(features[:, :WIDTH], labels, numbers, CLASSES)
    twice = vit.sums(features[:, WIDTH:].repeat(1, 2), labels, numbers, CLASSES)
    choice = Choice((3.0, 1.0), 0.3, False, 0.5)
    found = both.solve({0: total}, choice)
    expected = vit.solve({0: of_vit}, choice)
    own = vit.solve({0: twice}, Choice((1.0, 0.0), 0.01, False))
    torch.testing.assert_close(found.weight[:, :WIDTH], expected.weight)
    torch.testing.assert_close(found.weight[:, WIDTH:], 0.5 * 4.0 * own.weight[:, :SMALL])
    torch.testing.assert_close(found.bias, expected.bias + 0.5 * 4.0 * own.bias)


def test_a_small_model_that_knows_what_the_vit_does_not_is_chosen() -> None:
    features, labels = images()
    both = Discriminants(2, SMALL)
    total = both.sums(features, labels, torch.arange(IMAGES), CLASSES)
    hits = both.hits(total, features, labels, torch.ones(CLASSES, dtype=torch.bool))
    by_weight = {one.small: int(right) for one, right in zip(CHOICES_OF_BOTH, hits, strict=True) if not one.unit}
    assert by_weight[0.0] < 25
    assert by_weight[1.0] == IMAGES
    vit, alone = features[:, :WIDTH], Discriminants(2)
    of_vit = alone.sums(vit, labels, torch.arange(IMAGES), CLASSES)
    expected = alone.hits(of_vit, vit, labels, torch.ones(CLASSES, dtype=torch.bool))
    assert torch.equal(hits[: len(CHOICES)], expected)  # without its weight it changes nothing


def test_the_small_model_is_averaged_in_the_first_task_and_stays_as_it_is(
    make: Make, data: FederatedDataModule, wire: list[tuple[Message, bytes]]
) -> None:
    of = federation(make)
    results = run(of)
    sent: dict[int, list[Message]] = {}
    answers: dict[int, list[Message]] = {}
    for message, _ in wire:
        kind = sent if isinstance(message, Upload) else answers
        kind.setdefault(message.round, []).append(message)
    for number in (1, 2):
        assert all(small(m.tensors) == set(m.tensors) for m in sent[number])
        name = sorted(sent[number][0].tensors)[0]
        mean = sum(m.samples * m.tensors[name].double() for m in sent[number]) / sum(m.samples for m in sent[number])
        for answer in answers[number]:
            torch.testing.assert_close(answer.tensors[name].double(), mean, atol=1e-6, rtol=1e-5)
    for number in (3, 4):
        assert all("small_moments" in m.tensors and not small(m.tensors) for m in sent[number])
    assert not any(m.tensors for number in (5, 6) for m in sent[number])
    assert not {5, 6} & set(answers)
    # the head is that of all images under the small model of the second round
    clients = [restore_client(of, index) for index in range(of.clients)]
    theta = {f"model.{name}": tensor for name, tensor in answers[2][0].tensors.items()}
    sums = []
    for index in range(of.clients):
        client = restore_client(of, index)
        assert same(theta, {n: t for n, t in client.state().items() if n.startswith("model.cnn.")})
        at = torch.cat([torch.as_tensor(task.train) for task in data.split.clients[index].tasks])
        pixels, labels = client.data.batch("train", at)
        client.eval()
        with torch.no_grad():
            seen = client.seen_by_head(client.both(pixels, client.precompute(pixels)))
        sums.append(client.head.sums(seen, labels, at, data.num_classes))
    head, total = clients[0].head, added(sums)
    stored = dict(of.server.state())
    for name, tensor in total.items():
        torch.testing.assert_close(stored[f"0.{name}"], tensor, atol=len(labels) * 2**-10, rtol=1e-4)
    kept = {name: stored[f"0.{name}"] for name in total}
    for index in range(of.clients):
        client = restore_client(of, index)
        weight = head.solve({0: kept}, head.choices[client.choice()]).weight.float()
        assert torch.equal(client.memory.received["weight"], weight)
    assert outcome(run(federation(make))) == outcome(results)


def test_sums_change_nothing_in_the_small_model_with_batch_normalisation(make: Make) -> None:
    args = {"channels": [4, 4, 8, 8], "norm_layer": "batchnorm2d"}
    cnn = {"name": "resnet10t", "features": 6, "image_size": 32, "model_args": args}
    body = restore_client(federation(make, cnn=cnn), 0)
    fit(body, 1, 1)
    body.download(Download(0, 1, 1, 0, {name: tensor.clone() for name, tensor in body.shared().items()}))
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    assert any("running_mean" in name for name in small(before))
    summed_up(body)
    after = body.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in [*small(before), "own.weight"])
    one = body.sums
    body.evaluation_batch_size = 3
    body.collected.fill_(0)
    summed_up(body)
    assert torch.equal(one["class_sums"], body.sums["class_sums"])  # whatever the batches


def test_who_missed_the_last_round_of_the_first_task_sends_its_images_with_the_next(make: Make) -> None:
    body = restore_client(federation(make), 0)
    fit(body, 1, 1)
    first = len(body.current)
    body.begin_round(Round(2, 4, False, 0))
    make_trainer().fit(body)
    upload = body.upload()
    assert upload.samples == int(upload.tensors["images"].sum()) > first
    body.begin_round(Round(2, 5, False, 0))
    assert len(body.current) == upload.samples
    make_trainer().fit(body)
    assert not body.upload().tensors


def test_who_fails_once_is_heard_with_the_next_sums(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    of = federation(make)
    begin = BothDiscriminantsClient.begin_round

    def fails(self: BothDiscriminantsClient, round: Round) -> None:
        if self.index == 0 and round.number in (3, 4):
            raise ValueError("not now")
        begin(self, round)

    monkeypatch.setattr(BothDiscriminantsClient, "begin_round", fails)
    results = run(of)
    assert [[*result.skipped] for result in results] == [[], [], [0], [0], [], []]
    trained = [len(task.train) for client in of.template.data.split.clients for task in client.tasks]
    assert int(of.server.state()["0.images"].sum()) == sum(trained)
    late = restore_client(of, 0)
    assert 0 < int(late.hits.sum(dim=0).max()) <= sum(trained[:2])
    assert int(late.hits.sum(dim=0).max()) > max(trained[:2]) / 2  # both tasks' images were counted


def test_sums_are_of_the_small_model_that_all_have_in_common(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no answer came to what was trained last."""
    of = federation(make)
    average = FedAvg.aggregate

    def fails(self: FedAvg, uploads: Any, context: Context) -> Any:
        if context.round.number == 2:
            raise MessageError("no mean today")
        return average(self, uploads, context)

    monkeypatch.setattr(FedAvg, "aggregate", fails)
    run(of)
    states = [of.store.read(client_name(index)) for index in range(of.clients)]
    models = [{n: t for n, t in (state or {}).items() if n.startswith("model.cnn.")} for state in states]
    assert models[0]
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_an_answer_that_is_not_whole_is_refused(make: Make) -> None:
    of = federation(make)
    body = restore_client(of, 0)
    _, sums = uploads(of)
    for tensors in ({}, dict([*sums.tensors.items()][1:]), dict([*of.template.common_start.items()][1:])):
        with pytest.raises(MessageError, match="must be a small model or all sums"):
            body.download(Download(0, 1, 1, 0, tensors))


def test_with_one_round_the_small_model_stays_as_drawn(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    of = federation(make, rounds=1)
    with caplog.at_level(logging.WARNING):
        run(of)
    assert "rounds is 1" in caplog.text
    state = restore_client(of, 0).state()
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in of.template.common_start.items())
    assert "weight" in restore_client(of, 0).memory.received


def uploads(of: Federation) -> tuple[Upload, Upload]:
    """Of a round of training, and of one of sums."""
    body = restore_client(of, 0)
    fit(body, 1, 1)
    training = body.upload()
    tensors = {name: tensor.detach().clone() for name, tensor in training.tensors.items()}
    summed_up(body)
    return replace(training, tensors=tensors), body.upload()


def test_a_part_of_the_small_model_and_both_kinds_at_once_are_refused(make: Make) -> None:
    of = federation(make)
    training, sums = uploads(of)
    of.server.check(training)
    of.server.check(sums)
    with pytest.raises(MessageError, match=r"of the small model's"):
        of.server.check(replace(training, tensors=dict([*training.tensors.items()][1:])))
    with pytest.raises(MessageError, match=r"images"):
        of.server.check(replace(training, tensors={**training.tensors, **sums.tensors}))
    with pytest.raises(MessageError, match=r"must be over"):
        of.server.check(replace(sums, samples=sums.samples + 1))


def context(of: Federation, last: bool) -> Context:
    return Context(3, Round(1, 2, last, 0), make_trainer, of.template.common_start)


def test_who_sends_the_wrong_kind_is_left_out(make: Make) -> None:
    of = federation(make)
    training, sums = uploads(of)
    found = {0: sizes(training.tensors), 1: sizes(sums.tensors), 2: sizes(training.tensors)}
    assert of.server.compare(found, {}) == {1: "it sent sums, unlike the others"}
    found = {0: sizes(sums.tensors), 1: sizes(training.tensors), 2: sizes({})}
    assert of.server.compare(found, {}) == {1: "it sent a small model, unlike the others"}
    answers, _ = of.server.aggregate({0: training, 1: sums}, context(of, False))
    assert same(dict(answers[2].tensors), {n: t.detach() for n, t in training.tensors.items()})
    assert of.server.state() == {}
    assert of.server.aggregate({1: sums}, context(of, False)) == ({}, {})
    answers, metrics = of.server.aggregate({0: training, 1: sums}, context(of, True))
    assert metrics == {"images": sums.samples}
    assert same(dict(answers[0].tensors), dict(sums.tensors))


def test_terms_have_one_shape_whatever_is_sent(make: Make) -> None:
    of = federation(make)
    training, sums = uploads(of)
    found = [of.server.terms(upload) for upload in (training, sums, replace(sums, tensors={}))]
    shapes = [{name: tensor.shape for name, tensor in terms.items()} for terms in found]
    assert shapes[0] == shapes[1] == shapes[2]
    assert not any(tensor.any() for tensor in found[2].values())
    assert not any(found[1][name].any() for name in small(found[1]))
    assert of.server.from_sums(Total((0,), sums.samples, found[1]), context(of, True))[0]


def test_a_robust_average_takes_no_secure_sums(make: Make) -> None:
    of = make(client=BothDiscriminantsClient(), server=BothDiscriminantsServer(robust="median"), rounds=2)
    assert "compares uploads" in str(of.server.beyond_sums())
    run(of)
    assert federation(make).server.beyond_sums() is None


@pytest.mark.parametrize(("field", "value"), [("learning_rate", -1), ("epochs", 0), ("batch_size", 1)])
def test_impossible_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{field} is {value}"):
        BothDiscriminantsClient(**{field: value})
