"""RegMean: least squares on the inputs of linear layers, the mean of all else, and what clients measure for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CNN, copy_of, fit, make_client, make_trainer, restore_client, run, same
from torch import Tensor, nn

from fedlscl import seeds
from fedlscl.continual import NoReplay
from fedlscl.federation.algorithm import Federation
from fedlscl.federation.trainer import RoundTrainer
from fedlscl.messages import Download, Message, TensorSpec, Upload
from fedlscl.methods.fedavg import FedAvgClient
from fedlscl.methods.regmean import RegMeanClient, RegMeanServer
from fedlscl.schedule import Round
from fedlscl.server import Context

Make = Callable[..., Federation]
INPUTS, OUTPUTS = 6, 4
CONVNEXT = {
    "name": "convnext_atto",  # with linear layers inside, whose inputs are (B, H, W, channels)
    "features": 16,
    "image_size": 32,
    "model_args": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "conv_mlp": False},
}


def client(**settings: Any) -> Any:
    own = {"continual": NoReplay(), "train_mask": "task", "buffer_size": 0}
    return make_client(RegMeanClient, **{**own, **settings})


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upload(client: int, weight: Tensor, x: Tensor, bias: float = 0.0) -> Upload:
    tensors = {"head.weight": weight, "head.bias": torch.full((OUTPUTS,), bias), "gram.head": x.mT @ x}
    return Upload(client, 1, 1, len(x), tensors)


def merged(*uploads: Upload, alpha: float = 1.0) -> dict[str, Tensor]:
    server = RegMeanServer(alpha)
    of_head = {"head.weight": TensorSpec((OUTPUTS, INPUTS)), "head.bias": TensorSpec((OUTPUTS,))}
    gram = {"gram.head": TensorSpec((INPUTS, INPUTS))}
    server.begin({**of_head, **gram}, of_head, lambda: pytest.fail("no model is wanted"))
    context = Context(3, Round(1, 1, False, 0), lambda: pytest.fail("nothing is trained"))
    answers, _ = server.aggregate({one.client: one for one in uploads}, context)
    assert list(answers) == [0, 1, 2]
    assert all(answer.tensors is answers[0].tensors for answer in answers.values())
    assert set(answers[0].tensors) == set(of_head)
    assert answers[0].tensors["head.weight"].dtype == torch.float32
    return dict(answers[0].tensors)


# ---- merging


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("images", [3, 20])  # fewer than there are inputs, and more
def test_one_client_gets_its_own_weights_back(alpha: float, images: int) -> None:
    weight = normal(0, OUTPUTS, INPUTS)
    found = merged(upload(0, weight, normal(1, images, INPUTS), bias=0.5), alpha=alpha)
    assert torch.equal(found["head.weight"], weight)
    assert torch.equal(found["head.bias"], torch.full((OUTPUTS,), 0.5))


def test_clients_with_orthogonal_inputs_keep_their_answers() -> None:
    turn = torch.linalg.qr(normal(2, INPUTS, INPUTS)).Q
    xs = normal(3, 10, 2) @ turn[:2], normal(4, 30, 3) @ turn[2:5]
    weights = normal(5, OUTPUTS, INPUTS), normal(6, OUTPUTS, INPUTS)
    found = merged(*(upload(i, w, x) for i, (w, x) in enumerate(zip(weights, xs, strict=True))))["head.weight"]
    for weight, x in zip(weights, xs, strict=True):
        torch.testing.assert_close(x @ found.mT, x @ weight.mT, rtol=1e-4, atol=1e-4)
    # where neither has inputs, the mean by images stays
    mean = (10 * weights[0] + 30 * weights[1]) / 40
    torch.testing.assert_close(found @ turn[5], mean @ turn[5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clients", [2, 3])
def test_the_merge_is_a_least_squares_solution(clients: int) -> None:
    xs = [(1 + i) * normal(10 + i, 12 + i, INPUTS) for i in range(clients)]
    weights = [normal(20 + i, OUTPUTS, INPUTS) for i in range(clients)]
    found = merged(*(upload(i, w, x) for i, (w, x) in enumerate(zip(weights, xs, strict=True))))["head.weight"]
    wanted = torch.cat([x @ w.mT for x, w in zip(xs, weights, strict=True)]).double()
    solution = torch.linalg.lstsq(torch.cat(xs).double(), wanted).solution.mT
    torch.testing.assert_close(found.double(), solution, rtol=1e-4, atol=1e-4)


def test_what_lies_outside_the_diagonal_counts_by_alpha() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])

    def head(weight: Tensor) -> Tensor:
        return torch.cat([weight, torch.zeros(1, 4)], dim=1).expand(OUTPUTS, -1)

    uploads = [
        upload(i, head(w), torch.cat([z, torch.zeros(len(z), 4)], 1)) for i, w, z in ((0, one, x), (1, other, y))
    ]
    # G' = [[1, a], [a, 1]] and diag(4, 1); W G' summed is [1, a] + [0, 2] for the sum [[5, a], [a, 2]]
    for alpha in (0.0, 0.5, 1.0):
        determinant = 10 - alpha**2
        wanted = [(2 - alpha * (2 + alpha)) / determinant, (5 * (2 + alpha) - alpha) / determinant, 0, 0, 0, 0]
        assert merged(*uploads, alpha=alpha)["head.weight"][0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_few_images_do_not_blow_up_what_is_rounding() -> None:
    """Gram matrices of rank 4 in 6 dimensions that float32 has rounded: what is beyond them is the mean."""
    for seed in range(20):
        xs = 100 * normal(seed, 2, INPUTS), normal(seed + 100, 2, INPUTS)
        weights = normal(seed + 200, OUTPUTS, INPUTS), normal(seed + 300, OUTPUTS, INPUTS)
        found = merged(*(upload(i, w, x) for i, (w, x) in enumerate(zip(weights, xs, strict=True))))["head.weight"]
        assert float(found.abs().max()) < 20


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_impossible_alpha_is_named(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"server\.alpha is .*, must be between 0 and 1"):
        RegMeanServer(alpha)


def test_clients_without_gram_matrices_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"RegMeanServer, .* send 'gram', .* the model RegMeanClient"):
        make(client=make_client(FedAvgClient, train_mask="task"), server=RegMeanServer())


# ---- what a client measures


def measured(body: Any) -> dict[str, Tensor]:
    """The sums of x x^T over all inputs of linear layers in one pass over the current images, by hooks."""
    heard: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda m, i, o, name=name: heard.__setitem__(name, i[0].double().reshape(-1, m.in_features))
        )
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear)
    ]
    body.eval()
    with torch.no_grad():
        body(body.data.batch("train", body.current)[0], {})
    for handle in handles:
        handle.remove()
    return {name: x.mT @ x for name, x in heard.items()}


@pytest.mark.parametrize(("cnn", "layers"), [(CNN, 2), (CONVNEXT, 10)])
def test_a_client_sends_the_sums_over_all_inputs_of_its_linear_layers(make: Make, cnn: Any, layers: int) -> None:
    body = restore_client(make(client=client(evaluation_batch_size=5), server=RegMeanServer(), cnn=cnn), 0)
    fit(body, 1, 1)
    assert len(body.current) > 5
    wanted, sent = measured(body), body.upload().tensors
    assert len(wanted) == layers
    assert {"head", "cnn.project"} <= set(wanted)
    for name, gram in wanted.items():
        torch.testing.assert_close(sent[f"gram.{name}"].double(), gram, rtol=1e-3, atol=1e-3)
    assert not any(module._forward_pre_hooks for module in body.modules())
    Upload.from_bytes(body.upload().to_bytes(), body.upload_schema())


class Idle(RegMeanClient):
    """Has a linear layer that no image reaches."""

    def build(self, *args: Any) -> None:
        super().build(*args)
        self.idle = nn.Linear(3, 2)


def test_a_layer_that_is_not_called_is_averaged(make: Make) -> None:
    kind = make_client(Idle, continual=NoReplay(), train_mask="task", buffer_size=0)
    federation = make(client=kind, server=RegMeanServer())
    before = copy_of(restore_client(federation, 0).idle.state_dict())
    assert run(federation)[-1].skipped == {}
    assert same(copy_of(restore_client(federation, 1).idle.state_dict()), before)


def test_mixed_precision_measures_about_the_same(make: Make) -> None:
    grams = []
    for trainer in (make_trainer(), RoundTrainer("cpu", precision="bf16-mixed")):
        body = restore_client(make(client=client(), server=RegMeanServer()), 0)
        body.begin_round(Round(1, 1, False, 0))
        with seeds.seeded(0):
            trainer.fit(body)
        grams.append(body.grams)
    for name, gram in grams[0].items():
        assert grams[1][name].dtype == torch.float32
        torch.testing.assert_close(grams[1][name], gram, rtol=0.1, atol=0.05 * float(gram.abs().max()))


# ---- the federation


def test_after_a_round_all_clients_have_the_merged_model(make: Make, wire: list[tuple[Message, bytes]]) -> None:
    federation = make(client=client(), server=RegMeanServer(0.9), rounds=2, clients_per_round=2)
    for result in federation.run():
        sent = [m for m, _ in wire if isinstance(m, Upload) and m.round == result.round]
        assert len(sent) == 2
        answer = next(m.tensors for m, _ in wire if isinstance(m, Download) and m.round == result.round)
        assert not any(name.startswith("gram.") for name in answer)
        shares = torch.tensor([float(m.samples) for m in sent]) / sum(m.samples for m in sent)
        for name, tensor in answer.items():
            values = torch.stack([m.tensors[name].double() for m in sent])
            if f"gram.{name.removesuffix('.weight')}" in sent[0].tensors:
                grams = [m.tensors[f"gram.{name.removesuffix('.weight')}"].double() for m in sent]
                grams = [0.9 * gram + 0.1 * gram.diag().diag() for gram in grams]
                total = torch.stack([w @ g for w, g in zip(values, grams, strict=True)]).sum(0)
                wanted = total @ torch.linalg.inv(torch.stack(grams).sum(0))
                torch.testing.assert_close(tensor.double(), wanted, rtol=1e-3, atol=1e-3)
                mean = torch.einsum("i,i...->...", shares.double(), values)
                assert not torch.allclose(tensor.double(), mean, atol=1e-4)
            elif tensor.is_floating_point():
                wanted = torch.einsum("i,i...->...", shares.double(), values)
                torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)
        assert all(same(copy_of(restore_client(federation, index).shared()), dict(answer)) for index in range(3))
