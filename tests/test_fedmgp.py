"""FedMGP: two phases, a slot for each class, a head for each task, and prompts fused on surrogate images."""

from __future__ import annotations

from collections.abc import Callable
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
    make_federation,
    make_trainer,
    outcome,
    restore_client,
    run,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor

from fedlscl import seeds
from fedlscl.batches import Batch, Images
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.fedmgp.client import FedMGPClient, nearest
from fedlscl.methods.fedmgp.fits import consensus, distances
from fedlscl.methods.fedmgp.server import FedMGPServer
from fedlscl.models.adapters import Prefixes
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg

Make = Callable[..., Federation]
Wire = list[tuple[Message, bytes]]
LOCAL = {"slots", "slot_keys", "local_head.0.weight", "local_head.0.bias", "local_head.2.weight", "local_head.2.bias"}


def client(**changes: Any) -> Any:
    """With the second of the two blocks adapted."""
    own = {"continual": NoReplay(), "train_mask": "task", "length": 3, "local_length": 2, "blocks": (1,), "hidden": 8}
    return make_client(FedMGPClient, **{**own, **changes})


def server(**changes: Any) -> FedMGPServer:
    return FedMGPServer(**{"surrogates": 2, "epochs": 1, "batch_size": 5, **changes})


def assembled(vit: Any, classes: int = 8, **changes: Any) -> Any:
    with seeds.seeded(0, "client"):
        return client(**changes).assemble(vit, SmallModelSpec(**CNN), "resnet18", classes)


@pytest.fixture
def body(make: Make) -> Any:
    """Client 0, which has learned nothing yet."""
    return restore_client(make(client=client(), server=server()), 0)


def classes_of(body: Any, task: int) -> list[int]:
    return sorted(body.data.tasks[task - 1].classes)


def first_batch(body: Any, phase: str, task: int = 1) -> Batch:
    """Two images of each class of the task, after `begin_round`."""
    part = body.data.tasks[task - 1]
    held = torch.as_tensor(part.train)
    labels = body.data.labels(held)
    chosen = torch.cat([held[labels == c][:2] for c in part.classes])
    pixels, wanted = body.data.batch("train", chosen)
    return Batch(phase, Images(chosen.numpy(), pixels, wanted), {}, torch.zeros(len(wanted)))


def pixels_of(count: int = 4) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def literal(body: Any, image: Tensor, slot: int | None = None) -> Tensor:
    """All tokens (T + L, d) that leave the ViT for one image, straight from its parts; the prefix of a slot or none."""
    model: Any = body.vit.vit
    tokens = model._pos_embed(model.patch_embed(body.vit.prepare(image.unsqueeze(0))))
    prompt = body.prompt + model.pos_embed[:, :1]
    tokens = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)
    for number, block in enumerate(model.blocks):
        if slot is not None and number in body.adapted:
            prefix = body.slots[slot, body.adapted.index(number)]
            with Prefixes(number, prefix.unsqueeze(0)).into(block):
                tokens = block(tokens)
        else:
            tokens = block(tokens)
    return model.norm(tokens)[0]  # type: ignore[no-any-return]


def feature(body: Any, image: Tensor, slot: int | None = None) -> Tensor:
    return literal(body, image, slot)[1 : 1 + body.length].mean(dim=0)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other) / (one.norm() * other.norm())


# ---- sizes


@pytest.mark.parametrize(("classes", "size"), [(100, 1_780_112), (200, 1_985_312)])
def test_messages_and_slots_have_the_published_sizes(classes: int, size: int) -> None:
    base = SimpleNamespace(width=768, heads=12, depth=12)
    with torch.device("meta"):
        body = make_client(FedMGPClient, continual=NoReplay(), train_mask="task").assemble(
            base,  # type: ignore[arg-type]
            SmallModelSpec(**CNN),
            "resnet18",
            classes,
        )
    assert isinstance(body, FedMGPClient)
    sent = body.outgoing()
    coarse = {name: tensor.nbytes for name, tensor in sent.items() if not name.startswith("global_head.")}
    assert coarse == {"prompt": 46_080, "key": 3_072}
    assert sum(tensor.nbytes for tensor in sent.values()) == 49_152 + size
    assert sum(spec.max_bytes for spec in body.upload_schema().values()) == 49_152 + size
    required = [spec.max_bytes for spec in body.download_schema().values() if not spec.optional]
    assert sum(required) == 49_152
    assert body.slots.shape == (classes, 3, 2, 15, 12, 64)
    assert body.slots.numel() + body.slot_keys.numel() == {100: 6_988_800, 200: 13_977_600}[classes]


