"""LoRM: least-squares merging of factors, whose turn it is, what is deployed, and the Gram matrices behind it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    CNN,
    VIT,
    Recorder,
    copy_of,
    fit,
    make_client,
    make_data,
    make_federation,
    make_trainer,
    outcome,
    output_of,
    restore_client,
    run,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlscl import seeds
from fedlscl.continual import NoReplay, Replay
from fedlscl.data.module import FederatedDataModule
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Download, Message, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.lorm.client import LAYERS, LoRMClient, initial, joined
from fedlscl.methods.lorm.merging import divided, merge, projected, shrunk
from fedlscl.methods.lorm.server import LoRMServer
from fedlscl.methods.lwf import LwF
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT
from fedlscl.schedule import Round
from fedlscl.server import Context, FedAvg

Make = Callable[..., Federation]
Wire = list[tuple[Message, bytes]]
SEEDS = st.integers(0, 2**31)
INPUTS, RANK, OUTPUTS = 7, 3, 5


def client(**changes: Any) -> Any:
    return make_client(LoRMClient, **{"continual": NoReplay(), "train_mask": "task", "rank": 2, **changes})


@pytest.fixture
def body(make: Make) -> Any:
    return restore_client(make(client=client(), server=LoRMServer()), 0)


# ---- merging


def drawn(seed: int, clients: int, rows: int = 20) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Each client's B (out, r) and A (r, in), a common A, and each client's inputs (rows, in)."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    scales = (1 + torch.arange(clients)).double()  # of very different weight
    return (
        [normal(OUTPUTS, RANK) for _ in range(clients)],
        [normal(RANK, INPUTS) for _ in range(clients)],
        normal(RANK, INPUTS),
        [scale * normal(rows, INPUTS) for scale in scales],
    )


def merged(factors: list[Tensor], grams: list[Tensor]) -> Tensor:
    return merge({"x": pair} for pair in zip(factors, grams, strict=True))["x"]


def gram(x: Tensor) -> Tensor:
    return x.mT @ x


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_one_client_keeps_its_factor(seed: int) -> None:
    (b,), (own,), a, (x,) = drawn(seed, 1)
    for g in (gram(x), gram(x).diag()):
        assert_close(merged([b], [projected(a, g)]), b)
        assert_close(merged([own], [g]), own)


def test_with_few_inputs_b_is_kept_and_a_is_not() -> None:
    (b,), (own,), a, (x,) = drawn(0, 1, rows=RANK + 1)  # G of rank 4 in 7 dimensions
    assert_close(merged([b], [projected(a, gram(x))]), b)
    found = merged([own], [gram(x)])
    assert_close(found, own @ torch.linalg.pinv(x) @ x)  # what A does to the inputs that there were
    assert float((found - own).abs().max()) > 0.1
    few = x[: RANK - 1]  # not even A G A^T is invertible
    assert float((merged([b], [projected(a, gram(few))]) - b).abs().max()) > 0.1


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_identical_clients_change_nothing_and_equal_inputs_give_the_mean(seed: int, clients: int) -> None:
    b, own, a, x = drawn(seed, clients)
    for take in (gram, lambda x: gram(x).diag()):
        grams = [take(one) for one in x]
        assert_close(merged([b[0]] * clients, [projected(a, g) for g in grams]), b[0])
        assert_close(merged([own[0]] * clients, grams), own[0])
        assert_close(merged(b, [projected(a, grams[0])] * clients), torch.stack(b).mean(0))
        assert_close(merged(own, grams[:1] * clients), torch.stack(own).mean(0))


def test_with_diagonals_each_column_is_a_weighted_mean() -> None:
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 6.0, 7.0]])
    found = merged([one, other], [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])])
    assert found.tolist() == [[4.0, 6.0, 0.0]]  # the last input was always zero
    assert found.dtype == torch.float32


def test_a_diagonal_is_the_matrix_that_has_it() -> None:
    b, own, a, x = drawn(3, 3)
    diagonals = [gram(one).diag() for one in x]
    assert_close(
        merged(b, [projected(a, g) for g in diagonals]), merged(b, [projected(a, g.diag()) for g in diagonals])
    )
    assert_close(merged(own, diagonals), merged(own, [g.diag() for g in diagonals]))


def test_blocks_are_merged_each_by_itself() -> None:
    (b, own, a, x), (b2, own2, a2, x2) = drawn(1, 2), drawn(2, 2)
    both = torch.stack([a, a2])
    for take in (gram, lambda x: gram(x).diag()):
        grams = [torch.stack([take(p), take(q)]) for p, q in zip(x, x2, strict=True)]
        found = merged([torch.stack(p) for p in zip(b, b2, strict=True)], [projected(both, g) for g in grams])
        assert_close(found[0], merged(b, [projected(a, take(one)) for one in x]))
        assert_close(found[1], merged(b2, [projected(a2, take(one)) for one in x2]))
        found = merged([torch.stack(p) for p in zip(own, own2, strict=True)], grams)
        assert_close(found[1], merged(own2, [take(one) for one in x2]))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_the_outputs_change_least(seed: int, clients: int) -> None:
    b, own, a, x = drawn(seed, clients)
    rng = torch.Generator().manual_seed(seed + 1)
    for factors, seen, grams in (
        (b, [one @ a.mT for one in x], [projected(a, gram(one)) for one in x]),
        (own, x, [gram(one) for one in x]),
    ):

        def change(
            common: Tensor, factors: list[Tensor] = factors, seen: list[Tensor] = seen
        ) -> float:  # sum over clients of ||(X - X_i) x||^2
            terms = [((common - one) @ inputs.mT).square().sum() for one, inputs in zip(factors, seen, strict=True)]
            return float(torch.stack(terms).sum())

        found = merged(factors, grams)
        wanted = torch.cat([inputs @ one.mT for one, inputs in zip(factors, seen, strict=True)])
        assert_close(found, torch.linalg.lstsq(torch.cat(seen), wanted).solution.mT)
        for size in (1e-3, 0.1, 10):
            nearby = found + size * torch.randn(found.shape, generator=rng, dtype=found.dtype)
            assert change(nearby) > change(found)


def test_one_task_deploys_what_it_has_learned() -> None:
    (b,), (a,), _, (x,) = drawn(5, 1)
    assert_close(merged([b @ a], [gram(x)]), b @ a)
    found = joined(a[None, None], b[None, None], torch.ones(1, 1, INPUTS, dtype=torch.float64))
    assert_close((found.b @ found.a)[0], b @ a)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_the_joined_tasks_are_their_merged_products(seed: int, tasks: int) -> None:
    b, a, _, x = drawn(seed, tasks)
    g = [gram(one).diag() for one in x]
    for diagonal in g:
        diagonal[2] = 0  # an input that was always zero
    stacked = torch.stack(g)[:, None]
    found = joined(torch.stack(a)[:, None], torch.stack(b)[:, None], divided(stacked, stacked.sum(0)))
    assert found.a.shape == (1, tasks * RANK, INPUTS)
    products = [one @ other for one, other in zip(b, a, strict=True)]
    assert_close((found.b @ found.a)[0], merged(products, g))


def released(uploads: list[Upload], which: str, a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the released code makes of these uploads (aimagelab/fed-mammoth, `_models/lorm.py`, `end_round_server`).

    Its formulas written anew, as it computes them with its published settings: dense matrices in float64, each client's
    product formed first, `pinverse` for the factors and `inverse` for the head, rounded to float32; biases in float32.
    """
    sent = [upload.tensors for upload in uploads]
    merged = {}
    for layer in LAYERS:
        blocks = []
        for n in range(len(a[layer])):
            grams = [one[f"gram.{layer}"][n].diag().double() for one in sent]
            own = [one[f"{which}.{layer}"][n].double() for one in sent]
            total = torch.stack(grams).sum(0)
            if which == "b":
                common = a[layer][n].double()
                products = torch.stack([(b @ common) @ gram for b, gram in zip(own, grams, strict=True)]).sum(0)
                blocks.append(products @ common.T @ torch.pinverse(common @ total @ common.T))
            else:
                products = torch.stack([x @ gram for x, gram in zip(own, grams, strict=True)]).sum(0)
                blocks.append(products @ torch.pinverse(total))
        merged[f"merged.{which}.{layer}"] = torch.stack(blocks).float()
    eye = torch.eye(len(sent[0]["gram.head"]))
    heads = [(0.5 * one["gram.head"] + (1 - 0.5) * eye * one["gram.head"]).double() for one in sent]
    weights = torch.stack([one["head.weight"].double() @ gram for one, gram in zip(sent, heads, strict=True)]).sum(0)
    merged["merged.head.weight"] = (weights @ torch.inverse(torch.stack(heads).sum(0))).float()
    shares = [upload.samples / sum(other.samples for other in uploads) for upload in uploads]
    biases = [one["head.bias"] * share for one, share in zip(sent, shares, strict=True)]
    merged["merged.head.bias"] = torch.stack(biases).sum(0)
    return merged


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_merge_is_that_of_the_released_code_to_the_last_bit(body: Any, rounds: int) -> None:
    """Of float32, in which both hand out what they compute in float64; biases, there in float32, to about its last."""
    rng, server = torch.Generator().manual_seed(0), LoRMServer()
    schema = body.upload_schema()
    server.begin(schema, body.download_schema(), lambda: body)
    for number in range(1, rounds + 1):
        which = "b" if number == 1 else "a"
        uploads = []
        for index, samples in enumerate((3, 50, 7)):
            tensors = {}
            for name, spec in schema.items():
                if not name.startswith("b." if which == "a" else "a."):
                    drawn = torch.randn(*((80,) if name.startswith("gram.") else ()), *spec.shape, generator=rng)
                    tensors[name] = drawn.square().sum(0) * (index + 1) if name.startswith("gram.") else drawn
            inputs = torch.randn(80, body.head.in_features, generator=rng)
            tensors["gram.head"] = inputs.T @ inputs
            uploads.append(Upload(index, 1, number, samples, tensors))
        a = {layer: tensor.clone() for layer, tensor in server.a.items()}
        answers, _ = server.aggregate(dict(enumerate(uploads)), Context(3, Round(1, number, False, 0), make_trainer))
    found, wanted = answers[0].tensors, released(uploads, which, a)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        if name == "merged.head.bias":
            torch.testing.assert_close(found[name], tensor, rtol=2**-22, atol=2**-24)
        else:
            assert torch.equal(found[name], tensor), (name, (found[name] - tensor).abs().max())


