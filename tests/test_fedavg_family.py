"""FedAvg, FedProx and joint training of the small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import copy_of, fit, make_client, outcome, output_of, parameters, restore_client, run, same
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlscl.client import Client
from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Message, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.fedavg_vit import FedAvgViTClient
from fedlscl.methods.fedprox import FedProxClient, proximal
from fedlscl.methods.joint import JointClient
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import FedAvg, Isolated

Make = Callable[..., Federation]


def client(kind: type[Client], **settings: Any) -> Client:
    return make_client(kind, **{"continual": NoReplay(), "train_mask": "task", **settings})


@pytest.mark.parametrize("classes", [100, 200])
def test_a_message_has_the_bytes_of_the_formula(vit: FrozenViT, classes: int) -> None:
    cnn = SmallModelSpec("resnet18", 512, 32)
    body = client(FedAvgClient).assemble(vit, cnn, "resnet18", classes)
    wanted = 4 * (11_176_512 + 513 * classes + 9_600) + 160
    assert sum(tensor.nbytes for tensor in body.outgoing().values()) == wanted
    assert body.upload_schema() == body.download_schema()


def test_the_features_are_raw(vit: FrozenViT) -> None:
    body = client(FedAvgClient).assemble(vit, SmallModelSpec("resnet18", 512, 32), "resnet18", 4)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    output = body(images, {})
    assert not torch.allclose(output.representation.norm(dim=1), torch.ones(2), atol=0.05)
    torch.testing.assert_close(output.logits, body.head(output.representation))


def test_after_a_round_all_clients_are_the_weighted_mean(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(FedAvgClient), server=FedAvg())
    run(federation)
    last = [m for m, _ in wire if isinstance(m, Upload) and m.round == 2]
    weights = torch.tensor([float(m.samples) for m in last])
    for name, tensor in restore_client(federation, 0).shared().items():
        sent = torch.stack([m.tensors[name] for m in last])
        if sent.is_floating_point():
            mean = (weights.view(-1, *[1] * (sent.ndim - 1)) * sent).sum(0) / weights.sum()
            torch.testing.assert_close(tensor.detach(), mean, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, sent.amax(0))
    states = [copy_of(restore_client(federation, index).shared()) for index in range(3)]
    assert same(states[0], states[1])
    assert same(states[0], states[2])


# ---- a ViT


def test_fedavg_of_a_vit_begins_with_the_weights_of_a_file(make: Make, tmp_path: Path) -> None:
    """What everyone starts with, and the server averages, is the pretrained ViT, at another image size resampled."""
    args = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        pretrained = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=9, **args)
    save_file(
        {name: t.half().contiguous() for name, t in pretrained.state_dict().items()}, tmp_path / "vit.safetensors"
    )
    cnn = {"features": 16, "image_size": 16, "weights": str(tmp_path / "vit.safetensors"), "model_args": args}
    federation = make(client=client(FedAvgClient), server=FedAvg(), cnn={"name": "vit_tiny_patch16_224", **cnn})
    start, wanted = federation.template.common_start, pretrained.state_dict()
    assert set(start) == {f"cnn.backbone.{n}" for n in wanted if n[:5] != "head."} | {"head.weight", "head.bias"}
    for name in wanted.keys() - {"pos_embed", "head.weight", "head.bias"}:
        assert torch.equal(start[f"cnn.backbone.{name}"], wanted[name].half().float())
    position = wanted["pos_embed"].half().float()
    resampled = timm.layers.resample_abs_pos_embed(position, new_size=[2, 2], num_prefix_tokens=1)
    assert torch.equal(start["cnn.backbone.pos_embed"], resampled)
    assert [result.skipped for result in run(federation)] == [{}, {}]
    body = restore_client(federation, 0)
    moved = {n for n, tensor in body.shared().items() if not torch.equal(tensor, start[n])}
    assert moved == set(start)


def test_the_whole_vit_begins_as_the_frozen_one_which_stays(make: Make, vit: FrozenViT) -> None:
    before, images = copy_of(vit.state_dict()), torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    federation = make(client=client(FedAvgViTClient), server=FedAvg())
    body = restore_client(federation, 0)
    body.eval()
    output = output_of(body, images)
    torch.testing.assert_close(output.representation, vit(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, body.head(output.representation))
    names = {f"trained.vit.{name}" for name in vit.vit.state_dict()}
    assert set(body.shared()) == names | {"head.weight", "head.bias"}
    (counts,) = federation.cost().values()
    assert counts["trained_parameters"] == sum(tensor.numel() for tensor in body.shared().values())
    assert counts["flops_frozen"] == 0
    assert [result.skipped for result in run(federation)] == [{}, {}]
    after = restore_client(federation, 0).shared()
    assert all(not torch.equal(after[f"trained.{n}"], t) for n, t in before.items() if n not in ("mean", "std"))
    assert same(vit.state_dict(), before)


# ---- a pull to the start


def test_without_its_term_fedprox_is_fedavg_to_the_last_bit(make: Make) -> None:
    one = make(client=client(FedAvgClient), server=FedAvg())
    two = make(client=client(FedProxClient, mu=0.0), server=FedAvg())
    assert outcome(run(one)) == outcome(run(two))
    for index in range(3):
        assert same(restore_client(one, index).state(), copy_of(restore_client(two, index).state()))


def test_the_gradient_of_the_proximal_term_is_the_way_back() -> None:
    now = [nn.Parameter(torch.tensor([3.0, -1.0])), nn.Parameter(torch.tensor([[2.0]]))]
    before = [torch.tensor([1.0, -1.0]), torch.tensor([[5.0]])]
    mu = 0.5
    value = mu / 2 * proximal(now, before)
    assert float(value.detach()) == 0.25 * (4 + 9)
    gradients = torch.autograd.grad(value, now)
    assert [g.flatten().tolist() for g in gradients] == [[mu * 2, 0], [mu * -3]]
    assert proximal(now, [parameter.detach() for parameter in now]).detach() == 0


def test_a_strong_pull_keeps_the_model_near_where_the_round_began(make: Make) -> None:
    moved = []
    for mu in (0.0, 100.0):
        body = restore_client(make(client=client(FedProxClient, mu=mu, epochs=4), server=FedAvg()), 0)
        before = parameters(body)
        fit(body, 1, 1)
        moved.append(float(proximal(list(body.parameters()), list(before.values())).detach()))
    assert moved[1] < 0.5 * moved[0]


def test_a_negative_mu_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.mu is -1, must be at least 0"):
        client(FedProxClient, mu=-1)


def test_joint_training_sees_every_image_and_every_class(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(JointClient), server=Isolated())
    everything = [part for one in federation.template.data.split.clients for part in one.tasks]
    wanted = sorted(index for part in everything for index in part.train.tolist())
    for index, task in ((0, 1), (2, 2)):
        body = restore_client(federation, index)
        body.begin_round(Round(task, task, False, 0))
        seen: list[int] = [i for batch in body.train_dataloader() for i in batch.images.indices.tolist()]
        assert sorted(seen) == wanted
        assert bool(body.seen_mask.all())
    body = restore_client(federation, 0)
    fit(body, 1, 1)
    head: Tensor = body.head.weight.detach().clone()
    fit(body, 1, 2)
    used = {label for part in everything for label in part.classes}
    assert all(bool((body.head.weight[label] != head[label]).any()) for label in used)
    wire.clear()
    assert all(result.bytes_up == result.bytes_down == {} for result in run(federation))
    assert [message for message, _ in wire if message.round > 0] == []
