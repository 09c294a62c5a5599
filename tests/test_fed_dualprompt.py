"""FedDualPrompt: prefixes in the blocks, the slot of each task and image, and how a slot begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import CNN, VIT, copy_of, fit, make_client, output_of, parameters, restore_client, run, same
from torch import Tensor

from fedlscl import seeds
from fedlscl.continual import NoReplay
from fedlscl.data.local import LocalData
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Download, Message
from fedlscl.methods.fed_dualprompt import FedDualPromptClient, blocks_of, legacy_reshape
from fedlscl.methods.fed_l2p import similarities
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import FedAvg, Isolated

Make = Callable[..., Federation]
SMALL = {"pool_size": 4, "length": 3, "general_length": 2}


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0, "gradient_clip": 1.0}
    return make_client(FedDualPromptClient, **{**own, **SMALL, **settings})


@pytest.fixture(scope="module")
def deep() -> FrozenViT:
    """A ViT of four blocks."""
    with seeds.seeded(0, "vit"):
        return FrozenViT(**{**VIT, "model_args": {**VIT["model_args"], "depth": 4}})


@pytest.fixture
def body(make: Make, deep: FrozenViT) -> Any:
    """Client 0, which has learned nothing yet."""
    return restore_client(make(client=client(), server=FedAvg(), vit=deep), 0)


def some_images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def begin(body: Any, task: int, round: int = 1) -> None:
    body.begin_round(Round(task, round, False, 0))


def answer(body: Any, task: int, **changed: Tensor) -> None:
    """Send a client a model of a task: its own but for some tensors."""
    tensors = {**copy_of(body.shared()), **changed}
    body.download(Download.from_bytes(Download(0, task, task, 0, tensors).to_bytes(), body.download_schema()))


# ---- the model


def attention(module: Any, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What N tokens (N, d) make of themselves and of further keys and values (L, heads, size), head by head."""
    q, k, v = module.qkv(tokens).view(len(tokens), 3, *keys.shape[1:]).unbind(1)
    of_heads = []
    for head in range(keys.shape[1]):
        weights = q[:, head] @ torch.cat([keys[:, head], k[:, head]]).T / math.sqrt(keys.shape[2])
        of_heads.append(weights.softmax(dim=1) @ torch.cat([values[:, head], v[:, head]]))
    attended: Tensor = module.proj(torch.cat(of_heads, dim=1))
    return attended


def reference(body: Any, image: Tensor, slot: int | None = None) -> Tensor:
    """Logits (K,) of one image under the default blocks of a ViT of four, written out."""
    vit: Any = body.vit.vit
    tokens = body.vit.lower(body.vit.prepare(image[None]), 0)[0]
    if slot is None:
        query = vit.norm(vit.blocks(tokens[None]))[0, 0]
        cosines = [float(query @ key / query.norm() / key.norm()) for key in body.keys.detach()]
        slot = cosines.index(max(cosines))
    prefixes = [body.general[0], body.general[1], body.experts[0, :, slot], body.experts[1, :, slot]]
    for block, (keys, values) in zip(vit.blocks, prefixes, strict=True):
        tokens = tokens + attention(block.attn, block.norm1(tokens), keys, values)
        tokens = tokens + block.mlp(block.norm2(tokens))
    logits: Tensor = body.head(vit.norm(tokens)[0])
    return logits.detach()


def test_in_tests_every_image_passes_under_the_prefixes_of_the_best_key(body: Any) -> None:
    assert body.general.shape == (2, 2, 2, 2, 16)
    assert body.experts.shape == (2, 2, 4, 3, 2, 16)
    body.eval()
    images = some_images(6)
    found = output_of(body, images).logits
    wanted = torch.stack([reference(body, image) for image in images])
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)
    slots = body.choose(similarities(body.vit(images), body.keys))
    assert slots.shape == (6, 1)
    assert len(slots.unique()) > 1  # or else the images could not differ in their choice