def test_what_is_deployed_is_what_the_released_code_deploys() -> None:
    """W_0 + (sum B A G) (sum G)^+ over tasks (`end_task_server`), there as one dense matrix in float32."""
    a, b = torch.randn(4, RANK, INPUTS, generator=rng_of(1)), torch.randn(4, OUTPUTS, RANK, generator=rng_of(2))
    grams = torch.randn(4, INPUTS, generator=rng_of(3)).square()
    products = sum(b[n] @ a[n] @ grams[n].diag() for n in range(4))
    wanted = products @ torch.pinverse(grams.sum(0).diag())
    pair = joined(a[:, None], b[:, None], divided(grams[:, None], grams.sum(0)))
    torch.testing.assert_close(pair.b[0] @ pair.a[0], wanted, rtol=1e-5, atol=1e-6)


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_alpha_leaves_the_diagonal_alone() -> None:
    found = shrunk(torch.tensor([[4.0, 2.0], [2.0, 8.0]]), 0.25)
    assert found.tolist() == [[4.0, 0.5], [0.5, 8.0]]


# ---- factors


def test_a_is_drawn_alike_everywhere_and_anew_in_each_task(vit: FrozenViT) -> None:
    with seeds.seeded(1):
        one = initial((6, 20, 50), 7, 1, "attn.qkv")
    other = initial((6, 20, 50), 7, 1, "attn.qkv")
    assert torch.equal(one, other)
    bound = 1 / math.sqrt(50)
    assert 0.99 * bound < float(one.max()) <= bound
    assert -bound <= float(one.min()) < -0.99 * bound
    assert float(one.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for changed in ((8, 1, "attn.qkv"), (7, 2, "attn.qkv"), (7, 1, "mlp.fc1")):
        assert not torch.equal(one, initial((6, 20, 50), *changed))


def test_the_start_is_the_frozen_vit(body: Any, vit: FrozenViT) -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for training in (True, False):
        body.train(training)
        assert torch.equal(output_of(body, images).representation, vit(images))


def kept_of_a_task(body: Any) -> dict[str, Tensor]:
    """Shaped as what is kept of a finished task, by name."""
    factors = {name: t for name, t in body.shared().items() if name.startswith(("a.", "b."))}
    return {**factors, **{f"gram.{layer}": factors[f"a.{layer}"][:, 0] for layer in LAYERS}}


def pretend(body: Any, tasks: int) -> None:
    """Factors of the current task and of so many before it, as if they had been learned."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*body.a, *body.b]:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    body.memory.archive.clear()
    for name, like in kept_of_a_task(body).items():
        random = torch.randn(tasks, *like.shape, generator=rng)
        for task, tensor in enumerate(random.square() if name.startswith("gram.") else 0.3 * random, 1):
            body.memory.archive.setdefault(task, {})[name] = tensor


def dense(vit: FrozenViT, change: Callable[[str, int], Tensor]) -> FrozenViT:
    """A ViT with other weights in each layer of each block."""
    other = copy.deepcopy(vit)
    for layer in LAYERS:
        for number, block in enumerate(other.vit.blocks):
            block.get_submodule(layer).weight.add_(change(layer, number))
    return other


def product(body: Any, layer: str, block: int) -> Tensor:
    """B A of the current task."""
    place = LAYERS.index(layer)
    result: Tensor = (body.b[place][block] @ body.a[place][block]).detach()
    return result


def earlier(body: Any, layer: str, block: int) -> list[Tensor]:
    """B A of the tasks before."""
    return [one[f"b.{layer}"][block] @ one[f"a.{layer}"][block] for one in body.memory.archive.values()]


def between_rounds(body: Any, layer: str, block: int) -> Tensor:
    return torch.stack([*earlier(body, layer, block), product(body, layer, block)]).mean(0)


def test_training_knows_the_current_task_alone(body: Any, vit: FrozenViT) -> None:
    pretend(body, 2)
    body.train()
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    wanted = dense(vit, lambda *place: product(body, *place))(images)
    for body.merges in (0, 1):
        output = output_of(body, images)
        torch.testing.assert_close(output.representation, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits, body.head(output.representation))
    assert float((wanted - vit(images)).abs().max()) > 0.1


def test_between_the_rounds_all_tasks_count_alike(body: Any, vit: FrozenViT) -> None:
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    body.eval()
    for tasks in (0, 2):
        pretend(body, tasks)
        body.merges = 1
        wanted = dense(vit, lambda *place: between_rounds(body, *place))(images)
        torch.testing.assert_close(output_of(body, images).representation, wanted, rtol=1e-4, atol=1e-4)


def test_finished_tasks_count_by_their_inputs(body: Any, vit: FrozenViT) -> None:
    pretend(body, 3)
    body.eval()
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)

    def change(layer: str, block: int) -> Tensor:
        grams = [one[f"gram.{layer}"][block].diag() for one in body.memory.archive.values()]
        u = torch.stack([delta @ g for delta, g in zip(earlier(body, layer, block), grams, strict=True)]).sum(0)
        return u @ torch.linalg.inv(torch.stack(grams).sum(0))

    torch.testing.assert_close(output_of(body, images).representation, dense(vit, change)(images), rtol=1e-4, atol=1e-4)


def features_of(body: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        representation: Tensor = output_of(body, images).representation
    return representation


def test_without_gradients_products_are_merged_once_and_never_stale(
    body: Any, vit: FrozenViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, before = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8), copy_of(vit.state_dict())
    merges: list[int] = []
    merged = FrozenViT.merged

    def counting(self: FrozenViT, pairs: Any) -> Any:
        merges.append(len(pairs))
        return merged(self, pairs)

    monkeypatch.setattr(FrozenViT, "merged", counting)
    pretend(body, 3)
    state, wanted = body.state(), {}
    for body.merges in (0, 1):
        body.eval()
        wanted[body.merges] = output_of(body, images).representation.detach()  # with gradients: products apart
        assert merges == []
        for _ in range(2):
            torch.testing.assert_close(features_of(body, images), wanted[body.merges], rtol=1e-4, atol=1e-4)
        assert merges == [len(LAYERS) * vit.depth]
        merges.clear()
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.01

    body.load(state)  # another client, or another state: with merges 0
    torch.testing.assert_close(features_of(body, images), wanted[0], rtol=1e-4, atol=1e-4)
    body.train()
    trained = features_of(body, images)  # with the current task's factors alone
    assert float((trained - wanted[0]).abs().max()) > 0.01
    assert len(merges) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_a_measurement_and_a_test_leave_no_copies_behind(make: Make) -> None:
    body = restore_client(make(client=client(), server=LoRMServer()), 0)
    fit(body, 1, 1)  # its end is a measurement
    assert body._merged == ()
    body.begin_evaluation(1)
    make_trainer().test(body, verbose=False)
    assert body._merged == ()
    assert float(body.accuracy.tested.sum()) > 0


def test_operations_are_those_of_a_head_on_a_vit(make: Make) -> None:
    """What is merged costs a test image nothing, however many tasks there were."""
    federation = make(client=client(rank=8), server=LoRMServer())
    run(federation)
    (counts,) = federation.cost().values()
    classes = federation.template.data.num_classes
    block = 5 * 32 * 96 + 2 * (2 * 5 * 5 * 16) + 5 * 32 * 32 + 2 * (5 * 32 * 128)
    last = 3 * 32 * 32 + 2 * (2 * 5 * 32) + 32 * 32 + 2 * (32 * 128)  # of the class token alone
    assert counts["flops"] == 2 * (block + last + 32 * classes)
    assert counts["flops_frozen"] == 2 * (4 * 32 * 192)


# ---- a round


def test_only_the_factor_whose_turn_it_is_moves(make: Make) -> None:
    body = restore_client(make(client=client(), server=LoRMServer()), 0)
    pretend(body, 0)
    for number, moving in ((1, "b"), (2, "a"), (3, "b")):
        before = copy_of(body.shared())
        fit(body, 1, number)
        for name, tensor in body.shared().items():
            moved = not torch.equal(tensor, before[name])
            assert moved == name.startswith((f"{moving}.", "head.")), name
        sent = body.upload().tensors
        assert {name[0] for name in sent if name[:2] in ("a.", "b.")} == {moving}
        body.merges += 1


def test_the_factors_may_have_rates_of_their_own(make: Make) -> None:
    for own, wanted in (
        ({}, [0.5, 0.5, 0.5]),
        ({"a_learning_rate": 0.0}, [0.0, 0.5, 0.5]),
        ({"a_learning_rate": 0.02, "b_learning_rate": 0.0}, [0.02, 0.0, 0.5]),
    ):
        body = restore_client(make(client=client(learning_rate=0.5, **own), server=LoRMServer()), 0)
        groups = body.configure_optimizers().param_groups
        assert [group["lr"] for group in groups] == wanted
        parts = [[*body.a], [*body.b], [body.head.weight, body.head.bias]]
        assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in part] for part in parts]
    pretend(body, 0)  # with a B of zero A would have no gradient
    for number, still in ((1, True), (2, False)):  # B does not move, A does
        before = copy_of(body.shared())
        fit(body, 1, number)
        factors = {n: tensor for n, tensor in body.shared().items() if n[:2] in ("a.", "b.")}
        assert all(torch.equal(tensor, before[n]) for n, tensor in factors.items()) == still
        assert not torch.equal(body.head.weight, before["head.weight"])
        body.merges += 1


def test_the_published_settings_are_what_the_released_commands_give() -> None:
    path = Path(__file__).parent.parent / "experiments" / "methods" / "lorm_published.yaml"
    settings = yaml.safe_load(path.read_text())
    made = LoRMClient(**{**settings["model"]["init_args"], "continual": NoReplay()})
    assert (made.rank, made.learning_rate, [*made.rates.values()]) == (1, 0.003, [None, None])
    assert (made.epochs, made.batch_size, settings["server"]["init_args"]) == (5, 16, {"alpha": 0.5})


def measured(body: Any, vit: FrozenViT, indices: Tensor) -> dict[str, Tensor]:
    """The Gram matrices of some images, by hooks on a ViT that has the deployed weights."""
    other, grams = dense(vit, lambda *place: between_rounds(body, *place)), {}
    heard: dict[tuple[str, int], Tensor] = {}
    for layer in LAYERS:
        for number, block in enumerate(other.vit.blocks):
            block.get_submodule(layer).register_forward_pre_hook(
                lambda _, inputs, key=(layer, number): heard.__setitem__(key, inputs[0].double())
            )
    images = other.prepare(body.data.batch("train", indices)[0])
    features = other.encode(other.lower(images, 0), 0)[:, 0].double()  # all tokens are heard, in the last block too
    for layer in LAYERS:
        tokens = [heard[layer, number].flatten(0, 1) for number in range(other.depth)]
        grams[f"gram.{layer}"] = torch.stack([(x.mT @ x).diag() for x in tokens]).float()
    return {**grams, "gram.head": (features.mT @ features).float()}


def test_the_gram_matrices_are_sums_over_all_tokens_under_the_trained_weights(make: Make, vit: FrozenViT) -> None:
    body = restore_client(make(client=client(evaluation_batch_size=5, rank=3), server=LoRMServer()), 1)
    pretend(body, 2)
    fit(body, 1, 1)
    assert len(body.current) > 5
    wanted = measured(body, vit, body.current)
    sent = body.upload().tensors
    for name, tensor in wanted.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-3, atol=1e-3)
    hooks = [m for m in vit.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []


def test_mixed_precision_measures_about_the_same(make: Make) -> None:
    grams = []
    for trainer in (make_trainer(), RoundTrainer("cpu", precision="bf16-mixed")):
        body = restore_client(make(client=client(), server=LoRMServer()), 0)
        body.begin_round(Round(1, 1, False, 0))
        with seeds.seeded(0):
            trainer.fit(body)
        grams.append(body.grams)
    for name, tensor in grams[0].items():
        assert tensor.dtype == grams[1][name].dtype == torch.float32
        torch.testing.assert_close(grams[1][name], tensor, rtol=0.1, atol=0.02 * float(tensor.abs().max()))
    head = grams[1]["gram.head"]  # the product is no half-precision one
    assert not torch.equal(head, head.bfloat16().float())


# ---- the federation


def by_hand(uploads: Mapping[int, Upload], which: str, a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The formulas of the merge, map by map with dense matrices."""
    sent = [{name: t.double() for name, t in upload.tensors.items()} for upload in uploads.values()]
    result = {}
    for layer in LAYERS:
        blocks = []
        for n in range(len(sent[0][f"gram.{layer}"])):
            g, x = [one[f"gram.{layer}"][n].diag() for one in sent], [one[f"{which}.{layer}"][n] for one in sent]
            total = torch.stack(g).sum(0)
            if which == "b":
                common = a[layer][n].double()
                right = torch.linalg.inv(common @ total @ common.T)
                blocks.append(sum(b @ common @ one for b, one in zip(x, g, strict=True)) @ common.T @ right)
            else:
                blocks.append(sum(own @ one for own, one in zip(x, g, strict=True)) @ torch.linalg.inv(total))
        result[f"merged.{which}.{layer}"] = torch.stack(blocks)
    h = [(one["gram.head"] + one["gram.head"].diag().diag()) / 2 for one in sent]
    total = sum(one["head.weight"] @ g for one, g in zip(sent, h, strict=True))
    result["merged.head.weight"] = total @ torch.linalg.inv(torch.stack(h).sum(0))
    samples = torch.tensor([float(upload.samples) for upload in uploads.values()], dtype=torch.float64)
    result["merged.head.bias"] = torch.stack([one["head.bias"] for one in sent]).T @ (samples / samples.sum())
    return result


def test_turns_merges_and_tasks_in_a_federation_with_absent_clients(make: Make, wire: Wire, vit: FrozenViT) -> None:
    federation = make(client=client(), server=LoRMServer(), rounds=3, clients_per_round=2)
    server: Any = federation.server
    joined_late = set()
    known: set[int] = set()
    common = dict(server.a)
    for result in federation.run(Recorder()):
        which = "bab"[(result.round - 1) % 3]
        uploads = {m.client: m for m, _ in wire if isinstance(m, Upload) and m.round == result.round}
        assert len(uploads) == 2
        if which == "a":
            joined_late |= set(uploads) - known
        known |= set(uploads)
        for upload in uploads.values():
            assert {name.split(".")[0] for name in upload.tensors} == {which, "head", "gram"}
        answers = [m.tensors for m, _ in wire if isinstance(m, Download) and m.round == result.round]
        assert len(answers) == 3
        assert all(same(answers[0], other) for other in answers)
        ends = result.round % 3 == 0
        wanted = by_hand(uploads, which, common)
        for name, tensor in wanted.items():
            torch.testing.assert_close(answers[0][name].double(), tensor, rtol=1e-3, atol=1e-4)
        assert set(answers[0]) - set(wanted) == ({f"gram.{layer}" for layer in LAYERS} if ends else set())
        for name in set(answers[0]) - set(wanted):
            total = torch.stack([upload.tensors[name] for upload in uploads.values()]).sum(0)
            torch.testing.assert_close(answers[0][name], total)
        bodies = [copy_of(restore_client(federation, index).shared()) for index in range(3)]
        assert same(bodies[0], bodies[1])
        assert same(bodies[0], bodies[2])
        common = {layer: bodies[0][f"a.{layer}"] for layer in LAYERS}
        assert same(common, server.a)
        body: Any = restore_client(federation, 0)
        assert body.merges == (0 if ends else (result.round - 1) % 3 + 1)
        assert list(body.memory.archive) == list(range(1, result.round // 3 + 1))
        shapes = {name: tensor.shape for name, tensor in kept_of_a_task(body).items()}
        for one in body.memory.archive.values():
            assert {name: tensor.shape for name, tensor in one.items()} == shapes
    assert result.round == 6
    assert joined_late  # somebody was new in a round of A


def test_a_run_goes_on_in_the_middle_of_a_task(tmp_path: Path, data: FederatedDataModule, vit: FrozenViT) -> None:
    def federation(folder: str) -> Federation:
        options: dict[str, Any] = {"rounds": 4, "clients_per_round": 2}
        return make_federation(tmp_path / folder, data, vit, client(), LoRMServer(), **options)

    whole = federation("one")
    wanted = run(whole)
    first = []
    for result in federation("other").run(Recorder()):
        first.append(result)
        if result.round == 2:  # both factors have been merged once
            break
    rest = run(again := federation("other"))
    assert outcome([*first, *rest]) == outcome(wanted)
    for index in range(3):
        assert same(copy_of(restore_client(again, index).state()), restore_client(whole, index).state())


def test_a_finished_task_is_kept_and_the_next_begins_anew(make: Make, wire: Wire) -> None:
    federation = make(client=client(), server=LoRMServer(), rounds=2)
    first = copy_of(restore_client(federation, 0).shared())
    run(federation)
    body = restore_client(federation, 0)
    of_round = {m.round: m.tensors for m, _ in wire if isinstance(m, Download) and m.client == 0}
    assert list(body.memory.archive) == [1, 2]
    for layer in LAYERS:
        for task, (for_b, for_a) in {1: (1, 2), 2: (3, 4)}.items():
            kept = body.memory.archive[task]
            assert torch.equal(kept[f"b.{layer}"], of_round[for_b][f"merged.b.{layer}"])
            assert torch.equal(kept[f"a.{layer}"], of_round[for_a][f"merged.a.{layer}"])
            assert torch.equal(kept[f"gram.{layer}"], of_round[for_a][f"gram.{layer}"])
        assert not body.shared()[f"b.{layer}"].any()
        shape = body.shared()[f"a.{layer}"].shape
        assert torch.equal(first[f"a.{layer}"], initial(shape, int(body.origin), 1, layer))
        assert torch.equal(body.shared()[f"a.{layer}"], initial(shape, int(body.origin), 3, layer))
    # what is deployed does not change because another round begins
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    body.eval()
    before = output_of(body, images)
    body.begin_round(Round(2, 5, False, 0))
    body.eval()
    assert torch.equal(output_of(body, images).logits, before.logits)
    # and comes back with the state
    state = body.state()
    other = restore_client(make(client=client(), server=LoRMServer()), 0)
    other.load(state)
    other.eval()
    assert torch.equal(output_of(other, images).logits, before.logits)


def test_a_single_task_of_a_single_round(make: Make, cache: Path) -> None:
    data = make_data(cache, tasks=1, private_classes=1, public_classes=1)
    (result,) = run(make(client=client(), server=LoRMServer(), data=data))
    assert result.skipped == {}
    assert all(len(row) == 1 for row in result.accuracy["task"])


# ---- messages


def test_messages_have_the_bytes_of_the_formula() -> None:
    with torch.device("meta"):
        vit = FrozenViT("vit_base_patch16_224")
    body = client(rank=16).assemble(vit, SmallModelSpec(**CNN), "resnet18", 100)
    body.initial_state(0)
    schema = body.upload_schema()
    body.grams = {name: torch.ones(spec.shape) for name, spec in schema.items() if name.startswith("gram.")}
    body.index, body.current, server = 0, torch.arange(3), LoRMServer()
    server.begin(schema, body.download_schema(), lambda: body)
    sizes = []
    for number in (1, 2):
        body.round = Round(1, number, number == 2, 0)
        upload = body.upload()
        answers, _ = server.aggregate({0: upload}, Context(1, body.round, make_trainer))
        answer = answers[0].tensors
        sizes.append([sum(t.nbytes for t in message.values()) for message in (upload.tensors, answer)])
        body.download(Download(0, 1, number, 0, answer))
    assert sizes == [[8_233_360, 5_616_016], [7_053_712, 4_436_368 + 258_048]]
    d, depth, r, k = vit.width, vit.depth, 16, 100
    head, diagonals = 4 * (d + 1) * k, 4 * depth * 7 * d
    assert sizes[0][0] == 4 * depth * 9 * d * r + diagonals + head + 4 * d * d
    assert sizes[1][0] == 4 * depth * 7 * d * r + diagonals + head + 4 * d * d


# ---- replay


def test_replay_keeps_images_of_finished_tasks_and_trains_on_them_and_without_it_none_is_kept(make: Make) -> None:
    rows = {}
    for strategy in (Replay(passes=1, current=False), NoReplay()):
        trained = client(continual=strategy, train_mask="task", buffer_size=2, epochs=1)
        federation = make(client=trained, server=LoRMServer())
        for _ in federation.run():
            pass
        body = restore_client(federation, 0)
        body.begin_round(Round(body.memory.begun, 99, True, 0))
        old = body.data.labels(body.memory.buffer)
        phases = {phase for phase, _ in body.passes(torch.Generator())}
        if isinstance(strategy, Replay):
            first = body.data.labels(body.data.train_images(0, body.memory.learned))
            assert torch.bincount(old).tolist() == torch.bincount(first).clamp(max=2).tolist()
            assert phases == {"collaborate", "replay"}
        else:
            assert (len(old), phases) == (0, {"collaborate"})
        rows[type(strategy)] = body.head.weight.detach().clone()
    assert not torch.equal(rows[Replay], rows[NoReplay])


# ---- settings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 0}, r"model\.rank is 0, must be at least 1"),
        ({"a_learning_rate": -1.0}, r"model\.a_learning_rate is -1\.0, must be at least 0"),
        ({"b_learning_rate": math.inf}, r"model\.b_learning_rate is inf, must be finite"),
        ({"continual": LwF()}, r"model\.continual is LwF, must be NoReplay or Replay"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        client(**changes)


def test_what_does_not_fit_the_vit_or_the_method_is_named(make: Make, vit: FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"model\.rank is 33, must be between 1 and the width 32"):
        client(rank=33).assemble(vit, SmallModelSpec(**CNN), "resnet18", 4)
    other = FrozenViT(**{**VIT, "name": "vit_small_patch16_224"})
    for block in other.vit.blocks:
        block.mlp = Odd(32, 128)
    with pytest.raises(ValueError, match=r"have no linear layer mlp\.fc1"):
        client().assemble(other, SmallModelSpec(**CNN), "resnet18", 4)
    with pytest.raises(ValueError, match=r"server\.alpha is 1\.5, must be between 0 and 1"):
        LoRMServer(1.5)
    with pytest.raises(ValueError, match=r"LoRMServer, .* send 'gram', .* the model LoRMClient"):
        make(client=make_client(FedAvgClient, continual=NoReplay()), server=LoRMServer())
    with pytest.raises(ValueError, match="FedAvg averages what clients send"):
        make(client=client(), server=FedAvg())


class Odd(torch.nn.Module):
    """An MLP without the usual names."""

    def __init__(self, in_features: int, hidden_features: int, **kwargs: Any) -> None:
        super().__init__()
        self.only = torch.nn.Linear(in_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.only(x)
        return y
