"""FedProto: prototypes class by class, what they pull, and that nothing else travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CNN, SPLIT, copy_of, fit, make_client, output_of, restore_client, run, same
from torch import Tensor

from fedlscl.batches import Batch, Images, Output
from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message, MessageError, TensorSpec, Upload
from fedlscl.methods.fedproto import FedProtoClient, FedProtoServer
from fedlscl.schedule import Round
from fedlscl.server import Context

Make = Callable[..., Federation]


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0}
    return make_client(FedProtoClient, **{**own, **settings})


def upload(client: int, prototypes: Tensor, images: list[int]) -> Upload:
    return Upload(client, 1, 1, sum(images), {"prototypes": prototypes, "images": torch.tensor(images)})


def test_prototypes_are_averaged_class_by_class() -> None:
    uploads = {
        0: upload(0, torch.tensor([[1.0, 2.0], [4.0, 0.0], [0.0, 0.0]]), [1, 2, 0]),
        2: upload(2, torch.tensor([[5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]), [3, 0, 0]),
    }
    context = Context(3, Round(1, 1, False, 0), lambda: pytest.fail("nothing is trained"))
    answers, _ = FedProtoServer().aggregate(uploads, context)
    assert list(answers) == [0, 1, 2]
    for answer in answers.values():
        # (1 * 1 + 3 * 5) / 4 and (1 * 2 + 3 * 6) / 4; one sender; nobody
        assert answer.tensors["prototypes"].tolist() == [[4.0, 5.0], [4.0, 0.0], [0.0, 0.0]]
        assert answer.tensors["prototypes"].dtype == torch.float32
        assert answer.tensors["images"].tolist() == [4, 2, 0]


def test_the_server_refuses_what_it_cannot_average() -> None:
    server = FedProtoServer()
    server.check(upload(0, torch.ones(2, 2), [3, 0]))
    with pytest.raises(MessageError, match=r"images is \[4, -1\], must"):
        server.check(upload(0, torch.ones(2, 2), [4, -1]))
    with pytest.raises(MessageError, match=r"images is \[4, 0\], must add up to 3 images"):
        server.check(Upload(0, 1, 1, 3, {"prototypes": torch.ones(2, 2), "images": torch.tensor([4, 0])}))
    with pytest.raises(ValueError, match=r"FedProtoServer, .* send 'prototypes', .* the model FedProtoClient"):
        server.begin({"cnn.weight": TensorSpec((2,))}, {}, lambda: pytest.fail("no model is wanted"))


def test_the_term_is_the_mean_squared_distance_to_prototypes_that_there_are() -> None:
    body = client(strength=0.5)
    body.register_buffer("prototypes", torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    body.register_buffer("images", torch.tensor([4, 0]))
    body.competing_mask = body.seen_mask = body.learned_mask = torch.tensor([True, True])
    body.kept = {}
    images = Images(torch.arange(2).numpy(), torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]))
    output = Output(torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [7.0, 7.0]]))
    terms = body.collaborative_losses(output, Batch("collaborate", images, {}, torch.zeros(2)))
    assert float(terms["prototype"]) == 0.5 * (2**2 + 1**2) / 2 / 2  # of two features and two images; class 1 has none
    assert float(terms["cross_entropy"]) == pytest.approx(0.6931, abs=1e-4)


def test_a_client_sends_the_means_of_its_current_images(make: Make) -> None:
    body = restore_client(make(client=client(), server=FedProtoServer()), 0)
    fit(body, 1, 1)
    sent, labels = body.upload().tensors, body.data.labels(body.current)
    body.eval()
    with torch.no_grad():
        representation = output_of(body, body.data.batch("train", body.current)[0]).representation
    for label in range(body.num_classes):
        own = representation[labels == label]
        assert int(sent["images"][label]) == len(own)
        wanted = own.mean(0) if len(own) else torch.zeros(CNN["features"])
        torch.testing.assert_close(sent["prototypes"][label], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", ["resnet18", ["resnet18", "resnet34", "resnet18"]])
def test_no_weight_travels_and_clients_may_differ_in_their_cnn(
    make: Make, wire: list[tuple[Message, bytes]], names: str | list[str]
) -> None:
    args = CNN["model_args"]
    cnn = {**CNN, "name": names, "model_args": args if isinstance(names, str) else dict.fromkeys(names, args)}
    federation = make(client=client(), server=FedProtoServer(), cnn=cnn, rounds=2)
    run(federation)
    assert {type(message) for message, _ in wire} == {Upload, Download}
    for message, _ in wire:
        shapes = {name: tuple(tensor.shape) for name, tensor in message.tensors.items()}
        assert shapes == {"prototypes": (8, CNN["features"]), "images": (8,)}
    for message in (message for message, _ in wire if isinstance(message, Upload)):
        sent = message.tensors["images"] > 0
        assert sent.sum() == SPLIT["classes_per_task"]
        assert torch.equal(message.tensors["prototypes"].abs().sum(dim=1) > 0, sent)
    answer = next(m.tensors for m, _ in wire if isinstance(m, Download) and m.round == 4)
    heads = []
    for index in range(3):
        body = restore_client(federation, index)
        assert same(copy_of(body.shared()), answer)
        heads.append(body.head.weight.detach().clone())
    assert not torch.equal(heads[0], heads[2])


def test_a_strong_pull_brings_the_clients_classes_together(make: Make) -> None:
    distances = []
    for strength in (0.0, 100.0):
        body = restore_client(
            make(client=client(strength=strength, epochs=4, learning_rate=0.02), server=FedProtoServer()), 0
        )
        goal = {"prototypes": torch.ones_like(body.prototypes), "images": torch.ones_like(body.images)}
        body.download(Download(0, 1, 1, 0, goal))
        fit(body, 1, 2)
        sent = body.upload().tensors
        distances.append(float((sent["prototypes"] - 1)[sent["images"] > 0].square().mean()))
    assert distances[1] < 0.5 * distances[0]


def test_a_negative_strength_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.strength is -1, must be at least 0"):
        client(strength=-1)