@pytest.mark.parametrize("task", [1, 3])
def test_in_training_the_slot_is_that_of_the_task(body: Any, long_data: FederatedDataModule, task: int) -> None:
    body.data = LocalData(long_data, 0)
    begin(body, task)
    images = some_images(3)
    found = output_of(body, images).logits
    wanted = torch.stack([reference(body, image, slot=task - 1) for image in images])
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_the_number_of_tokens_stays(body: Any) -> None:
    seen: list[int] = []
    handles = [b.register_forward_hook(lambda _, i, o: seen.append(o.shape[1])) for b in body.vit.vit.blocks]
    frozen = body.precompute(some_images(2))
    seen.clear()
    body.eval()
    body(some_images(2), frozen)
    for handle in handles:
        handle.remove()
    assert seen == [5] * 3  # of the last block the class token alone is asked for


def test_prefixes_of_no_length_leave_the_plain_vit(make: Make, deep: FrozenViT) -> None:
    federation = make(client=client(length=0, general_length=0), server=FedAvg(), vit=deep)
    assert all(result.skipped == {} for result in run(federation))
    body = restore_client(federation, 0)
    body.eval()
    images = some_images(4)
    output = output_of(body, images)
    assert torch.equal(output.representation, deep(images))
    assert torch.equal(output.logits, body.head(deep(images)))


def test_the_query_is_the_feature_of_the_plain_vit_whatever_is_trained(body: Any) -> None:
    images = some_images(4)
    before = body.precompute(images)
    assert torch.equal(before["query"], body.vit(images))
    fit(body, 1, 1)
    assert same(body.precompute(images), before)


def test_blocks_below_the_first_adapted_one_are_computed_once(make: Make, deep: FrozenViT) -> None:
    whole = restore_client(make(client=client(general_length=0), server=FedAvg(), vit=deep), 0)
    part = restore_client(make(client=client(general_blocks=[], expert_blocks=[2, 3]), server=FedAvg(), vit=deep), 0)
    images = some_images(4)
    for one in (whole, part):
        one.eval()
    with torch.no_grad():
        for name in ("experts", "keys"):
            getattr(part, name).copy_(getattr(whole, name))
        part.head.load_state_dict(whole.head.state_dict())
    torch.testing.assert_close(part.precompute(images)["tokens"], deep.lower(deep.prepare(images), 2))
    torch.testing.assert_close(output_of(part, images).logits, output_of(whole, images).logits, rtol=1e-4, atol=1e-5)


# ---- the ports' mistake


@pytest.mark.parametrize("batch", [4, 5])
def test_the_legacy_reshape_gives_one_half_keys_and_the_other_values(batch: int) -> None:
    keys, values = torch.full((3, 2, 2, 4), 1.0), torch.full((3, 2, 2, 4), 2.0)  # (L, heads, size) behind E = 3
    chosen = torch.stack([keys, values], dim=1).unsqueeze(2).expand(-1, -1, batch, -1, -1, -1)  # one slot for all
    mixed = legacy_reshape(chosen)
    right = chosen.transpose(1, 2)
    assert mixed.shape == right.shape == (3, batch, 2, 2, 2, 4)
    for b in range(batch):
        assert [right[:, b, n].unique().tolist() for n in (0, 1)] == [[1.0], [2.0]]
        found = [mixed[:, b, n].unique().tolist() for n in (0, 1)]
        if b < batch // 2:
            assert found == [[1.0], [1.0]]
        elif b >= (batch + 1) // 2:
            assert found == [[2.0], [2.0]]
        else:  # the one in the middle of an odd batch
            assert found == [[1.0], [2.0]]


def test_the_legacy_reshape_mixes_the_choices_of_a_batch() -> None:
    chosen = torch.tensor([[[10, 11, 12], [20, 21, 22]]])  # keys of images 0 to 2, then their values
    assert legacy_reshape(chosen).tolist() == [[[10, 11], [12, 20], [21, 22]]]
    assert chosen.transpose(1, 2).tolist() == [[[10, 20], [11, 21], [12, 22]]]


