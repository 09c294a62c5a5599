"""FedCODAPrompt: prefixes assembled for each image, which components have a part in them, and what is held."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CNN, VIT, copy_of, fit, make_client, output_of, parameters, restore_client, run, same
from test_fed_dualprompt import attention, begin, first_batch
from torch import Tensor

from fedlscl import seeds
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.messages import Download, Message
from fedlscl.methods.fed_codaprompt import FedCODAPromptClient, agreement, assembled, orthonormal, overlap
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.server import FedAvg

Make = Callable[..., Federation]
POOLS = ("components", "keys", "attention")


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0, "pool_size": 7, "length": 3}
    return make_client(FedCODAPromptClient, **{**own, **settings})


@pytest.fixture(scope="module")
def deep() -> FrozenViT:
    """A ViT of four blocks."""
    with seeds.seeded(0, "vit"):
        return FrozenViT(**{**VIT, "model_args": {**VIT["model_args"], "depth": 4}})


@pytest.fixture
def body(make: Make, deep: FrozenViT, long_data: FederatedDataModule) -> Any:
    """Client 0 of a federation of three tasks: two of the seven components are of each, the last is nobody's."""
    return restore_client(make(client=client(), server=FedAvg(), vit=deep, data=long_data), 0)


def some_images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


# ---- the sums


def test_agreement_is_the_cosine_under_attention() -> None:
    query, keys = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    weights = agreement(query, keys, torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    # (1, 0) beside (3, 4), and (2, 2) beside (0, 1)
    assert weights[0].tolist() == pytest.approx([0.6, 0.5**0.5], abs=1e-6)
    torch.testing.assert_close(agreement(5 * query, 2 * keys, torch.tensor([[1.0, 0.0], [2.0, 1.0]])), weights)


def test_a_prefix_is_the_weighted_sum() -> None:
    components = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 0.0], [0.0, 10.0]]])
    found = assembled(components, torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, 0.0]]))
    assert found.tolist() == [[[6, 2], [3, 9]], [[-1, -2], [-3, -4]], [[0, 0], [0, 0]]]


def test_the_penalty_is_how_far_rows_are_from_orthonormal() -> None:
    rows = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    # the first block's products are [[1, 1], [1, 2]], less I [[0, 1], [1, 1]]; the second's are I
    assert float(overlap(rows)) == 3 / 4
    with torch.autocast("cpu", torch.bfloat16):
        assert float(overlap(1.001 * rows[1:])) == pytest.approx((1.001**2 - 1) ** 2 / 2, rel=1e-2)
    assert float(overlap(orthonormal(3, 4, 2, 5).detach().flatten(2))) < 1e-10
    more = orthonormal(1, 6, 4).detach()[0]  # more rows than entries
    torch.testing.assert_close(more.mT @ more, torch.eye(4))


# ---- the model


@torch.no_grad()
def reference(body: Any, image: Tensor, count: int) -> Tensor:
    """Logits (K,) of one image under the first `count` components, written out."""
    vit: Any = body.vit.vit
    tokens = body.vit.lower(body.vit.prepare(image[None]), 0)[0]
    query = vit.norm(vit.blocks(tokens[None]))[0, 0]
    for number, block in enumerate(vit.blocks):
        prefix = torch.zeros_like(body.components[number, 0])
        for m in range(count):
            seen, key = query * body.attention[number, m], body.keys[number, m]
            prefix = prefix + (seen @ key / seen.norm() / key.norm()) * body.components[number, m]
        keys, values = prefix
        tokens = tokens + attention(block.attn, block.norm1(tokens), keys, values)
        tokens = tokens + block.mlp(block.norm2(tokens))
    logits: Tensor = body.head(vit.norm(tokens)[0])
    return logits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", [1, 3])
def test_every_image_passes_under_prefixes_of_its_own(body: Any, task: int, training: bool) -> None:
    assert body.components.shape == (4, 7, 2, 3, 2, 16)
    assert body.keys.shape == body.attention.shape == (4, 7, 32)
    with torch.no_grad():
        body.components.mul_(30)  # so that they are seen
    begin(body, task)
    body.train(training)
    images = some_images(5)
    found = output_of(body, images).logits
    wanted = torch.stack([reference(body, image, 2 * task) for image in images])
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-4)
    others = torch.stack([reference(body, image, 2 * task - 1) for image in images])
    assert not torch.allclose(wanted, others, atol=1e-3)