def test_nothing_local_travels(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=server(), rounds=1)
    run(federation)
    private = {}
    for index in range(3):
        body = restore_client(federation, index)
        assert set(body.outgoing()) == set(dict(body.named_parameters())) - LOCAL
        own = {name: t for name, t in copy_of(body.state_dict()).items() if name in LOCAL}
        kept = {f"finished.{name}": t for one in body.memory.archive.values() for name, t in one.items()}
        assert set(own) == LOCAL
        assert len(kept) == 4
        private |= {(index, name): t.numpy().tobytes() for name, t in {**own, **kept}.items()}
    everything = b"".join(data for _, data in wire)
    assert [name for name, value in private.items() if value in everything] == []


def test_heads_may_be_linear(vit: FrozenViT) -> None:
    body = assembled(vit, hidden=0)
    assert {name for name in body.outgoing() if "head" in name} == {"global_head.weight", "global_head.bias"}
    assert body(pixels_of(), {}).logits.shape == (4, 8)


def test_blocks_that_the_vit_lacks_are_left_out(vit: FrozenViT) -> None:
    assert assembled(vit, blocks=(1, 2, 7)).adapted == [1]
    assert assembled(vit, blocks=(1, 0)).slots.shape == (8, 2, 2, 2, 2, 16)
    with pytest.raises(ValueError, match=r"model\.blocks is \[2, 3, 4\], but the backbone has blocks 0 to 1"):
        assembled(vit, blocks=(2, 3, 4))


# ---- the two passes


def test_the_features_are_those_of_the_formula(vit: FrozenViT) -> None:
    body, images = assembled(vit, blocks=(1, 0)), pixels_of()
    tokens = body.precompute(images)["tokens"]
    entering = body.entering(tokens, body.prompt)
    encoded = body.vit.encode(entering, 0)
    torch.testing.assert_close(encoded, torch.stack([literal(body, image) for image in images]))
    coarse = torch.stack([feature(body, image) for image in images])
    torch.testing.assert_close(body.pooled(entering), coarse)
    slots = [5, 0, 5, 7]
    fine = torch.stack([feature(body, image, slot) for image, slot in zip(images, slots, strict=True)])
    torch.testing.assert_close(body.prefixed(entering, torch.tensor(slots)), fine)
    assert float((coarse - fine).detach().abs().min()) > 0


def test_the_query_of_the_global_key_is_the_plain_feature(vit: FrozenViT) -> None:
    body, images = assembled(vit), pixels_of()
    torch.testing.assert_close(body.precompute(images)["query"], vit(images))


def test_nothing_computed_before_gives_the_same(vit: FrozenViT) -> None:
    body, images = assembled(vit), pixels_of()
    torch.testing.assert_close(body(images, {}).logits, body(images, body.precompute(images)).logits)