def test_the_legacy_setting_trains_with_keys_or_values_alone(make: Make, deep: FrozenViT) -> None:
    body = restore_client(make(client=client(legacy_reshape=True), server=FedAvg(), vit=deep), 0)
    right = restore_client(make(client=client(), server=FedAvg(), vit=deep), 0)
    images = some_images(6)
    for one in (body, right):
        begin(one, 1)
    found, proper = output_of(body, images).logits.detach(), output_of(right, images).logits.detach()
    assert not torch.allclose(found, proper, atol=1e-4)
    for half, kept in ((slice(0, 3), 0), (slice(3, 6), 1)):
        with torch.no_grad():
            right.experts.copy_(body.experts[:, kept : kept + 1].expand_as(right.experts))
        wanted = output_of(right, images[half]).logits.detach()
        torch.testing.assert_close(found[half], wanted, rtol=1e-4, atol=1e-5)


# ---- the objective


def first_batch(body: Any, task: int) -> Any:
    begin(body, task)
    body.on_train_start()
    return next(iter(body.train_dataloader()))


@torch.no_grad()
def test_the_terms_of_the_objective(make: Make, deep: FrozenViT) -> None:
    body = restore_client(make(client=client(pull=0.3), server=FedAvg(), vit=deep), 0)
    body.memory.begun = 1
    batch = first_batch(body, 2)
    terms = body.losses(batch)
    assert set(terms) == {"cross_entropy", "pull"}
    classes = list(body.data.tasks[1].classes)
    logits, query = output_of(body, batch.images.pixels).logits, body.vit(batch.images.pixels)
    entropy = pull = 0.0
    for z, y, q in zip(logits, batch.images.labels, query, strict=True):
        entropy += float(z[classes].logsumexp(0) - z[y])
        pull -= 0.3 * float(q @ body.keys[1] / q.norm() / body.keys[1].norm())
    assert float(terms["cross_entropy"]) == pytest.approx(entropy / len(logits), rel=1e-5)
    assert float(terms["pull"]) == pytest.approx(pull / len(logits), rel=1e-4)


def test_only_the_slot_of_the_task_is_trained(body: Any) -> None:
    batch = first_batch(body, 1)
    terms = body.losses(batch)
    (gradient,) = torch.autograd.grad(terms["pull"], [body.keys], retain_graph=True)
    everything = dict(body.named_parameters())
    by_entropy = torch.autograd.grad(terms["cross_entropy"], list(everything.values()), allow_unused=True)
    found = dict(zip(everything, by_entropy, strict=True))
    assert found["keys"] is None
    assert bool(gradient[0].any())
    assert not gradient[1:].any()
    assert bool(found["general"].flatten(2).any(dim=2).all())
    assert bool(found["experts"][:, :, 0].flatten(2).any(dim=2).all())
    assert not found["experts"][:, :, 1:].any()

    before = parameters(body)
    fit(body, 1, 1)
    after = parameters(body)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(after["experts"][:, :, 1:], before["experts"][:, :, 1:])
    assert torch.equal(after["keys"][1:], before["keys"][1:])


def test_the_key_of_a_task_approaches_its_queries(make: Make, deep: FrozenViT) -> None:
    body = restore_client(make(client=client(epochs=5), server=FedAvg(), vit=deep), 0)
    begin(body, 1)
    query = body.vit(body.data.batch("train", body.current)[0])
    before = similarities(query, body.keys.detach())
    fit(body, 1, 1)
    after = similarities(query, body.keys.detach())
    assert float(after[:, 0].mean()) > float(before[:, 0].mean()) + 0.01
    assert torch.equal(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_moves_what_is_trained_and_not_the_vit(body: Any, precision: Any) -> None:
    before, vit = parameters(body), copy_of(body.vit.state_dict())
    begin(body, 1)
    trainer = RoundTrainer("cpu", precision)
    trainer.fit(body)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in parameters(body).items())
    assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in body.state_dict().values())
    assert same(copy_of(body.vit.state_dict()), vit)
    body.begin_evaluation(1)
    trainer.test(body, verbose=False)
    assert 0 <= body.accuracy.compute()["task"][0] <= 100