def test_a_client_that_was_absent_uses_what_it_received(body: Any) -> None:
    begin(body, 1)
    tensors = copy_of(body.shared())
    tensors["components"] = 30 * tensors["components"]
    body.download(Download.from_bytes(Download(0, 2, 2, 0, tensors).to_bytes(), body.download_schema()))
    body.load(copy_of(body.state()))
    body.eval()
    image = some_images(1)
    found = output_of(body, image).logits[0].detach()
    torch.testing.assert_close(found, reference(body, image[0], 4), rtol=1e-3, atol=1e-4)


# ---- training


def test_the_terms_and_what_they_move(body: Any) -> None:
    batch = first_batch(body, 2)
    with torch.no_grad():
        body.keys.mul_(2)  # of norm 2: (2^2 - 1)^2 on the diagonal of 4 x 4 products, in four blocks
    terms = body.losses(batch)
    assert float(terms["orthogonality"].detach()) == pytest.approx(0.1 * 4 * 9 / 4, rel=1e-4)
    pools = [getattr(body, name) for name in POOLS]
    by_entropy = torch.autograd.grad(terms["cross_entropy"], pools, retain_graph=True)
    (by_penalty,) = torch.autograd.grad(terms["orthogonality"], [body.keys])
    for gradient in (*by_entropy, by_penalty):
        assert bool(gradient[:, 2:4].flatten(2).any(dim=2).all())
        assert not gradient[:, :2].any()
        assert not gradient[:, 4:].any()


def test_a_fit_moves_the_task_s_part_and_nothing_of_the_vit(body: Any) -> None:
    vit = copy_of(body.vit.state_dict())
    for task, part in ((1, slice(0, 2)), (2, slice(2, 4))):
        before = parameters(body)
        fit(body, task, task)
        after = parameters(body)
        for name in POOLS:
            moved = (after[name] != before[name]).flatten(2).any(dim=2)
            wanted = torch.zeros(4, 7, dtype=torch.bool)
            wanted[:, part] = True
            assert torch.equal(moved, wanted)
    assert same(copy_of(body.vit.state_dict()), vit)


def test_a_federation_averages_and_holds_finished_tasks(
    make: Make, deep: FrozenViT, wire: list[tuple[Message, bytes]]
) -> None:
    federation = make(client=client(pool_size=4), server=FedAvg(), vit=deep, clients_per_round=2)
    run(federation)
    first, second = (m.tensors for m, _ in wire if isinstance(m, Download) and m.client == 0 and m.round)
    start = federation.template.common_start
    for name in POOLS:
        assert torch.equal(first[name][:, 2:], start[name][:, 2:])
        assert torch.equal(second[name][:, :2], first[name][:, :2])
        assert not torch.equal(second[name][:, 2:], first[name][:, 2:])
    for index in range(3):
        assert same(copy_of(restore_client(federation, index).shared()), dict(second))


# ---- settings and what travels


def test_a_message_has_the_bytes_of_the_formula() -> None:
    vit: Any = SimpleNamespace(width=768, heads=12, depth=12)
    body = FedCODAPromptClient(continual=NoReplay())
    body.assemble(vit, SmallModelSpec(), "resnet18", 100)
    assert sum(tensor.nbytes for tensor in body.outgoing().values()) == 15_667_600
    assert body.blocks == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_size": 0}, r"model\.pool_size is 0, must be at least 1"),
        ({"length": 0}, r"model\.length is 0, must be at least 1"),
        ({"orthogonality": -1.0}, r"model\.orthogonality is -1\.0, must be at least 0"),
        ({"blocks": [4]}, r"model\.blocks holds 4, but the ViT has the blocks 0 to 3"),
        ({"blocks": []}, r"model\.blocks is \[\], must name one block or more, each once"),
        ({"blocks": [1, 1]}, r"model\.blocks is \[1, 1\], must name one block or more, each once"),
        ({"continual": Replay()}, r"model\.continual is Replay, must be NoReplay for FedCODAPromptClient"),
    ],
)
def test_wrong_settings_are_named(deep: FrozenViT, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client(**settings).assemble(deep, SmallModelSpec(**CNN), "resnet18", 5)


def test_more_tasks_than_components_are_refused_before_training(make: Make, deep: FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"model\.pool_size is 1, must be at least the number of tasks, 2"):
        make(client=client(pool_size=1), server=FedAvg(), vit=deep)