def test_the_nearest_key_is_that_of_the_largest_cosine_among_the_learned() -> None:
    keys = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 0.1], [-1.0, 0.0]])
    query = torch.tensor([[1.0, 0.9], [0.2, 1.0], [-3.0, 0.1], [3.0, 0.1]])
    assert nearest(query, keys, torch.ones(4, dtype=torch.bool)).tolist() == [1, 2, 3, 0]
    assert nearest(query, keys, torch.tensor([True, False, True, False])).tolist() == [0, 2, 2, 0]
    assert nearest(query, keys, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_in_tests_each_image_takes_the_slot_of_the_nearest_key(vit: FrozenViT) -> None:
    body, images = assembled(vit), pixels_of(6)
    coarse = torch.stack([feature(body, image) for image in images]).detach()
    with torch.no_grad():
        body.slot_keys[[2, 4]] = coarse[[0, 3]]  # the keys of two images
        body.slot_keys[6] = coarse[1]  # not learned
        body.slots.mul_(3.0)  # so that the choice matters
    body.owner[[2, 4, 5]] = 1
    learned = [2, 4, 5]
    wanted = [max(learned, key=lambda c: float(cosine(f, body.slot_keys.detach()[c]))) for f in coarse]
    assert (wanted[0], wanted[3]) == (2, 4)
    fine = torch.stack([feature(body, image, slot) for image, slot in zip(images, wanted, strict=True)])
    output = body(images, {})
    torch.testing.assert_close(output.representation, fine)
    torch.testing.assert_close(output.logits, body.local_head(fine))
    torch.testing.assert_close(output.logits[1:2], body(images[1:2], {}).logits)  # whatever else is in the batch


# ---- training


def test_the_phases_come_one_after_the_other(make: Make) -> None:
    body = restore_client(make(client=client(epochs=3), server=server()), 0)
    body.begin_round(Round(1, 1, False, 0))
    phases = [phase for phase, _ in body.plan]
    count = len(body.current)
    assert phases == sorted(phases)  # global, local
    for phase in ("global", "local"):
        samples = torch.cat([part for name, part in body.plan if name == phase]).tolist()
        assert len(samples) == 3 * count
        for epoch in range(3):
            assert sorted(samples[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize("phase", ["global", "local"])
def test_a_phase_moves_its_own_tensors_and_no_others(body: Any, phase: str) -> None:
    body.begin_round(Round(1, 1, False, 0))
    batch = first_batch(body, phase)
    torch.stack(list(body.losses(batch).values())).sum().backward()
    moved = {name for name, parameter in body.named_parameters() if parameter.grad is not None}
    names = set(dict(body.named_parameters()))
    assert moved == (LOCAL if phase == "local" else names - LOCAL)
    assert all(bool(parameter.grad.any()) for _, parameter in body.named_parameters() if parameter.grad is not None)


def test_the_terms_of_the_global_phase(body: Any) -> None:
    body.begin_round(Round(1, 1, False, 0))
    batch = first_batch(body, "global")
    terms = body.losses(batch)
    assert set(terms) == {"cross_entropy", "pull"}
    classes = classes_of(body, 1)
    wanted = [], []  # type: ignore[var-annotated]
    for image, label in zip(batch.images.pixels, batch.images.labels.tolist(), strict=True):
        logits = body.global_head(feature(body, image))[classes]
        wanted[0].append(-logits.log_softmax(0)[classes.index(label)])
        wanted[1].append(-0.1 * cosine(body.vit(image.unsqueeze(0))[0], body.key[0]))
    torch.testing.assert_close(terms["cross_entropy"], torch.stack(wanted[0]).mean())
    torch.testing.assert_close(terms["pull"], torch.stack(wanted[1]).mean())


def test_in_the_local_phase_the_slot_is_the_labels(body: Any) -> None:
    body.begin_round(Round(1, 1, False, 0))
    batch, classes = first_batch(body, "local"), classes_of(body, 1)
    terms = body.losses(batch)
    wanted = [], []  # type: ignore[var-annotated]
    for image, label in zip(batch.images.pixels, batch.images.labels.tolist(), strict=True):
        logits = body.local_head(feature(body, image, label))[classes]
        wanted[0].append(-logits.log_softmax(0)[classes.index(label)])
        wanted[1].append(-0.1 * cosine(feature(body, image), body.slot_keys[label]))
    torch.testing.assert_close(terms["cross_entropy"], torch.stack(wanted[0]).mean())
    torch.testing.assert_close(terms["pull"], torch.stack(wanted[1]).mean())
    one = first_batch(body, "local")
    only = one.images.labels == classes[0]
    images = Images(one.images.indices[only.numpy()], one.images.pixels[only], one.images.labels[only])
    torch.stack(list(body.losses(one._replace(images=images)).values())).sum().backward()
    for tensor in (body.slots, body.slot_keys):
        rows = tensor.grad.flatten(1).any(dim=1)
        assert rows.nonzero().flatten().tolist() == [classes[0]]


def test_slots_of_other_classes_stay_to_the_last_bit(body: Any) -> None:
    before = copy_of(dict(body.named_parameters()))
    fit(body, 1, 1)
    fit(body, 2, 2)
    for name in ("slots", "slot_keys"):
        moved = (getattr(body, name).detach() != before[name]).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert moved == sorted([*classes_of(body, 1), *classes_of(body, 2)])


def test_finished_tasks_keep_their_slots_and_heads(body: Any) -> None:
    fit(body, 1, 1)
    first = copy_of(dict(body.named_parameters()))
    fit(body, 2, 2)
    for name in ("slots", "slot_keys"):
        assert torch.equal(getattr(body, name)[classes_of(body, 1)], first[name][classes_of(body, 1)])
    head = {name.removeprefix("local_head."): t for name, t in first.items() if name.startswith("local_head.")}
    assert list(body.memory.archive) == [1]
    assert same(body.memory.archive[1], head)


def test_a_round_under_bf16_is_finite(body: Any) -> None:
    body.begin_round(Round(1, 1, False, 0))
    trainer = RoundTrainer("cpu", precision="bf16-mixed")
    trainer.fit(body)
    body.begin_evaluation(1)
    trainer.test(body, verbose=False)
    assert all(bool(tensor.isfinite().all()) for tensor in body.state_dict().values())
    assert float(body.accuracy.tested.sum()) > 0


# ---- from task to task


def logits_of(body: Any, task: int, tasks: int, told: int | None = None) -> Tensor:
    """Test logits of a task's images after `tasks` tasks; the client is told another task if `told` says so."""
    body.begin_evaluation(tasks)
    body.on_test_start()
    part = torch.as_tensor(body.data.tasks[task - 1].test)
    pixels, labels = body.data.batch("test", part)
    numbers = torch.full_like(labels, (told or task) - 1)
    with torch.no_grad():
        logits: Tensor = body.test_logits(Images(part.numpy(), pixels, labels), numbers)
    return logits


def test_each_class_is_judged_by_the_head_of_its_task(body: Any) -> None:
    fit(body, 1, 1)
    fit(body, 2, 2)
    first, second = classes_of(body, 1), classes_of(body, 2)
    before = logits_of(body, 1, 2)
    assert before[:, first + second].isfinite().all()
    others = [c for c in range(body.num_classes) if c not in first + second]
    assert others
    assert torch.isneginf(before[:, others]).all()
    with torch.no_grad():
        body.local_head[2].bias += 1.0
        after = logits_of(body, 1, 2)
        torch.testing.assert_close(after[:, second], before[:, second] + 1)
        assert torch.equal(after[:, first], before[:, first])
        body.memory.archive[1]["2.bias"] += 2.0
        after = logits_of(body, 1, 2)
        torch.testing.assert_close(after[:, first], before[:, first] + 2)


def test_the_task_of_an_image_decides_nothing(body: Any) -> None:
    fit(body, 1, 1)
    fit(body, 2, 2)
    assert torch.equal(logits_of(body, 1, 2), logits_of(body, 1, 2, told=2))
    assert FedMGPClient.task_aware == ("task",)


def test_every_task_and_client_begins_with_a_head_of_its_own(make: Make) -> None:
    federation, found = make(client=client(), server=server()), []
    for index in (0, 1):
        body = restore_client(federation, index)
        body.begin_round(Round(1, 1, False, 0))
        found.append(body.local_head[0].weight.detach().clone())
        body.begin_round(Round(1, 2, False, 0))
        assert torch.equal(body.local_head[0].weight, found[-1])
        body.begin_round(Round(2, 3, False, 0))
        found.append(body.local_head[0].weight.detach().clone())
        assert list(body.memory.archive) == [1]
    assert all(not torch.equal(a, b) for n, a in enumerate(found) for b in found[:n])


def test_who_catches_up_has_one_head_for_all_it_missed(make: Make, long_data: FederatedDataModule) -> None:
    body = restore_client(make(client=client(), server=server(), data=long_data), 0)
    assert logits_of(body, 1, 1)[:, classes_of(body, 1)].isfinite().all()  # absent so far
    fit(body, 2, 1)
    assert body.memory.archive == {}
    assert set(body.owner[classes_of(body, 1) + classes_of(body, 2)].tolist()) == {2}
    fit(body, 3, 2)
    assert list(body.memory.archive) == [2]
    assert set(body.owner[classes_of(body, 3)].tolist()) == {3}
    with torch.no_grad():
        before = logits_of(body, 1, 3)
        body.memory.archive[2]["2.bias"] += 1.0
        moved = logits_of(body, 1, 3) - before
    old = classes_of(body, 1) + classes_of(body, 2)
    torch.testing.assert_close(moved[:, old], torch.ones_like(moved[:, old]))
    assert not moved[:, classes_of(body, 3)].any()


def test_a_state_is_all_there_is(body: Any) -> None:
    fit(body, 1, 1)
    fit(body, 2, 2)
    state, before = copy_of(body.state()), logits_of(body, 1, 2)
    assert {name.split(".")[2] for name in state if name.startswith("memory.archive.")} == {"1"}
    fresh = body.initial_state(1)
    assert not [name for name in fresh if name.startswith("memory.archive.")]
    body.load(fresh)
    assert body.memory.archive == {}
    assert not body.owner.any()
    assert not torch.equal(logits_of(body, 1, 2), before)
    body.load(state)
    assert same(body.state(), state)
    assert torch.equal(logits_of(body, 1, 2), before)


def test_resumption_after_every_round_changes_nothing(
    tmp_path: Path, make: Make, data: FederatedDataModule, vit: FrozenViT
) -> None:
    whole = run(make(client=client(), server=server(), rounds=1, clients_per_round=2))
    results = []
    for _ in range(2):
        federation = make_federation(tmp_path / "one", data, vit, client(), server(), rounds=1, clients_per_round=2)
        result = next(federation.run(Recorder()))
        results.append(result)
    assert outcome(results) == outcome(whole)
    assert all(set(result.server) == {"fusion_before", "fusion_after", "head"} for result in whole)
    assert all(result.accuracy["seen"] == result.accuracy["none"] for result in whole)
    assert [result.skipped for result in whole] == [{}, {}]


# ---- fusion


@given(st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_distance_is_the_sum_over_the_teachers(count: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    student, *teachers = torch.randn(count + 1, 3, 4, 5, generator=rng, dtype=torch.float64).unbind(0)
    found = distances(student, *consensus(iter(teachers)), count)
    wanted = torch.stack([(student - teacher).square().sum(dim=(1, 2)) for teacher in teachers]).sum(0)
    torch.testing.assert_close(found, wanted)
    equal = distances(student, *consensus([student.clone() for _ in range(count)]), count)
    assert torch.equal(equal, torch.zeros(3, dtype=torch.float64))


class Fused:
    """A server with surrogates, and uploads for it."""

    def __init__(self, vit: FrozenViT, data: FederatedDataModule, trainer: Callable[[], Trainer], **changes: Any):
        self.vit, self.trainer = vit, trainer
        self.server = server(**changes)
        self.body = assembled(vit)
        self.server.begin(self.body.upload_schema(), self.body.download_schema(), lambda: assembled(vit))
        if self.server.server_images:
            self.server.hold(*data.server_images(self.server.server_images))

    def uploads(self, *indices: int, spread: float = 0.3) -> dict[int, Upload]:
        """Different tensors and numbers of samples, from each client."""
        start, found = copy_of(self.body.shared()), {}
        for index in indices:
            rng = torch.Generator().manual_seed(index)
            moved = {n: t + spread * torch.randn(t.shape, generator=rng) for n, t in start.items()}
            found[index] = Upload(index, 1, 1, 10 + index, moved)
        return found

    def __call__(self, uploads: dict[int, Upload], number: int = 1) -> dict[str, Tensor]:
        answers, self.metrics = self.server.aggregate(uploads, Context(4, Round(1, number, False, 0), self.trainer))
        assert list(answers) == [0, 1, 2, 3]
        answer = answers[0].tensors
        assert all(same(answer, answers[index].tensors) for index in range(4))
        body = assembled(self.vit)
        body.download(Download.from_bytes(Download(0, 1, 1, 0, answer).to_bytes(), body.download_schema()))
        return dict(answer)

    def loss(self, prompt: Tensor, teachers: list[Tensor]) -> float:
        """The objective over all surrogates, image by image and teacher by teacher."""
        body, total = self.body, 0.0
        with torch.no_grad():
            for image in self.server.images:
                seen = []
                for one in (prompt, *teachers):
                    body.prompt.copy_(one)
                    seen.append(literal(body, image))
                total += sum(float((seen[0] - other).square().sum()) for other in seen[1:])
        return total / len(self.server.images)


@pytest.fixture
def fused(vit: FrozenViT, data: FederatedDataModule) -> Callable[..., Fused]:
    return lambda trainer=make_trainer, **changes: Fused(vit, data, trainer, **changes)


def test_fusion_lowers_its_loss(fused: Callable[..., Fused]) -> None:
    one = fused(epochs=4, learning_rate=0.01)
    uploads = one.uploads(0, 2, 3)
    answer = one(uploads)
    teachers = [uploads[index].tensors["prompt"] for index in (2, 3)]
    before, after = (one.loss(prompt, teachers) for prompt in (uploads[0].tensors["prompt"], answer["prompt"]))
    assert one.metrics["fusion_before"] == pytest.approx(before, rel=1e-3)
    assert one.metrics["fusion_after"] == pytest.approx(after, rel=1e-3)
    assert after < 0.8 * before


def test_the_head_learns_the_surrogates_under_the_fused_prompt(fused: Callable[..., Fused]) -> None:
    found = []
    for rate in (0.0, 0.02):
        one = fused(epochs=20, learning_rate=rate)
        body = one.body
        with torch.no_grad():
            body.prompt.mul_(0.02)  # an untrained ViT adds little to a prompt
        answer = one(one.uploads(0, 2, spread=0.0))
        body.adopt(answer)
        features = torch.stack([feature(body, image) for image in one.server.images])
        cross_entropy = float(F.cross_entropy(body.global_head(features), one.server.labels).detach())
        assert one.metrics["head"] == pytest.approx(cross_entropy, rel=1e-3)
        found.append(cross_entropy)
    assert found[1] < 0.9 * found[0]
    assert sorted(set(one.server.labels.tolist())) == list(range(8))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("count", [1, 3])
def test_identical_prompts_are_a_fixed_point(fused: Callable[..., Fused], precision: Any, count: int) -> None:
    one = fused(lambda: RoundTrainer("cpu", precision=precision), epochs=2)
    uploads = one.uploads(1, 2, 3)
    prompt = uploads[1].tensors["prompt"]
    for upload in uploads.values():
        upload.tensors["prompt"] = prompt.clone()  # type: ignore[index]
    answer = one({index: uploads[index] for index in range(1, 1 + count)})
    assert torch.equal(answer["prompt"], prompt)
    assert one.metrics["fusion_before"] == one.metrics["fusion_after"] == 0
    assert not torch.equal(answer["global_head.2.bias"], uploads[1].tensors["global_head.2.bias"])


def test_the_fusion_starts_from_the_first_prompt_and_the_mean_of_keys_and_heads(fused: Callable[..., Fused]) -> None:
    one = fused(learning_rate=0.0)
    uploads = one.uploads(3, 1, 2)
    answer = one(uploads)
    assert set(answer) == set(one.body.shared())
    assert torch.equal(answer.pop("prompt"), uploads[1].tensors["prompt"])
    for name, tensor in answer.items():
        mean = sum(upload.samples * upload.tensors[name] for upload in uploads.values()) / (11 + 12 + 13)
        torch.testing.assert_close(tensor, mean)


def test_fusion_draws_from_the_round(fused: Callable[..., Fused]) -> None:
    def answers(number: int) -> dict[str, Tensor]:
        one = fused(epochs=1)
        return one(one.uploads(0, 1), number)

    assert same(answers(1), answers(1))
    assert not torch.equal(answers(1)["prompt"], answers(2)["prompt"])


def test_client0_is_what_published_code_does(fused: Callable[..., Fused]) -> None:
    one = fused(fusion="client0")
    assert one.server.server_images == 0
    uploads = one.uploads(2, 1)
    answer = one(uploads)
    assert same(answer, {name: uploads[1].tensors[name] for name in ("prompt", "key")})
    head = copy_of(one.body.global_head.state_dict())
    one.body.download(Download(0, 1, 1, 0, answer))
    assert same(one.body.global_head.state_dict(), head)
    assert torch.equal(one.body.prompt, answer["prompt"])


def test_a_run_with_client0_needs_no_images(make: Make) -> None:
    federation = make(client=client(), server=server(fusion="client0"))
    results = run(federation)
    assert [result.skipped for result in results] == [{}, {}]
    assert all(result.server == {} for result in results)
    assert results[0].bytes_down[0] < results[0].bytes_up[0]


# ---- settings


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"length": 0}, r"model\.length is 0, must be at least 1"),
        ({"local_length": 0}, r"model\.local_length is 0, must be at least 1"),
        ({"hidden": -1}, r"model\.hidden is -1, must be at least 0"),
        ({"pull": float("nan")}, r"model\.pull is nan, must be at least 0"),
        ({"blocks": ()}, r"model\.blocks is \[\], must name blocks, counted from 0, each once"),
        ({"blocks": (1, 1)}, r"model\.blocks is \[1, 1\], must name blocks"),
        ({"blocks": (-1,)}, r"model\.blocks is \[-1\], must name blocks"),
        ({"train_mask": "seen"}, r"model\.train_mask is seen, must be task"),
        ({"continual": Replay()}, r"model\.continual is Replay, must be NoReplay"),
    ],
)
def test_a_clients_setting_out_of_range_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        client(**change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fusion": "mean"}, r"server\.fusion is mean, must be distil or client0"),
        ({"surrogates": 0}, r"server\.surrogates is 0, must be at least 1"),
        ({"epochs": 0}, r"server\.epochs is 0, must be at least 1"),
        ({"batch_size": 0}, r"server\.batch_size is 0, must be at least 1"),
        ({"learning_rate": -1.0}, r"server\.learning_rate is -1\.0, must be at least 0"),
    ],
)
def test_a_servers_setting_out_of_range_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        server(**change)


def test_the_server_refuses_clients_without_a_global_prompt(make: Make) -> None:
    with pytest.raises(ValueError, match=r"FedMGPServer, .* send 'prompt', .* the model FedMGPClient"):
        make(client=make_client(FedAvgClient, train_mask="task"), server=server())


def test_fedavg_takes_the_mean_of_prompts_and_keys_alone(make: Make, wire: Wire) -> None:
    """The server of other methods is no error; what is optional in a download stays with the client."""
    assert not [r for r in run(make(client=client(), server=FedAvg())) if r.skipped]
    assert all(set(m.tensors) == {"prompt", "key"} for m, _ in wire if isinstance(m, Download) and m.round > 0)


def test_the_model_of_a_server_has_no_data(vit: FrozenViT) -> None:
    output = assembled(vit)(pixels_of(), {})
    assert output.logits.shape == (4, 8)
    assert output.logits.isfinite().all()