def test_a_step_is_clipped() -> None:
    file = Path(__file__).parent.parent / "experiments" / "methods" / "fed_dualprompt.yaml"
    settings = yaml.safe_load(file.read_text())["model"]["init_args"]
    assert (settings["gradient_clip"], settings["train_mask"]) == (1.0, "task")


# ---- from task to task


def test_a_slot_begins_as_a_copy_of_the_one_before_and_its_key_as_drawn(body: Any) -> None:
    fit(body, 1, 1)
    before = parameters(body)
    begin(body, 2, 2)
    wanted = before["experts"].clone()
    wanted[:, :, 1] = wanted[:, :, 0]
    after = parameters(body)
    assert torch.equal(after.pop("experts"), wanted)
    assert same(after, {name: tensor for name, tensor in before.items() if name != "experts"})


def test_a_slot_is_copied_once_a_task(body: Any) -> None:
    begin(body, 1, 1)
    begin(body, 2, 2)
    with torch.no_grad():
        body.experts[:, :, 1] = 7.0  # as if trained
    body.load(copy_of(body.state()))
    begin(body, 2, 3)
    assert bool((body.experts[:, :, 1] == 7).all())


def test_who_was_absent_when_a_task_began_takes_the_slot_as_others_trained_it(body: Any) -> None:
    begin(body, 1, 1)
    answer(body, 1)
    trained = body.experts.detach().clone()
    trained[:, :, 1] = 7.0
    answer(body, 2, experts=trained)
    body.load(copy_of(body.state()))
    begin(body, 2, 3)
    assert torch.equal(body.experts.detach(), trained)


def test_who_was_never_there_copies_within_what_it_received(body: Any, long_data: FederatedDataModule) -> None:
    body.data = LocalData(long_data, 0)
    trained = body.experts.detach().clone()
    trained[:, :, 1] = 7.0
    answer(body, 2, experts=trained)
    begin(body, 3, 3)
    trained[:, :, 2] = 7.0
    assert torch.equal(body.experts.detach(), trained)


def test_without_a_server_missed_slots_are_copies_too(
    make: Make, deep: FrozenViT, long_data: FederatedDataModule
) -> None:
    body = restore_client(make(client=client(), server=Isolated(), vit=deep, data=long_data), 0)
    fit(body, 1, 1)
    before = body.experts.detach().clone()
    begin(body, 3, 3)
    before[:, :, 1:3] = before[:, :, :1]
    assert torch.equal(body.experts.detach(), before)


