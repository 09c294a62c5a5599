"""FedL2P: what an image chooses from the pool, what becomes of it, and what moves what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import copy_of, fit, make_client, output_of, parameters, restore_client, run, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Message, Upload
from fedlscl.methods.fed_l2p import FedL2PClient, chosen_similarity, prompts_of, similarities
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import FedAvg

Make = Callable[..., Federation]
SMALL = {"pool_size": 4, "length": 3, "top_k": 2}


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0, "gradient_clip": 1.0}
    return make_client(FedL2PClient, **{**own, **SMALL, **settings})


@pytest.fixture
def body(make: Make) -> Any:
    """Client 0, which has learned nothing yet."""
    return restore_client(make(client=client(), server=FedAvg()), 0)


def some_images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


# ---- the pool


def test_the_similarity_is_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    found = similarities(query, keys)
    for b in range(3):
        for m in range(4):
            wanted = (query[b] @ keys[m]) / (query[b] @ query[b]).sqrt() / (keys[m] @ keys[m]).sqrt()
            assert float(found[b, m]) == pytest.approx(float(wanted), abs=1e-6)
    torch.testing.assert_close(similarities(10 * query, 0.1 * keys), found, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarities(query, keys), found)  # a choice between close keys needs all digits


def test_the_chosen_similarity_sums_over_slots_and_averages_over_images() -> None:
    similarity = torch.tensor([[0.5, -0.25, 1.0], [0.0, 0.75, -1.0]])
    assert float(chosen_similarity(similarity, torch.tensor([[2, 0], [1, 2]]))) == (1.5 - 0.25) / 2


@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
def test_the_pull_is_bounded(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    similarity = similarities(query, keys)
    value = chosen_similarity(similarity, similarity.topk(k, dim=1).indices)
    assert abs(float(value)) <= k * (1 + 1e-6)
    assert float(chosen_similarity(similarities(keys, keys), torch.arange(6).unsqueeze(1))) == pytest.approx(1)
    assert float(chosen_similarity(similarities(-keys, keys), torch.arange(6).unsqueeze(1))) == pytest.approx(-1)


def test_chosen_prompts_stand_one_behind_another() -> None:
    pool = torch.arange(12.0).view(3, 2, 2)  # M = 3, L = 2, d = 2
    found = prompts_of(pool, torch.tensor([[2, 0], [1, 2]]))
    assert found.tolist() == [
        [[8, 9], [10, 11], [0, 1], [2, 3]],
        [[4, 5], [6, 7], [8, 9], [10, 11]],
    ]


# ---- the model


@torch.no_grad()
def reference(body: Any, image: Tensor) -> Tensor:
    """Logits (K,) of one image, written out."""
    vit: Any = body.vit.vit
    tokens = body.vit.lower(body.vit.prepare(image[None]), 0)[0]
    query = vit.norm(vit.blocks(tokens[None]))[0, 0]
    cosines = [float(query @ key / query.norm() / key.norm()) for key in body.keys]
    best = sorted(range(len(cosines)), key=lambda m: -cosines[m])[: body.top_k]
    rows = [token + vit.pos_embed[0, 0] for m in best for token in body.prompts[m]]
    entering = torch.cat([tokens[:1], torch.stack(rows), tokens[1:]])
    leaving = vit.norm(vit.blocks(entering[None]))[0]
    return body.head(sum(leaving[1 + n] for n in range(len(rows))) / len(rows))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_every_image_passes_under_the_prompts_of_its_own_choice(body: Any, training: bool) -> None:
    body.train(training)
    images = some_images(6)
    found = output_of(body, images)
    wanted = torch.stack([reference(body, image) for image in images])
    torch.testing.assert_close(found.logits, wanted, rtol=1e-4, atol=1e-5)
    chosen = body.choose(similarities(body.precompute(images)["query"], body.keys)).sort(dim=1).values
    assert len({tuple(row) for row in chosen.tolist()}) > 1  # or else the images could not differ in their choice


def test_choosing_all_makes_the_keys_irrelevant(make: Make) -> None:
    body = restore_client(make(client=client(top_k=4), server=FedAvg()), 0)
    images = some_images(6)

    def with_other_keys() -> tuple[Tensor, Tensor]:
        before = output_of(body, images).logits.detach()
        with torch.no_grad():
            body.keys.neg_()
        return before, output_of(body, images).logits.detach()

    torch.testing.assert_close(*with_other_keys(), rtol=1e-4, atol=1e-5)
    body.top_k = 2
    before, after = with_other_keys()
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_query_is_the_feature_of_the_plain_vit_whatever_is_trained(body: Any) -> None:
    images = some_images(4)
    before = body.precompute(images)
    assert torch.equal(before["query"], body.vit(images))
    fit(body, 1, 1)
    assert same(body.precompute(images), before)


def test_the_start_is_uniform(make: Make) -> None:
    body = restore_client(make(client=client(pool_size=40, length=4), server=FedAvg()), 0)
    for tensor in (body.prompts.detach(), body.keys.detach()):
        assert -1 <= float(tensor.min()) < -0.95
        assert 0.95 < float(tensor.max()) <= 1
        assert abs(float(tensor.mean())) < 0.1


# ---- the objective


def first_batch(body: Any) -> Any:
    body.begin_round(Round(1, 1, False, 0))
    body.on_train_start()
    return next(iter(body.train_dataloader()))


@torch.no_grad()
def test_the_terms_of_the_objective(make: Make) -> None:
    body = restore_client(make(client=client(pull=0.3), server=FedAvg()), 0)
    batch = first_batch(body)
    terms = body.losses(batch)
    assert set(terms) == {"cross_entropy", "pull"}
    classes = list(body.data.tasks[0].classes)
    logits, query = output_of(body, batch.images.pixels).logits, body.vit(batch.images.pixels)
    entropy = pull = 0.0
    for z, y, q in zip(logits, batch.images.labels, query, strict=True):
        entropy += float(z[classes].logsumexp(0) - z[y])
        cosines = sorted(float(q @ key / q.norm() / key.norm()) for key in body.keys)
        pull -= 0.3 * sum(cosines[-2:])
    assert float(terms["cross_entropy"]) == pytest.approx(entropy / len(logits), rel=1e-5)
    assert float(terms["pull"]) == pytest.approx(pull / len(logits), rel=1e-4)


def test_keys_are_moved_by_the_pull_and_prompts_by_the_cross_entropy(body: Any) -> None:
    batch = first_batch(body)
    terms = body.losses(batch)
    everything = dict(body.named_parameters())

    def moved_by(term: Tensor) -> set[str]:
        found = torch.autograd.grad(term, list(everything.values()), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(everything, found, strict=True) if gradient is not None}

    assert moved_by(terms["pull"]) == {"keys"}
    assert moved_by(terms["cross_entropy"]) == {"prompts", "head.weight", "head.bias"}
    chosen = set(body.choose(similarities(body.vit(batch.images.pixels[:1]), body.keys))[0].tolist())
    one = batch._replace(
        images=batch.images._replace(**{n: getattr(batch.images, n)[:1] for n in ("indices", "pixels", "labels")})
    )
    torch.stack(list(body.losses(one).values())).sum().backward()
    for tensor in (body.keys, body.prompts):
        moved = {m for m in range(4) if bool(tensor.grad[m].any())}
        assert moved == chosen


def test_without_the_pull_the_keys_stay_and_with_it_they_approach_the_queries(make: Make) -> None:
    nearness = []
    for pull in (0.0, 1.0):
        body = restore_client(make(client=client(pull=pull, epochs=4), server=FedAvg()), 0)
        before = parameters(body)
        fit(body, 1, 1)
        assert torch.equal(body.keys, before["keys"]) == (pull == 0)
        assert not torch.equal(body.prompts, before["prompts"])
        similarity = similarities(body.vit(body.data.batch("train", body.current)[0]), body.keys)
        nearness.append(float(chosen_similarity(similarity, body.choose(similarity)).detach()))
    assert nearness[1] > nearness[0] + 0.01


def test_a_step_is_clipped() -> None:
    file = Path(__file__).parent.parent / "experiments" / "methods" / "fed_l2p.yaml"
    settings = yaml.safe_load(file.read_text())["model"]["init_args"]
    assert (settings["gradient_clip"], settings["train_mask"]) == (1.0, "task")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_moves_what_is_trained_and_not_the_vit(body: Any, precision: Any) -> None:
    before, vit = parameters(body), copy_of(body.vit.state_dict())
    body.begin_round(Round(1, 1, False, 0))
    trainer = RoundTrainer("cpu", precision)
    trainer.fit(body)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in parameters(body).items())
    assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in body.state_dict().values())
    assert same(copy_of(body.vit.state_dict()), vit)
    body.begin_evaluation(1)
    trainer.test(body, verbose=False)
    assert 0 <= body.accuracy.compute()["task"][0] <= 100


# ---- what travels


@pytest.mark.parametrize(("classes", "wanted"), [(100, 491_920), (200, 799_520)])
def test_a_message_has_the_bytes_of_the_formula(classes: int, wanted: int) -> None:
    vit: Any = SimpleNamespace(width=768)
    body = FedL2PClient(continual=NoReplay()).assemble(vit, SmallModelSpec(), "resnet18", classes)
    assert sum(tensor.nbytes for tensor in body.outgoing().values()) == wanted
    assert body.upload_schema() == body.download_schema()


def test_after_a_round_all_clients_are_the_weighted_mean(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(), server=FedAvg())
    run(federation)
    last = [m for m, _ in wire if isinstance(m, Upload) and m.round == 2]
    weights = torch.tensor([float(m.samples) for m in last])
    states = [copy_of(restore_client(federation, index).state_dict()) for index in range(3)]
    assert same(states[0], states[1])
    assert same(states[0], states[2])
    assert set(states[0]) == {"prompts", "keys", "head.weight", "head.bias"}
    for name, tensor in states[0].items():
        mean = sum(w * m.tensors[name] for w, m in zip(weights, last, strict=True)) / weights.sum()
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


def test_prompts_go_into_a_vit_without_class_token() -> None:
    args = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    vit = FrozenViT("vit_base_patch16_siglip_224", image_size=16, model_args=args)
    body = client().assemble(vit, SmallModelSpec(), "resnet18", 5)
    assert vit.num_prefix_tokens == 0
    images = some_images(2)
    found = output_of(body, images)
    prompts = prompts_of(body.prompts, body.choose(similarities(vit(images), body.keys)))
    tokens = torch.cat([prompts, vit.lower(vit.prepare(images), 0)], dim=1)
    torch.testing.assert_close(found.representation, vit.encode(tokens, 0)[:, :6].mean(1))
    assert isinstance(body.head, nn.Linear)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 7, "pool_size": 5}, r"model\.top_k is 7, must be between 1 and model\.pool_size 5"),
        ({"top_k": 0}, r"model\.top_k is 0, must be between 1"),
        ({"pool_size": 0}, r"model\.pool_size is 0, must be at least 1"),
        ({"length": 0}, r"model\.length is 0, must be at least 1"),
        ({"pull": -0.1}, r"model\.pull is -0\.1, must be at least 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client(**settings)