def test_all_clients_begin_each_fit_alike(
    make: Make,
    deep: FrozenViT,
    long_data: FederatedDataModule,
    wire: list[tuple[Message, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with absent clients: from what was received last, in a task's first round with the slot copied."""
    begun: dict[tuple[int, int], dict[str, Tensor]] = {}

    def spy(self: Any) -> None:
        begun[self.round.number, self.index] = parameters(self)
        start(self)

    start = FedDualPromptClient.on_train_start
    monkeypatch.setattr(FedDualPromptClient, "on_train_start", spy)
    federation = make(client=client(), server=FedAvg(), vit=deep, data=long_data, rounds=2, clients_per_round=2, seed=3)
    handout = copy_of(federation.template.common_start)
    run(federation)
    received = {m.round: m.tensors for m, _ in wire if isinstance(m, Download) and m.client == 0 and m.round}
    first_visits = {index: min(number for number, other in begun if other == index) for _, index in begun}
    assert sorted(number for number, _ in begun) == [n for n in range(1, 7) for _ in range(2)]
    assert max(first_visits.values()) > 1  # somebody came late
    for (number, _), tensors in begun.items():
        wanted = copy_of(received.get(number - 1, handout))
        task = (number + 1) // 2
        if number % 2 and task > 1:
            wanted["experts"][:, :, task - 1] = wanted["experts"][:, :, task - 2]
        assert same(tensors, wanted)
    for number in range(3, 7):  # slots of finished tasks, and of those to come, stay as they are
        task = (number + 1) // 2
        for name, dimension in (("experts", 2), ("keys", 0)):
            others = torch.tensor([slot for slot in range(4) if slot != task - 1])
            now, then = (received[r][name].index_select(dimension, others) for r in (number, number - 1))
            assert torch.equal(now, then)
            assert not torch.equal(received[number][name], received[number - 1][name])


def test_more_tasks_than_slots_are_refused_before_training(make: Make, deep: FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"model\.pool_size is 1, must be at least the number of tasks, 2"):
        make(client=client(pool_size=1), server=FedAvg(), vit=deep)
    restore_client(make(client=client(pool_size=2), server=FedAvg(), vit=deep), 0)


# ---- settings and what travels


@pytest.mark.parametrize(("classes", "length", "wanted"), [(100, 5, 1_321_360), (200, 20, 4_393_760)])
def test_a_message_has_the_bytes_of_the_formula(classes: int, length: int, wanted: int) -> None:
    vit: Any = SimpleNamespace(width=768, heads=12, depth=12)
    body = FedDualPromptClient(length=length, continual=NoReplay())
    body.assemble(vit, SmallModelSpec(), "resnet18", classes)
    assert sum(tensor.nbytes for tensor in body.outgoing().values()) == wanted
    assert body.upload_schema() == body.download_schema()
    assert body.blocks == [0, 1, 2, 3, 4]
    for tensor in (body.general.detach(), body.experts.detach(), body.keys.detach()):
        assert -1 <= float(tensor.min()) < -0.99
        assert 0.99 < float(tensor.max()) <= 1


def test_the_published_blocks_as_far_as_there_are_any() -> None:
    assert blocks_of("expert_blocks", None, (2, 3, 4), 12) == [2, 3, 4]
    assert blocks_of("expert_blocks", None, (2, 3, 4), 4) == [2, 3]
    assert blocks_of("expert_blocks", None, (2, 3, 4), 2) == []
    assert blocks_of("expert_blocks", [1], (2, 3, 4), 2) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": -1}, r"model\.length is -1, must be at least 0"),
        ({"general_length": -1}, r"model\.general_length is -1, must be at least 0"),
        ({"pool_size": 0}, r"model\.pool_size is 0, must be at least 1"),
        ({"pull": -1.0}, r"model\.pull is -1\.0, must be at least 0"),
        ({"expert_blocks": [2, 4]}, r"model\.expert_blocks holds 4, but the ViT has the blocks 0 to 3"),
        ({"general_blocks": [-1]}, r"model\.general_blocks holds -1, but the ViT has the blocks 0 to 3"),
        ({"expert_blocks": []}, r"model\.expert_blocks is \[\] for a ViT of 4 blocks, must name one or more"),
        (
            {"expert_blocks": [1, 2]},
            r"expert_blocks is \[1, 2\] and model\.general_blocks \[0, 1\], but a block can take one prefix",
        ),
        ({"expert_blocks": [2, 2]}, r"expert_blocks is \[2, 2\] and .* a block can take one prefix"),
    ],
)
def test_wrong_settings_are_named(deep: FrozenViT, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client(**settings).assemble(deep, SmallModelSpec(**CNN), "resnet18", 5)


def test_a_vit_of_two_blocks_needs_blocks_of_its_own(vit: FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"model\.expert_blocks is \[\] for a ViT of 2 blocks"):
        client().assemble(vit, SmallModelSpec(**CNN), "resnet18", 5)
    body = client(general_blocks=[0], expert_blocks=[1]).assemble(vit, SmallModelSpec(**CNN), "resnet18", 5)
    assert (len(body.general), len(body.experts)) == (1, 1)
